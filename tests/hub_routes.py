"""What a local hub answers, route by route."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from hub_repos import BIG, Content, RefusedError, Xet, git_oid, sha256

if TYPE_CHECKING:
    from hub_server import Handler


def _resolve(it: Handler, name: str, revision: str, path: str) -> None:
    sha, files = it.commit_of(name, revision)
    granted = it.hub.repos[name].granted
    if granted is not None and it.token not in granted:
        message = f"Access to model {name} is restricted and you are not in the authorized list."
        raise RefusedError(403 if it.token else 401, "GatedRepo", message)
    if path not in files:
        raise RefusedError(404, "EntryNotFound", "Entry not found")
    data = files[path]
    assert isinstance(data, bytes), "Xet holds it"
    if not path.endswith(BIG):
        it.send_file(data, **{"X-Repo-Commit": sha, "ETag": f'"{git_oid(data)}"'})
        return
    oid, port = sha256(data), it.headers["Host"].rpartition(":")[2]
    linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": sha}
    # On another host than the hub's, as it is: no token may go there.
    location = f"http://localhost:{port}/cdn/{oid}?signature={it.hub.sign()}"
    it.send(302, b"", Location=location, **linked)


def _cdn(it: Handler, oid: str) -> None:
    assert "Authorization" not in it.headers, "a token went to the CDN"
    if not it.hub.is_signed(it.query.get("signature", "")):
        raise RefusedError(403, "", "Request has expired")
    it.send_file(it.hub.big(oid), ETag='"some-etag-of-the-cdn"')


def _model(it: Handler, name: str, revision: str | None) -> None:
    sha, files = it.commit_of(name, revision or "main")
    said = {"id": name, "sha": sha, "private": it.hub.repos[name].private, "tags": []}
    siblings = [{"rfilename": path} for path in files]
    changed = "2024-02-04T12:00:00.000Z"
    it.say({**said, "_id": "1", "lastModified": changed, "downloads": 0, "siblings": siblings})


def _tree(it: Handler, name: str, revision: str, folder: str | None) -> None:
    _, files = it.commit_of(name, revision)
    start = f"{folder}/" if folder else ""
    found = [_entry(path, files[path]) for path in sorted(files) if path.startswith(start)]
    if folder and not found:
        raise RefusedError(404, "EntryNotFound", f"{folder} does not exist")
    first = int(it.query.get("cursor", 0))
    after = first + it.hub.page
    headers = {}
    if after < len(found):
        # The hub's own address, whatever mirror was asked.
        following = f"https://huggingface.co/elsewhere?recursive=true&cursor={after}"
        headers["Link"] = f'<{following}>; rel="next"'
    it.say(found[first:after], **headers)


def _paths_info(it: Handler, name: str, revision: str) -> None:
    _, files = it.commit_of(name, revision)
    asked = parse_qs(it.data.decode())["paths"]
    it.say([_entry(path, files[path]) for path in asked if path in files])


def _entry(path: str, content: Content) -> dict[str, Any]:
    if isinstance(content, Xet):
        lfs = {"oid": content.oid, "size": content.size, "pointerSize": 134}
        return {"type": "file", "path": path, "size": content.size, "oid": "0" * 40, "lfs": lfs}
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if path.endswith(BIG):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _create(it: Handler) -> None:
    it.needs_token(to_write=True)
    asked = json.loads(it.data)
    name = f"{asked['organization'] or it.hub.tokens[it.token]}/{asked['name']}"
    said = {"url": f"http://{it.headers['Host']}/{name}", "id": name}
    if name in it.hub.repos:
        it.send(409, json.dumps({"error": "You already created this model repo", **said}).encode())
        return
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    it.hub.repo(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
    it.say(said)


def _preupload(it: Handler, name: str, revision: str) -> None:
    it.may_write(name)
    _, files = it.commit_of(name, revision)

    def mode(path: str) -> dict[str, Any]:
        known = files.get(path)
        oid = None
        if known is not None:
            entry = _entry(path, known)
            oid = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        kind = "lfs" if path.endswith(BIG) else "regular"
        return {"path": path, "uploadMode": kind, "shouldIgnore": False, "oid": oid}

    it.say({"files": [mode(file["path"]) for file in json.loads(it.data)["files"]]})


def _batch(it: Handler, name: str) -> None:
    it.may_write(name)
    asked = json.loads(it.data)["objects"]

    def one(entry: dict[str, Any]) -> dict[str, Any]:
        said = {"oid": entry["oid"], "size": entry["size"]}
        if entry["oid"] in it.hub.objects:
            return said
        href = f"http://{it.headers['Host']}/lfs/{entry['oid']}"
        verify = {"href": f"{href}/verify", "header": {}}
        return {**said, "actions": {"upload": {"href": href, "header": {}}, "verify": verify}}

    kind = "application/vnd.git-lfs+json"
    it.say({"transfer": "basic", "objects": [one(o) for o in asked]}, **{"Content-Type": kind})


def _upload(it: Handler, oid: str) -> None:
    if sha256(it.data) != oid:
        raise RefusedError(400, "", "The content has another sha256")
    it.hub.objects[oid] = it.data
    it.send(200, b"")


def _verify(it: Handler, oid: str) -> None:
    if oid not in it.hub.objects:
        raise RefusedError(404, "", "No such object")
    it.say({})


def _commit(it: Handler, name: str, revision: str) -> None:
    repo = it.may_write(name)
    lines = [json.loads(line) for line in it.data.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    files: dict[str, Content | None] = {}
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            known = it.hub.objects.get(value["oid"])
            if known is None and it.hub.cas is None:
                raise RefusedError(400, "", "LFS pointer pointed to a file that does not exist")
            files[value["path"]] = known or Xet(oid=value["oid"], size=value["size"])
        elif line["key"] == "deletedFile":
            files[value["path"]] = None
    with it.hub.lock:
        if header.get("parentCommit") not in (None, repo.at(revision)):
            raise RefusedError(412, "", "A commit has happened since. Please refresh.")
        sha = repo.commit(files, revision, header["summary"])
    url = f"http://{it.headers['Host']}/{name}/commit/{sha}"
    it.say({"success": True, "commitUrl": url, "commitOid": sha})


def _xet_token(it: Handler, name: str, kind: str, revision: str) -> None:
    it.may_write(name) if kind == "write" else it.repo(name)
    if it.hub.cas is None:
        raise RefusedError(404, "", "no Xet")
    ends = int(time.time()) + 3600
    it.say({"accessToken": "xet", "exp": ends, "casUrl": f"local://{it.hub.cas}"})


def _who(it: Handler) -> None:
    it.needs_token(to_write=False)
    role = {"accessToken": {"role": "read" if it.token in it.hub.readers else "write"}}
    orgs = [{"name": name} for name in ("ours", "theirs")]
    it.say({"type": "user", "name": it.hub.tokens[it.token], "orgs": orgs, "auth": role})


def _yaml(it: Handler) -> None:
    it.say({"errors": [], "warnings": []})


_MODEL = r"/api/models/([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _resolve),
    (r"/cdn/([0-9a-f]{64})", _cdn),
    (rf"{_MODEL}(?:/revision/([^/]+))?", _model),
    (rf"{_MODEL}/tree/([^/]+)(?:/(.*))?", _tree),
    (rf"{_MODEL}/paths-info/([^/]+)", _paths_info),
    (r"/api/repos/create", _create),
    (rf"{_MODEL}/preupload/([^/]+)", _preupload),
    (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _batch),
    (r"/lfs/([0-9a-f]{64})", _upload),
    (r"/lfs/([0-9a-f]{64})/verify", _verify),
    (rf"{_MODEL}/commit/([^/]+)", _commit),
    (rf"{_MODEL}/xet-(read|write)-token/([^/]+)", _xet_token),
    (r"/api/whoami-v2", _who),
    (r"/api/validate-yaml", _yaml),
]

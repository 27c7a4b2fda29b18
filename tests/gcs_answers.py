"""What ``gcs_server`` answers to each request of the XML API of Google Cloud Storage."""

from __future__ import annotations

import contextlib
import datetime as dt
import email.utils
import hashlib
import json
import re
import secrets
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

NAMESPACE = "http://doc.s3.amazonaws.com/2006-03-01"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An object."""

    data: bytes
    etag: str
    generation: int
    meta: dict[str, str]
    modified: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A multipart upload under way; each part with its ETag."""

    bucket: str
    key: str
    meta: dict[str, str]
    parts: dict[int, tuple[str, bytes]] = field(default_factory=dict)


class RefusedError(Exception):
    """The answer is an error: status and code."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    gcs: Any
    """The server."""

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client has gone
            super().handle()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def exchange(self) -> None:
        target = urlsplit(self.path)
        self.query = dict(parse_qsl(target.query, keep_blank_values=True))
        self.bucket, _, self.key = unquote(target.path).removeprefix("/").partition("/")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            with self.gcs.lock:
                status, headers, body = self._answer()
        except RefusedError as error:
            status, code = error.args
            said = f"<Error><Code>{code}</Code><Message>{code}.</Message></Error>"
            headers, body = {"Content-Type": "application/xml; charset=UTF-8"}, said.encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = exchange  # noqa: N815

    def _answer(self) -> tuple[int, dict[str, str], bytes]:
        if (self.command, self.bucket, self.key) == ("POST", "token", ""):
            if self.gcs.refuses_keys:
                said = {"error": "invalid_grant", "error_description": "Invalid JWT Signature."}
                return 400, {"Content-Type": "application/json"}, json.dumps(said).encode()
            given = self.gcs.give_token(dict(parse_qsl(self.body.decode())))
            return 200, {"Content-Type": "application/json"}, json.dumps(given).encode()
        self._check_rights()
        if not self.key:
            return _xml(self._uploads() if "uploads" in self.query else self._objects())
        upload = "uploadId" in self.query
        answers = {
            "GET": self._read,
            "HEAD": self._read,
            "PUT": self._put_part if upload else self._put,
            "POST": self._complete if upload else self._begin,
            "DELETE": self._abort if upload else self._delete,
        }
        return answers[self.command]()

    def _check_rights(self) -> None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        reads = self.command in ("GET", "HEAD") and "uploads" not in self.query
        if not scheme and not (reads and self.bucket in self.gcs.public):
            raise RefusedError(403, "AccessDenied")
        if scheme and (scheme != "Bearer" or token not in self.gcs.tokens):
            raise RefusedError(401, "AuthenticationRequired")
        if self.bucket not in self.gcs.buckets:
            raise RefusedError(404, "NoSuchBucket")

    @property
    def _here(self) -> dict[str, Stored]:
        return self.gcs.buckets[self.bucket]

    def _meta(self) -> dict[str, str]:
        named = {name.lower(): value for name, value in self.headers.items()}
        return {name: value for name, value in named.items() if name.startswith("x-goog-meta-")}

    def _read(self) -> tuple[int, dict[str, str], bytes]:
        if self.key not in self._here:
            raise RefusedError(404, "NoSuchKey")
        found = self._here[self.key]
        if self.headers.get("If-Match", found.etag) != found.etag:
            raise RefusedError(412, "PreconditionFailed")
        headers = {
            "ETag": found.etag,
            "Last-Modified": email.utils.formatdate(found.modified, usegmt=True),
            "Content-Type": "application/octet-stream",
            "x-goog-generation": str(found.generation),
            "x-goog-metageneration": "1",
            "x-goog-stored-content-length": str(len(found.data)),
            **found.meta,
        }
        wanted = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, headers | {"Content-Length": str(len(found.data))}, found.data
        start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(found.data))
        if start >= len(found.data):
            raise RefusedError(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(found.data)}"
        return 206, headers, found.data[start:end]

    def _put(self) -> tuple[int, dict[str, str], bytes]:
        there = self._here.get(self.key)
        expected = self.headers.get("x-goog-if-generation-match")
        if self.gcs.ignores_conditions:
            expected = None
        if expected is not None and int(expected) != (there.generation if there else 0):
            raise RefusedError(412, "PreconditionFailed")
        source = self.headers.get("x-goog-copy-source")
        if source is not None:
            return self._copy(unquote(source))
        etag = f'"{hashlib.md5(self.body).hexdigest()}"'
        stored = self.gcs.store(self.bucket, self.key, self.body, self._meta(), etag)
        return 200, {"ETag": etag, "x-goog-generation": str(stored.generation)}, b""

    def _copy(self, source: str) -> tuple[int, dict[str, str], bytes]:
        bucket, _, key = source.removeprefix("/").partition("/")
        found = self.gcs.buckets.get(bucket, {}).get(key)
        if found is None:
            raise RefusedError(404, "NoSuchKey")
        stored = self.gcs.store(self.bucket, self.key, found.data, found.meta, found.etag)
        body = f"<ETag>{found.etag}</ETag><LastModified>{_time(stored.modified)}</LastModified>"
        status, headers, data = _xml(f"<CopyObjectResult>{body}</CopyObjectResult>")
        return status, headers | {"x-goog-generation": str(stored.generation)}, data

    def _delete(self) -> tuple[int, dict[str, str], bytes]:
        if self._here.pop(self.key, None) is None:
            raise RefusedError(404, "NoSuchKey")
        return 204, {}, b""

    def _begin(self) -> tuple[int, dict[str, str], bytes]:
        assert "uploads" in self.query
        number = self.gcs.begin(self.bucket, self.key, self._meta())
        return _xml(_result("InitiateMultipartUploadResult", self._named(number)))

    def _named(self, upload: str) -> str:
        key = f"<Bucket>{self.bucket}</Bucket><Key>{escape(self.key)}</Key>"
        return f"{key}<UploadId>{upload}</UploadId>"

    @property
    def _upload(self) -> Upload:
        upload = self.gcs.uploads.get(self.query["uploadId"])
        if upload is None or (upload.bucket, upload.key) != (self.bucket, self.key):
            raise RefusedError(404, "NoSuchUpload")
        return upload

    def _put_part(self) -> tuple[int, dict[str, str], bytes]:
        etag = f'"{hashlib.md5(self.body).hexdigest()}"'
        number = int(self.query["partNumber"])
        if not 1 <= number <= 10_000:
            raise RefusedError(400, "InvalidArgument")
        self._upload.parts[number] = etag, self.body
        return 200, {"ETag": etag}, b""

    def _complete(self) -> tuple[int, dict[str, str], bytes]:
        upload, named = self._upload, ET.fromstring(self.body).findall("{*}Part")
        wanted = [(int(_text(part, "PartNumber")), _text(part, "ETag")) for part in named]
        numbers = [number for number, _ in wanted]
        if not numbers or numbers != sorted(set(numbers)):
            raise RefusedError(400, "InvalidPartOrder")
        if any(upload.parts.get(number, ("",))[0] != etag for number, etag in wanted):
            raise RefusedError(400, "InvalidPart")
        parts = [upload.parts[number][1] for number in numbers]
        if any(len(part) < self.gcs.least_part for part in parts[:-1]):
            raise RefusedError(400, "EntityTooSmall")
        del self.gcs.uploads[self.query["uploadId"]]
        etag = f'"-{secrets.token_urlsafe(9)}="'  # of no MD5
        stored = self.gcs.store(self.bucket, self.key, b"".join(parts), upload.meta, etag)
        result = f"{self._named(self.query['uploadId'])}<ETag>{etag}</ETag>"
        status, headers, data = _xml(_result("CompleteMultipartUploadResult", result))
        return status, headers | {"x-goog-generation": str(stored.generation)}, data

    def _abort(self) -> tuple[int, dict[str, str], bytes]:
        assert self._upload
        del self.gcs.uploads[self.query["uploadId"]]
        return 204, {}, b""

    def _objects(self) -> str:
        assert self.query.get("list-type") == "2"
        assert "delimiter" not in self.query
        prefix, after = self.query.get("prefix", ""), self.query.get("continuation-token", "")
        keys = sorted(key for key in self._here if key.startswith(prefix) and key > after)
        shown = keys[: self.gcs.page]
        rows = [f"<IsTruncated>{str(shown != keys).lower()}</IsTruncated>"]
        if shown != keys:
            rows.append(f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>")
        for key in shown:
            found = self._here[key]
            rows.append(
                f"<Contents><Key>{escape(key)}</Key><Generation>{found.generation}</Generation>"
                f"<MetaGeneration>1</MetaGeneration><ETag>{found.etag}</ETag>"
                f"<LastModified>{_time(found.modified)}</LastModified>"
                f"<Size>{len(found.data)}</Size></Contents>"
            )
        return _result("ListBucketResult", "".join(rows))

    def _uploads(self) -> str:
        marks = self.query.get("key-marker", ""), self.query.get("upload-id-marker", "\uffff")
        pairs = sorted(
            (upload.key, number)
            for number, upload in self.gcs.uploads.items()
            if upload.bucket == self.bucket and upload.key.startswith(self.query.get("prefix", ""))
        )
        pairs = [pair for pair in pairs if pair > marks]
        shown = pairs[: self.gcs.page]
        rows = [f"<IsTruncated>{str(shown != pairs).lower()}</IsTruncated>"]
        if shown != pairs:
            rows.append(f"<NextKeyMarker>{escape(shown[-1][0])}</NextKeyMarker>")
            rows.append(f"<NextUploadIdMarker>{shown[-1][1]}</NextUploadIdMarker>")
        for key, number in shown:
            rows.append(f"<Upload><Key>{escape(key)}</Key><UploadId>{number}</UploadId></Upload>")
        return _result("ListMultipartUploadsResult", "".join(rows))


def _result(name: str, content: str) -> str:
    return f"<{name} xmlns='{NAMESPACE}'>{content}</{name}>"


def _xml(text: str) -> tuple[int, dict[str, str], bytes]:
    body = f"<?xml version='1.0' encoding='UTF-8'?>{text}".encode()
    return 200, {"Content-Type": "application/xml; charset=UTF-8"}, body


def _text(element: ET.Element, name: str) -> str:
    return element.findtext(f"{{*}}{name}", "")


def _time(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

"""``raymeld merge --out hf://org/name``, as it is typed: what it says, refuses, and survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from handmade import small_merge
from hub_server import Hub
from kills import Kill, command, marked
from pushes import TOKEN, assert_pushed, head
from typer.testing import CliRunner

from cluster.cli import app
from merge_core.stores import scratch

# huggingface_hub 2.4's own, where it sends a file:
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

RAYMELD = str(Path(sys.executable).with_name("raymeld"))
INPUTS = ("base", "adapter", "--shard-size", "10KB")
OUT = ("--out", "hf://me/merge")
TO_HUB = (*OUT, "--state", "state", "--scratch", "scratch")
MERGE = ("merge", *INPUTS, "--address", "inline")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The working directory, with ``base`` and ``adapter``, and a hub with a proxy before it."""

    folder: Path
    hub: Hub
    proxy: FaultProxy

    def run(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """A program that ends with that code."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "HF_ENDPOINT": self.proxy.address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done

    def answer(self, *words: str, code: int = 0) -> Any:
        """That of a command in this process."""
        done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)


@pytest.fixture
def place(
    tmp_path: Path, hub: Hub, before_hub: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> Place:
    small_merge(tmp_path)
    monkeypatch.chdir(tmp_path)
    return Place(folder=tmp_path, hub=hub, proxy=before_hub)


def test_a_merge_is_told_by_the_address_of_its_commit_and_known_by_its_state(place: Place) -> None:
    done = place.run(RAYMELD, *MERGE, *TO_HUB)
    repo = place.hub.repos["me/merge"]
    url = f"{place.proxy.address}/me/merge/commit/{repo.refs['main']}"
    assert f"result   {url}" in done.stdout
    assert "B/s]" not in done.stderr  # huggingface_hub's own progress bars
    assert repo.private

    again = place.answer(*MERGE, *TO_HUB)
    assert (again["already_there"], again["out"], again["url"]) == (True, "hf://me/merge", url)
    status = place.answer("status", "state")
    found = [status[field] for field in ("state", "model", "url")]
    assert found == ["finished", "hf://me/merge@main", url]
    place.answer("report", "state", "--output", "page.html", "--spectrum", "1")
    assert "Merged and verified" in (place.folder / "page.html").read_text()
    files = [path for path in place.folder.rglob("*") if path.is_file()]
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_what_a_model_on_the_hub_holds_is_verified_from_there(place: Place) -> None:
    place.answer(*MERGE, *TO_HUB)
    repo = place.hub.repos["me/merge"]
    name = next(name for name in head(repo) if name.endswith(".safetensors"))
    assert place.answer("verify", "state", "--level", "numeric")["ok"]

    repo.commits[repo.refs["main"]][name] = head(repo)[name][:-1] + b"!"
    found = place.answer("verify", "state", code=3)["findings"]
    assert [(one["check"], one["where"].partition(":")[0]) for one in found] == [("digest", name)]


def test_a_merge_that_was_killed_sends_only_the_rest(place: Place) -> None:
    place.answer(*MERGE, "--out", "local")
    hold = "after merge_core.stores.hub_objects:HubObjects.hold"
    kills = marked([Kill(victim="driver", place=hold, call=3)], place.folder / "marks")
    place.run(*command(kills, *MERGE, *TO_HUB), code=-signal.SIGKILL)
    assert len(list((place.folder / "scratch").glob("*.raymeld-part"))) == 1
    assert head(place.hub.repos["me/merge"]) == {}
    status = place.answer("status", "state")
    assert (status["state"], status["done"]) == ("stopped", 2)
    before = len(place.hub.objects)
    place.proxy.forget()

    done = place.answer(*MERGE, *TO_HUB)

    assert done["resumed"] == 2
    assert before == 3  # what was sent and not told is merged again, and found to be there
    assert place.proxy.tally("PUT").requests == len(place.hub.objects) - before
    assert_pushed(place.hub.repos["me/merge"], place.folder / "local")
    assert list((place.folder / "scratch").glob("*.raymeld-part")) == []


def test_a_worker_that_dies_while_it_sends_is_replaced(place: Place) -> None:
    place.answer(*MERGE, "--out", "local")
    upload = "before merge_core.stores.hub_objects:HubObjects.hold"
    kills = marked([Kill(victim="worker", place=upload, call=2)], place.folder / "marks")
    ray = ("merge", *INPUTS, "--address", "local", "--workers", "2", "--device", "cpu")
    done = place.run(*command(kills, *ray, *TO_HUB, "--scratch-limit", "30KB"))

    assert (place.folder / "marks" / "0-worker").exists()
    assert "after failure 1 of 20" in done.stderr
    assert_pushed(place.hub.repos["me/merge"], place.folder / "local")
    assert list((place.folder / "scratch").glob("*.raymeld-part")) == []


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (OUT, "hf://me/merge: a merge onto the hub keeps its records elsewhere until it is done"),
        ((*OUT, "--state", "hf://me/state"), "the hub keeps nothing of a merge but its one commit"),
        ((*OUT, "--state", "base/state"), "STATE and BASE"),
        (("--out", "hf://me/merge/folder", "--state", "state"), "is no model on the hub"),
        (("--out", "local", "--state", "state"), "--state: goes with a merge onto the hub alone"),
        (("--out", "local", "--public"), "--public: goes with a merge onto the hub alone"),
        ((*TO_HUB, "--scratch-limit", "1KB"), "--scratch-limit 1000: the largest file of the"),
        ((*TO_HUB, "--scratch-limit", "much"), "--scratch-limit: 'much' is no size"),
        ((*OUT, "--state", "state", "--scratch", "s3://a/b"), "is no directory of a node"),
        (("--out", "hf://me/other", "--state", "state"), "holds something else already: model.saf"),
        (("--out", "hf://me/open", "--state", "state"), "everybody can see it. Choose another"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["plan", "merge"])
def test_what_cannot_go_there_is_refused_before_anything_is_written(
    place: Place, verb: str, words: tuple[str, ...], wanted: str
) -> None:
    place.hub.repo("me/other", {"model.safetensors": b"precious"}, private=True)
    place.hub.repo("me/open", {"README.md": b"hello"})
    address = ("--address", "inline") if verb == "merge" else ()
    before = set(place.folder.iterdir())

    assert wanted in place.answer(verb, *INPUTS, *words, *address, code=2)["error"]

    assert set(place.folder.iterdir()) <= before
    assert set(place.hub.repos) == {"me/other", "me/open"}


def test_a_folder_is_the_state_of_one_merge_and_nothing_else(place: Place) -> None:
    place.answer(*MERGE, "--out", "local")
    weights = {path: path.read_bytes() for path in (place.folder / "local").glob("*.safetensors")}
    mixed = ["--out", "hf://me/merge", "--state", "local"]
    for how in ([], ["--overwrite"]):
        said = place.answer(*MERGE, *mixed, *how, code=2)["error"]
        assert "local: holds weights, of a merge that went there itself" in said
    assert {path: path.read_bytes() for path in weights} == weights

    place.answer(*MERGE, *TO_HUB)
    said = place.answer(*MERGE, "--out", "hf://me/second", "--state", "state", code=2)["error"]
    assert "state: is the state of a merge onto hf://me/merge" in said
    said = place.answer(*MERGE, "--out", "state", "--overwrite", code=2)["error"]
    assert "state: is the state of a merge onto hf://me/merge" in said


def test_a_token_that_may_not_write_ends_a_merge_before_it_begins(place: Place) -> None:
    place.hub.repo("me/merge", {}, private=True)
    place.hub.readers.add(TOKEN)
    said = place.answer(*MERGE, *TO_HUB, code=2)["error"]
    assert "hf://me/merge@main: the hub answered 403 (you must use a write token" in said
    said = place.answer(*MERGE, *TO_HUB, "--out", "hf://me/new", code=2)["error"]
    assert "hf://me/new@main: the token may only read. Use one that may write" in said
    assert not (place.folder / "scratch").exists()
    assert not (place.folder / "state").exists()
    assert set(place.hub.repos) == {"me/merge"}


@pytest.mark.parametrize("verb", ["plan", "merge"])
def test_without_a_token_nothing_goes_there(
    place: Place, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    address = ("--address", "inline") if verb == "merge" else ()
    said = place.answer(verb, *INPUTS, *TO_HUB, *address, code=2)["error"]
    assert "hf://me/merge@main: there is no token" in said


@pytest.mark.parametrize("words", [("push", "local", "me/merge@none"), (*MERGE, *TO_HUB)])
def test_a_branch_that_does_not_exist_is_wrong_input(place: Place, words: tuple[str, ...]) -> None:
    place.hub.repo("me/merge", {}, private=True)
    if words[0] == "push":
        place.answer(*MERGE, "--out", "local")
    else:
        words = (*words, "--out", "hf://me/merge@none")
    said = place.answer(*words, code=2)["error"]
    assert "hf://me/merge@none: the model has no branch, tag or commit 'none'" in said
    assert len(place.hub.repos["me/merge"].commits) == 1


def test_a_scratch_that_cannot_be_used_is_wrong_input(place: Place) -> None:
    said = place.answer(*MERGE, *OUT, "--state", "state", "--scratch", "/proc/foo", code=2)["error"]
    assert said.startswith("--scratch /proc/foo: No such file or directory. Give --scratch a dir")


def test_the_records_of_a_model_are_not_sought_on_the_hub(place: Place) -> None:
    place.answer(*MERGE, *TO_HUB)
    for verb in ("verify", "status"):
        said = place.answer(verb, "hf://me/merge", code=2)["error"]
        assert said.startswith("hf://me/merge: what the hub has of a merge is the model alone")
        assert "Give the --state of that merge, or the folder that was pushed" in said


def test_a_plan_says_nothing_against_a_model_that_is_yet_to_be_made(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = iter(["ext4", "tmpfs"])
    monkeypatch.setattr(scratch, "file_system_of", lambda _: next(kinds))
    (note,) = place.answer("plan", *INPUTS, *TO_HUB)["notes"]
    assert "scratch: holds, for each worker of a node, a file of up to 0.00 GB until it is" in note
    _, memory = place.answer("plan", *INPUTS, *TO_HUB)["notes"]
    assert "is memory, not a disk (tmpfs). Give --scratch a directory on a disk" in memory
    assert place.hub.repos == {}
    assert not (place.folder / "state").exists()


def test_numeric_is_refused_and_load_is_not(place: Place) -> None:
    said = place.answer(*MERGE, *TO_HUB, "--verify", "numeric", code=2)["error"]
    assert "--verify numeric: reads the whole result before it is published" in said
    assert place.hub.repos == {}
    done = place.answer(*MERGE, *TO_HUB, "--verify", "load")
    assert done["verified"]["checks"][-1].startswith("names and shapes against the transformers")


def test_a_recipe_may_name_the_hub(place: Place) -> None:
    words = ["recipe", *INPUTS, *TO_HUB, "--public", "--scratch-limit", "1MB"]
    (place.folder / "recipe.yaml").write_text(CliRunner().invoke(app, words).stdout)
    place.answer("merge", "recipe.yaml", "--address", "inline")
    assert not place.hub.repos["me/merge"].private
    assert (place.folder / "state" / "config.json").exists()

"""Pushes to a hub on this machine, and what must have come of them."""

from __future__ import annotations

import json
from pathlib import Path

from hub_client import QUICK
from hub_repos import Repo, sha256

from merge_core import push as pushing
from merge_core.model_card import for_hub
from merge_core.stores.location import locate_model

TOKEN = "hf_sesame"


def push(out: Path, model: str = "me/merge", said: list[str] | None = None, **how: object) -> str:
    told = (said if said is not None else []).append
    return pushing.push(out, locate_model(model), say=told, retries=QUICK, **how)


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def head(repo: Repo) -> dict[str, bytes]:
    return {n: data for n, data in repo.commits[repo.refs["main"]].items() if n != ".gitattributes"}


def assert_pushed(repo: Repo, out: Path, commits: int = 2) -> None:
    """All of it, in one commit after the one that made the repository."""
    files, own = head(repo), files_of(out)
    card, recipe = files.pop("README.md"), json.loads(files.pop("raymeld.json"))
    assert card.decode() == for_hub(own.pop("README.md").decode(), "digest")
    assert files == own
    assert recipe["sha256"] == {name: sha256(data) for name, data in files.items()}
    assert len(repo.commits) == commits

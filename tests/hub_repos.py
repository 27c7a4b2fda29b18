"""What a local hub keeps: repositories, their commits, and what it refuses."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

BIG = ".safetensors"
"""Files of that name are stored as LFS, the others in git."""


@functools.lru_cache(maxsize=64)  # asked for at every read of a big file
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Xet:
    """Content that Xet holds, of which the hub knows only this."""

    oid: str
    size: int


Content = bytes | Xet


@dataclass(slots=True)
class Repo:
    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    """Commits of branches and tags."""
    titles: list[str] = field(default_factory=list)
    private: bool = False
    granted: set[str] | None = None
    """Tokens of those who accepted the terms; None: it is not gated."""

    def commit(
        self, files: Mapping[str, Content | None], ref: str = "main", title: str = ""
    ) -> str:
        """Change files, None removes one; returns the commit."""
        before = self.commits.get(self.refs.get(ref, ""), {})
        after = {name: data for name, data in {**before, **files}.items() if data is not None}
        sha = hashlib.sha1(repr((len(self.commits), sorted(after), title)).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = after, sha
        self.titles.append(title)
        return sha

    def at(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


class RefusedError(Exception):
    """Answered with a status and one of the hub's own codes."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message

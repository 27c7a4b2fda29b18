"""Who a worker is: what it imported from where, so that a driver never works with strangers.

The top-level names ``cluster`` and ``actors`` are generic. Ray puts the user's working directory
first on its workers' path, where a package of the same name would be imported instead of ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
import pickle
import platform
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core import __version__

PACKAGES = ("cluster", "actors", "merge_core")

SAME_CODE = (
    "Install the same raymeld on every node, and start the cluster from a directory that holds no"
    " package named cluster, actors or merge_core"
)
"""What to do about a difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One process of a merge."""

    host: str
    pid: int
    python: str
    raymeld: str
    torch: str
    paths: tuple[str, ...]
    """Where the three packages lie."""
    digest: str
    """Over the source of the three packages."""

    def difference(self, driver: Identity) -> str | None:
        """Why this worker cannot work for ``driver``, or None if it can."""
        other = self.code_difference(driver)
        if other is None and _minor(self.torch) != _minor(driver.torch):
            return f"has torch {self.torch}, the driver {driver.torch}"
        return other

    def code_difference(self, driver: Identity) -> str | None:
        """Why ``driver`` cannot even read this process's records, or None if it can."""
        if self.raymeld != driver.raymeld:
            return f"has raymeld {self.raymeld}, the driver {driver.raymeld}"
        if self.digest != driver.digest:
            for name, mine, theirs in zip(PACKAGES, self.paths, driver.paths, strict=False):
                if mine != theirs:
                    return f"imports {name!r} from {mine}, the driver from {theirs}"
            return f"has other source files than the driver, in {self.paths[0]}"
        return None


Signed = tuple[dict[str, Any], bytes]
"""A record on its way to the driver, behind the identity of who made it. Nothing but builtins:
other code may have records of other fields, which pickle puts into ours without a word."""

_UNKNOWN = Identity(
    host="an unknown host",
    pid=0,
    python="unknown",
    raymeld="unknown",
    torch="unknown",
    paths=("an unknown place",),
    digest="unknown",
)


def sign(record: Any) -> Signed:
    """Make a record ready for a driver whose code may be another."""
    return dataclasses.asdict(identify()), pickle.dumps(record)


def signer(answer: object) -> Identity:
    """Who signed; what other code does not tell of itself is unknown."""
    said = answer[0] if isinstance(answer, tuple) and answer else None
    known = {field.name for field in dataclasses.fields(Identity)}
    fields = {k: v for k, v in said.items() if k in known} if isinstance(said, dict) else {}
    return dataclasses.replace(_UNKNOWN, **fields)


def unsigned(answer: Signed) -> Any:
    """The record, which is to be read only if the signer's code is the reader's."""
    return pickle.loads(answer[1])  # noqa: S301 - what Ray would do with it


def identify() -> Identity:
    """This process's identity, without importing the packages that it does not need."""
    paths = tuple(_location(name) for name in PACKAGES)
    return Identity(
        host=socket.gethostname(),
        pid=os.getpid(),
        python=platform.python_version(),
        raymeld=__version__,
        torch=importlib.metadata.version("torch"),
        paths=paths,
        digest=_digest(paths),
    )


def _location(name: str) -> str:
    spec = importlib.util.find_spec(name)
    origin = spec.origin if spec is not None else None
    return str(Path(origin).parent) if origin else "nowhere"


def _digest(paths: tuple[str, ...]) -> str:
    state = hashlib.sha256()
    for path in paths:
        for file in sorted(Path(path).rglob("*.py")):
            state.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return state.hexdigest()


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+", maxsplit=1)[0].split(".")[:2])

"""Which of the libraries that raymeld asks for are installed here, and in which versions."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One of raymeld's dependencies, as its own metadata names it."""

    name: str
    wanted: str
    """Its versions, such as ``>=0.20``; the reasons stand in pyproject.toml. Empty: any."""
    found: str | None

    @property
    def fits(self) -> bool:
        """Whether it is there in such a version."""
        from packaging.specifiers import SpecifierSet

        wanted = SpecifierSet(self.wanted)
        return self.found is not None and wanted.contains(self.found, prereleases=True)


def find_libraries() -> tuple[Library, ...]:
    """All of them, none imported; empty where raymeld itself was not installed (a plain checkout
    on the path), so that nothing says what it asks for.
    """
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("raymeld") or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    asked = [Requirement(line) for line in lines]
    return tuple(
        Library(name=one.name, wanted=str(one.specifier), found=_version(one.name))
        for one in asked
        if one.marker is None or one.marker.evaluate()
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

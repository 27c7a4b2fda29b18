"""What an examination has found, each thing once, wherever it was met."""

from __future__ import annotations

from dataclasses import dataclass, field

from merge_core.errors import some_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem, or something worth knowing, wherever it was met."""

    what: str
    places: tuple[str, ...]
    """Nodes mostly; paths where it is about these."""
    remedy: str

    def __str__(self) -> str:
        sentences = [self.what.removesuffix("."), self.remedy.removesuffix(".")]
        return f"{some_of(self.places)}: {'. '.join(filter(None, sentences))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What is wrong, and what is not but may matter."""

    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]


@dataclass(slots=True)
class Notebook:
    """What was noted, the places of one and the same thing joined."""

    _problems: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    _notes: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def problem(self, place: str, what: str, remedy: str) -> None:
        """Note what stands against a merge."""
        _put(self._problems, place, what, remedy)

    def note(self, place: str, what: str, remedy: str = "") -> None:
        """Note what does not, and may matter."""
        _put(self._notes, place, what, remedy)

    def close(self) -> Diagnosis:
        """All of it."""
        return Diagnosis(problems=_findings(self._problems), notes=_findings(self._notes))


def _put(findings: dict[tuple[str, str], list[str]], place: str, what: str, remedy: str) -> None:
    places = findings.setdefault((what, remedy), [])
    if place not in places:
        places.append(place)


def _findings(noted: dict[tuple[str, str], list[str]]) -> tuple[Finding, ...]:
    return tuple(
        Finding(what=what, places=tuple(places), remedy=remedy)
        for (what, remedy), places in noted.items()
    )

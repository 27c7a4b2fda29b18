"""A doctor on a machine whose own mounts are dead: what it looks at hangs, and it does not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import doctor
from cluster.diagnosis import diagnose
from cluster.doctor import Checkup, Intent, examine
from merge_core.plan import MergePlan
from merge_core.stores.location import locate


@pytest.fixture
def hangs() -> Iterator[Callable[[Path], None]]:
    """What an access to such a mount does, until the test ends."""
    over = threading.Event()
    yield lambda _: over.wait() and None
    over.set()


def checkup(plan: MergePlan, out: Path, said: list[str]) -> Checkup:
    adapter = plan.adapters[0].path
    intent = Intent(base=locate(plan.base), adapters=[str(adapter)], out=locate(out))
    return examine("inline", intent, seconds=0.2, say=said.append)


def test_inputs_that_hang_are_told_after_it_was_said_what_is_looked_at(
    small: MergePlan, out: Path, hangs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "look_at_input", hangs)
    said: list[str] = []

    found = checkup(small, out, said)

    base, adapter = small.base, small.adapters[0].path
    assert said == [f"looking at {base}, {adapter}, {out}"]
    assert found.plan is None
    assert [problem.what for problem in diagnose(found).problems] == [
        f"{kind} cannot be read: no answer within 0.2 s, as of a mount whose server is gone"
        for kind in (f"BASE {base}", f"ADAPTER {adapter}")
    ]


def test_an_out_that_hangs_is_told(
    small: MergePlan, out: Path, hangs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "nearest_directory", hangs)
    for name in ("check_destination", "check_ownership", "notes_on"):
        monkeypatch.delattr(doctor, name)

    found = checkup(small, out, [])

    (problem,) = diagnose(found).problems
    assert str(problem).startswith(f"{out}: OUT cannot be written: no answer within 0.2 s")
    assert found.plan is not None  # OUT alone is not looked at any more

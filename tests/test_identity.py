"""Who a process is, as a driver reads it whose code may be another."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from actors.examiner import Silence, examine_here
from actors.identity import identify, sign, signer, unsigned
from actors.pool import Pool
from actors.rounds import read_examination
from merge_core.errors import InputError

US = identify()
THEM = dataclasses.replace(US, raymeld="0.1", digest="of other code")


class Unreadable:
    """A record that only the code which made it can read."""

    def __reduce__(self) -> Any:
        return (_fail, ())


def _fail() -> None:
    raise AssertionError("a record of other code was read")


def answer_of(who: object, record: object) -> Any:
    """What a process of other code would send."""
    fields = dataclasses.asdict(who) if dataclasses.is_dataclass(who) else who  # type: ignore[arg-type]
    return fields, pickle.dumps(record)


def test_what_we_sign_we_read() -> None:
    answer = sign({"memory": 1})

    assert signer(answer) == US
    assert unsigned(answer) == {"memory": 1}


@pytest.mark.parametrize(
    ("answer", "difference"),
    [
        (answer_of(THEM, Unreadable()), f"has raymeld 0.1, the driver {US.raymeld}"),
        (answer_of({"raymeld": "9", "new": 1}, Unreadable()), "has raymeld 9, the driver"),
        (answer_of({"raymeld": US.raymeld}, Unreadable()), "imports 'cluster' from an unknown pl"),
        (answer_of([], Unreadable()), "has raymeld unknown, the driver"),
        (Silence(reason="not what was asked", kind="late"), "has raymeld unknown, the driver"),
        (None, "has raymeld unknown, the driver"),
    ],
)
def test_of_other_code_nothing_is_read_but_who_it_is(answer: Any, difference: str) -> None:
    found = signer(answer)
    assert str(found.difference(US)).startswith(difference)
    if not isinstance(answer, Silence):
        assert read_examination(answer, US) == found


def test_an_examination_of_the_same_code_is_read_also_beside_another_torch() -> None:
    found = examine_here([], None, None).examination
    with_torch = dataclasses.replace(US, torch="1.0")

    assert read_examination(sign(found), US) == found
    assert read_examination(answer_of(with_torch, found), US) == found
    assert with_torch.difference(US) == f"has torch 1.0, the driver {US.torch}"


def test_a_pool_refuses_a_worker_of_other_code_before_it_reads_its_greeting() -> None:
    pool = Pool.__new__(Pool)  # no Ray is needed for what it makes of a greeting
    pool._driver = US
    with pytest.raises(InputError, match=f"has raymeld 0.1, the driver {US.raymeld}"):
        pool._greet(0, None, answer_of(THEM, Unreadable()))  # type: ignore[arg-type]

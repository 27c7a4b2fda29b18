"""What can go wrong, and the exit code that each failure ends with.

    RaymeldError                 1  the merge failed
    |-- InputError               2  base, adapter, options or OUT are not what a merge needs
    |-- VerificationError        3  written, but a check failed: nothing was published
    |-- NonFiniteError           1  a merged value is NaN or infinite
    |-- DeviceMemoryError        1  the device or the machine ran out of memory
    |-- StorageError             1  a read or write failed (disk full, permission, vanished file)
    |   |-- AbsentError          1  there is no such file
    |   `-- TakenError           1  another writer has given its file that name
    |-- LeaseLostError           1  another merge has taken OUT over
    `-- InterruptedMergeError  130  Ctrl-C or SIGTERM

All of them cross process borders, so each keeps its constructor's positional arguments in
``args``: that is what pickle calls the class with on the other side.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

SHOWN_PROBLEMS = 20
"""In one message: an adapter for another size has one a module, hundreds for a 72B."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: what it is, where it was found, and what the reader can do."""

    what: str
    where: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.remedy}"


class RaymeldError(Exception):
    """Root of everything that raymeld raises on purpose.

    Args:
        what: what is wrong, without a full stop.
        where: tensor, file, shard or node.
        remedy: what to do about it, as a sentence.
    """

    exit_code = 1

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where, remedy)
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        what = self.what.removesuffix(".")  # some are what another program said
        head = f"{self.where}: {what}" if self.where else what
        return f"{head}. {self.remedy}" if self.remedy else head


class InputError(RaymeldError, ValueError):
    """Every problem found in the input, so that the user fixes them in one go."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        Exception.__init__(self, tuple(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        shown = self.problems[:SHOWN_PROBLEMS]
        listed = "\n".join(f"  {n}. {problem}" for n, problem in enumerate(shown, 1))
        more = len(self.problems) - len(shown)
        rest = f"\n  and {more} more; ``problems`` holds them all" if more else ""
        return f"{len(self.problems)} problems:\n{listed}{rest}"


class VerificationError(RaymeldError):
    """A check on the written checkpoint failed; it was not published."""

    exit_code = 3


class NonFiniteError(RaymeldError):
    """A merged value is NaN or infinite."""


class DeviceMemoryError(RaymeldError, MemoryError):
    """A lane could not get the memory it needs; a retry takes fewer lanes."""


class StorageError(RaymeldError, OSError):
    """A read or a write failed and is not likely to pass by itself."""

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        RaymeldError.__init__(self, what, where, remedy)

    __str__ = RaymeldError.__str__


class AbsentError(StorageError):
    """There is no such file, or not any more."""


class TakenError(StorageError):
    """Another writer has given its file that name."""


class NotCopiedError(StorageError):
    """The store does not copy a file within itself: it has to be read, and written anew."""


class LeaseLostError(RaymeldError):
    """Another merge works in OUT by now: this one may write nothing more there."""


class InterruptedMergeError(RaymeldError):
    """The user or the machine asked the merge to stop."""

    exit_code = 130


def refuse(what: str, where: str, remedy: str) -> InputError:
    """The InputError for a single problem."""
    return InputError([Problem(what, where, remedy)])


def some_of(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" * (len(names) > 3))


def shortened(value: object) -> str:
    """``repr`` of what somebody else wrote, of a length that fits into a message."""
    return reprlib.repr(value)


def counted(number: int, noun: str) -> str:
    """``1 lane``, ``3 lanes``."""
    return f"{number:,} {noun}" + "s" * (number != 1)


class gathered:  # noqa: N801 - read as a verb: "with gathered(problems):"
    """Move the problems of an InputError raised inside into ``problems`` and go on.

    This is how the plan reports everything at once instead of the first thing it meets.
    """

    def __init__(self, problems: list[Problem]) -> None:
        self._problems = problems

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, InputError):
            self._problems.extend(error.problems)
            return True
        return False


def replaced(where: object) -> StorageError:
    """The error for an input that changed while it was being merged."""
    what = "the file changed while it was being merged"
    return StorageError(what, str(where), "Start again with stable input.")

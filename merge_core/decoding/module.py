"""A packed module, as planning meets it: its stored parts, and whether they fit one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from merge_core.decoding.stored import Stored
from merge_core.errors import InputError, Problem, some_of

FETCH = "Fetch the checkpoint again, or the config.json that belongs to it"

SCALES = ("F16", "BF16", "F32")
"""Dtypes that scales are multiplied in."""


@dataclass(slots=True, kw_only=True)
class PackedModule:
    """The stored tensors that make up the weight of one module."""

    path: str
    """Such as ``model.layers.0.mlp.up_proj``."""
    parts: Mapping[str, Stored]
    """By what stands behind the path: ``qweight``, ``weight.absmax``, ..."""
    where: str
    read: Callable[[Stored], bytes]
    """Reads a small one: planning reads nothing else of the data."""
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, what: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(what, f"{self.where}, module {self.path}", FETCH))

    def require(self, *parts: str) -> None:
        """Make sure that these are there.

        Raises:
            InputError: with the names of those that are not.
        """
        lost = [f"{self.path}.{part}" for part in parts if part not in self.parts]
        if lost:
            there = some_of(sorted(stored.tensor.name for stored in self.parts.values()))
            self.wrong(f"{some_of(lost)} is missing, {there} is there")
        self.check()

    def expect(self, part: str, dtypes: Sequence[str], shape: tuple[int, ...]) -> None:
        """Note a problem if the part has another dtype or shape."""
        tensor = self.parts[part].tensor
        if tensor.dtype not in dtypes or tensor.shape != shape:
            wanted = f"{' or '.join(dtypes)} {list(shape)}"
            self.wrong(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, not {wanted}")

    def matrix(self, part: str) -> tuple[int, int]:
        """Rows and columns of the part that says how large the module is.

        Raises:
            InputError: it is no matrix.
        """
        tensor = self.parts[part].tensor
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            self.wrong(f"{tensor.name} has shape {list(tensor.shape)}, not two sizes above 0")
        self.check()
        return tensor.shape[0], tensor.shape[1]

    def check(self) -> None:
        """Raise what was noted.

        Raises:
            InputError: something was.
        """
        if self.problems:
            raise InputError(self.problems)

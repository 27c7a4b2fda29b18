"""What a tuner is, in the terms of the table of them: tensors of a layer, fields, needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from merge_core.updates.tuning import Kind, Others, Part

Form = Mapping[str, str]
"""Names of a layer's tensors and their shapes, size by size. A size is a number; ``in`` or ``out``
of the layer, ``least``, the smaller of the two, or ``affine``, ``in`` and one more for a bias; a
field of the config; or a name that must mean the same wherever it stands. ``2r`` and ``in/r`` are
what they look like. ``name.{n}`` are as many tensors as n says, numbered from 0, and ``#`` in their
sizes is the number of each."""

CONV1D = frozenset({Kind.LINEAR, Kind.CONV1D})
EMBEDDING = frozenset({Kind.LINEAR, Kind.EMBEDDING})
"""Kinds of layers that several tuners have."""

SLOW = "PEFT decomposes each layer (SVD), which takes far longer than to read and write it"
"""What is said of those that do."""

COMMON_FIELDS = frozenset(
    {"peft_type", "peft_version", "bias", "modules_to_save", "fan_in_fan_out"}
)
"""Fields of many tuners; what ``bias`` and ``modules_to_save`` name is trained without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuner:
    """One ``peft_type``."""

    groups: tuple[tuple[Form, ...], ...]
    """Of each group a layer has one form."""
    fields: frozenset[str]
    """Fields of its config that may change the result."""
    copies: int
    """Tensors of the size of a layer's weight that are in memory at once while PEFT merges it, in
    float32, besides the result; as ``benchmarks/tuner_memory.py`` measures it on a CPU, and more
    where a whole merge was seen to take more."""
    squares: int = 0
    """The same for tensors of [n, n], where n is the layer's larger side."""
    shared: Form = field(default_factory=dict)
    """What belongs to no layer, after ``base_model.``. Its sizes may also be ``widest`` and
    ``tallest``, the largest ``in`` and ``out`` of all layers; ``longer`` is the larger of the two,
    ``shorter`` the other. A name that ends with ``*`` stands for any number of tensors."""
    changes: tuple[Part, ...] = ("weight",)
    """Which tensors of a layer it changes."""
    kinds: frozenset[Kind] = frozenset({Kind.LINEAR})
    others: Others = Others.NONE
    needs: str = ""
    """A package that PEFT imports for it, beside its own dependencies."""
    note: str = ""
    """What a person should know who merges one."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """The same, by a field that is set."""


def groups(*texts: str) -> tuple[tuple[Form, ...], ...]:
    """Each from ``name: sizes; name: sizes | other form``."""
    return tuple(tuple(map(form, text.split("|"))) for text in texts)


def form(text: str) -> Form:
    """From ``name: sizes; name: sizes``."""
    pairs = (part.split(":") for part in text.split(";") if part.strip())
    return MappingProxyType({name.strip(): sizes.strip() for name, sizes in pairs})


def words(text: str) -> frozenset[str]:
    """Names of fields."""
    return frozenset(text.split())

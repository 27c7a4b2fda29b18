"""Factors of experts: whose they are, and which rows of the base they change.

Of a parameter with the weights of E experts, [E, out, in], PEFT (``lora.ParamWrapper``) reshapes A
to [E, r, in] and B to [out, r, E], and adds ``s * B[:, :, e] @ A[e]`` to expert e. Releases before
0.19 took the parameter for [E, in, out], and add the transpose of that product. The weights of an
expert's gate are the upper half of its rows of ``gate_up_proj``, those of its up layer the lower.

Such a base tensor is compared in slabs, ranges of rows that the same factors change.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.verify.header import TensorEntry
from merge_core.verify.strict_json import MalformedError

Matrix = npt.NDArray[np.float32]
Sizes = Callable[[str], tuple[int, ...] | None]
"""Shape of a tensor of the result, by name."""

_MODEL = "qwen2_moe"
"""The model whose experts are known."""

_PARAMETERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""In the order in which the module registers them, each with the layers that it holds."""

_LAYER = re.compile(r"(.*\.experts)\.(0|[1-9][0-9]*)\.([a-z_]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which part of the factors changes which part of the base tensor."""

    expert: tuple[int, int] | None = None
    """Number of the expert, and how many share the factors; None: the factors are its own."""
    rows: tuple[int, int] | None = None
    """Rows of the delta; None: all."""
    span: tuple[int, int] | None = None
    """Rows of the base tensor, its experts one below the other; None: all."""


def parameter_of(wrapper: str, config: Mapping[str, Any]) -> str | None:
    """The parameter whose factors lie below ``wrapper``; None if it is a layer.

    Raises:
        MalformedError: the config names no such parameter.
    """
    module = re.sub(r"(\.base_layer)+$", "", wrapper)
    if module == wrapper and not module.endswith(".experts"):
        return None
    depth = (len(wrapper) - len(module)) // len(".base_layer")
    paths = [f"{module}.{name}" for name in _PARAMETERS if module.endswith(".experts")]
    inner_first = [path for path in paths if is_parameter(config, path)]
    if depth >= len(inner_first):
        raise MalformedError(f"target_parameters names {len(inner_first)} parameters of it")
    return inner_first[len(inner_first) - 1 - depth]


def is_parameter(config: Mapping[str, Any], path: str) -> bool:
    """Whether ``target_parameters`` names the parameter at ``path``."""
    return any(f".{path}".endswith(f".{name}") for name in config.get("target_parameters") or ())


def parts_of(parameter: str, sizes: Sizes, model_type: object) -> Iterator[tuple[str, Part]]:
    """The base tensors with the weights of a parameter, and what each gets of its factors.

    Raises:
        MalformedError: the base has no such weights, or is of a model that is not known.
    """
    module, _, name = parameter.rpartition(".")
    experts, out, _ = shape_of(parameter, sizes, model_type)
    layers = _PARAMETERS[name]
    half = out // len(layers)
    for expert in range(experts):
        whose = (expert, experts)
        if sizes(parameter) is not None:
            yield parameter, Part(expert=whose, span=(expert * out, (expert + 1) * out))
            continue
        for n, layer in enumerate(layers):
            rows = (n * half, (n + 1) * half)
            yield f"{module}.{expert}.{layer}.weight", Part(expert=whose, rows=rows)


def shape_of(parameter: str, sizes: Sizes, model_type: object) -> tuple[int, int, int]:
    """[experts, out, in], see ``parts_of``."""
    if model_type != _MODEL:
        raise MalformedError(f"the experts of {model_type!r} are not known")
    shape = sizes(parameter)
    if shape is not None and len(shape) == 3:
        return shape[0], shape[1], shape[2]
    module, _, name = parameter.rpartition(".")
    first, experts = _PARAMETERS[name][0], 0
    while sizes(f"{module}.{experts}.{first}.weight") is not None:
        experts += 1
    shape = sizes(f"{module}.0.{first}.weight")
    if shape is None or len(shape) != 2:
        raise MalformedError(f"the base has no {parameter}")
    return experts, shape[0] * len(_PARAMETERS[name]), shape[1]


def is_swapped(
    product: tuple[int, int], weights: tuple[int, int], config: Mapping[str, Any]
) -> bool:
    """Whether an expert's product is the transpose of its weights' delta.

    Raises:
        MalformedError: it is neither, or nothing tells.
    """
    if weights not in (product, product[::-1]):
        raise MalformedError(f"B @ A of an expert is {product}, its weights are {weights}")
    if product[0] != product[1]:
        return product != weights
    version = config.get("peft_version")
    if version is None:  # written since 0.18
        return True
    release = re.fullmatch(r"([0-9]+)\.([0-9]+)(\.[0-9]+)?", str(version))
    if release is None:
        raise MalformedError(f"its weights are square, and PEFT {version} is no release")
    return (int(release[1]), int(release[2])) < (0, 19)


def span_of(
    module: str, sizes: Sizes, model_type: object
) -> tuple[str, tuple[int, int], tuple[int, int]] | None:
    """Where a tensor with all experts holds the weights of one expert's layer.

    Returns:
        The tensor, its rows, and the shape of the weights; None if there is none.
    """
    match = _LAYER.fullmatch(module)
    if match is None or model_type != _MODEL:
        return None
    for name, layers in _PARAMETERS.items():
        shape = sizes(f"{match[1]}.{name}")
        if match[3] in layers and shape is not None and int(match[2]) < shape[0]:
            rows = shape[1] // len(layers)
            top = int(match[2]) * shape[1] + layers.index(match[3]) * rows
            return f"{match[1]}.{name}", (top, top + rows), (rows, shape[2])
    return None


def taken(left: Matrix, part: Part) -> Matrix:
    """The rows of a product's left factor that a part is about."""
    return left if part.rows is None else left[slice(*part.rows)]


def factors_of(a: Matrix, b: Matrix, part: Part) -> tuple[Matrix, Matrix]:
    """A and B of one expert."""
    if part.expert is None:
        return a, b
    expert, experts = part.expert
    mine = b.reshape(len(b), -1, experts)[:, :, expert]
    return a.reshape(experts, -1, a.shape[1])[expert], np.ascontiguousarray(mine)


def slabs(parts: Sequence[Part], rows: int) -> Iterator[tuple[int, int, list[Part | None]]]:
    """Ranges of rows that the same parts cover.

    Returns:
        First row and row behind the last, with what each part adds there; None for nothing.
    """
    spans = [part.span or (0, rows) for part in parts]
    borders = sorted({0, rows, *(border for span in spans for border in span)})
    for first, stop in itertools.pairwise(borders):
        found: list[Part | None] = []
        for part, (top, bottom) in zip(parts, spans, strict=True):
            start = (part.rows or (0, 0))[0] - top
            inside = replace(part, rows=(start + first, start + stop), span=None)
            found.append(inside if top <= first and stop <= bottom else None)
        yield first, stop, found


def slab(entry: TensorEntry, first: int, stop: int) -> TensorEntry:
    """Some rows of a tensor whose experts lie one below the other."""
    width = entry.shape[-1]
    row_bytes = entry.nbytes // max(1, int(np.prod(entry.shape[:-1])))
    return TensorEntry(
        name=f"{entry.name}[{first}:{stop}]",
        dtype=entry.dtype,
        shape=(stop - first, width),
        start=entry.start + first * row_bytes,
        nbytes=(stop - first) * row_bytes,
    )

"""Which tensors of a quantised base make up which weight, by this package's own reading.

What the planner refuses is not looked for once more: here it is enough that every part is there in
the shape that the others ask for, or that nothing is checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from merge_core.errors import refuse
from merge_core.verify.header import TensorEntry
from merge_core.verify.places import read_range
from merge_core.verify.rounding import FLOATS
from merge_core.verify.weights import BaseTensor, Packing

_STATE = "weight.quant_state.bitsandbytes__"
_FOUR_BIT = (
    *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax"),
    *("weight.nested_quant_map", f"{_STATE}nf4", f"{_STATE}fp4"),
)
_ENDINGS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "awq gemv": ("qweight", "qzeros", "scales"),
    "awq gemv_fast": ("qweight", "scales", "scaled_zeros", "qzeros"),
    "4bit": _FOUR_BIT,
    "8bit": ("weight", "SCB", "weight_format"),
    "fp8": ("weight", "weight_scale_inv"),
}
_BIASLESS = ("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Shape = tuple[int, ...]


def unpacked(tensors: Mapping[str, BaseTensor], config: Mapping[str, Any]) -> dict[str, BaseTensor]:
    """The tensors of a base as a merge sees them: those of a quantised one decoded.

    Raises:
        InputError: it is packed in a way that cannot be checked.
    """
    said = config.get("quantization_config")
    if not said:
        return dict(tensors)
    method = _method(said)
    modules = _modules(tensors, _ENDINGS[method])
    used = {part.entry.name for parts in modules.values() for part in parts.values()}
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    for module, parts in modules.items():
        name = f"{module}.weight"
        try:
            rest[name] = _weight(name, method, parts, _said_of(module, said))
        except (KeyError, TypeError, ValueError, OSError) as error:
            what = f"its parts cannot be understood ({error!r})"
            raise refuse(what, f"tensor {name!r} of the base", _REMEDY) from error
    empty = set(_empty(rest)) if config.get("model_type") in ("qwen2", "qwen2_moe") else set()
    return {name: tensor for name, tensor in rest.items() if name not in empty}


def _modules(
    tensors: Mapping[str, BaseTensor], endings: Sequence[str]
) -> dict[str, dict[str, BaseTensor]]:
    """The parts of each packed weight; a weight of floats alone is none."""
    modules: dict[str, dict[str, BaseTensor]] = {}
    for name, tensor in tensors.items():
        for ending in endings:
            if name.endswith(f".{ending}"):
                modules.setdefault(name.removesuffix(f".{ending}"), {})[ending] = tensor
    return {
        path: parts
        for path, parts in modules.items()
        if parts.keys() != {"weight"} or parts["weight"].entry.dtype not in FLOATS
    }


def _empty(tensors: Mapping[str, BaseTensor]) -> Iterator[str]:
    """Biases of zeros beside packed weights, where a Qwen2 has none."""
    for name, tensor in tensors.items():
        weight = tensors.get(f"{name.removesuffix('.bias')}.weight")
        if not name.endswith(_BIASLESS) or weight is None or weight.packing is None:
            continue
        if not _bytes_of(tensor).any():
            yield name


def rounded(tensors: Mapping[str, BaseTensor]) -> dict[str, BaseTensor]:
    """The tensors of a Qwen2 as QLoRA trains on them: every linear layer but the head in NF4."""
    return {
        name: BaseTensor(
            path=tensor.path,
            entry=replace(tensor.entry, start=0),
            packing=Packing(method="nf4", stored=(("weight", tensor),)),
        )
        if name.endswith("_proj.weight")
        else tensor
        for name, tensor in tensors.items()
    }


_REMEDY = "Check without --level numeric"


def _method(said: Any) -> str:
    method = said.get("quant_method") if isinstance(said, dict) else None
    if method == "bitsandbytes":
        method = "8bit" if said.get("load_in_8bit") or said.get("_load_in_8bit") else "4bit"
    if method == "awq":
        named = [said.get(name) for name in ("version", "format", "checkpoint_format")]
        layout = str(next(filter(None, named), "gemm")).lower()
        method = "awq" if layout == "gemm" else f"awq {layout}"
    if method not in _ENDINGS:
        what = f"a base that is quantised by {method!r} cannot be checked"
        raise refuse(what, "config.json of the base", _REMEDY)
    return str(method)


def _said_of(module: str, said: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fields of one module: the first rule of GPTQ's ``dynamic`` that matches it may have others.

    Raises:
        ValueError: the rule is that it is not packed.
    """
    for rule, others in (said.get("dynamic") or {}).items():
        if re.match(rule[2:] if rule[:2] in ("+:", "-:") else rule, module):
            if rule.startswith("-:"):
                raise ValueError(f"the rule {rule!r} is that it is not packed")
            return {**said, **others}
    return said


def _weight(
    name: str, method: str, parts: Mapping[str, BaseTensor], said: Mapping[str, Any]
) -> BaseTensor:
    """The decoded tensor; raises where a part is missing or does not fit."""
    shape, dtype, wanted, settings = _READERS[method](parts, said)
    for ending, sizes in wanted.items():
        if parts[ending].entry.shape != sizes:
            raise ValueError(f"{ending} is {list(parts[ending].entry.shape)}, not {list(sizes)}")
    size = math.prod(shape) * np.dtype(FLOATS[dtype].storage).itemsize
    entry = TensorEntry(name=name, dtype=dtype, shape=shape, start=0, nbytes=size)
    packing = Packing(
        method=method,
        stored=tuple(parts.items()),
        said=tuple(settings.items()),
    )
    return BaseTensor(
        path=min((part.path for part in parts.values()), key=str), entry=entry, packing=packing
    )


_Read = tuple[Shape, str, dict[str, Shape], dict[str, Any]]
"""Shape and dtype of the weight, shapes that its parts must have, and what decodes them."""


def _gptq(parts: Mapping[str, BaseTensor], said: Mapping[str, Any]) -> _Read:
    bits = said.get("bits", 4)
    words, out = parts["qweight"].entry.shape
    width = words * 32 // bits
    size = said.get("group_size") or 128
    size = width if size == -1 else size
    groups = -(-width // size)
    wanted: dict[str, Shape] = {"qzeros": (groups, out * bits // 32), "scales": (groups, out)}
    if said.get("desc_act") or "g_idx" in parts:
        wanted["g_idx"] = (width,)
    second = "gptq_v2" in (said.get("checkpoint_format"), said.get("format"))
    settings = {"bits": bits, "group": size, "less": 0 if second else 1}
    return (out, width), parts["scales"].entry.dtype, wanted, settings


def _awq(parts: Mapping[str, BaseTensor], said: Mapping[str, Any]) -> _Read:
    width, words = parts["qweight"].entry.shape
    size = said.get("group_size") or 128
    size = width if size == -1 else size
    wanted: dict[str, Shape] = {
        "qzeros": (width // size, words),
        "scales": (width // size, 8 * words),
    }
    return (8 * words, width), parts["scales"].entry.dtype, wanted, {"group": size}


def _awq_gemv(parts: Mapping[str, BaseTensor], said: Mapping[str, Any]) -> _Read:
    (out, words), size = parts["qweight"].entry.shape, said.get("group_size") or 128
    room = _room(8 * words, size)
    wanted: dict[str, Shape] = {"qzeros": (out, room // 8), "scales": (out, room)}
    return (out, 8 * words), parts["scales"].entry.dtype, wanted, {"group": size}


def _awq_fast(parts: Mapping[str, BaseTensor], said: Mapping[str, Any]) -> _Read:
    (rows, width), size = parts["qweight"].entry.shape, said.get("group_size") or 128
    (zeros,) = parts.keys() & {"scaled_zeros", "qzeros"}
    wanted: dict[str, Shape] = dict.fromkeys(("scales", zeros), (_room(width, size), 4 * rows))
    if width % 64:
        raise ValueError(f"{width} columns are no multiple of 64")
    return (4 * rows, width), parts["scales"].entry.dtype, wanted, {"group": size}


def _room(width: int, size: int) -> int:
    """For how many groups there is room: of small ones for 8, 16 or 32, or a multiple."""
    if width % size or (size not in (32, 64) and size < 128):
        raise ValueError(f"groups of {size} among {width} columns")
    step = {32: 32, 64: 16}.get(size, 8)
    return -(-width // size // step) * step


def _four_bit(parts: Mapping[str, BaseTensor], said: Mapping[str, Any]) -> _Read:
    del said
    (state,) = (part for ending, part in parts.items() if ending.startswith(_STATE))
    text = json.loads(_bytes_of(state).tobytes())
    out, width = text["shape"]
    block, count = text["blocksize"], out * width
    blocks = -(-count // block)
    wanted: dict[str, Shape] = {"weight.absmax": (blocks,), "weight.quant_map": (16,)}
    if parts["weight"].entry.nbytes != -(-count // 2):
        raise ValueError(f"weight has {parts['weight'].entry.nbytes} bytes")
    settings = {"block": block}
    if "nested_blocksize" in text:
        nested = text["nested_blocksize"]
        wanted |= {"weight.nested_absmax": (-(-blocks // nested),)}
        wanted |= {"weight.nested_quant_map": (256,)}
        settings |= {"nested": nested, "offset": text["nested_offset"]}
    return (out, width), _DTYPES[text["dtype"]], wanted, settings


def _int8(parts: Mapping[str, BaseTensor], said: Mapping[str, Any]) -> _Read:
    del said
    out, width = parts["weight"].entry.shape
    return (out, width), "F32", {"SCB": (out,)}, {}


def _fp8(parts: Mapping[str, BaseTensor], said: Mapping[str, Any]) -> _Read:
    out, width = parts["weight"].entry.shape
    block = said.get("weight_block_size", [128, 128])
    scale = parts["weight_scale_inv"].entry
    if parts["weight"].entry.dtype != "F8_E4M3" or scale.dtype not in FLOATS:
        raise ValueError(f"dtypes are {parts['weight'].entry.dtype} and {scale.dtype}")
    wanted: dict[str, Shape] = {}
    if block is not None:
        wanted["weight_scale_inv"] = (-(-out // block[0]), -(-width // block[1]))
    elif math.prod(scale.shape) != 1:
        raise ValueError(f"weight_scale_inv is {list(scale.shape)}, not one number")
    return (out, width), "F32", wanted, {"block": tuple(block or (out, width))}


_READERS = {
    "gptq": _gptq, "awq": _awq, "awq gemv": _awq_gemv, "awq gemv_fast": _awq_fast,
    "4bit": _four_bit, "8bit": _int8, "fp8": _fp8,
}  # fmt: skip


def _bytes_of(tensor: BaseTensor) -> Any:
    entry = tensor.entry
    return read_range(tensor.path, entry.start, entry.nbytes)

"""safetensors headers: every honest one is read back exactly, every lie is an InputError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from handmade import write_raw
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import assert_same_tensors, make_base, read_tensors
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from merge_core.errors import InputError
from merge_core.layout import (
    ALIGNMENT,
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    TensorSpec,
    header_length,
    lay_out,
    parse_header,
    tensor_bytes,
)
from merge_core.stores.location import locate
from merge_core.weight_files import read_header

TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
Wanted = list[tuple[str, str, tuple[int, ...]]]

names = st.text(max_size=12).filter(lambda name: name != "__metadata__")
sizes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensors = st.dictionaries(names, st.tuples(st.sampled_from(sorted(TORCH)), sizes), max_size=6)
notes = st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=3)
large = st.sampled_from([(2048,), (4, 1024), (3, 2048), (1024,), (0, 4096)])
outputs = st.dictionaries(
    names, st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), sizes | large), max_size=8
)


def read(content: bytes) -> tuple[TensorSpec, ...]:
    length = header_length(content[:8], len(content), "here")
    return parse_header(content[8 : 8 + length], len(content), "here")


@given(tensors, st.none() | notes)
@settings(max_examples=200)
def test_whatever_safetensors_writes_is_read_back_exactly(
    drawn: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    content = save(
        {n: torch.zeros(shape, dtype=TORCH[d]) for n, (d, shape) in drawn.items()}, metadata
    )

    found = read(content)

    assert {t.name: (t.dtype, t.shape) for t in found} == drawn
    reference = {name: fields["data"] for name, fields in safetensors.deserialize(content)}
    for tensor in found:
        assert tensor.nbytes == len(reference[tensor.name])
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == reference[tensor.name]
    offsets = [tensor.offset for tensor in found]
    assert offsets == sorted(offsets)


@given(st.dictionaries(names, st.binary(min_size=1, max_size=9), min_size=1, max_size=6))
def test_every_tensor_is_found_where_its_bytes_are(drawn: dict[str, bytes]) -> None:
    content = save({n: torch.frombuffer(bytearray(d), dtype=torch.uint8) for n, d in drawn.items()})

    assert {t.name: content[t.offset : t.offset + t.nbytes] for t in read(content)} == drawn


@given(outputs)
@settings(max_examples=200)
def test_a_file_laid_out_is_read_by_safetensors_and_starts_on_pages(
    drawn: dict[str, tuple[str, tuple[int, ...]]],
) -> None:
    wanted: Wanted = [(name, *fields) for name, fields in drawn.items()]
    layout = lay_out(wanted)
    content = layout.header + bytes(layout.size - len(layout.header))

    assert len(layout.header) % ALIGNMENT == 0
    assert {t.name: (t.dtype, t.shape) for t in layout.tensors} == drawn
    assert set(read(content)) == set(layout.tensors)
    reference = dict(safetensors.deserialize(content))
    assert {n: len(f["data"]) for n, f in reference.items()} == {
        name: tensor_bytes(*fields) for name, fields in drawn.items()
    }
    for tensor in layout.tensors:
        if tensor.nbytes % ALIGNMENT == 0:
            assert tensor.offset % ALIGNMENT == 0, tensor
    odd = [(DTYPE_BYTES[t.dtype], t.nbytes) for t in layout.tensors if t.nbytes % ALIGNMENT]
    assert odd == sorted(odd, reverse=True)


def test_the_layout_is_the_same_each_time_and_byte_for_byte_this() -> None:
    wanted: Wanted = [("norm", "F32", (3,)), ("w", "BF16", (2, 1024)), ("b", "F32", (5,))]

    layout = lay_out(wanted)

    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"w":{"dtype":"BF16","shape":[2,1024],"data_offsets":[0,4096]},'
        b'"b":{"dtype":"F32","shape":[5],"data_offsets":[4096,4116]},'
        b'"norm":{"dtype":"F32","shape":[3],"data_offsets":[4116,4128]}}'
    )
    assert layout.header == (4088).to_bytes(8, "little") + text.ljust(4088)
    assert layout.size == 4096 + 4128
    assert lay_out(wanted) == layout


def test_transformers_loads_a_file_that_was_laid_out(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    path = base / "model.safetensors"
    before = {name: tensor.clone() for name, tensor in read_tensors(base).items()}
    specs = read_header(locate(path.parent), path.name).tensors
    layout = lay_out((t.name, t.dtype, t.shape) for t in specs)
    old, new = path.read_bytes(), bytearray(layout.header.ljust(layout.size))
    sources = {t.name: old[t.offset : t.offset + t.nbytes] for t in specs}
    for tensor in layout.tensors:
        new[tensor.offset : tensor.offset + tensor.nbytes] = sources[tensor.name]
    path.write_bytes(new)

    model, info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)

    assert not any(info.values())
    assert_same_tensors(dict(model.state_dict()), before)


def entry(begin: Any, end: Any, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [4] if shape is None else shape, "data_offsets": [begin, end]}


TWO = {"a": entry(0, 4), "b": entry(4, 8)}


def text(**changes: Any) -> bytes:
    """A header of tensors ``a`` and ``b`` of four bytes each, with changes; None removes one."""
    return json.dumps({k: v for k, v in {**TWO, **changes}.items() if v is not None}).encode()


LIES: dict[str, tuple[bytes, str]] = {
    "a name twice": (
        b'{"a":%s,"b":%s,"a":%s}'
        % tuple(json.dumps(e).encode() for e in (*TWO.values(), entry(0, 4))),
        "names 'a' twice",
    ),
    "a field twice": (text()[:-2] + b',"dtype":"U8"}}', "names 'dtype' twice"),
    "a hole": (text(b=entry(5, 9)), "leaves a hole"),
    "a hole at the start": (text(a=None), "leaves a hole"),
    "an overlap": (text(b=entry(3, 7)), "overlaps"),
    "the same bytes twice": (text(b=entry(0, 4)), "overlaps"),
    "data beyond the end": (text(c=entry(8, 12)), "truncated"),
    "trailing bytes": (text(b=None), "trailing bytes"),
    "size and shape that disagree": (text(a=entry(0, 4, shape=[5])), "takes 5 bytes"),
    "a negative offset": (text(a=entry(-4, 0)), "natural numbers"),
    "a negative size": (text(a=entry(0, 4, shape=[-2, -2])), "natural numbers"),
    "a float": (text(a=entry(0, 4.0)), "natural numbers"),
    "a boolean": (text(a=entry(False, 4)), "natural numbers"),
    "a boolean size": (text(a=entry(0, 4, shape=[4, True])), "natural numbers"),
    "three offsets": (text(a={**TWO["a"], "data_offsets": [0, 2, 4]}), "natural numbers"),
    "a shape that is a number": (text(a=entry(0, 4, shape=4)), "natural numbers"),
    "end before begin": (text(a=entry(4, 0)), "hold -4"),
    "an unknown dtype": (text(a=entry(0, 4, dtype="F4")), "'F4' is not one"),
    "a dtype that is a list": (text(a=entry(0, 4, dtype=["U8"])), "is not one"),
    "no dtype": (text(a={"shape": [4], "data_offsets": [0, 4]}), "lacks dtype"),
    "an entry that is a list": (text(a=[]), "lacks dtype"),
    "metadata of numbers": (text(__metadata__={"n": 1}), "__metadata__"),
    "metadata that is a list": (text(__metadata__=[]), "__metadata__"),
    "NUL padding": (text() + b"\0\0\0", "no JSON"),
    "two objects": (text() + b"{}", "no JSON"),
    "no object": (b"[1]", "no JSON object"),
    "nothing": (b"", "no JSON"),
    "NaN": (text(a=entry(0, float("nan"))), "natural numbers"),
    "no UTF-8": (text().replace(b'"a"', b'"\xff"'), "no JSON"),
    "half a surrogate pair": (text().replace(b'"a"', b'"\\ud800"'), "no JSON"),
    "huge nesting": (b"[" * 100_000, "no JSON"),
    "huge nesting in a shape": (b'{"a":' + b"[" * 100_000, "no JSON"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", "no JSON"),
    "a size of 4000 digits": (text(a=entry(0, 4, shape=[10**4000])), "natural numbers"),
    "sizes whose product is astronomic": (text(a=entry(0, 4, shape=[1 << 62] * 64)), "too many"),
    "a million dimensions": (text(a=entry(0, 4, shape=[1] * 10**6)), "natural numbers"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_an_input_error_that_says_what_is_wrong(lie: str, tmp_path: Path) -> None:
    header, message = LIES[lie]
    path = write_raw(tmp_path / "lie.safetensors", header, bytes(8))

    with pytest.raises(InputError, match=message) as caught:
        read_header(locate(path.parent), path.name)

    assert all("lie.safetensors" in problem.where for problem in caught.value.problems)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"1234567", "7 bytes are too few"),
        ((9).to_bytes(8, "little") + b"{}", "truncated: the header ends at byte 17"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "exceeds the format's 100 MB"),
        (b"\xff" * 16, "exceeds the format's 100 MB"),
    ],
)
def test_a_file_without_room_for_its_header_is_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(content)

    with pytest.raises(InputError, match=message):
        read_header(locate(path.parent), path.name)


def test_a_header_of_100_mb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "long.safetensors", b"")
    with path.open("r+b") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate(1 << 41)  # sparse: the length would fit

    with pytest.raises(InputError, match="100 MB"):
        read_header(locate(path.parent), path.name)


HONEST = save({"a": torch.arange(3), "b": torch.zeros(2, 2), "é": torch.zeros(0)}, {"format": "pt"})
Change = Callable[[bytearray], None]


@given(st.data())
@settings(max_examples=300)
@example(None)
def test_damaged_bytes_are_read_as_something_valid_or_refused(data: st.DataObject | None) -> None:
    content = bytearray(HONEST)
    if data is not None:
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, len(content) - 1))
            content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        found = read(bytes(content))
    except InputError:
        return
    assert sum(t.nbytes for t in found) == len(content) - 8 - int.from_bytes(content[:8], "little")

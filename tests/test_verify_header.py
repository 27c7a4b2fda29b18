"""The header reader of ``merge_core.verify``: what safetensors writes, and hostile bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.torch import save

from merge_core.stores.location import locate
from merge_core.verify import FileCheck, check_file
from merge_core.verify.header import TensorEntry, parse_header, read_header
from merge_core.verify.strict_json import MalformedError

WRITABLE = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
}

tensors = st.builds(
    torch.zeros,
    st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(list(WRITABLE)),
)
checkpoints = st.dictionaries(
    st.text(min_size=1, max_size=9).filter(lambda name: name != "__metadata__"),
    tensors,
    max_size=5,
)
# Not empty: without tensors safetensors 0.8 writes invalid JSON for it.
texts = st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1)


@given(checkpoints, st.none() | texts)
def test_reads_what_safetensors_writes(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None
) -> None:
    blob = save(tensors, metadata)

    entries = parse_header(blob, len(blob))

    assert {e.name: (e.dtype, e.shape, e.nbytes) for e in entries} == {
        name: (WRITABLE[t.dtype], tuple(t.shape), t.numel() * t.element_size())
        for name, t in tensors.items()
    }
    assert [e.start + e.nbytes for e in entries] == [e.start for e in entries[1:]] + [len(blob)] * (
        len(entries) > 0
    )


@settings(max_examples=200)
@given(checkpoints, st.data())
def test_mutated_files_are_read_as_safetensors_reads_them_or_refused(
    tensors: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    blob = bytearray(save(tensors))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(blob) - 1))
        kind = data.draw(st.sampled_from(["replace", "delete", "insert"]))
        if kind == "delete":
            del blob[place]
        else:
            byte = data.draw(st.sampled_from(b'0129-{}[]",:\\. \x00\xff') | st.integers(0, 255))
            blob[place : place + (kind == "replace")] = bytes([byte])
        if not blob:
            break

    try:
        ours = {e.name: (e.dtype, list(e.shape)) for e in parse_header(bytes(blob), len(blob))}
    except MalformedError:
        return

    theirs = dict(deserialize(bytes(blob)))
    assert ours == {name: (t["dtype"], t["shape"]) for name, t in theirs.items()}


@given(st.binary(max_size=64))
def test_random_bytes_never_crash(blob: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_header(b"\xff" + blob, 1 + len(blob))


def file_of(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(*offsets: Any, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    shape = [offsets[1] - offsets[0]] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


HOSTILE = {
    "no header": (b"\x01\0\0", "the file has 3 bytes"),
    "a header longer than the file": (b"\xff" * 8, "declares a header of"),
    "a header over the limit": (file_of(b"{}", b"")[:1] + b"\0\0\0\1\0\0\0{}", "declares a header"),
    "no JSON": (file_of(b"{", b""), "it is not JSON"),
    "no object": (file_of([], b""), "it is not a JSON object"),
    "deep nesting": (file_of(b"[" * 100_000, b""), "nests too deep"),
    "a huge number": (file_of(b'{"a": ' + b"9" * 5000 + b"}", b""), "it is not JSON"),
    "NaN": (file_of(b'{"a": NaN}', b""), "NaN is not JSON"),
    "half a character": (file_of(b'{"\\ud800": {}}', b""), "not valid Unicode"),
    "no UTF-8": (file_of(b'{"\xff": {}}', b""), "it is not JSON"),
    "padding with NUL": (file_of(b"{}\0\0", b""), "it is not JSON"),
    "a name twice": (
        file_of(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b""),
        "key 'a' stands there twice",
    ),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}, b""), "__metadata__ maps"),
    "no description": (file_of({"a": 1}, b""), "'a' has no description"),
    "an unknown dtype": (file_of({"a": tensor(0, 1, dtype="U7")}, b"1"), "unknown dtype 'U7'"),
    "a dtype that is a list": (file_of({"a": tensor(0, 1, dtype=[])}, b"1"), "unknown dtype []"),
    "a negative size": (file_of({"a": tensor(0, 1, shape=[-1])}, b"1"), "shape [-1]"),
    "a size that is no integer": (file_of({"a": tensor(0, 1, shape=[1.0])}, b"1"), "shape [1.0]"),
    "a size that is true": (file_of({"a": tensor(0, 1, shape=[True])}, b"1"), "shape [True]"),
    "an overflowing size": (file_of({"a": tensor(0, 1, shape=[2**64])}, b"1"), "has shape"),
    "one offset": (file_of({"a": tensor(0, shape=[1])}, b"1"), "data_offsets [0]"),
    "offsets backwards": (file_of({"a": tensor(1, 0, shape=[1])}, b"1"), "data_offsets [1, 0]"),
    "a lying shape": (file_of({"a": tensor(0, 4, shape=[3])}, b"1234"), "has 4 bytes, U8 [3]"),
    "half a byte": (file_of({"a": tensor(0, 1, shape=[3], dtype="F4")}, b"1"), "needs 1.5"),
    "an overlap": (
        file_of({"a": tensor(0, 2), "b": tensor(1, 3)}, b"123"),
        "an overlap before tensor 'b', at data byte 2",
    ),
    "a hole": (
        file_of({"a": tensor(0, 1), "b": tensor(2, 3)}, b"123"),
        "a hole before tensor 'b', at data byte 1",
    ),
    "a truncated file": (file_of({"a": tensor(0, 2)}, b"1"), "end at data byte 2, the file at 1"),
    "trailing bytes": (file_of({"a": tensor(0, 2)}, b"123"), "end at data byte 2, the file at 3"),
}


@pytest.mark.parametrize("story", HOSTILE)
def test_hostile_files_are_findings(story: str, tmp_path: Path) -> None:
    blob, reason = HOSTILE[story]
    path = tmp_path / "model.safetensors"
    path.write_bytes(blob)

    result = check_file(FileCheck(file=locate(path), level="structure", rows=None))

    [finding] = result.findings
    assert (finding.check, finding.where) == ("header", "model.safetensors")
    assert reason in finding.what


def test_offsets_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    header = {"late": tensor(2, 6, dtype="F32", shape=[]), "early": tensor(0, 2)}
    (tmp_path / "x").write_bytes(file_of(header, b"123456"))
    start = 8 + len(json.dumps(header))

    assert read_header(locate(tmp_path / "x")) == (
        TensorEntry(name="early", dtype="U8", shape=(2,), start=start, nbytes=2),
        TensorEntry(name="late", dtype="F32", shape=(), start=start + 2, nbytes=4),
    )


def test_a_missing_file_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    result = check_file(FileCheck(file=locate(path), level="digest", rows=()))

    assert [(f.check, f.where) for f in result.findings] == [("read", "model.safetensors")]

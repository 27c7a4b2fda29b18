"""Reading and digests: any offset, any size, direct or not, always the same bytes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merged_by_hand import naive_digest, write_weights

from merge_core.stores.location import locate
from merge_core.verify import FileCheck, check_file, digests
from merge_core.verify.ledger import Row
from merge_core.verify.reading import Lanes, Reader

# Each example overwrites the files of the one before.
SAME_TMP_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_bytes(path: Path, contents: dict[str, bytes]) -> None:
    """A file of U8 tensors without any padding: they start wherever the header ends."""
    header, end = {}, 0
    for name, data in contents.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(contents.values()))


def row(name: str, nbytes: int, digest: str) -> Row:
    return Row(
        tensor=name,
        file="model.safetensors",
        action="copied",
        dtype="U8",
        shape=(nbytes,),
        nbytes=nbytes,
        digest=digest,
    )


@SAME_TMP_PATH
@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=4), st.randoms())
def test_ranges_are_read_exactly(tmp_path: Path, sizes: list[int], random: Any) -> None:
    data = random.randbytes(sum(sizes))
    path = tmp_path / "data"
    path.write_bytes(data)

    with Reader(str(path)) as reader, Lanes(40_000) as lanes:
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        ranges = list(zip(starts, sizes, strict=True))
        read = lanes.map(lambda r, buffers: reader.read(*r, buffers[0]).tobytes(), ranges)

        assert list(read) == [data[start : start + size] for start, size in ranges]


def test_reading_past_the_end_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"x" * 5000)

    with Reader(str(tmp_path / "data")) as reader, Lanes(8192) as lanes:
        with pytest.raises(OSError, match="the file ends at byte 5000") as caught:
            list(lanes.map(lambda n, buffers: reader.read(0, n, buffers[0]), [5001]))

        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("refused", ["open", "read"])
def test_a_file_system_without_direct_reads_gives_the_same(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 64)
    direct: set[int] = set()
    real_open, real_preadv = os.open, os.preadv

    def open_(name: str, flags: int) -> int:
        if not flags & os.O_DIRECT:
            return real_open(name, flags)
        if refused == "open":
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        direct.add(descriptor := real_open(name, flags))
        return descriptor

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    with Reader(str(path)) as reader, Lanes(8192) as lanes:
        read = lanes.map(lambda n, buffers: reader.read(n, 5000, buffers[1]).tobytes(), [4097])

        assert list(read) == [path.read_bytes()[4097:9097]]
    assert bool(direct) == (refused == "read")


def test_an_unreadable_sector_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "model.safetensors"
    write_weights(path, {"a": torch.ones(4)})
    monkeypatch.setattr(os, "preadv", fail)

    result = check_file(FileCheck(file=locate(path), level="digest", rows=None))

    assert [(f.check, f.where) for f in result.findings] == [("read", "model.safetensors")]
    assert "Input/output error" in result.findings[0].what


@SAME_TMP_PATH
@given(st.lists(st.integers(0, 300), max_size=5), st.integers(1, 100), st.randoms())
def test_digests_are_those_of_the_description(
    tmp_path: Path, sizes: list[int], cell: int, random: Any
) -> None:
    path = tmp_path / "model.safetensors"
    contents = {f"t{n}": random.randbytes(size) for n, size in enumerate(sizes)}
    write_bytes(path, contents)
    rows = tuple(row(name, len(data), naive_digest(data, cell)) for name, data in contents.items())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "CELL_BYTES", cell)
        result = check_file(FileCheck(file=locate(path), level="digest", rows=rows))

    assert result.findings == ()


def test_known_digests() -> None:
    """Frozen: whoever changes the grid or the hash breaks every ledger that was ever written."""
    assert naive_digest(b"") == digests.tensor_digest([]) == "99aa06d3014798d86001c324468d497f"
    assert naive_digest(b"raymeld") == "d863b75d68558a879f2e90fc552c4a74"


@pytest.mark.parametrize("nbytes", [0, 1, 4096, (8 << 20) - 1, 8 << 20, (8 << 20) + 1, 20 << 20])
def test_files_are_hashed_on_the_8_mib_grid(nbytes: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensor = torch.arange(nbytes, dtype=torch.int32).to(torch.uint8)
    data = tensor.numpy().tobytes()
    write_bytes(path, {"t": data})

    good = check_file(
        FileCheck(file=locate(path), level="digest", rows=(row("t", nbytes, naive_digest(data)),))
    )
    bad = check_file(
        FileCheck(file=locate(path), level="digest", rows=(row("t", nbytes, "0" * 32),))
    )

    assert (good.findings, good.bytes_read, good.tensors) == ((), nbytes, 1)
    assert [(f.check, f.where) for f in bad.findings] == [("digest", "model.safetensors: t")]
    assert naive_digest(data) in bad.findings[0].what


@SAME_TMP_PATH
@given(st.integers(0, 8 * 300 - 1))
def test_any_flipped_bit_is_found(tmp_path: Path, bit: int) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.linspace(-1, 1, 50), "b": torch.linspace(0, 9, 50, dtype=torch.bfloat16)}
    write_weights(path, tensors)
    rows = tuple(
        Row(
            tensor=name,
            file=path.name,
            action="copied",
            dtype={4: "F32", 2: "BF16"}[tensor.element_size()],
            shape=(50,),
            nbytes=50 * tensor.element_size(),
            digest=naive_digest(tensor.view(torch.uint8).numpy().tobytes()),
        )
        for name, tensor in tensors.items()
    )
    blob = bytearray(path.read_bytes())
    blob[4096 + bit // 8] ^= 1 << bit % 8
    path.write_bytes(blob)

    result = check_file(FileCheck(file=locate(path), level="digest", rows=rows))

    name = "a" if bit < 8 * 200 else "b"
    assert [(f.check, f.where) for f in result.findings] == [("digest", f"{path.name}: {name}")]

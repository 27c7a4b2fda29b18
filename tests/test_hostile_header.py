"""A weight file whose size, header or offsets are wrong is refused and named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import header_of, rewrite_header
from scenes import ONE, TWO, BaseScene, Q


def shift(file: Path, begin: int, end: int) -> None:
    """Move the second tensor's offsets."""
    header = header_of(file)
    names = sorted(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"])
    first, behind = header[names[1]]["data_offsets"]
    header[names[1]]["data_offsets"] = [first + begin, behind + end]
    rewrite_header(file, header)


def name_twice(file: Path) -> None:
    header = header_of(file)
    twin = json.dumps({Q: header[next(k for k in header if k != "__metadata__")]})
    rewrite_header(file, f"{json.dumps(header)[:-1]},{twin[1:-1]},{twin[1:]}".encode())


def claim_header(file: Path, length: int, size: int) -> None:
    with file.open("r+b") as data:
        data.write(length.to_bytes(8, "little") + b"\0")
        data.truncate(size)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: os.truncate(f, f.stat().st_size - 1), "truncated: data ends at byte"),
        (lambda f: os.truncate(f, 20), "truncated: the header ends at byte"),
        (lambda f: os.truncate(f, 5), "5 bytes are too few"),
        (lambda f: os.truncate(f, f.stat().st_size + 1), "trailing bytes"),
        (lambda f: shift(f, 0, 2), "its offsets hold"),
        (lambda f: shift(f, 10**12, 10**12), "leaves a hole"),
        (lambda f: shift(f, 2, 2), "leaves a hole"),
        (lambda f: shift(f, -2, -2), "overlaps the tensor before it"),
        (lambda f: claim_header(f, 100_000_001, 4096), "exceeds the format's 100 MB limit"),
        (lambda f: claim_header(f, 100_000_001, 100_000_009), "exceeds the format's 100 MB limit"),
        (lambda f: claim_header(f, 100_000_000, 100_000_008), "is no JSON"),
        (name_twice, f"names '{Q}' twice"),
        (Path.unlink, "which is missing"),
    ],
)
def test_a_damaged_weight_file_is_refused_and_named(
    scene: BaseScene, damage: Callable[[Path], None], said: str
) -> None:
    damage(scene.base / ONE)
    text = scene.refusal()
    assert said in text
    assert ONE in text
    assert TWO not in text

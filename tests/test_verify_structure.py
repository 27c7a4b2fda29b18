"""``verify`` names every breakage of config, index, files and ledger, and checks the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from merged_by_hand import (
    FIRST,
    INDEX,
    LEDGER,
    NORM,
    SECOND,
    found,
    read_rows,
    write_json,
    write_ledger,
    write_weights,
)
from safetensors.torch import load_file

from merge_core.verify import LEVELS, verify


def edit_index(out: Path, **changes: Any) -> None:
    path = out / INDEX
    index = json.loads(path.read_text())
    index["weight_map"].update(changes.pop("weight_map", {}))
    write_json(path, {**index, **changes})


def move_tensor(out: Path) -> None:
    """Into the other file, with index and ledger none the wiser."""
    first, second = load_file(out / FIRST), load_file(out / SECOND)
    second[NORM] = first.pop(NORM)
    write_weights(out / FIRST, first)
    write_weights(out / SECOND, second)


def duplicate_tensor(out: Path) -> None:
    write_weights(out / SECOND, {**load_file(out / SECOND), NORM: load_file(out / FIRST)[NORM]})
    index = json.loads((out / INDEX).read_text())
    total = index["metadata"]["total_size"] + 128
    edit_index(out, metadata={"total_size": total})


def cut_file(out: Path) -> None:
    blob = (out / FIRST).read_bytes()
    (out / FIRST).write_bytes(blob[:-1])


def change_row(field: str, value: Any) -> Callable[[Path], None]:
    def plant(out: Path) -> None:
        rows = read_rows(out)
        for row in rows:
            if row["tensor"] == NORM:
                row[field] = value
        write_ledger(out, rows)

    return plant


def drop_row(out: Path) -> None:
    write_ledger(out, [row for row in read_rows(out) if row["tensor"] != NORM])


def add_row(out: Path) -> None:
    rows = read_rows(out)
    write_ledger(out, [*rows, {**rows[0], "tensor": "model.more"}])


def repeat_row(out: Path) -> None:
    rows = read_rows(out)
    write_ledger(out, [*rows, rows[0]])


def drop_column(out: Path) -> None:
    write_ledger(out, [{"tensor": row["tensor"]} for row in read_rows(out)])


BREAKAGES: dict[str, tuple[Callable[[Path], object], list[tuple[str, str]]]] = {
    "no config": (lambda out: (out / "config.json").unlink(), [("config", "config.json")]),
    "half a config": (
        lambda out: (out / "config.json").write_text('{"a": '),
        [("config", "config.json")],
    ),
    "a file is missing": (
        lambda out: (out / SECOND).unlink(),
        [("files", SECOND), ("ledger", SECOND)],
    ),
    "a file too many": (
        lambda out: (out / "model-00003-of-00003.safetensors").write_bytes(b""),
        [("files", "model-00003-of-00003.safetensors")],
    ),
    "an old single file": (
        lambda out: shutil.copy(out / FIRST, out / "model.safetensors"),
        [("files", "model.safetensors")],
    ),
    "an old pickle": (
        lambda out: (out / "pytorch_model.bin").write_bytes(b""),
        [("files", "pytorch_model.bin")],
    ),
    "no index": (
        lambda out: (out / INDEX).unlink(),
        [
            ("files", "model.safetensors"),
            ("files", FIRST),
            ("files", SECOND),
            ("ledger", FIRST),
            ("ledger", SECOND),
        ],
    ),
    "half an index": (lambda out: (out / INDEX).write_text("{"), [("index", INDEX)]),
    "an index of another kind": (
        lambda out: (out / INDEX).write_text('{"weight_map": []}'),
        [("index", INDEX)],
    ),
    "an index that leads out": (
        lambda out: edit_index(out, weight_map={NORM: "../model.safetensors"}),
        [("index", INDEX)],
    ),
    "a wrong total_size": (
        lambda out: edit_index(out, metadata={"total_size": 27}),
        [("index", INDEX)],
    ),
    "no total_size": (lambda out: edit_index(out, metadata={}), [("index", INDEX)]),
    "a tensor in the other file": (
        move_tensor,
        [
            ("index", f"{FIRST}: {NORM}"),
            ("index", f"{SECOND}: {NORM}"),
            ("ledger", f"{FIRST}: {NORM}"),
            ("ledger", f"{SECOND}: {NORM}"),
        ],
    ),
    "a tensor in two files": (
        duplicate_tensor,
        [
            ("files", f"{SECOND}: {NORM}"),
            ("index", f"{SECOND}: {NORM}"),
            ("ledger", f"{SECOND}: {NORM}"),
        ],
    ),
    "a tensor that only the index has": (
        lambda out: edit_index(out, weight_map={"model.more": FIRST}),
        [("index", f"{FIRST}: model.more")],
    ),
    "a truncated file": (cut_file, [("header", FIRST)]),
    "an empty file": (lambda out: (out / FIRST).write_bytes(b""), [("header", FIRST)]),
    "another dtype in the ledger": (change_row("dtype", "F16"), [("ledger", f"{FIRST}: {NORM}")]),
    "another shape in the ledger": (change_row("shape", [8, 8]), [("ledger", f"{FIRST}: {NORM}")]),
    "another size in the ledger": (change_row("nbytes", 1), [("ledger", f"{FIRST}: {NORM}")]),
    "another file in the ledger": (
        change_row("file", "elsewhere.safetensors"),
        [("ledger", "elsewhere.safetensors"), ("ledger", f"{FIRST}: {NORM}")],
    ),
    "a null in the ledger": (change_row("digest", None), [("ledger", LEDGER)]),
    "a row too few": (drop_row, [("ledger", f"{FIRST}: {NORM}")]),
    "a row too many": (add_row, [("ledger", f"{FIRST}: model.more")]),
    "a row twice": (repeat_row, [("ledger", LEDGER)]),
    "a column too few": (drop_column, [("ledger", LEDGER)]),
    "no parquet": (lambda out: (out / LEDGER).write_bytes(b"x" * 99), [("ledger", LEDGER)]),
}


@pytest.mark.parametrize("story", BREAKAGES)
def test_structure_names_the_breakage(story: str, finished: Path) -> None:
    damage, expected = BREAKAGES[story]
    damage(finished)

    assert found(finished, "structure") == expected


@pytest.mark.parametrize("level", LEVELS)
def test_breakages_never_stop_a_deeper_check(level: str, finished: Path) -> None:
    """The file that is whole is still checked, and nothing raises."""
    cut_file(finished)
    (finished / "config.json").write_text("[]")

    checks = found(finished, level)

    assert ("header", FIRST) in checks
    assert ("config", "config.json") in checks
    assert not [where for check, where in checks if check != "load" and SECOND in where]


def test_a_missing_ledger_matters_from_digest_on(finished: Path) -> None:
    (finished / LEDGER).unlink()

    report = verify(finished, "structure")

    assert report.ok
    assert report.checks == ("config, index, headers, offsets, sizes and the list of files",)
    assert [found(finished, level) for level in ("digest", "numeric", "load")] == [
        [("ledger", LEDGER)]
    ] * 3


def test_before_the_commit_the_staged_config_counts(finished: Path) -> None:
    (finished / "config.json").rename(finished / ".raymeld" / "config.json")

    assert [found(finished, level, committed=False) for level in LEVELS] == [[]] * 4
    assert found(finished, "structure") == [("config", "config.json")]
    finding = verify(finished, "structure").findings[0]
    assert finding.what == "it is missing: this is an unfinished merge"
    (finished / ".raymeld" / "config.json").unlink()
    assert found(finished, "digest", committed=False) == [("config", ".raymeld/config.json")]

"""The rules that the source itself keeps: length, docstrings, frozen records, the README's tree."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
from handmade import TWO_LANES, Geometry, random_factors, random_tensors, write_adapter, write_base

from merge_core import errors
from merge_core.merge import merge
from merge_core.planner import make_plan

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    path
    for folder in (
        "merge_core",
        "merge_core/decoding",
        "merge_core/stores",
        "merge_core/updates",
        "merge_core/verify",
        "actors",
        "cluster",
        "cluster/report",
    )
    for path in (ROOT / folder).glob("*.py")
)
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]
RECORDS = ["plan", "trained", "ledger", "checkpoint", "adapter", "shards", "progress"]
ERRORS = sorted(
    (k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_a_module_has_at_most_300_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def undocumented(node: ast.AST, name: str) -> Iterator[str]:
    """Public definitions without a docstring; what a function defines inside is its own matter."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if child.name.startswith("_"):
            continue
        if ast.get_docstring(child) is None:
            yield f"{name}.{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, f"{name}.{child.name}")


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    assert list(undocumented(tree, path.stem)) == []


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_frozen(name: str) -> None:
    module = importlib.import_module(f"merge_core.{name}")
    records = [
        value
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
    ]
    assert records
    for record in records:
        assert record.__dataclass_params__.frozen, record
        assert "__slots__" in vars(record), record


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_crosses_processes_with_its_text_and_exit_code(
    kind: type[errors.RaymeldError],
) -> None:
    if kind is errors.InputError:
        error = kind([errors.Problem("is odd", "there", "Mend it"), errors.Problem("b", "c", "D")])
        wanted = "2 problems:\n  1. there: is odd. Mend it\n  2. c: b. D"
    else:
        error, wanted = kind("is odd", "there", "Mend it"), "there: is odd. Mend it"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(error) == str(again) == wanted
    assert again.exit_code == error.exit_code
    assert vars(again) == vars(error)


def test_the_exit_codes_are_those_that_the_readme_promises() -> None:
    codes = {kind.__name__: kind.exit_code for kind in ERRORS}
    special = {"InputError": 2, "VerificationError": 3, "InterruptedMergeError": 130}
    assert codes == {**dict.fromkeys(codes, 1), **special}


def test_the_example_recomputes_the_digests_of_the_ledger(tmp_path: Path) -> None:
    small, out = Geometry(layers=1), tmp_path / "out"
    base = write_base(tmp_path / "base", random_tensors(small), small.config)
    factors = random_factors(small.linear, {"model.layers.0.self_attn.q_proj": 4})
    adapter = write_adapter(tmp_path / "adapter", factors, r=4, lora_alpha=8)
    plan = make_plan(base, [adapter], shard_bytes=1)
    merge(plan, out, device="cpu", choice=TWO_LANES)
    command = [sys.executable, "-W", "error", ROOT / "examples" / "recompute_digests.py", out]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    printed = dict(line.split("  ")[::-1] for line in done.stdout.splitlines())
    rows = pyarrow.parquet.read_table(out / ".raymeld" / "ledger.parquet").to_pylist()
    assert printed == {row["tensor"]: row["digest"] for row in rows}
    assert printed.keys() == small.shapes.keys()

    file = min(out.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        "15 in the ledger, 1 differ model.embed_tokens.weight",
    )


def test_the_tree_in_the_readme_is_the_tree_on_disk() -> None:
    folder, named = "", set()
    (tree,) = re.findall(r"```\n(merge_core/ .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        named.add(folder if folder == name else folder + name)
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    found = {n for n in NAMES if not n.endswith("__init__.py") and "/verify/" not in n}
    assert found == {name for name in named if name.endswith(".py")}

"""``verify`` changes nothing, opens no connection, and shares no code with the merge."""

from __future__ import annotations

import ast
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from merged_by_hand import found
from models import edit_json

from merge_core import verify as package
from merge_core.verify import LEVELS, verify


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_touches_the_network(
    level: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    if level == "load":
        edit_json(finished / "config.json", _name_or_path="Qwen/Qwen1.5-0.5B")

    assert found(finished, level) == []


def test_inputs_are_left_as_they_are(finished: Path) -> None:
    def listing() -> list[tuple[str, int, int]]:
        paths = sorted(path for path in finished.rglob("*") if path.is_file())
        return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]

    before = listing()
    for level in LEVELS:
        verify(finished, level)

    assert listing() == before


def test_structure_and_digest_run_without_torch(finished: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from merge_core.verify import verify\n"
        f"assert verify(Path({str(finished)!r}), 'digest').ok\n"
        "assert not {'torch', 'transformers', 'peft', 'safetensors'} & set(sys.modules)"
    )
    root = Path(package.__file__).parents[2]

    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_the_package_shares_nothing_with_the_merge() -> None:
    allowed = {"numpy", "xxhash", "pyarrow", "torch", "transformers"} | sys.stdlib_module_names
    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                ways = ("merge_core.verify", "merge_core.stores")
                ours = name == "merge_core.errors" or name.startswith(ways)
                assert ours or name.split(".")[0] in allowed, (path.name, name)

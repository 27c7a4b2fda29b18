"""What the benchmarks of stores share: options, models, and rows in processes of their own."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints import FAMILY, config, make_adapter, make_checkpoint
from measure import drop_page_cache

HERE = Path(__file__).resolve().parent


def parser(text: str, *, model: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all of them have.

    Args:
        text: what the benchmark is.
        model: taken unless another one is asked for, and so are ``rounds``.
    """
    asked = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("--model", choices=FAMILY, default=model)
    asked.add_argument("--dir", type=Path, default=Path("/tmp/raymeld-bench"), help="on the disk")
    asked.add_argument("--rounds", type=int, default=rounds)
    asked.add_argument("--results", action="store_true", help="keep them in benchmarks/results")
    return asked


@contextlib.contextmanager
def models(options: argparse.Namespace, name: str) -> Iterator[Path]:
    """A directory with ``base`` and ``adapter``, as long as it is needed."""
    place: Path = options.dir / f"raymeld-bench-{name}-{options.model}"
    shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped
    place.mkdir(parents=True)
    make_checkpoint(config(options.model), place / "base")
    make_adapter(config(options.model), place / "adapter")
    yield place
    shutil.rmtree(place)


def weights_in(folder: Path) -> list[int]:
    """Bytes of each file of weights."""
    return [file.stat().st_size for file in sorted(folder.glob("*.safetensors"))]


def answer(script: str, words: Sequence[str]) -> Any:
    """What a benchmark's script says last, as JSON."""
    command = [sys.executable, str(HERE / script), *words]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


def one_round(
    number: int,
    rows: Mapping[str, Sequence[str]],
    titles: Mapping[str, str],
    before: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Every row once, beginning with another one each time.

    Args:
        rows: what ``storage_client.py`` is told, by the row's name.
        before: called before each.
    """
    names, found = list(rows), {}
    first = number % len(names)
    for name in names[first:] + names[:first]:
        before()
        os.sync()
        drop_page_cache()
        found[name] = answer("storage_client.py", rows[name])
        print(f"round {number + 1}: {found[name]['seconds']:6.2f} s  {titles[name]}", flush=True)
    return found

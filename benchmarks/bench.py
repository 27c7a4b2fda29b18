"""How fast a merge is, against copying the same files: one table, rounds paired. Linux only.

    python benchmarks/bench.py --model 4B --dir /a/disk/with/room --results

In every round each row runs once, in an order that rotates, under the same conditions (see
``measure``); ratios are taken within a round, since disks of shared machines change by the minute.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import machine
from checkpoints import FAMILY, config, make_adapter, make_checkpoint
from measure import INTERVAL, CommandError, Measured, measure
from report import Report, Row

from merge_core.architecture import expected_tensors
from merge_core.layout import tensor_bytes

HERE = Path(__file__).parent
SLACK = 2_000_000_000
"""Bytes of disk beyond base and result: adapters, Ray's session, and what others write."""

TITLES = {
    "cp": "cp -r",
    "copy-engine": "same engine, bytes copied, no arithmetic",
    "inline-structure": "raymeld inline, --verify structure",
    "inline": "raymeld inline",
    "ray-structure": "raymeld on Ray, --verify structure",
    "ray": "raymeld on Ray",
    "inline-structure-qv": "raymeld inline, --verify structure, q+v",
    "inline-structure-dora": "raymeld inline, --verify structure, DoRA",
    "peft": "PEFT merge_and_unload, save_pretrained",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """Where things lie below --dir."""

    base: Path
    adapter: Path
    adapter_qv: Path
    adapter_dora: Path
    out: Path
    log: Path

    @classmethod
    def below(cls, directory: Path, model: str) -> Workplace:
        """Everything of one model in a directory of its own."""
        root = directory.absolute() / f"raymeld-bench-{model}"
        return cls(
            base=root / "base",
            adapter=root / "adapter-all-r16",
            adapter_qv=root / "adapter-qv-r16",
            adapter_dora=root / "adapter-dora-r16",
            out=root / "out",
            log=root / "last.log",
        )


def main() -> None:
    options = _options()
    names = [name for name in TITLES if name in options.rows]
    place = Workplace.below(options.dir, options.model)
    place.base.parent.mkdir(parents=True, exist_ok=True)
    facts = machine.describe(place.base.parent)
    _check_space(options.model, place)
    command = "python " + shlex.join(sys.argv)
    with _inputs(options.model, place, keep=options.keep):
        commands = _commands(place)
        runs = _run_rounds({n: commands[n] for n in names}, options.rounds, options.model, place)
    report = Report(
        model=options.model,
        date=dt.datetime.now(dt.UTC).date().isoformat(),
        command=command,
        machine=facts,
        notes=_notes(options.rounds, runs, facts),
        rows=[Row(name=n, title=TITLES[n], command=commands[n], runs=runs[n]) for n in names],
    )
    print(report.text())
    if options.results:
        stem = f"{options.model}_{machine.hardware_name(facts)}_{report.date}"
        for path in report.write(options.results, stem):
            _say(f"wrote {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=FAMILY, default="4B")
    parser.add_argument("--dir", type=Path, default=Path("/tmp/raymeld-bench"), help="on the disk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--rows", nargs="+", choices=TITLES, default=[n for n in TITLES if n != "peft"]
    )
    parser.add_argument("--peft", action="store_true", help="run PEFT too, in the last round only")
    parser.add_argument(
        "--keep", action="store_true", help="leave the checkpoint for the next time"
    )
    parser.add_argument(
        "--results",
        type=Path,
        nargs="?",
        const=HERE / "results",
        help="write Markdown and JSON there (default: benchmarks/results); replaces today's",
    )
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.peft:
        options.rows.append("peft")
    return options


def _commands(place: Workplace) -> dict[str, list[str]]:
    """The command of every row."""
    python, base, out = sys.executable, str(place.base), str(place.out)
    raymeld = str(Path(python).with_name("raymeld"))
    merge = [raymeld, "merge", base, str(place.adapter), "--out", out, "--quiet"]
    merge_qv = [*merge[:3], str(place.adapter_qv), *merge[4:]]
    merge_dora = [*merge[:3], str(place.adapter_dora), *merge[4:]]
    inline, ray = ["--address", "inline"], ["--address", "local"]
    structure = ["--verify", "structure"]
    return {
        "cp": ["cp", "-r", base, out],
        "copy-engine": [python, str(HERE / "copy_engine.py"), base, str(place.adapter), out],
        "inline-structure": [*merge, *inline, *structure],
        "inline": [*merge, *inline],
        "ray-structure": [*merge, *ray, *structure],
        "ray": [*merge, *ray],
        "inline-structure-qv": [*merge_qv, *inline, *structure],
        "inline-structure-dora": [*merge_dora, *inline, *structure],
        "peft": [python, str(HERE / "peft_merge.py"), base, str(place.adapter), out],
    }


def _run_rounds(
    commands: Mapping[str, Sequence[str]], rounds: int, model: str, place: Workplace
) -> dict[str, dict[int, Measured]]:
    """Every row once a round; PEFT, which takes minutes, only at the end of the last one."""
    runs: dict[str, dict[int, Measured]] = {name: {} for name in commands}
    every = [name for name in commands if name != "peft"]
    for number in range(rounds):
        turn = number * len(every) // rounds  # a row's places are spread over the whole round
        order = every[turn:] + every[:turn]
        if number == rounds - 1:
            order += [name for name in commands if name == "peft"]
        for name in order:
            try:
                run = measure(commands[name], place.out, place.log)
            except CommandError as error:
                sys.exit(f"error: {error}")
            _check_output(name, place.out, model)
            runs[name][number + 1] = run
            _say(f"round {number + 1} of {rounds}: {run.seconds:7.2f} s  {TITLES[name]}")
    return runs


def _check_output(name: str, out: Path, model: str) -> None:
    """A row that did less than the others was not measured but broken."""
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if written < _model_bytes(model) or not (out / "config.json").exists():
        sys.exit(f"error: {name} wrote no whole checkpoint ({written} bytes of weights)")


def _notes(
    rounds: int, runs: Mapping[str, Mapping[int, Measured]], facts: dict[str, str]
) -> list[str]:
    cold = {run.cold for row in runs.values() for run in row.values()}
    cache = "dropped before each run" if cold == {True} else "NOT dropped: no right to do so"
    seconds = "seconds of the whole process from start to exit, plus sync"
    tree = "largest sum of PSS over the process and all that it started"
    when = "PSS is read when their resident memory grew by 1 %, and once a second"
    notes = [
        f"rounds: {rounds}; {seconds}",
        "x cp, x copy: median of the ratios to cp -r, and to the engine's own copy, in each round",
        f"page cache {cache}; output removed and synced before each run",
        f"peak memory is sampled every {INTERVAL * 1000:.0f} ms: {tree} ({when})",
        "largest process: the largest RSS of any one of them, sampled too",
        "adapters: rank 16, float32, on all linear layers and experts; q+v: on q_proj and v_proj",
        "DoRA: on all linear layers but experts, with magnitudes",
    ]
    if "peft" in runs:
        notes.append("PEFT ran once, in the last round")
    if machine.may_clone(facts):
        notes.append("on this file system cp may share blocks instead of copying them")
    return notes


@contextlib.contextmanager
def _inputs(model: str, place: Workplace, *, keep: bool) -> Iterator[None]:
    """Checkpoint and adapters, made where they are missing; what was made is removed again."""
    makers: dict[Path, Callable[[Path], None]] = {
        place.base: lambda path: make_checkpoint(config(model), path),
        place.adapter: lambda path: make_adapter(config(model), path, "all"),
        place.adapter_qv: lambda path: make_adapter(config(model), path, "qv"),
        place.adapter_dora: lambda path: make_adapter(config(model), path, "dora"),
    }
    made = [path for path in makers if not path.exists()]
    try:
        for path in made:
            _say(f"making {path}")
            unfinished = path.with_name(f"{path.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            makers[path](unfinished)
            unfinished.rename(path)
        yield
    finally:
        place.log.unlink(missing_ok=True)
        shutil.rmtree(place.out, ignore_errors=True)
        for path in [] if keep else made:
            shutil.rmtree(path, ignore_errors=True)
            shutil.rmtree(path.with_name(f"{path.name}.unfinished"), ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: something was kept
            place.base.parent.rmdir()


def _check_space(model: str, place: Workplace) -> None:
    shutil.rmtree(place.out, ignore_errors=True)
    copies = 1 if place.base.exists() else 2
    needed = copies * _model_bytes(model) + SLACK
    free = shutil.disk_usage(place.base.parent).free
    if free < needed:
        sys.exit(
            f"error: {place.base.parent} has {free / 1e9:.1f} GB free;"
            f" the {model} needs {needed / 1e9:.1f} GB; give another --dir"
        )


def _model_bytes(model: str) -> int:
    return sum(tensor_bytes("BF16", shape) for _, shape in expected_tensors(config(model)))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""Recompute the estimates that the documentation shows, without the models and without a cluster.

    python benchmarks/estimates.py            # exit code 1 where a page says something else
    python benchmarks/estimates.py --write    # mend the pages

In docs/*.md, a console block whose command is ``raymeld plan`` with one of the models goes on with
what that command prints about time. Base and adapter are made of headers alone, in no space.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
from pathlib import Path

from checkpoints import FAMILY, config, make_adapter, make_checkpoint
from typer.testing import CliRunner

from cluster.cli import app

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(
    r"^```console\n\$ (raymeld plan [^\n]*)\n(?:estimate|assuming)[^`]*```$", re.MULTILINE
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    changed, blocks = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for page in sorted(DOCS.glob("*.md")):
            before = page.read_text()
            after, found = BLOCK.subn(lambda match: _block(match[1], Path(scratch)), before)
            blocks += found
            if after != before:
                changed.append(page.name)
                if write:
                    page.write_text(after)
    print(f"{blocks} estimates, {', '.join(changed) or 'no page'} {'changed' * write or 'differs'}")
    sys.exit(bool(changed) and not write)


def _block(command: str, scratch: Path) -> str:
    """The code block of a command, with what it prints."""
    _, verb, base, _, *options = shlex.split(command)
    model = base.rpartition("-")[2]
    assert model in FAMILY, command
    place = scratch / model
    if not place.exists():
        make_checkpoint(config(model), place / "base", hollow=True)
        make_adapter(config(model), place / "adapter", hollow=True)
    words = [verb, str(place / "base"), str(place / "adapter"), *options]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said = [line for line in done.stdout.splitlines() if line.startswith(("estimate", "assuming"))]
    return "\n".join(["```console", f"$ {command}", *said, "```"])


if __name__ == "__main__":
    main()

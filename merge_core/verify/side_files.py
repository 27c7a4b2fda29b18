"""The files beside the weights: config, index, tokenizer, licence.

Against the ledger every byte must be the one that the merge wrote. Against the base they must be
the base's own, or an adapter's where its tokenizer won, but for the fields of config.json that a
merge may change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from merge_core.stores.location import Location
from merge_core.verify.places import read_bytes
from merge_core.verify.report import Finding
from merge_core.verify.sources import Sources
from merge_core.verify.strict_json import MalformedError, parse_object
from merge_core.verify.structure import config_path
from merge_core.verify.weights import INDEX

CONFIG = "config.json"

CARD = "README.md"
"""Written for the result. Once that is published it may be written on."""

MAY_CHANGE = ("dtype", "torch_dtype")
"""Fields of config.json that ``--dtype`` changes."""


def check_recorded(
    out: Location, recorded: Mapping[str, str], *, committed: bool
) -> Iterator[Finding]:
    """Compare the files on disk with the sha256 that the ledger has of each.

    Args:
        committed: False before the merge's commit, when config.json is still staged.
    """
    for name, digest in sorted(recorded.items()):
        if name == CARD and committed:
            continue
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            what = "the ledger names it, outside of the checkpoint"
            yield Finding(check="ledger", where=name, what=what)
            continue
        path = config_path(out, committed=committed) if name == CONFIG else out / name
        try:
            found = hashlib.sha256(read_bytes(path)).hexdigest()
        except OSError as error:
            what = f"it cannot be read ({error.strerror or error}), and the merge wrote it"
            yield Finding(check="files", where=name, what=what)
            continue
        if found != digest:
            what = "it is not what the merge wrote: its sha256 differs from the ledger's"
            yield Finding(check="digest", where=name, what=what)


def compare_with_base(
    out: Location,
    sources: Sources,
    recorded: Mapping[str, str],
    changes: Mapping[str, Any],
    *,
    committed: bool,
) -> Iterator[Finding]:
    """Compare them with the files that they come from: the base's of the same names, but for those
    of which ``sources`` says otherwise.

    Args:
        changes: fields of config.json that the adapters change, and their new values.
    """
    for name in sorted(recorded.keys() - {CARD, CONFIG, INDEX}):
        folder, there = sources.side_sources.get(name, (None, name))
        whose = "the base's" if folder is None else f"that of {folder}"
        try:
            if read_bytes(out / name) != read_bytes((folder or sources.base) / there):
                yield Finding(check="base", where=name, what=f"it differs from {whose}")
        except OSError as error:
            what = f"it cannot be compared with {whose} ({error.strerror or error})"
            yield Finding(check="base", where=name, what=what)
    config = sources.base / CONFIG
    yield from _compare_configs(config_path(out, committed=committed), config, changes)


def _compare_configs(
    path: Location, base: Location, changes: Mapping[str, Any]
) -> Iterator[Finding]:
    try:
        mine = parse_object(read_bytes(path), constants=True)
        old = parse_object(read_bytes(base), constants=True)
    except (OSError, MalformedError) as error:
        what = f"it cannot be compared with the base's ({error})"
        yield Finding(check="base", where=CONFIG, what=what)
        return
    for field in sorted((mine.keys() | old.keys() | changes.keys()) - set(MAY_CHANGE)):
        wanted = changes.get(field, old.get(field))
        if repr(mine.get(field)) != repr(wanted):  # NaN is not equal to itself
            whose = "with these adapters it must be" if field in changes else "in the base"
            what = f"{field} is {mine.get(field)!r}, {whose} {wanted!r}"
            yield Finding(check="base", where=CONFIG, what=what)

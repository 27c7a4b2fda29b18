"""Would transformers load it: names and shapes against the model class, without any data."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from merge_core.errors import refuse
from merge_core.stores.location import Location
from merge_core.verify.header import TensorEntry
from merge_core.verify.places import read_bytes
from merge_core.verify.report import Finding


def check_load(config: Location, entries: Iterable[TensorEntry]) -> list[Finding]:
    """Hand the checkpoint's names and shapes to transformers and report what does not fit.

    The class comes from the config; it is built, and "loaded", on the meta device, by
    transformers' own loading code. So what it does on the way (tied heads, fused experts,
    renamed keys) counts just as it will for the user. Nothing is downloaded and no code of the
    checkpoint runs.

    Args:
        config: the ``config.json``.
        entries: all tensors of the checkpoint.

    Raises:
        InputError: transformers or accelerate is not installed.
    """
    for needed in ("transformers", "accelerate"):  # it places models on devices with accelerate
        if importlib.util.find_spec(needed) is None:
            remedy = f"pip install {needed}, or check with --level digest"
            raise refuse(f"level load needs {needed}", str(config), remedy)
    import transformers  # seconds, and only this level needs it

    with _silent(transformers.utils.logging):
        try:
            with tempfile.TemporaryDirectory() as folder:  # transformers wants it on a disk
                Path(folder, "config.json").write_bytes(read_bytes(config))
                info = _loading_info(transformers, folder, entries)
        except Exception as error:  # noqa: BLE001 - whatever stops transformers stops the user
            lines = str(error).splitlines() or [type(error).__name__]
            what = f"transformers cannot load it: {lines[0]}"
            return [Finding(check="load", where="config.json", what=what)]
    return list(_mismatches(info))


def _loading_info(
    transformers: Any, config_dir: str, entries: Iterable[TensorEntry]
) -> dict[str, Any]:
    import torch

    config = transformers.AutoConfig.from_pretrained(
        config_dir, local_files_only=True, trust_remote_code=False
    )
    auto_class = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model_class = type(auto_class.from_config(config, trust_remote_code=False))
    state = {entry.name: torch.empty(entry.shape, device="meta") for entry in entries}
    _, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        device_map="meta",
        ignore_mismatched_sizes=True,  # so that they are all listed
        output_loading_info=True,
        local_files_only=True,
    )
    return dict(info)


def _mismatches(info: dict[str, Any]) -> Iterator[Finding]:
    for name in sorted(info["missing_keys"]):
        what = "the model needs it, the checkpoint has not got it"
        yield Finding(check="load", where=name, what=what)
    for name in sorted(info["unexpected_keys"]):
        yield Finding(check="load", where=name, what="the model has no place for it")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        what = f"its shape is {list(found)}, the model's is {list(wanted)}"
        yield Finding(check="load", where=name, what=what)
    for message in info["error_msgs"]:
        yield Finding(check="load", where="config.json", what=str(message))


@contextlib.contextmanager
def _silent(log: Any) -> Iterator[None]:
    """Without transformers' own report and progress bar: the findings say it."""
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()

"""The config.json of the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from merge_core.errors import replaced
from merge_core.json_text import parse_object
from merge_core.plan import MergePlan
from merge_core.quantised import quantisation_of
from merge_core.side_files import CONFIG
from merge_core.stores.opening import read_file


def config_changes(
    config: Mapping[str, Any], matched: Mapping[str, Any], dtype: str | None
) -> dict[str, Any]:
    """The fields of the base's ``config`` that the merge changes, see ``MergePlan``.

    Transformers 5 writes ``dtype``, older ones ``torch_dtype``: both say the same after it.

    Args:
        matched: changes that the adapters bring.
        dtype: of the result, if it is not the base's.
    """
    changes = dict(matched)
    if quantisation_of(config) is not None:
        changes["quantization_config"] = None
    if dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        changes |= dict.fromkeys(keys, dtype)
    return {key: value for key, value in changes.items() if config.get(key) != value}


def config_to_publish(plan: MergePlan) -> bytes:
    """The result's config.json: the base's bytes, unless the merge changed a field."""
    data = read_planned_config(plan)
    if not plan.config_changes:
        return data
    changes = plan.config_changes
    fields = {**plan.config, **changes}
    kept = {key: value for key, value in fields.items() if key not in changes or value is not None}
    return json.dumps(kept, indent=2).encode() + b"\n"


def read_planned_config(plan: MergePlan) -> bytes:
    """The base's config.json, if it still says what was planned with.

    Raises:
        StorageError: it changed.
    """
    file = plan.base / CONFIG
    data = read_file(file)
    if parse_object(data, str(file), "Fetch it again") != plan.config:
        raise replaced(file)
    return data

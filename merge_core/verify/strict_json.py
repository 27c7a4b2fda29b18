"""JSON as a checkpoint may contain it: one object, no key twice, no NaN, text that can be printed.

Python's reader takes the last of two equal keys, which is how a header could show one tensor to
one program and another to the next.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn


class MalformedError(ValueError):
    """Bytes that are not what their format demands; the message says how, without a full stop."""


def parse_object(blob: bytes, *, constants: bool = False) -> dict[str, Any]:
    """Parse ``blob`` as one JSON object in UTF-8.

    Args:
        constants: whether NaN and Infinity pass, which transformers writes into a config.json.

    Raises:
        MalformedError: it is not JSON, not an object, holds NaN or Infinity, repeats a key, or
            escapes half a character.
    """
    refused = None if constants else _no_constant
    try:
        text = blob.decode()
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=refused)
    except RecursionError as error:
        raise MalformedError("it nests too deep") from error
    except MalformedError:
        raise
    except ValueError as error:
        raise MalformedError(f"it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise MalformedError("it is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise MalformedError(f"key {key!r} stands there twice")
        if any("\ud800" <= char <= "\udfff" for char in key):
            raise MalformedError(f"key {key!r} is not valid Unicode")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise MalformedError(f"{name} is not JSON")

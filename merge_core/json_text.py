"""JSON that somebody else wrote: objects only, and no key twice.

Python's parser takes the last of two equal keys. A header or an index that says two things about
one tensor must not decide by accident what is merged.
"""

from __future__ import annotations

import json
from typing import Any

from merge_core.errors import refuse


def parse_object(data: bytes, where: str, remedy: str) -> dict[str, Any]:
    """The JSON object that ``data`` holds.

    Raises:
        InputError: it is no JSON, no object, or names a key twice.
    """
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                twice.append(key)
            fields[key] = value
        return fields

    try:
        fields = json.loads(data.decode(), object_pairs_hook=unique)
        if (
            b"\\ud" in data.lower()
        ):  # half a surrogate pair is no text, and no message could show it
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise refuse(f"is no JSON ({error})", where, remedy) from None
    if twice:
        raise refuse(f"names {twice[0]!r} twice", where, remedy)
    if not isinstance(fields, dict):
        raise refuse("is no JSON object", where, remedy)
    return fields

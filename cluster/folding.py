"""Long lines on a terminal: broken between words, and indented below what they are about."""

from __future__ import annotations

import re
import textwrap

_LABEL = re.compile(r"[a-z]+ +(?=\S)|\s*")
"""What a line is about, such as ``adapter  ``."""

WIDEST_LABEL = 10
"""Columns; what is longer is the beginning of a sentence."""


def fold(line: str, width: int) -> str:
    """``line`` in lines of at most ``width`` columns; a path that is longer stays whole, so that it
    can be copied.
    """
    if len(line) <= width:
        return line
    match = _LABEL.match(line)
    indent = len(match[0]) if match and len(match[0]) <= WIDEST_LABEL else 0
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    )

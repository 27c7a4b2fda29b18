"""Pages in zh/ say that they are Chinese: browsers choose letters by that, and readers voices."""

from __future__ import annotations

from typing import Any


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with each page as it is written."""
    if not page.file.src_uri.startswith("zh/"):
        return output
    return output.replace('<html lang="en"', '<html lang="zh-Hans"', 1)

"""Links that leave docs/ lead to the repository: a page is read there and on the site.

A file that is not there is a warning, and so, as mkdocs.yml is strict, an error.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks.repository_links")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    docs, repository = Path(config.docs_dir), config.extra["repository"]

    def lead(match: re.Match[str]) -> str:
        path = (docs / page.file.src_uri).parent.joinpath(match[1]).resolve()
        if path.is_relative_to(docs):
            return match[0]
        if not path.exists():
            _log.warning("%s: there is no %s", page.file.src_uri, match[1])
        there = path.relative_to(docs.parent).as_posix()
        return f"]({repository}/blob/main/{there}{match[2] or ''})"

    return _LINK.sub(lead, markdown)

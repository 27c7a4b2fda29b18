"""The pages that people read, the code blocks in them, and the commands in those."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
SHELL, SESSION = "sh", "console"
"""Commands alone, and commands behind "$ " with what they print."""

_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)\n(?P<text>.*?)^ *```$", re.DOTALL | re.MULTILINE
)
_PROGRAM = re.compile(
    r"\$? ?(raymeld|ray|docker|kubectl|helm|aws|gcloud|pip|make|python\S*) [\w./-]"
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str

    @property
    def commands(self) -> Iterator[str]:
        """Each command of a shell block or of a session; lines that go on are joined."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if self.language == SHELL and line and not line.startswith("#"):
                yield line
            elif self.language == SESSION and line.startswith("$ "):
                yield line.removeprefix("$ ")

    @property
    def hidden_commands(self) -> list[str]:
        """Lines that look like commands in a block that does not say that it has any."""
        if self.language in (SHELL, SESSION):
            return []
        return [line for line in self.text.splitlines() if _PROGRAM.match(line)]


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks, without the indentation of the list that they are in."""
    return [
        Block(
            language=match["language"],
            text=re.sub(rf"^ {{0,{len(match['indent'])}}}", "", match["text"], flags=re.MULTILINE),
        )
        for match in _BLOCK.finditer(page.read_text())
    ]


def spans_of(page: Path) -> list[str]:
    """What stands in backquotes in running text."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", _BLOCK.sub("", page.read_text()))

"""The Grafana dashboard, taken apart: enough of PromQL to know what it asks for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parent.parent / "examples" / "grafana" / "raymeld.json"


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(PATH.read_text())
    return content


def queries(board: dict[str, Any]) -> list[str]:
    """Every expression of a panel."""
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def asked_for(query: str) -> dict[str, set[str]]:
    """Labels by metric: matched, grouped by, or listed for a variable."""
    found: dict[str, set[str]] = {}
    grouped = {
        label.strip()
        for group in re.findall(r"\bby \(([^)]*)\)", query)
        for label in group.split(",")
    }
    listed = set(re.findall(r"label_values\(.*, (\w+)\)", query))
    for metric, matchers in re.findall(r"(ray_\w+)(?:\{([^}]*)\})?", query):
        matched = set(re.findall(r"(\w+)\s*=~?", matchers))
        found.setdefault(metric, set()).update(matched, grouped, listed)
    return found


def values_of(query: str, label: str) -> set[str]:
    """What a label is compared with, without variables."""
    texts = re.findall(rf'\b{label}=~?"([^"$]*)"', query)
    return {value for text in texts for value in text.split("|")}

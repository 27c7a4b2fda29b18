"""The Grafana dashboard as Grafana needs it; what it asks for is tested with the metrics."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from grafana import asked_for, dashboard, queries, values_of

COLUMNS = 24
"""Of Grafana's grid."""


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return dashboard()


def test_it_has_what_an_import_needs(board: dict[str, Any]) -> None:
    assert re.fullmatch(r"[\w-]{1,40}", board["uid"])
    assert board["title"]
    assert board["schemaVersion"] >= 36  # the first in which a data source is named by its uid
    assert "id" not in board  # Grafana's own, of another installation
    assert "__inputs" not in board


def test_panels_have_ids_of_their_own_and_room_of_their_own(board: dict[str, Any]) -> None:
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(at["x"] + at["w"] <= COLUMNS for at in places)
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below


def test_every_panel_says_what_it_shows_and_asks_the_chosen_data_source(
    board: dict[str, Any],
) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in board["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert panel["type"] in {"stat", "timeseries"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == chosen
        assert [target["datasource"] for target in panel["targets"]] == [chosen]


def test_every_variable_is_used_and_every_one_that_is_used_is_there(
    board: dict[str, Any],
) -> None:
    variables = board["templating"]["list"]
    assert [one["name"] for one in variables] == ["datasource", "session", "driver"]
    assert [one["type"] for one in variables] == ["datasource", "query", "query"]
    for query in queries(board):
        assert set(re.findall(r"\$(\w+)", query)) - {"__rate_interval"} == {"session", "driver"}


def test_queries_are_understood_by_these_tests() -> None:
    query = 'sum by (a, b) (rate(ray_x{c="1", d=~"2|3"}[5m])) / ray_y'
    assert asked_for(query) == {"ray_x": {"a", "b", "c", "d"}, "ray_y": {"a", "b"}}
    assert values_of(query, "d") == {"2", "3"}
    assert asked_for('label_values(ray_x{c=~"$e"}, f)') == {"ray_x": {"c", "f"}}

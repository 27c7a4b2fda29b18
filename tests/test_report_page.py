"""The report in a real browser: charts, filters, keyboard, dark, narrow, printed, no script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Shown, browser, shown
from handmade import (
    GEOMETRY,
    TWO_LANES,
    Geometry,
    random_factors,
    random_tensors,
    write_adapter,
    write_base,
)
from played import QWEN_72B, hollow_plan, play
from playwright.sync_api import Browser, expect

from cluster.report.changes import changed
from cluster.report.evidence import read_evidence
from cluster.report.page import page
from cluster.report.spectrum import spectra
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.stores.location import locate

MOST_BYTES = 2_000_000


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as one:
        yield one


def report(out: Path, path: Path, most: int = 0) -> Path:
    evidence = read_evidence(locate(out))
    path.write_text(page(evidence, spectra(evidence, most) if most else []), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a merge of a 72B by 64 workers, with failures, that nobody did."""
    where = tmp_path_factory.mktemp("72B")
    plan = hollow_plan(where, QWEN_72B, shard_bytes=2_000_000_000)
    assert len(list(plan.tasks)) == 963
    return report(play(plan, where / "out", workers=64), where / "report.html")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a merge of a small model that was done, with singular values."""
    where = tmp_path_factory.mktemp("real")
    factors = random_factors(GEOMETRY.linear, dict.fromkeys(GEOMETRY.linear, 4))
    base = write_base(where / "base", random_tensors(GEOMETRY), GEOMETRY.config)
    plan = make_plan(base, [write_adapter(where / "lora", factors, r=4, lora_alpha=8)])
    merge(plan, where / "out", choice=TWO_LANES)
    return report(where / "out", where / "report.html", most=5)


@pytest.fixture(scope="module")
def seen(big: Path, chromium: Browser) -> Iterator[Shown]:
    """Not to be left changed."""
    with shown(chromium, big, viewport={"width": 1280, "height": 900}) as one:
        yield one


def test_a_72b_fits_into_two_megabytes_and_draws_without_a_word(big: Path, seen: Shown) -> None:
    assert big.stat().st_size < MOST_BYTES
    for name in ("heat", "gantt", "rate", "memory"):
        assert seen.chart(name).locator("svg path").count() > 20, name
    assert seen.count("heat") == 7 * 80
    assert seen.page.locator("#chart-spectrum").count() == 0
    assert seen.said == []


def middle(seen: Shown, name: str) -> tuple[int, list[float]]:
    """The first bar of a kind: its series, and the middle of it."""
    series = seen.series("gantt")
    number = [one["name"] for one in series].index(name)
    row, began, ended = series[number]["data"][0]["value"]
    return number, [(began + ended) / 2, row]


def test_every_chart_says_what_is_under_the_mouse(seen: Shown) -> None:
    assert seen.hover("heat", 0, [29, 0]).startswith("layer 29, mlp.down_proj")
    assert seen.hover("gantt", *middle(seen, "merged")).startswith("model-00001-of-00082")
    assert "CUDA out of memory on gpu-3" in seen.hover("gantt", *middle(seen, "failed"))
    assert "limit of VRAM: 139 GB" in seen.hover("memory", 1, [110e9, 5])
    assert seen.said == []


def test_filters_leave_what_was_asked_for(seen: Shown) -> None:
    page, everything = seen.page, seen.count("gantt")
    page.fill("#filter-heat", "layers.7.mlp")
    assert seen.count("heat") == 3
    page.fill("#filter-worker", "gpu-node-03")
    assert 0 < seen.count("gantt") < everything / 4
    page.fill("#filter-heat", "no such tensor")
    assert seen.count("heat") == 0
    page.fill("#filter-heat", "")
    page.fill("#filter-worker", "")

    assert (seen.count("heat"), seen.count("gantt")) == (560, everything)
    assert seen.said == []


def test_a_table_is_filtered_sorted_and_leafed_through(seen: Shown) -> None:
    seen.page.get_by_text("Every tensor that is done, with digests").click()
    table = seen.page.locator('[data-table="tensors"]')
    first, state = table.locator("tbody tr").first, table.get_by_role("status")
    assert state.inner_text() == "1 to 50 of 963 rows"
    table.get_by_role("button", name="Next").click()
    assert state.inner_text() == "51 to 100 of 963 rows"
    table.get_by_label("Only rows with").fill("embed_tokens")
    assert (state.inner_text(), first.locator("th").inner_text()) == (
        "1 row",
        "model.embed_tokens.weight",
    )
    table.get_by_label("Only rows with").fill("")
    table.get_by_label("What was done").select_option("copied")
    assert state.inner_text() == "1 to 50 of 403 rows"
    table.get_by_role("button", name="Size").click()
    assert "2.49 GB" in first.inner_text()
    assert table.locator("th[aria-sort=descending]").inner_text() == "Size ↓"
    table.get_by_role("button", name="Size").click()
    assert "16.4 kB" in first.inner_text()
    assert seen.said == []


def test_charts_are_read_with_the_keyboard(seen: Shown) -> None:
    seen.chart("heat").focus()
    seen.page.keyboard.press("ArrowRight")
    seen.page.keyboard.press("ArrowRight")
    told = seen.page.locator("#live").inner_text()

    assert told.startswith("layer 0, mlp.gate_proj, ")
    assert seen.chart("heat").locator(".tip").inner_text().startswith("layer 0, mlp.gate_proj")
    seen.chart("gantt").focus()
    seen.page.keyboard.press("ArrowLeft")
    assert "worker-" in seen.page.locator("#live").inner_text()
    assert seen.said == []


def test_who_tabs_meets_the_way_to_the_report_first(chromium: Browser, real: Path) -> None:
    with shown(chromium, real) as one:
        one.page.keyboard.press("Tab")
        assert one.page.evaluate("document.activeElement.textContent") == "Skip to the report"
        one.page.keyboard.press("Enter")
        assert one.page.evaluate("document.activeElement.id") == "main"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_grave(chromium: Browser, real: Path, scheme: str) -> None:
    with shown(chromium, real, color_scheme=scheme) as one:
        one.unfold()
        assert one.grave() == []
        assert one.said == []


def test_a_page_that_is_open_follows_the_system_into_the_dark(
    chromium: Browser, real: Path
) -> None:
    background = "getComputedStyle(document.documentElement).backgroundColor"

    with shown(chromium, real, color_scheme="light") as one:
        label = one.chart("gantt").locator("svg text").first
        light = [one.page.evaluate(background), label.get_attribute("fill")]
        one.page.emulate_media(color_scheme="dark")
        # The style is new at once; the charts are drawn again in an event that comes after it.
        expect(label).not_to_have_attribute("fill", light[1])
        dark = [one.page.evaluate(background), label.get_attribute("fill")]

    assert light[0] == "rgb(255, 255, 255)"
    assert all(a != b for a, b in zip(light, dark, strict=True))


def test_a_narrow_screen_scrolls_down_and_never_sideways(chromium: Browser, big: Path) -> None:
    with shown(chromium, big, viewport={"width": 360, "height": 700}) as one:
        assert one.page.evaluate("document.documentElement.scrollWidth") == 360


def test_what_is_printed_is_light_and_as_wide_as_the_paper(chromium: Browser, big: Path) -> None:
    with shown(chromium, big, color_scheme="dark") as one:
        one.page.evaluate(
            "addEventListener('beforeprint', () => { window.printed = [...document"
            ".querySelectorAll('.canvas svg')].map((svg) => svg.clientWidth) })"
        )
        pdf = one.page.pdf(format="A4")
        assert pdf.startswith(b"%PDF")
        assert set(one.page.evaluate("window.printed")) == {670}
        assert one.page.evaluate("document.querySelector('.canvas svg').clientWidth") > 670


def test_without_a_script_the_lists_are_there(chromium: Browser, real: Path) -> None:
    with shown(chromium, real, java_script_enabled=False) as one:
        text = one.page.inner_text("body")
        assert one.page.locator("figure:visible").count() == 0

    first = changed(read_evidence(locate(real.parent / "out")).tensors)[0]
    assert f"{first['tensor']}\t{first['relative_change']:.3%}" in text
    assert "Charts and the longer tables need JavaScript" in text


def test_singular_values_are_drawn(chromium: Browser, real: Path) -> None:
    with shown(chromium, real) as one:
        assert one.count("spectrum") == 5 * 4
        assert one.said == []


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}"


def test_hostile_names_are_shown_as_they_are(chromium: Browser, tmp_path: Path) -> None:
    geometry = Geometry(layers=1)
    base = write_base(tmp_path / HOSTILE, random_tensors(geometry), geometry.config)
    factors = random_factors(geometry.linear, {"model.layers.0.self_attn.q_proj": 4})
    plan = make_plan(base, [write_adapter(tmp_path / "a", factors, r=4, lora_alpha=8)])
    out = tmp_path / "out"
    merge(plan, out, choice=TWO_LANES)
    ledger = next((out / ".raymeld" / "runs").glob("*.json"))
    run = json.loads(ledger.read_bytes())
    attempt = {"worker": HOSTILE, "host": HOSTILE, "task": HOSTILE, "why": HOSTILE}
    times = {"began": run["began"], "ended": run["ended"]}
    run["attempts"] = [{**attempt, **times, "phase": "merging", "outcome": "failed"}]
    run["lines"] = [[run["began"], HOSTILE]]
    ledger.write_text(json.dumps(run))

    with shown(chromium, report(out, tmp_path / "report.html")) as one:
        one.unfold()
        assert one.said == []
        assert one.page.inner_text("#troubles").count(HOSTILE) >= 4
        assert HOSTILE in one.page.inner_text("#inputs")
        assert one.page.locator("img").count() == 0
        assert HOSTILE in one.hover("gantt", *middle(one, "failed"))
        assert one.said == []

"""A real browser, headless: what a page shows, logs and asks for."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
"""Root has no sandbox, and Chromium by itself would call home."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A page that is open, and all that it did beside what it shows."""

    page: Page
    said: list[str] = field(default_factory=list)
    """Every line of its console, every error that nobody caught, every request but the first."""

    def chart(self, name: str) -> Any:
        """Where a chart is drawn."""
        return self.page.locator(f'[data-chart="{name}"]')

    def place(self, name: str, series: int, value: list[float]) -> tuple[float, float]:
        """The pixel at which a chart shows a value, in the middle of the window."""
        x, y = self.page.evaluate(
            """([name, series, value]) => {
                const host = document.querySelector(`[data-chart="${name}"]`);
                const chart = echarts.getInstanceByDom(host);
                const at = chart.convertToPixel({ seriesIndex: series }, value);
                scrollBy(0, host.getBoundingClientRect().top + at[1] - innerHeight / 2);
                const box = host.getBoundingClientRect();
                return [box.left + at[0], box.top + at[1]];
            }""",
            [name, series, value],
        )
        return x, y

    def series(self, name: str) -> list[dict[str, Any]]:
        """What a chart shows, as the library has it."""
        return list(
            self.page.evaluate(
                """(name) => {
                    const host = document.querySelector(`[data-chart="${name}"]`);
                    return echarts.getInstanceByDom(host).getOption().series
                        .map(({ name, data }) => ({ name, data }));
                }""",
                name,
            )
        )

    def hover(self, name: str, series: int, value: list[float]) -> str:
        """What a chart tells of the point that the mouse is moved to."""
        x, y = self.place(name, series, value)
        self.page.mouse.move(x - 3, y)
        self.page.mouse.move(x, y)
        tip = self.chart(name).locator(".tip")
        tip.wait_for(state="visible")
        return str(tip.inner_text())

    def count(self, name: str) -> int:
        """How many points a chart has."""
        return sum(len(one["data"]) for one in self.series(name))

    def unfold(self) -> None:
        """Open every table."""
        self.page.evaluate(
            "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
        )
        hosts = self.page.locator("[data-table]")
        for number in range(hosts.count()):
            hosts.nth(number).locator("table").wait_for()

    def grave(self) -> list[str]:
        """What axe-core finds that keeps somebody from using the page."""
        found = Axe().run(self.page).response["violations"]
        grave = [one for one in found if one["impact"] in ("serious", "critical")]
        return [f"{one['id']}: {one['nodes'][0]['html']}" for one in grave]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """The one of this machine; the test is skipped where there is none."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield one
        finally:
            one.close()


@contextlib.contextmanager
def shown(one: Browser, path: Path, **options: Any) -> Iterator[Shown]:
    """A page of this machine, ready."""
    with contextlib.closing(one.new_context(**options)) as context:
        page = context.new_page()
        seen = Shown(page)
        page.on("console", lambda line: seen.said.append(f"{line.type}: {line.text}"))
        page.on("pageerror", lambda error: seen.said.append(f"error: {error}"))
        page.on("request", lambda asked: seen.said.append(asked.url))
        page.goto(path.as_uri())
        seen.said.remove(path.as_uri())
        if options.get("java_script_enabled", True):
            page.locator("html[data-ready]").wait_for(state="attached")
        yield seen

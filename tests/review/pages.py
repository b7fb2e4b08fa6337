"""Pages as a person sees them: opened in headless Chromium, which says what it disliked."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

FRONTIER = "KL against bits per element, with baselines and budget"
LAYER_MAP = "Format and sensitivity of every layer group"
COMPARED = "KL of each run against bits per element"

_WHO_IS_LOGGED_IN = "/ajax-api/2.0/mlflow/users/current"
"""MLflow's pages ask this of every server, and servers without accounts do not know it."""


class Chromium:
    """A browser; `errors` is what the consoles of its pages showed."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self.errors: list[str] = []

    def open(self, address: str, *, width: int = 1100, height: int = 900, **context: Any) -> Any:
        """A page at `address`; `context` goes to Playwright, such as `color_scheme="dark"`."""
        page = self._browser.new_page(viewport={"width": width, "height": height}, **context)
        page.set_default_timeout(60_000)
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(address)
        return page

    def _note(self, message: Any) -> None:
        if message.type == "error" and _WHO_IS_LOGGED_IN not in message.location["url"]:
            self.errors.append(f"{message.text} ({message.location['url']})")


@contextmanager
def chromium() -> Iterator[Chromium]:
    """Debian's Chromium, headless."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        try:
            yield Chromium(browser)
        finally:
            browser.close()


def run_address(server: str, experiment: str, run: str, tab: str = "") -> str:
    """MLflow's page of a run."""
    return f"{server}/#/experiments/{experiment}/runs/{run}{tab}"


def open_study(browser: Chromium, server: str) -> Any:
    """The dashboard's page of the only study: its trials in parallel coordinates and in time."""
    page = browser.open(f"{server}/dashboard/studies/0/smartSelection", width=1500, height=1240)
    page.locator(".parcoords .axis-title").first.wait_for()
    page.locator(".scatterlayer .point").first.wait_for()
    return page


def picture(page: Any, label: str) -> Any:
    """The picture of this label, in a page or a frame."""
    return page.locator(f'svg[aria-label="{label}"]')


def cut_off(page: Any) -> list[str]:
    """Texts of pictures that do not lie whole inside of them."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("figure svg")].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll("text")].filter(text => {
                const box = text.getBoundingClientRect();
                return box.left < frame.left - 1 || box.right > frame.right + 1
                    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
            }).map(text => `${svg.getAttribute("aria-label")}: ${text.textContent.trim()}`);
        })"""
    )
    return found


def report_of(folder: Path) -> str:
    """Address of a run's report."""
    return (folder / "report.html").resolve().as_uri()

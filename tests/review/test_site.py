"""The documentation as a site: built strictly, opened as a reader opens it."""

import functools
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pages import CHROMIUM, chromium

pytest.importorskip("mkdocs", reason="mkdocs is absent: pip install 'autoquant[docs]'")
pytest.importorskip("playwright", reason="playwright is absent: pip install 'autoquant[test]'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing of each request."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_page_of_the_documentation_is_in_it(site):
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / "docs" / f"{page.stem}.html").is_file()


def test_the_reference_has_every_public_name(site):
    import autoquant_kernels

    import autoquant.api

    page = (site / "docs" / "api.html").read_text(encoding="utf-8")
    for name in autoquant.api.__all__:
        assert f'id="autoquant.api.{name}"' in page
    for name in autoquant_kernels.__all__:
        assert f'id="autoquant_kernels.{name}"' in page
    assert "RunConflict" in page


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is absent: apt-get install chromium")
def test_the_first_page_opens_and_leads_to_the_others(address):
    with chromium() as browser:
        page = browser.open(f"{address}/index.html")
        assert page.title() == "AutoQuant"
        assert page.locator("h1").first.inner_text().startswith("AutoQuant")
        for image in page.locator("article img").all():
            assert image.evaluate("i => i.complete && i.naturalWidth") > 0, "a broken picture"
        page.locator("article").get_by_role("link", name="docs/search.md").first.click()
        page.wait_for_url("**/docs/search.html")
        page.locator("h1", has_text="How a search decides").wait_for()
        phone = browser.open(f"{address}/index.html", width=390, height=800)
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390
        assert browser.errors == []

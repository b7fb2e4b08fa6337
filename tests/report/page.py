"""A page as a test reads it."""

import json
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def change(path: Path, **values) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def page_of(autoquant, run) -> Page:
    """The run's report, written anew."""
    done = autoquant("report", run)
    assert done.exit_code == 0, done.stderr
    return Page((run / "report.html").read_text())

"""Makes a site of the repository's pages where they are, for mkdocs.

Pages link to each other, to scripts and to notebooks by their place in the repository. So the site
is laid out like the repository: it holds the pages that mkdocs.yml names, every other page of
docs/, and whatever they link to.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Replace the files of docs/ by those of the repository; a theme's own stay."""
    own = [file for file in files if file.src_dir != config.docs_dir]
    pages = [*(ROOT / page for page in _named(config.nav)), *(ROOT / "docs").glob("*.md")]
    return Files(
        [
            *own,
            *(
                File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, False)
                for path in _reached(pages)
            ),
        ]
    )


def _named(nav: Any) -> Iterator[str]:
    """The pages of a navigation, whatever their sections."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _named(part)


def _reached(pages: list[Path]) -> Iterator[Path]:
    """The pages, and the files that they link to, directly or by another page."""
    seen = {page for page in pages if page.is_file()}
    waiting = sorted(seen)
    while waiting:
        page = waiting.pop()
        yield page
        if page.suffix != ".md":
            continue
        for link in _LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve()
            if target.is_file() and target.is_relative_to(ROOT) and target not in seen:
                seen.add(target)
                waiting.append(target)

"""The worked examples of the documentation are computed, not typed."""

import doctest
import re

import pytest
from tracked import ROOT

PAGES = {
    "docs/architecture.md": 1,
    "docs/architectures.md": 1,
    "docs/calibration.md": 1,
    "docs/checkpoints.md": 1,
    "docs/processors.md": 1,
    "docs/samplers.md": 1,
    "docs/scale.md": 1,
    "docs/search.md": 6,
    "kernels/README.md": 1,
}
"""Pages with formulas, and how many examples they have at least."""


_BLOCK = re.compile(r"^```python\n(>>> .*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_give_what_it_says(page):
    blocks = _BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert len(blocks) >= PAGES[page]
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page, page, 0)
    said: list[str] = []
    assert doctest.DocTestRunner().run(example, out=said.append).failed == 0, "".join(said)

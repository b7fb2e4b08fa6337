"""A small problem whose groups differ."""

import pytest


@pytest.fixture(scope="module")
def problem(small):
    return small(uneven=1.0)

import pytest


@pytest.fixture
def autoquant_command(autoquant):
    """The command line, where `autoquant` is the package."""
    return autoquant

"""What is kept within a limit, and what goes beyond it."""

from autoquant.codes.kept import Kept


def made_by(kept, keys, size):
    """The keys that had to be made when these were asked for in turn."""
    made = []
    for key in keys:
        kept.get(key, size, lambda key=key: made.append(key) or key)
    return "".join(made)


def test_beyond_the_limit_the_value_used_longest_ago_goes_first():
    kept = Kept(0, recent_bytes=2)
    assert made_by(kept, "abacab", 1) == "abcb"


def test_what_fits_the_limit_stays():
    kept = Kept(2, recent_bytes=1)
    assert made_by(kept, "abcdab", 1) == "abcd"

"""Numbers as text that loses nothing."""


def shortest(value: float) -> str:
    """The fewest digits that read back as the same number: `5`, `4.75`, `4.1234567`."""
    return repr(float(value)).removesuffix(".0")


def gigabytes(size: int) -> str:
    """A number of bytes for people, in units of 10^9: `4.57 GB`."""
    return f"{size / 1e9:,.2f} GB"

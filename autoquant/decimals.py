"""Numbers as text that loses nothing."""


def shortest(value: float) -> str:
    """The fewest digits that read back as the same number: `5`, `4.75`, `4.1234567`."""
    return repr(float(value)).removesuffix(".0")

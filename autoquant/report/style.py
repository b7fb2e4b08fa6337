"""One look for every picture, on paper, on a dark screen and in a notebook.

Figures are drawn in the light palette. In an SVG that goes into a page, each of its colours becomes
a CSS variable of the same name, so that the picture follows the page's theme.
"""

import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = {
    "ink": ("#1f2430", "#e7e9ee"),
    "muted": ("#687084", "#9aa3b5"),
    "grid": ("#dfe2e8", "#343a46"),
    "paper": ("#fffffe", "#15181e"),
    "accent": ("#c2255c", "#ff7eb0"),
    "nvfp4": ("#f0b35f", "#d9923a"),
    "fp8": ("#2f7fc1", "#57a8e8"),
    "bf16": ("#2b3350", "#dbe1f1"),
    "other": ("#b4bac6", "#59606e"),
    "on-nvfp4": ("#2d1c03", "#1d1202"),
    "on-fp8": ("#fdfeff", "#04121f"),
    "on-bf16": ("#fefdff", "#1b2033"),
    "baseline": ("#7a8194", "#a7afc0"),
    "solver": ("#c2245d", "#ff7fb1"),
    "runner-up": ("#2e7fc2", "#58a8e7"),
    "reweight": ("#2a9d63", "#55cf93"),
    "swap": ("#c77d0a", "#f2b04d"),
    "rules": ("#8a5a2b", "#c99a6b"),
    "refit": ("#7a4fc0", "#b497ec"),
    "ramp0": ("#eef4fb", "#1b2836"),
    "ramp1": ("#cfe0f2", "#233c55"),
    "ramp2": ("#a3c5e6", "#2d5478"),
    "ramp3": ("#6fa3d4", "#3f739d"),
    "ramp4": ("#437fb9", "#6497c2"),
    "ramp5": ("#285a91", "#97bfe2"),
    "ramp6": ("#163862", "#d7eafb"),
}
"""Name to (light, dark); no two lights are alike, so that each can be told in an SVG."""

LIGHT = {name: light for name, (light, _) in PALETTE.items()}
RAMP = [LIGHT[f"ramp{step}"] for step in range(7)]

_VARIABLE = {light: f"var(--{name})" for name, light in LIGHT.items()}

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_RC: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelcolor": LIGHT["ink"],
    "ytick.labelcolor": LIGHT["ink"],
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": LIGHT["paper"],
    "figure.dpi": 110,
    "lines.markersize": 5,
}


@contextmanager
def project_style() -> Iterator[None]:
    """Draw in the project's style, whatever the caller's own settings are."""
    import matplotlib as mpl

    # Reading the backend of the caller would choose one, and import pyplot for it.
    defaults = {name: value for name, value in mpl.rcParamsDefault.items() if name != "backend"}
    settings: Any = {**defaults, **_RC}
    with mpl.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of `width` x `height` inches that needs no window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain_log(axes: "Axes", which: str) -> None:
    """Logarithmic axis with decimal labels where a reader needs them, and no powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = sorted(axis.get_view_interval())
    decades = high / low if low > 0 else 1e9
    steps = (1, 2, 5) if decades < 50 else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    if decades < 2.5:
        axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_locator(NullLocator())


def powers_of_ten(axes: "Axes", which: str) -> None:
    """Logarithmic axis over many decades, labelled in plain text: mathtext is slow to set."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"10{str(round(math.log10(value))).translate(_RAISED)}")
    )
    axis.set_minor_locator(NullLocator())


def sign_marker(text: str, height: float) -> dict[str, Any]:
    """The text as a marker `height` points high, without mathtext, which is slow to set."""
    import numpy as np
    from matplotlib.path import Path
    from matplotlib.textpath import TextPath

    letters = TextPath((0, 0), text, size=1)
    box = letters.get_extents()
    middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    vertices = (np.asarray(letters.vertices) - middle) / box.height
    # matplotlib scales a marker by its farthest point from the origin
    return {"marker": Path(vertices, letters.codes), "ms": 2 * height * np.abs(vertices).max()}


def to_svg(figure: "Figure", name: str, label: str) -> str:
    """Inline SVG: text as text, colours as CSS variables, the same bytes for the same figure.

    Args:
        figure: drawn in the light palette.
        name: unique on the page; ids are derived from it.
        label: what a screen reader says.
    """
    import html

    import matplotlib as mpl

    _lay_out(figure)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda m: _VARIABLE.get(m[0], m[0]), svg)
    svg = re.sub(r"(font: (?:bold )?[\d.]+px) [^;\"]+", r"\1 var(--sans)", svg)
    svg = re.sub(r' (?:d|x|y|transform)="[^"]*"', _rounded, svg)
    svg = _with_classes(svg, name)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', _opening(html.escape(label)), svg, count=1)
    return re.sub(r"\n\s*", "\n", svg)


def _lay_out(figure: "Figure") -> None:
    """Place everything now, so that saving need not draw the whole figure once more to do so."""
    engine = figure.get_layout_engine()
    if engine is not None:
        figure.dpi = 72
        engine.execute(figure)
        figure.set_layout_engine(None)


def _rounded(match: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point."""
    return re.sub(r"(\.\d\d)\d+", r"\1", match[0])


def _with_classes(svg: str, name: str) -> str:
    """Styles as classes, which are written once, where matplotlib repeats them at every mark."""
    styles = list(dict.fromkeys(re.findall(r' style="([^"]*)"', svg)))
    svg = re.sub(r' style="([^"]*)"', lambda m: f' class="{name}-{styles.index(m[1])}"', svg)
    rules = "".join(f".{name}-{index}{{{style}}}" for index, style in enumerate(styles))
    return svg.replace("</style>", f"{rules}</style>", 1)


def _opening(label: str) -> Callable[[re.Match[str]], str]:
    return lambda match: (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{match[1]}" role="img" '
        f'aria-label="{label}">'
    )


def to_png(figure: "Figure") -> bytes:
    """PNG on white, 2x the size of the figure on a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()

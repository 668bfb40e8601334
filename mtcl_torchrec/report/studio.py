"""Pictures that follow the reader's light or dark page: matplotlib's SVG with CSS variables for colours, and PNGs."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtcl_torchrec.drawing import plain_text
from mtcl_torchrec.schema import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's hues (Color Universal Design, 2008), darker on white and lighter on black: every pair is told apart
# with any colour blindness, and each line also has a dash or marker of its own.
LIGHT = {
    "surface": "#ffffff", "panel": "#f5f6f8", "ink": "#1b1f24", "muted": "#56606b", "grid": "#d8dde3",
    "a": "#0067a5", "b": "#c2410c", "c": "#00795a", "d": "#8a3f86",
    "warm": "#8fc3ea", "cold": "#f3b083", "good": "#00694f", "bad": "#a8320a", "link": "#005a91",
}  # fmt: skip
DARK = {
    "surface": "#14171b", "panel": "#1e2329", "ink": "#eceff2", "muted": "#aab3bd", "grid": "#3a424b",
    "a": "#6cb8f0", "b": "#f59b5b", "c": "#46c99b", "d": "#e093d6",
    "warm": "#1f5f92", "cold": "#8a4413", "good": "#5fd3a8", "bad": "#ffa37a", "link": "#85c5f5",
}  # fmt: skip
# The same thing looks the same in every picture.
ROLES = {"own head": "a", "fused": "b", "fused score": "b", "popularity": "c", "before": "b", "after": "a"}
DASHES = {"a": "-", "b": (0, (5, 2)), "c": (0, (1.5, 1.5)), "d": (0, (6, 2, 1, 2))}
MARKERS = {"a": "o", "b": "s", "c": "^", "d": "D"}

Colours = dict[str, str]
Margins = tuple[float, float, float, float]
Paint = Callable[["Axes", Colours], None]
_STAND_INS = {role: f"#fe{number:02x}a5" for number, role in enumerate(LIGHT, 1)}
_TITLE = 0.24  # inches, above a PNG
_LETTER = 0.075  # inches, of a tick's label
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 8.5, "axes.titlesize": 9.5,
    "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.8, "lines.linewidth": 1.7, "legend.frameon": False,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
}  # fmt: skip


def roles_of(names: Collection[str]) -> dict[str, str]:
    """Name -> the colour (dash, marker) it is drawn in: its own, or the next that is free.

    Example:
        >>> roles_of(["popularity", "other"])
        {'popularity': 'c', 'other': 'a'}
    """
    found = {name: ROLES[name] for name in names if name in ROLES}
    free = [role for role in "abcd" if role not in found.values()]
    return {name: found[name] if name in found else free.pop(0) for name in names}


def ticks(axis: Axis, most: int, *, integer: bool = False) -> None:
    """At most so many of them, on whole numbers if that is asked."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, integer=integer, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))


@dataclass(frozen=True)
class Picture:
    """One picture of the page.

    Args:
        name: of letters, digits and dashes, unique in the page.
        title: above it.
        alt: what a person who does not see it should know.
        svg: the element.
        width: in CSS pixels, as it was drawn.
    """

    name: str
    title: str
    alt: str
    svg: str
    width: int


class Studio:
    """Draws the pictures of one page.

    Args:
        png: folder in which each is also written as NAME.png; None: only the page.
        say: is told which picture is being drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """

    def __init__(self, png: Path | None = None, say: Callable[[str], None] = lambda doing: None) -> None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ConfigError("a report needs matplotlib: pip install 'mtcl_torchrec[plots]'") from None
        self.png, self.say = png, say
        self.names: set[str] = set()

    def draw(
        self,
        name: str,
        title: str,
        alt: str,
        paint: Paint,
        *,
        size: tuple[float, float] = (3.3, 2.6),
        margins: Margins = (0.56, 0.12, 0.44, 0.1),
    ) -> Picture:
        """Draw a picture.

        Args:
            name: anything; made a file's name and unique.
            paint: is given axes and the colours by role.
            size: in inches of 72 pixels.
            margins: in inches, left, right, below and above the axes.
        """
        import matplotlib

        self.say(f"drawing {title}")
        base = name = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "picture"
        number = 1
        while name in self.names:
            number += 1
            name = f"{base}-{number}"
        self.names.add(name)
        with plain_text(), matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
            out = io.StringIO()
            _figure(size, margins, paint, _STAND_INS).savefig(
                out, format="svg", transparent=True, metadata={"Date": None}
            )
            if self.png is not None:
                self.png.mkdir(parents=True, exist_ok=True)
                left, right, below, above = margins
                titled = (size[0], size[1] + _TITLE)
                figure = _figure(titled, (left, right, below, above + _TITLE), paint, LIGHT)
                figure.text(0.5, 1 - 0.12 / titled[1], title, ha="center", va="center", color=LIGHT["ink"])
                figure.savefig(self.png / f"{name}.png", dpi=160, metadata={"Software": None})
        return Picture(name, title, alt, _inline(out.getvalue()), round(size[0] * 96))


def _figure(size: tuple[float, float], margins: Margins, paint: Paint, colours: Colours) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, facecolor=colours["surface"])
    FigureCanvasAgg(figure)
    (width, height), (left, right, below, above) = size, margins
    box = (left / width, below / height, 1 - (left + right) / width, 1 - (below + above) / height)
    axes = figure.add_axes(box)  # a layout that is worked out takes most of the time
    axes.set_facecolor("none")
    axes.tick_params(colors=colours["muted"], labelcolor=colours["ink"], length=3)
    for spine in axes.spines.values():
        spine.set_color(colours["muted"])
    axes.grid(color=colours["grid"], linewidth=0.7)
    axes.set_axisbelow(True)
    paint(axes, colours)
    if axes.get_ylabel():  # beside it, numbers may need more room than was left
        numbers = axes.yaxis.get_major_formatter().format_ticks(list(axes.yaxis.get_majorticklocs()))
        more = max(left, 0.3 + _LETTER * max(map(len, numbers), default=0))
        axes.set_position((more / width, below / height, 1 - (more + right) / width, 1 - (below + above) / height))
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(colours["ink"])
    if (legend := axes.get_legend()) is not None:
        for text in legend.get_texts():
            text.set_color(colours["ink"])
    return figure


def _inline(svg: str) -> str:
    """The svg element alone: colours by CSS variable, no declared size, short numbers, no names that clash."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # Its style would hold for the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", svg)
    svg = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", svg)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", svg, count=3)
    svg = svg.replace("xlink:href", "href").replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    for role, stand_in in _STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{role})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    return re.sub(r"\s*\n\s*", " ", svg).strip()

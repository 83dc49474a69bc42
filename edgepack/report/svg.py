"""A matplotlib figure as an SVG that sits in a page: themed by CSS, named for screen readers, the same bytes each time.

Colours are drawn as marks that stand for CSS variables, so that one figure serves light and dark. Text stays text, in
the page's font. matplotlib names elements by counters and hashes; here they get a prefix, as several figures share
one page, and the hashes a fixed salt.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree

from edgepack.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "text": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "surface": "#040404",
    "chosen": "#050505",
    "front": "#060606",
    "other": "#070707",
    "bad": "#080808",
    "fp32": "#090909",
}
"""CSS variable -> the mark that stands for it in matplotlib's output."""

SIZE = (5.2, 4.3)
"""Of one figure, in inches of 72 units: 374 units wide, so that its text of 11 units is still read on a phone."""

WIDE = 4.0
"""From so many times between the least and the largest on, an axis is logarithmic: one interrupted inference must not
flatten all others."""

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold (section 2.2, Char)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """What a figure is called, and what it shows for those who do not see it."""

    title: str
    text: str


def require_plotting() -> None:
    """Raises UnsupportedError where the libraries of the page are not installed; cheap, so ask before long work."""
    import importlib.util

    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"the HTML report needs {' and '.join(missing)}, which are not installed: pip install 'edgepack[report]'"
        )


def draw(
    paint: Callable[[Figure], None],
    *,
    size: tuple[float, float],
    prefix: str,
    caption: Caption,
    hints: Mapping[str, str] | None = None,
) -> str:
    """The SVG of what `paint` puts on a figure of `size` (inches of 72 units).

    `prefix` makes its ids unique in the page. `hints`: text shown on pointing at the artist with that gid.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it tells that it builds its cache
    out = io.BytesIO()
    with mpl.rc_context(), warnings.catch_warnings():
        # measured with a font that lacks the character; the reader's browser has one that has it
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        _set_style()
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        paint(figure)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(out.getvalue(), prefix, caption, hints or {})


def _set_style() -> None:
    """Our style from matplotlib's defaults, not from the user's: the same bytes everywhere."""
    import matplotlib as mpl

    text, muted = COLOURS["text"], COLOURS["muted"]
    mpl.rcdefaults()
    mpl.rc("svg", fonttype="none", hashsalt="edgepack")  # text, not outlines: small, selectable, in the page's font
    mpl.rc("text", color=text, parse_math=False)  # a layer may be called $x
    mpl.rc("font", family="DejaVu Sans", size=11.0)  # matplotlib's own: what is measured follows from no machine
    mpl.rc("axes", facecolor="none", labelcolor=text, titlecolor=text, edgecolor=muted)
    mpl.rc("axes", grid=True, axisbelow=True, unicode_minus=False)
    mpl.rc("axes.spines", top=False, right=False)
    mpl.rc("xtick", color=muted, labelcolor=text)
    mpl.rc("ytick", color=muted, labelcolor=text)
    mpl.rc("grid", color=COLOURS["grid"], linewidth=0.8)
    mpl.rc("legend", frameon=False, fontsize=10.0)


def is_wide(least: float, largest: float) -> bool:
    """Whether times from `least` to `largest` want a logarithmic axis."""
    return 0 < least * WIDE < largest


def logarithmic(axes: Axes, axis: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5; matplotlib's own are written as mathematics."""
    from matplotlib.ticker import LogLocator, NullFormatter

    (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())


def printable(text: str) -> str:
    """`text` without what no XML document can hold."""
    return NOT_XML.sub("\ufffd", text)


def _for_page(svg: bytes, prefix: str, caption: Caption, hints: Mapping[str, str]) -> str:
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for style in root.iter(f"{{{SVG}}}style"):  # `*{...}` would style the whole page
        style.text = (style.text or "").replace("*", f"#{prefix} *")
    for element in root.iter():
        _rename(element, prefix)
        hint = hints.get(element.get("id", "").removeprefix(f"{prefix}-"))
        if hint:
            element.insert(0, _element("title", hint))
            element.set("class", "point")
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    width = root.get("viewBox", "0 0 0 0").split()[2]
    root.attrib.update(
        {
            "id": prefix,
            "role": "img",
            "aria-labelledby": f"{prefix}-title {prefix}-text",
            "style": f"max-width:{float(width) * 1.5:.0f}px",
        }
    )
    root.insert(0, _element("title", caption.title, f"{prefix}-title"))
    root.insert(1, _element("desc", caption.text, f"{prefix}-text"))
    return ElementTree.tostring(root, encoding="unicode")


def _element(tag: str, text: str, name: str | None = None) -> ElementTree.Element:
    made = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": name} if name else {})
    made.text = printable(text)
    return made


def _rename(element: ElementTree.Element, prefix: str) -> None:
    """Give ids, and what refers to them, the prefix; put CSS variables where marks stand for them."""
    for key, value in element.attrib.items():
        if key in ("style", "fill", "stroke"):
            for name, mark in COLOURS.items():
                value = value.replace(mark, f"var(--{name})")  # noqa: PLW2901
            element.set(key, value)
        if key == "id":
            element.set(key, f"{prefix}-{value}")
        elif key in (f"{{{XLINK}}}href", "href") and value.startswith("#"):
            element.set(key, f"#{prefix}-{value[1:]}")
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{prefix}-"))

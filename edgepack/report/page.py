"""The HTML page: what was built, what was measured of it, and the history, as far as each is there.

One file without a script or a network: inline CSS, inline SVG (svg.py). The template escapes whatever it is handed;
only figures, which are escaped as XML, are put in as they are. The same input gives the same bytes.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from edgepack.report import charts
from edgepack.report.builds import section
from edgepack.report.gather import Material
from edgepack.report.results import measurements
from edgepack.report.svg import printable, require_plotting
from edgepack.report.tables import ms_text, size_text
from edgepack.report.words import drop_text, limit_text, value_text

if TYPE_CHECKING:
    from markupsafe import Markup


def report_page(material: Material) -> str:
    """The whole page, in the order given. Raises UnsupportedError where matplotlib or jinja2 is missing."""
    require_plotting()
    builds = [section(evidence, f"t{number}") for number, evidence in enumerate(material.builds, 1)]
    measured = measurements(material)
    found = {each.evidence.name for each in builds} | {row.name for row in material.history}
    return render("page.html", builds=builds, measured=measured, material=material, names=sorted(found))


def render(template: str, **values: object) -> str:
    """A page of that template in the one style that all have; what it is handed is escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgepack.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "svg": Markup,
        "size": size_text,
        "value": value_text,
        "drop": drop_text,
        "limit": limit_text,
        "ms": ms_text,
        "ticked": _ticked,
    }
    environment.globals["ranked"] = charts.ranked
    # CSS of ours, not of the evidence
    style = Markup((resources.files("edgepack.report") / "templates" / "page.css").read_text(encoding="utf-8"))
    return printable(environment.get_template(template).render(style=style, **values))


def _ticked(text: str) -> Markup:
    """What stands in backticks as code."""
    from markupsafe import Markup, escape

    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )

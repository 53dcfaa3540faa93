"""The report as one self-contained HTML page: template, style, scripts and data in one file.

Its content security policy allows only these scripts, by their hashes, and no network access. So text in the data
cannot run as a script, and no library can fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe_evo.report.lines import kept_label, lines_of_all, parameters_label
from moe_evo.report.payload import drawable, index_payload, packed, run_payload
from moe_evo.report.record import Record
from moe_evo.report.sections import section
from moe_evo.report.spread import spreads
from moe_evo.shown import printable

GENERATOR = "moe_evo report"
"""Text in the head of every report, by which a file is recognised as a report."""

_SCRIPTS = ("tools.js", "tables.js", "plots.js", "maps.js", "compare.js", "page.js")
_BOKEH = ("bokeh.min.js", "bokeh-api.min.js")


def render_page(records: Sequence[Record], *, now: datetime | None = None) -> str:
    """The whole page of these runs, the first one shown first."""
    environment = Environment(
        loader=PackageLoader("moe_evo.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters["decimals"] = lambda value: "–" if value is None else f"{value:.3f}"
    environment.globals |= {"kept_label": kept_label, "parameters_label": parameters_label}
    lines = lines_of_all(records)
    scripts = [_in_script(text) for text in (*map(_bokeh, _BOKEH), "\n".join(map(_asset, _SCRIPTS)))]
    return environment.get_template("report.html").render(
        generator=f"{GENERATOR} {version('moe_evo')}",
        made=(now or datetime.now()).strftime("%Y-%m-%d %H:%M"),
        models=list(dict.fromkeys(line.model for line in lines)),
        tasks=list(dict.fromkeys(name for record in records for name in record.task_names)),
        sections=[section(record, number) for number, record in enumerate(records)],
        lines=lines,
        spread=spreads(lines),
        numbers={record.label: number for number, record in enumerate(records)},
        index=drawable(index_payload(records, lines)),
        payloads=[Markup(packed(run_payload(record))) for record in records],
        style=Markup(_asset("report.css")),
        scripts=scripts,
        policy=_policy(scripts),
    )


def _printable(value: object) -> object:
    """A value of the template; texts of ours are marked as markup, all others may hold control characters."""
    return printable(value) if type(value) is str else value


def _asset(name: str) -> str:
    return files("moe_evo.report").joinpath("assets", name).read_text("utf-8")


def _bokeh(name: str) -> str:
    return files("bokeh").joinpath("server", "static", "js", name).read_text("utf-8")


def _in_script(text: str) -> Markup:
    """JavaScript escaped for a script element, so that nothing in it ends the element early."""
    return Markup(text.replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _policy(scripts: Sequence[str]) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"


def is_report(head: str) -> bool:
    """Whether a file is a report; head: its beginning."""
    return f'<meta name="generator" content="{GENERATOR}' in head

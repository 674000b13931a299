"""Pages that hold their style, script and pictures, and need nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --holds: #00795c; --fails: #c03a00;
        --undecided: #8a6500; }
@media (prefers-color-scheme: dark) { :root { --holds: #3fc9a0; --fails: #ff8a50;
        --undecided: #e0b040; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.how { opacity: .75; }
.conclusion { border-left: .3rem solid currentColor; padding: .3rem .8rem; }
.conclusion span { color: CanvasText; }
button { font: inherit; padding: .2rem .7rem; }
details { border-top: 1px solid var(--line); padding: .5rem 0; }
summary { cursor: pointer; display: grid; grid-template-columns: 8rem 1fr 13rem 12rem; gap: .6rem;
          list-style: none; }
.number { font-variant-numeric: tabular-nums; text-align: right; }
summary::-webkit-details-marker { display: none; }
summary:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
.verdict { font-weight: 600; }
summary .verdict::before { content: "\\25b8\\a0"; opacity: .6; }
details[open] .verdict::before { content: "\\25be\\a0"; }
.holds { color: var(--holds); } .fails { color: var(--fails); }
.undecided { color: var(--undecided); }
.statement { opacity: .75; font-size: .9em; text-align: right; }
.inside { margin: .5rem 0 .5rem 7.1rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .5rem 0; }
dt { opacity: .75; } dd { margin: 0; }
img { background: #fff; border-radius: .3rem; display: block; height: auto; margin: .6rem 0;
      max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { border-bottom: 1px solid var(--line); font-weight: normal; padding: .25rem .6rem;
         text-align: right; vertical-align: top; }
thead { opacity: .75; }
td { white-space: nowrap; }
th:first-child { text-align: left; }
td.verdict { font-weight: normal; min-width: 14rem; text-align: left; white-space: normal; }
footer { border-top: 1px solid var(--line); font-size: .85em; margin-top: 2rem; opacity: .75;
         overflow-wrap: anywhere; padding-top: .5rem; }
@media (max-width: 40rem) { summary { grid-template-columns: 7rem 1fr; overflow-wrap: anywhere; }
  .statement, .number { grid-column: 2; text-align: left; } .inside { margin-left: 0; } }
@media print { body { font-size: 9px; max-width: none; } button { display: none; }
  summary { grid-template-columns: 7em 1fr 24em 24em; }
  details { break-inside: avoid; padding: .15rem 0; } img { max-height: 5cm; } }
"""


def document(title: str, body: Sequence[str], footer: str, script: str = "") -> str:
    """A page.

    Args:
        title: The title, as text.
        body: Its parts, as HTML.
        footer: What is below, as text.
        script: What it runs at its end.
    """
    scripts = [f"<script>{script}</script>"] if script else []
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
            *body,
            f"</main>\n<footer>{html.escape(footer)}</footer>",
            *scripts,
            "</body>\n</html>",
        ]
    )


def definitions(entries: Mapping[str, str]) -> str:
    """A list of terms, each with what is said of it."""
    rows = "".join(
        f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in entries.items()
    )
    return f"<dl>{rows}</dl>"


def image(figure: Figure, title: str) -> str:
    """A picture as an image that holds itself, the same for the same picture."""
    alt = html.escape(title, quote=True)
    return f'<img src="{svg_address(figure, title)}" alt="{alt}"/>'


def svg_address(figure: Figure, title: str) -> str:
    """The address of an image that holds itself."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

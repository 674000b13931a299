"""The report as a page: one file that holds its style and its plots and needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence

from manifold_sde.solvers.archive import versions
from manifold_sde.verification.pictures import picture_as_svg
from manifold_sde.verification.result import KINDS, Design, Result

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
summary { cursor: pointer; display: grid; grid-template-columns: 8rem 1fr auto 10rem; gap: .6rem;
          list-style: none; }
.number { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
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
footer { border-top: 1px solid var(--line); font-size: .85em; margin-top: 2rem; opacity: .75;
         overflow-wrap: anywhere; padding-top: .5rem; }
@media (max-width: 40rem) { summary { grid-template-columns: 7rem 1fr; }
  .statement, .number { grid-column: 2; text-align: left; } .inside { margin-left: 0; } }
@media print { body { font-size: 9px; max-width: none; } button { display: none; }
  details { break-inside: avoid; padding: .15rem 0; } img { max-height: 5cm; } }
"""
#: Opens and closes all rows; without a script each still opens by itself.
_SCRIPT = """
const all = document.getElementById("all"), rows = [...document.querySelectorAll("details")];
all.hidden = false;
all.onclick = () => {
  const open = rows.some(row => !row.open);
  rows.forEach(row => { row.open = open; });
  all.textContent = open ? "Close all" : "Open all";
};
"""


def page(
    title: str, how: Sequence[str], verdict: str, conclusion: str, results: Sequence[Result]
) -> str:
    """A self-contained page of results, whose one script opens all rows.

    Args:
        title: The title.
        how: How the results were made, in a few words each.
        verdict: The verdict on all of them.
        conclusion: It, in words.
        results: The results.
    """
    title = html.escape(title)
    body = [
        f"<h1>{title}</h1>",
        f'<p class="how">{html.escape(", ".join(part for part in how if part))}</p>',
        f'<p class="conclusion {verdict}"><span>{html.escape(conclusion)}</span></p>',
        '<p><button type="button" id="all" hidden="">Open all</button></p>',
    ]
    for kind, heading in KINDS.items():
        of_kind = [result for result in results if result.kind == kind]
        if of_kind:
            body += [f"<h2>{heading}</h2>", *map(_result, of_kind)]
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
            *body,
            f"</main>\n<footer>{html.escape(made)}</footer>",
            f"<script>{_SCRIPT}</script>\n</body>\n</html>",
        ]
    )


def _result(result: Result) -> str:
    """One check: closed where it holds, open where there is something to read."""
    inside = [f"<p>{html.escape(text)}</p>" for text in (result.detail, result.meaning) if text]
    inside.append(_list({"Time": f"{result.seconds:.1f} s"}))
    if result.design is not None:
        inside.append(_list(_design(result.design)))
    for picture in result.pictures:
        source, alt = picture_as_svg(picture), html.escape(picture.title, quote=True)
        inside.append(f'<img src="{source}" alt="{alt}"/>')
    opened = "" if result.verdict == "holds" else ' open=""'
    return (
        f"<details{opened}>\n<summary>"
        f'<span class="verdict {result.verdict}">{result.verdict}</span>'
        f"<span>{html.escape(result.name)}</span>"
        f'<span class="statement">{html.escape(", ".join(result.statements))}</span>'
        f'<span class="number">{html.escape(result.number)}</span>'
        f'</summary>\n<div class="inside">\n' + "\n".join(inside) + "\n</div>\n</details>"
    )


def _design(design: Design) -> dict[str, str]:
    return {
        "Hypothesis": design.hypothesis,
        "False alarms": f"{design.false_alarm:.2g}",
        "To be found": f"{design.departure}; missed with probability {design.miss:.2g}",
        "Runs": str(design.sample_size),
    }


def _list(entries: dict[str, str]) -> str:
    rows = "".join(
        f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in entries.items()
    )
    return f"<dl>{rows}</dl>"

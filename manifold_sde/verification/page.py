"""The report as a page, with its plots."""

from __future__ import annotations

import html
from collections.abc import Sequence

from matplotlib.figure import Figure

from manifold_sde.html_page import definitions, document, image
from manifold_sde.solvers.archive import versions
from manifold_sde.verification.pictures import plot_picture
from manifold_sde.verification.result import KINDS, Design, Result

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
    title: str,
    how: Sequence[str],
    verdict: str,
    conclusion: str,
    results: Sequence[Result],
    sections: Sequence[str] = (),
) -> str:
    """A self-contained page of results, whose one script opens all rows.

    Args:
        title: The title.
        how: How the results were made, in a few words each.
        verdict: The verdict on all of them.
        conclusion: It, in words.
        results: The results.
        sections: What comes after them, as HTML.
    """
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="how">{html.escape(", ".join(part for part in how if part))}</p>',
        f'<p class="conclusion {verdict}"><span>{html.escape(conclusion)}</span></p>',
        '<p><button type="button" id="all" hidden="">Open all</button></p>',
    ]
    for kind, heading in KINDS.items():
        of_kind = [result for result in results if result.kind == kind]
        if of_kind:
            body += [f"<h2>{heading}</h2>", *map(_result, of_kind)]
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    return document(title, [*body, *sections], made, _SCRIPT)


def _result(result: Result) -> str:
    """One check: closed where it holds, open where there is something to read."""
    inside = [f"<p>{html.escape(text)}</p>" for text in (result.detail, result.meaning) if text]
    inside.append(definitions({"Time": f"{result.seconds:.1f} s"}))
    if result.design is not None:
        inside.append(definitions(_design(result.design)))
    for picture in result.pictures:
        figure = plot_picture(picture).figure
        assert isinstance(figure, Figure)
        inside.append(image(figure, picture.title))
    numbers = "; ".join(filter(None, (result.reach, result.number)))
    opened = "" if result.verdict == "holds" else ' open=""'
    return (
        f"<details{opened}>\n<summary>"
        f'<span class="verdict {result.verdict}">{result.verdict}</span>'
        f'<span title="{html.escape(result.name)}">{html.escape(result.plain_name)}</span>'
        f'<span class="statement">{html.escape(", ".join(result.statements))}</span>'
        f'<span class="number">{html.escape(numbers)}</span>'
        f'</summary>\n<div class="inside">\n' + "\n".join(inside) + "\n</div>\n</details>"
    )


def _design(design: Design) -> dict[str, str]:
    return {
        "Hypothesis": design.hypothesis,
        "False alarms": f"{design.false_alarm:.2g}",
        "To be found": f"{design.departure}; missed with probability {design.miss:.2g}",
        "Runs": str(design.sample_size),
    }

"""An audit as a page, or as the section of one: its table, its ledger and its picture."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from manifold_sde.html_page import definitions, image
from manifold_sde.training.group_audit import AS_PREDICTED, OFF, GroupAudit, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {
    "norm": "of the weights; with many parts (rows, heads) that of the median part",
    "predicted": "what independent gradients of the sizes that were seen make of it",
    "at rest": "where it tends at the present rates (at a rate of 0: at those before)",
    "turn/step": "angle of a step in radians, which says nothing of mixing",
    "expected": "what noise alone makes of the angle, over the same steps",
    "aligned": "share of the norm's growth from updates that are aligned with the weights",
    "noise": "what momentum alone makes of that share; more is signal",
}
LEDGER = {
    "decay": "relative change of |x|\u00b2 that decay makes in a step",
    "growth": "what the update makes of it",
    "sum": "of the two",
    "measured": "the change that was measured",
    "|g|/|x|": "size of the gradient over that of the weights; it rises while the norm falls",
    "rate": "effective learning rate, which has to be small",
    "cos(x, g)": "0 for what is scale-invariant",
}
_CLASSES = {AS_PREDICTED: "holds", OFF: "fails"}


def section(
    title: str,
    rows: Sequence[GroupAudit],
    shown: Sequence[GroupAudit],
    notes: Sequence[str],
    closing: float,
    figure: Figure | None,
    *,
    judged: str,
    ledger: bool,
    level: int,
) -> str:
    """The section of a page.

    Args:
        title: What was audited.
        rows: The groups.
        shown: The lines of the tables: the groups, and all of them together.
        notes: What is to know of the run as a whole.
        closing: The largest difference between a norm's change and its ledger, or NaN.
        figure: The picture of the norms, if there is one.
        judged: What the verdicts mean.
        ledger: Whether to show the ledger of the norms.
        level: Level of the heading.
    """
    verdict, conclusion = _conclusion(rows)
    parts = [
        f"<h{level}>Training clock: is this normal?</h{level}>",
        f'<p class="how">{html.escape(title)}</p>',
        f'<p class="conclusion {verdict}"><span>{html.escape(conclusion)}</span></p>',
        _table([(row, row.numbers) for row in shown], verdicts=True),
        f"<p>{html.escape(judged)}</p>" if judged else "",
    ]
    if ledger:
        parts += [
            f"<h{level + 1}>Ledger of |x|\u00b2, a step, relative</h{level + 1}>",
            _table([(row, row.ledger) for row in shown], verdicts=False),
        ]
        if math.isfinite(closing):
            parts.append(f"<p>It closes to {closing:.1e} of |x|\u00b2.</p>")
    if figure is not None:
        parts.append(image(figure, "norms over the steps: measured, predicted and at rest"))
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    meanings = {**COLUMNS, **(LEDGER if ledger else {})}
    parts += [
        '<details><summary><span class="verdict">columns</span>'
        "<span>what they are</span></summary>",
        f'<div class="inside">{definitions(meanings)}</div></details>',
    ]
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _conclusion(rows: Sequence[GroupAudit]) -> tuple[str, str]:
    """The verdict on all groups, by its class, and in words."""
    verdicts = [row.verdict for row in rows]
    words = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    number = f"{len(rows)} groups" if len(rows) > 1 else "1 group"
    if OFF in verdicts:
        kind = "fails"
    else:
        kind = "holds" if set(verdicts) == {AS_PREDICTED} else "undecided"
    return kind, f"{number}: {words}."


def _table(rows: Sequence[tuple[GroupAudit, Mapping[str, float]]], *, verdicts: bool) -> str:
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in rows[0][1])
    first = '<th scope="col">group</th>' + '<td class="verdict">verdict</td>' * verdicts
    body = []
    for row, numbers in rows:
        parts = f" ({row.parts} parts)" if row.parts > 1 else ""
        cells = [f'<th scope="row">{html.escape(row.group + parts)}</th>']
        if verdicts:
            kind = _CLASSES.get(row.verdict, "undecided")
            cells.append(f'<td class="verdict {kind}">{html.escape(row.sentence)}</td>')
        cells += [f"<td>{short(number)}</td>" for number in numbers.values()]
        body.append(f"<tr>{''.join(cells)}</tr>")
    lines = "\n".join(body)
    return (
        f'<div class="wide"><table>\n<thead><tr>{first}{heads}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody>\n</table></div>"
    )

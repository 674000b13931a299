"""The table of an audit: what each group's norm should be, and is."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from manifold_sde.errors import printable
from manifold_sde.html_page import document
from manifold_sde.number_arrays import Array
from manifold_sde.training.group_audit import AT_REST, NOT_YET, OFF, GroupAudit, short
from manifold_sde.writing import plain, write_form

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 80
_MOST_SHOWN = 8
_NAN = float("nan")


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        title: What was audited.
        rows: The groups.
        notes: What is to know of the run as a whole, a line each.
        closing: The largest difference between a norm's change and its ledger, relative to |x|^2.
        steps: Steps of the history, (n,).
        norms: The norm at these, measured, for each group (n,); NaN where it was not logged.
        predictions: Predicted norms at these steps, where they are known.
        clocks: Of a log, the clock v at these steps, (n,) for each group: for ``relaxation``.
        tolerance: By how much a norm that is as predicted may be off, relative to the prediction.
        whole: All groups of a clock together, where there are several; with ``clock.time``.
    """

    title: str
    rows: tuple[GroupAudit, ...]
    notes: tuple[str, ...] = ()
    closing: float = _NAN
    steps: Array = field(default_factory=lambda: np.zeros(0))
    norms: dict[str, Array] = field(default_factory=dict)
    predictions: dict[str, Array] = field(default_factory=dict)
    clocks: dict[str, Array] = field(default_factory=dict)
    tolerance: float = _NAN
    whole: GroupAudit | None = None

    def __iter__(self) -> Iterator[GroupAudit]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> GroupAudit:
        return next(row for row in self.rows if row.group == name)

    @property
    def shown(self) -> tuple[GroupAudit, ...]:
        """The groups, and all of them together."""
        return self.rows if self.whole is None else (*self.rows, self.whole)

    @property
    def has_ledger(self) -> bool:
        """Whether the changes of the norms are known."""
        return any(math.isfinite(row.decay) for row in self.rows)

    @property
    def judged(self) -> str:
        """What the words of the verdicts mean, in a line; "" where it is not known."""
        words = []
        if math.isfinite(self.tolerance):
            words.append(f"as predicted: within {100 * self.tolerance:.0f} % of predicted")
        if any(row.verdict == NOT_YET for row in self.rows):
            words.append(f"steps to go: until within {100 * AT_REST:.0f} % of at rest")
        return "; ".join(words)

    @property
    def passed(self) -> bool:
        """Whether nothing is off."""
        return all(row.verdict != OFF for row in self.rows)

    def __str__(self) -> str:
        lines = [*textwrap.wrap(self.title, _WIDTH), ""]
        lines += _head(row.numbers for row in self.rows)
        for row in self.shown:
            parts = f" ({row.parts} parts, the median)" if row.parts > 1 else ""
            lines += textwrap.wrap(
                f"{row.group}{parts}: {row.sentence}", _WIDTH, subsequent_indent="    "
            )
            lines.append(_row(short(number) for number in row.numbers.values()))
        lines += textwrap.wrap(self.judged, _WIDTH)
        if self.has_ledger:
            lines += ["", "ledger of |x|^2, a step, relative"]
            lines += _head(row.ledger for row in self.rows)
            for row in self.shown:
                lines.append(textwrap.shorten(row.group, _WIDTH, placeholder="..."))
                lines.append(_row(short(number) for number in row.ledger.values()))
            if math.isfinite(self.closing):
                lines.append(f"it closes to {self.closing:.1e} of |x|^2")
        for note in self.notes:
            lines += ["", *textwrap.wrap(note, _WIDTH)]
        return printable("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """All numbers; NaN and infinity are ``None``."""
        found: dict[str, Any] = plain(
            {
                "title": self.title,
                "passed": self.passed,
                "closing": self.closing,
                "tolerance": self.tolerance,
                "notes": self.notes,
                "groups": [asdict(row) for row in self.rows],
                "whole": None if self.whole is None else asdict(self.whole),
                "steps": self.steps.tolist(),
                **{
                    key: {name: values.tolist() for name, values in series.items()}
                    for key, series in (
                        ("norms", self.norms),
                        ("predictions", self.predictions),
                        ("clocks", self.clocks),
                    )
                },
            }
        )
        return found

    def section(self, level: int = 2) -> str:
        """The audit as a section of a page, in HTML, with its picture.

        Args:
            level: Level of its heading.
        """
        from manifold_sde.training.audit_page import section

        figure = self.plot().get_figure(root=True) if self.norms else None
        return section(
            self.title,
            self.rows,
            self.shown,
            self.notes,
            self.closing,
            figure,
            judged=self.judged,
            ledger=self.has_ledger,
            level=level,
        )

    def to_html(self) -> str:
        """A page that holds its style and its picture, and needs nothing else."""
        made = f"torch {torch.__version__}, numpy {np.__version__}"
        return document("Training clock: audit", [self.section(1)], made)

    def save(self, path: str | Path) -> None:
        """Write the audit to a file, whose ending says in which form.

        Args:
            path: A file that ends in .html, .json or .txt.

        Raises:
            ArgumentError: If it has another ending.
            WriteError: If it cannot be written.
        """
        write_form(
            path,
            {
                ".html": self.to_html,
                ".json": lambda: json.dumps(self.to_dict(), indent=1),
                ".txt": self.__str__,
            },
        )

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the norms over the steps, with their predictions and equilibria (dotted).

        Predictions are dashed where they are known at each step, as of a log; of a clock there is
        a cross for that of the last step.

        Args:
            ax: Axes to draw in, or ``None`` for new ones.
            **options: Options of the lines.
        """
        from matplotlib.figure import Figure

        if ax is None:
            ax = Figure(figsize=(6.4, 4.0), layout="constrained").subplots()
        shown = self.rows[:_MOST_SHOWN]
        mark = "o" if len(self.steps) == 1 else None
        for i, row in enumerate(shown):
            style = {"color": f"C{i}", "lw": 3.0, "alpha": 0.5, "marker": mark, **options}
            if row.group in self.norms:
                name = textwrap.shorten(row.group, 40, placeholder="...")
                ax.plot(*_known(self.steps, self.norms[row.group]), label=name, **style)
            over = {**style, "color": "black", "alpha": 1.0, "lw": 1.2, "ls": "--", "zorder": 3}
            if row.group in self.predictions:
                ax.plot(*_known(self.steps, self.predictions[row.group]), **over)
            elif math.isfinite(row.predicted):
                ax.plot(self.steps[-1:], [row.predicted], **{**over, "marker": "x", "ls": ""})
            if math.isfinite(row.equilibrium):
                ax.axhline(row.equilibrium, color=f"C{i}", lw=0.9, ls=":")
        ax.set_xlabel("steps")
        ax.set_ylabel("norm of the weights")
        more = len(self.rows) - len(shown)
        known = "dashed" if self.predictions else "cross: at the end"
        title = f"measured, predicted ({known}), at rest (dotted)"
        ax.set_title(f"{title}; {more} more groups not shown" if more else title, fontsize=9)
        if self.norms:
            ax.legend(fontsize=8)
        return ax


def _known(steps: Array, values: Array) -> tuple[Array, Array]:
    """Without the steps at which there is no value."""
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def _head(rows: Iterable[dict[str, float]]) -> list[str]:
    """The line of heads, if there is a row."""
    return [_row(row) for row in rows][:1]


def _row(cells: Iterable[str]) -> str:
    return "  " + " ".join(f"{cell:>10}" for cell in cells)

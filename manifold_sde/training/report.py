"""The table of an audit: what each group's norm should be, and is."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manifold_sde.errors import printable
from manifold_sde.number_arrays import Array
from manifold_sde.writing import plain, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AS_PREDICTED, NOT_YET, OFF, NONE = (
    "as predicted",
    "not yet in equilibrium",
    "off",
    "no equilibrium",
)
_WIDTH = 80
_MOST_SHOWN = 8
_FOREVER = 1e8
_NAN = float("nan")


@dataclass(frozen=True)
class GroupAudit:
    """One group: measured, predicted, and a verdict. NaN is what could not be known.

    Attributes:
        group: Its name.
        parts: Number of its parts; numbers are those of the median part.
        norm: Norm of the weights.
        predicted: What it should be, after these steps with independent gradients of these sizes.
        equilibrium: Where it tends at the present rates.
        rotation: Angle by which a step turns, in radians (root mean square).
        expected_rotation: What noise alone makes of it at this norm.
        gradient_ratio: |g| / |x|.
        effective_rate: η/(1 - β) / |x|^2 of SGD, η / |x| of optimizers of fixed step size.
        decay: Relative change of |x|^2 that decay makes in a step (negative).
        growth: What the update makes of it: injection and alignment.
        change: What was measured of both.
        alignment: Share of the growth that is alignment with the weights.
        pure_alignment: What momentum makes of that share where gradients are independent.
        cosine: Root mean square of the cosine of weights and gradient; 0 if scale-invariant.
        clock: Angular clock v.
        steps_to_go: Steps until the norm is within 5 % of equilibrium; infinite without decay.
        verdict: ``"as predicted"``, ``"not yet in equilibrium"``, ``"no equilibrium"`` (without
            decay) or ``"off"``.
        reason: The likely reason of what is off, or what else to know.
    """

    group: str
    parts: int
    norm: float
    predicted: float
    equilibrium: float = _NAN
    rotation: float = _NAN
    expected_rotation: float = _NAN
    gradient_ratio: float = _NAN
    effective_rate: float = _NAN
    decay: float = _NAN
    growth: float = _NAN
    change: float = _NAN
    alignment: float = _NAN
    pure_alignment: float = _NAN
    cosine: float = _NAN
    clock: float = _NAN
    steps_to_go: float = _NAN
    verdict: str = AS_PREDICTED
    reason: str = ""

    @property
    def sentence(self) -> str:
        """The verdict with its reason."""
        text = self.verdict
        if self.verdict == NOT_YET and self.steps_to_go > _FOREVER:
            text += ", and at this learning rate it stays so"
        elif self.verdict == NOT_YET:
            text += f", {self.steps_to_go:.3g} steps to go"
        return f"{text}: {self.reason}" if self.reason else text


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        title: What was audited.
        rows: The groups.
        notes: What is to know of the run as a whole, a line each.
        closing: The largest difference between a norm's change and its ledger, relative to |x|^2.
        steps: Steps of the history, (n,).
        norms: The norm at these, measured, for each group (n,).
        predictions: Predicted norms at these steps, where they are known.
    """

    title: str
    rows: tuple[GroupAudit, ...]
    notes: tuple[str, ...] = ()
    closing: float = _NAN
    steps: Array = field(default_factory=lambda: np.zeros(0))
    norms: dict[str, Array] = field(default_factory=dict)
    predictions: dict[str, Array] = field(default_factory=dict)

    def __iter__(self) -> Iterator[GroupAudit]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> GroupAudit:
        return next(row for row in self.rows if row.group == name)

    @property
    def passed(self) -> bool:
        """Whether nothing is off."""
        return all(row.verdict != OFF for row in self.rows)

    def __str__(self) -> str:
        lines = [*textwrap.wrap(self.title, _WIDTH), ""]
        head = ("norm", "predicted", "at rest", "turn/step", "expected", "aligned", "noise")
        lines.append("  " + " ".join(f"{h:>10}" for h in head))
        for row in self.rows:
            parts = f" ({row.parts} parts, the median)" if row.parts > 1 else ""
            lines += textwrap.wrap(
                f"{row.group}{parts}: {row.sentence}", _WIDTH, subsequent_indent="    "
            )
            numbers = (
                row.norm,
                row.predicted,
                row.equilibrium,
                row.rotation,
                row.expected_rotation,
                row.alignment,
                row.pure_alignment,
            )
            lines.append("  " + " ".join(f"{_short(number):>10}" for number in numbers))
        if any(math.isfinite(row.decay) for row in self.rows):
            lines += ["", "ledger of |x|^2, a step, relative"]
            head = ("decay", "growth", "sum", "measured", "|g|/|x|", "rate", "cos(x, g)")
            lines.append("  " + " ".join(f"{h:>10}" for h in head))
            for row in self.rows:
                lines.append(textwrap.shorten(row.group, _WIDTH, placeholder="..."))
                numbers = (
                    row.decay,
                    row.growth,
                    row.decay + row.growth,
                    row.change,
                    row.gradient_ratio,
                    row.effective_rate,
                    row.cosine,
                )
                lines.append("  " + " ".join(f"{_short(number):>10}" for number in numbers))
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
                "notes": self.notes,
                "groups": [asdict(row) for row in self.rows],
                "steps": self.steps.tolist(),
                "norms": {name: values.tolist() for name, values in self.norms.items()},
            }
        )
        return found

    def save(self, path: str | Path) -> None:
        """Write a JSON file.

        Raises:
            WriteError: If it cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(), indent=1))

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the norms over the steps, with their predictions dashed and equilibria dotted.

        Args:
            ax: Axes to draw in, or ``None`` for new ones.
            **options: Options of the lines.
        """
        from matplotlib.figure import Figure

        if ax is None:
            ax = Figure(figsize=(6.4, 4.0), layout="constrained").subplots()
        shown = self.rows[:_MOST_SHOWN]
        for i, row in enumerate(shown):
            style = {"color": f"C{i}", "lw": 1.6, **options}
            if row.group in self.norms:
                name = textwrap.shorten(row.group, 40, placeholder="...")
                ax.plot(self.steps, self.norms[row.group], label=name, **style)
            if row.group in self.predictions:
                ax.plot(self.steps, self.predictions[row.group], **{**style, "ls": "--"})
            if math.isfinite(row.equilibrium):
                ax.axhline(row.equilibrium, color=f"C{i}", lw=0.9, ls=":")
        ax.set_xlabel("steps")
        ax.set_ylabel("norm of the weights")
        more = len(self.rows) - len(shown)
        title = "measured, predicted (dashed), at rest (dotted)"
        ax.set_title(f"{title}; {more} more groups not shown" if more else title, fontsize=9)
        if self.norms:
            ax.legend(fontsize=8)
        return ax


def _short(number: float) -> str:
    if math.isnan(number):
        return "-"
    if number == 0.0:
        return "0"
    return f"{number:.2e}" if abs(number) < 1e-3 or abs(number) >= 1e5 else f"{number:.4g}"

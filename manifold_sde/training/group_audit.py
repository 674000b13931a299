"""What an audit says of one group."""

from __future__ import annotations

import math
from dataclasses import dataclass

AS_PREDICTED, NOT_YET, OFF, NONE = (
    "as predicted",
    "not yet in equilibrium",
    "off",
    "no equilibrium",
)
STOPPED = "the learning rate is 0 now, and the norm stays where it is"
"""What else to know at the end of a schedule that ends at 0."""
AT_REST = 0.05
"""How near to equilibrium the norm is when no steps are to go."""
NOT_FINITE = "not finite since step {} (about)"
NOT_COME_BACK = (
    "A run does not come back from NaN or infinity: go on from a checkpoint of before, with a "
    "smaller learning rate, a longer warm-up or clipped gradients."
)
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
        equilibrium: Where it tends at the present rates; at a learning rate of 0, where it tended
            at those before.
        rotation: Angle by which a step turns, in radians (root mean square).
        expected_rotation: What noise alone, of the same gradients, makes of it in the same steps.
        gradient_ratio: |g| / |x|.
        effective_rate: η/(1 - β) / |x|^2 of SGD, η / |x| of optimizers of fixed step size.
        decay: Relative change of |x|^2 that decay makes in a step (negative).
        growth: What the update makes of it: injection and alignment.
        change: What was measured of both.
        alignment: Share of the growth that is alignment with the weights.
        pure_alignment: What momentum makes of that share where gradients are independent.
        cosine: Root mean square of the cosine of weights and gradient; 0 if scale-invariant.
        clock: Angular clock v.
        steps_to_go: Steps until the norm is within ``AT_REST`` of equilibrium; infinite without
            decay.
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
    def numbers(self) -> dict[str, float]:
        """What the table shows, by the heads of its columns."""
        return {
            "norm": self.norm,
            "predicted": self.predicted,
            "at rest": self.equilibrium,
            "turn/step": self.rotation,
            "expected": self.expected_rotation,
            "aligned": self.alignment,
            "noise": self.pure_alignment,
        }

    @property
    def ledger(self) -> dict[str, float]:
        """What the ledger of |x|^2 shows, by the heads of its columns."""
        return {
            "decay": self.decay,
            "growth": self.growth,
            "sum": self.decay + self.growth,
            "measured": self.change,
            "|g|/|x|": self.gradient_ratio,
            "rate": self.effective_rate,
            "cos(x, g)": self.cosine,
        }

    @property
    def sentence(self) -> str:
        """The verdict with its reason."""
        text = self.verdict
        if self.verdict == NOT_YET and self.steps_to_go > _FOREVER:
            text += ", and at this learning rate it stays so"
        elif self.verdict == NOT_YET:
            text += f", {float(f'{self.steps_to_go:.3g}'):,.0f} steps to go"
        return f"{text}: {self.reason}" if self.reason else text


def short(number: float) -> str:
    """A number for a table; a dash where it is not known."""
    if math.isnan(number):
        return "-"
    if number == 0.0:
        return "0"
    return f"{number:.2e}" if abs(number) < 1e-3 or abs(number) >= 1e5 else f"{number:.4g}"

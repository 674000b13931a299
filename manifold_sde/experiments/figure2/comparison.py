"""SGD's angles beside the exact law of the limit: numbers, and what they say in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from scipy.special import ndtr

from manifold_sde.experiments.experiment import Array, plain_table
from manifold_sde.experiments.figure2.simulation import Figure2, Run
from manifold_sde.experiments.settings.figure2 import DESIGNS, Plan
from manifold_sde.verification.exact import WrappedNormal
from manifold_sde.verification.statistics import (
    VarianceRatio,
    circular_distance,
    detectable_variance_ratio,
    holm,
    variance_ratio,
    watson_test,
)

#: Probability that one figure, all its tests together, finds a difference where there is none.
FALSE_ALARM = 1e-3
#: Probability of missing a variance that is off by the factor stated.
MISS = 0.01


@dataclass(frozen=True)
class Comparison:
    """The angles of one ensemble at one time against the law of the limit.

    Attributes:
        design, lr, T: Which ensemble, and the time.
        steps: Steps of SGD at that time.
        runs: Number of runs.
        limit_variance: Variance of the unwrapped angle in the limit.
        variance_ratio, standard_error: The sample's variance divided by it.
        coarse_ratio: The ratio with angles unwrapped over half as many records.
        circular_ratio: The ratio of -2 ln |E exp(i angle)|, which is the variance of a normal
            angle: it lives on the circle, and does not depend on whole turns.
        kurtosis: 3 for the normal law of the limit.
        beyond: Part of the runs that are more than half a turn from the start.
        limit_beyond: The same part in the limit.
        distance: Wasserstein distance on the circle between angles and law, in radians.
        p_variance: p-value of the unwrapped angle's variance.
        p_angle: p-value of Watson's test of the angle on the circle.
        differs: Whether either rejects, at a false alarm rate of ``FALSE_ALARM`` for the figure.
    """

    design: str
    lr: float
    T: float
    steps: int
    runs: int
    limit_variance: float
    variance_ratio: float
    standard_error: float
    coarse_ratio: float
    circular_ratio: float
    kurtosis: float
    beyond: float
    limit_beyond: float
    distance: float
    p_variance: float
    p_angle: float
    differs: bool = False


def compare(figure: Figure2) -> list[Comparison]:
    """Compare every ensemble with the limit's law, at the times of the settings it reached.

    The law is known exactly, so its own sampling error does not blur the test, as it would in a
    test of two samples.
    """
    rows = []
    for run in figure.runs:
        for index, T in enumerate(run.plan.law_times):
            if T in figure.settings.law_times:
                rows.append(_compare(run, index, limit_law(figure, run.plan, index)))
    order = {design: i for i, design in enumerate(DESIGNS)}
    rows.sort(key=lambda row: (order[row.design], -row.lr, row.T))
    adjusted = holm([p for row in rows for p in (row.p_variance, row.p_angle)])
    found = adjusted.reshape(-1, 2).min(axis=1) < FALSE_ALARM
    return [
        dataclasses.replace(row, differs=bool(differs))
        for row, differs in zip(rows, found, strict=True)
    ]


def limit_law(figure: Figure2, plan: Plan, index: int) -> WrappedNormal:
    """The limit's law of the angle at one of the times of an ensemble."""
    law = figure.laws[plan.design]
    return law.at_steps(plan.lr, figure.settings.weight_decay, plan.law_steps[index])


def ratio_curve(figure: Figure2, run: Run) -> tuple[Array, list[VarianceRatio]]:
    """Variance ratio of the unwrapped angle at all times of an ensemble."""
    ratios = [
        variance_ratio(angles, limit_law(figure, run.plan, i).variance)
        for i, angles in enumerate(run.angles)
    ]
    return np.array(run.plan.law_times), ratios


def _compare(run: Run, index: int, law: WrappedNormal) -> Comparison:
    angles = run.angles[index]
    ratio = variance_ratio(angles, law.variance)
    return Comparison(
        design=run.plan.design,
        lr=run.plan.lr,
        T=run.plan.law_times[index],
        steps=run.plan.law_steps[index],
        runs=len(angles),
        limit_variance=law.variance,
        variance_ratio=ratio.value,
        standard_error=ratio.standard_error,
        coarse_ratio=variance_ratio(run.coarse_angles[index], law.variance).value,
        circular_ratio=-2.0 * math.log(abs(np.exp(1j * angles).mean())) / law.variance,
        kurtosis=ratio.kurtosis,
        beyond=float((np.abs(angles - law.mean) > math.pi).mean()),
        limit_beyond=2.0 * float(ndtr(-math.pi / math.sqrt(law.variance))),
        distance=circular_distance(angles, law.cdf),
        p_variance=ratio.p_value,
        p_angle=watson_test(angles, law.cdf).p_value,
    )


def verdicts(rows: Sequence[Comparison]) -> list[str]:
    """What the comparison says, for each design and learning rate at the last time reached."""
    last = max((row.T for row in rows), default=0.0)
    sentences = [_verdict(row) for row in rows if last == row.T]
    if rows:
        n = rows[0].runs
        low, high = detectable_variance_ratio(n, FALSE_ALARM / (2 * len(rows)), MISS)
        sentences.append(
            f"With {n} runs, a variance off by a factor above {high:.1f} or below {low:.2f} is "
            f"found with {1 - MISS:.0%}, at a false alarm rate of {FALSE_ALARM:g} for all rows "
            "together."
        )
    return sentences


def _verdict(row: Comparison) -> str:
    name = "The paper's design" if row.design == "gaussian" else "The orthogonal design"
    text = f"{name} at η = {row.lr:g}: "
    ratio = f"{row.variance_ratio:.2f} ± {row.standard_error:.2f}"
    if not row.differs:
        return f"{text}no difference from the limit was found (variance {ratio} times its)."
    text += (
        f"not at the limit. The unwrapped angle has {ratio} times the limit's variance, "
        f"{row.circular_ratio:.2f} times if whole turns do not count"
    )
    if row.beyond > 2 * row.limit_beyond + 1 / row.runs:
        text += (
            f"; {row.beyond:.1%} of the runs are more than half a turn from the start "
            f"({row.limit_beyond:.1%} in the limit)"
        )
    return text + "."


def comparison_table(rows: Sequence[Comparison]) -> Table:
    """The comparison as a table of 80 columns."""
    table = plain_table(
        "The angle of SGD against the exact law of the limit",
        "variance: of the unwrapped angle, divided by the limit's",
        "kurtosis: of the unwrapped angle, 3 in the limit",
        "> π: runs more than half a turn from the start, and as many in the limit",
        "p: Watson's test of the angle on the circle",
        f"differs: by variance or p, with a false alarm rate of {FALSE_ALARM:g} for the table",
    )
    table.add_column("inputs", no_wrap=True)
    for name in ("η", "T", "variance", "kurtosis", "> π", "limit", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("differs", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(
            row.design,
            f"{row.lr:g}",
            f"{row.T:g}",
            f"{row.variance_ratio:.2f} ± {row.standard_error:.2f}",
            f"{row.kurtosis:.1f}",
            f"{row.beyond:.1%}",
            f"{row.limit_beyond:.1%}",
            f"{row.p_angle:.1g}" if row.p_angle < 0.01 else f"{row.p_angle:.2f}",
            "yes" if row.differs else "-",
            end_section=i + 1 == len(rows) or rows[i + 1].design != row.design,
        )
    return table

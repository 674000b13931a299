"""Is this normal? Norms, rotations and clock of a run against what theory says of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from manifold_sde.arguments import kind_of
from manifold_sde.errors import ArgumentError, DTypeError, MixingClockError
from manifold_sde.number_arrays import Array
from manifold_sde.paper import implements
from manifold_sde.training.clock import MixingClock
from manifold_sde.training.expected import ADAM, LINEAR, RELATIVE
from manifold_sde.training.group_audit import (
    AS_PREDICTED,
    AT_REST,
    NONE,
    NOT_COME_BACK,
    NOT_FINITE,
    NOT_YET,
    OFF,
    STOPPED,
    GroupAudit,
)
from manifold_sde.training.groups import EPS_MATTERS, INVARIANT
from manifold_sde.training.lane import Lane, split
from manifold_sde.training.logs import audit_log
from manifold_sde.training.recursions import SecondMoments
from manifold_sde.training.report import AuditReport
from manifold_sde.training.rules import (
    NORMS,
    Options,
    long_run_rate,
    matrix,
    options_of,
    relaxation_rate,
)
from manifold_sde.training.scale_group import ScaleGroup

NORM_OFF, ALIGNMENT_OFF = 0.15, 0.03
"""By how much norms may be off their prediction, and alignment off momentum's."""
CLIPPED = 0.8
"""Share of the gradients from which on a run is one of clipped gradients."""
UNEVEN = 0.85
"""Noise of Adam's updates, over that of even gradients, below which this is why a norm is off."""
EPS_SEEN = 0.8
"""What Adam's eps may leave of the noise of its updates, before it is spoken of."""


@implements("Equation (10)")
def audit(source: MixingClock | str | Path, **options: Any) -> AuditReport:
    """Compare a run with theory: its norms, how far a step turns, and the ledger of the norms.

    Of each group, and of all together: the norm against what independent gradients of the sizes
    that were seen would have made of it; the norm at rest at the present rates, and the steps
    until it is within 5 % of it; the angle of a step, and what noise alone makes of it; the share
    of the norm's growth that is alignment of the update with the weights, of which momentum alone
    makes 2β/(1 + β).

    None of it says that the run has mixed: norms and single rotations are the same whether the
    noise explores the minimisers or not.

    Args:
        source: A clock that was stepped; or a log (CSV, JSON lines) or a folder of checkpoints,
            with the rates as options: see :func:`~manifold_sde.training.logs.audit_log`.
        **options: For a log or folder.

    Returns:
        The report: ``print`` it, ``.plot()``, ``.save("audit.json")``, and its rows.

    Raises:
        MixingClockError: If the clock was not stepped.

    Source: the norm equations of Section 3 group by group, in their exact discrete form.
    """
    if isinstance(source, (str, Path)):
        return audit_log(source, **options)
    if not isinstance(source, MixingClock):
        raise DTypeError(
            "there is nothing to audit",
            received=kind_of(source),
            expected="a MixingClock, or the path of a log or of a folder of checkpoints",
            remedy="audit(clock)",
        )
    if options:
        raise ArgumentError(
            "a clock knows its rates",
            received=", ".join(options),
            expected="no options",
            remedy="audit(clock)",
        )
    if not source.steps:
        raise MixingClockError(
            "the clock was not stepped",
            received="0 steps",
            expected="steps of the optimizer that the clock was made with",
            remedy="make the clock before training, with the optimizer whose step() is called",
        )
    steps, _, norms = source.history
    columns = [_columns(source, lane) for lane in source._lanes]
    rows = [row for lane, c in zip(source._lanes, columns, strict=True) for row in _rows(lane, *c)]
    closing = float(np.max([lane.track.closing for lane in source._lanes]))
    return AuditReport(
        " ".join(str(source).split()),
        tuple(rows),
        tuple(_notes(source)),
        closing,
        steps,
        norms,
        tolerance=NORM_OFF,
        whole=_whole(source, rows, [numbers for numbers, *_ in columns]),
    )


def _notes(clock: MixingClock) -> list[str]:
    notes = [] if clock.not_finite_since is None else [NOT_COME_BACK]
    if clock.clipped >= CLIPPED:
        what = (
            "steps have the size of the clip, the norm at rest goes with its square, and u is not "
            "the clock."
            if clock.rule in LINEAR
            else "that moves this optimizer's steps by little, as their size is not the gradient's."
        )
        notes.append(f"{100 * clock.clipped:.0f} % of the gradients looked at are clipped: {what}")
    if clock.fresh is not None and clock.fresh < 0.1:
        what = (
            "Nearly all noise comes back each epoch"
            if clock.sampling is not None
            else "Little noise is fresh at each visit. If every sample comes once an epoch"
        )
        notes.append(
            f"{what}: norms and rotations are as with independent batches, but the minimisers are "
            f"not explored (f = {clock.fresh:.2g})."
        )
    if clock.fresh is None:
        notes.append(
            "Whether the noise explores the minimisers is not in these numbers: it depends on the "
            'order of the data. Tell sampling="iid" or "reshuffled", or call clock.measure(...).'
        )
    return notes


def _columns(clock: MixingClock, lane: Lane) -> tuple[dict[str, Array], float, float, float]:
    """The numbers of all parts of a lane; its decay a step, power of the norm, and rate to rest."""
    track = lane.track
    now = options_of(clock.optimizer.param_groups[lane.index]).numbers()
    loss = 1.0 - decay_factor(clock.rule, now) ** 2
    speed = relaxation_rate(clock.rule, now, loss)
    rate, noise = long_run_rate(clock.rule, now), track.long_run_noise(now)
    clipped = clock.rule in LINEAR and clock.clipped >= CLIPPED
    power = 4.0 if clock.rule in LINEAR and not clipped else 2.0
    if clipped:
        speed, noise = loss, track.mean("gradient")
    with np.errstate(invalid="ignore", divide="ignore"):
        squared, lost = np.full_like(noise, rate**2), np.full_like(noise, loss)
        if rate == 0.0:  # the balance of the steps before
            squared, lost = track.mean("rate"), -track.mean("decay")
        elif loss > 0.0 and clock.rule in (*LINEAR, "adamw"):
            lost = np.full_like(noise, 1.0 / rest_factor(clock.rule, now))
        at_rest = np.where(lost > 0.0, noise * squared / lost, np.nan)
        equilibrium = at_rest ** (1.0 / power)
        if clock.rule in ADAM:
            # r (1 + eps r / s) is at rest what r is without eps, in units of the norm s.
            eps, norm = np.sqrt(track.live / track.share) - 1.0, np.sqrt(track.square)
            without = equilibrium / norm * (1.0 + eps)
            equilibrium = 2.0 * without * norm / (1.0 + np.sqrt(1.0 + 4.0 * eps * without))
        predicted = np.sqrt(track.predicted.xx)
        effective = rate / track.square ** (1.0 if clock.rule in LINEAR else 0.5)
    if clock.rule in RELATIVE or clock.rule == NORMS:
        predicted = equilibrium = np.full_like(predicted, np.nan)
    return (
        {
            "norm": np.sqrt(track.square),
            "predicted": predicted,
            "equilibrium": equilibrium,
            "rotation": np.sqrt(track.mean("turned")),
            "expected_rotation": np.sqrt(track.mean("expected")),
            "gradient_ratio": track.mean("ratio"),
            "effective_rate": effective,
            "decay": track.mean("decay"),
            "growth": track.mean("growth"),
            "change": track.mean("change"),
            "pure_alignment": track.mean("pure"),
            "cosine": np.sqrt(track.mean("cosine")),
            "clock": track.clock,
            "alignment": track.mean("alignment"),
        },
        loss,
        power,
        speed,
    )


def _rows(
    lane: Lane, columns: dict[str, Array], loss: float, power: float, speed: float
) -> list[GroupAudit]:
    """The audit of the groups of a lane, each by the median of its parts."""
    track = lane.track
    parts = {name: split(lane, column) for name, column in columns.items()}
    found = []
    for i, group in enumerate(lane.watch.groups):
        numbers = {name: _median(column[i]) for name, column in parts.items()}
        # A share of sums, not of medians: both fluctuate from step to step.
        numbers["alignment"] = _share(parts["alignment"][i], parts["growth"][i])
        moved = bool(split(lane, track.count)[i].max())
        damped = float(np.median(split(lane, track.share / track.live)[i]))
        even = _median(split(lane, track.evenness)[i])
        found.append(
            _judged(group, numbers, loss, power, speed, moved, track.touched, damped, even)
            if not (lost := _lost(lane, i))
            else GroupAudit(group.name, group.parts, **numbers, verdict=OFF, reason=lost)
        )
    return found


def _lost(lane: Lane, index: int) -> str:
    """What is not finite of a group, in words; "" if all is, but for weights that are 0."""
    track = lane.track
    lost = split(lane, track.lost)[index]
    if lost.any():
        return NOT_FINITE.format(int(lost[lost > 0].min()))
    known = np.isfinite(track.square + track.clock + track.predicted.xx)
    known |= (track.square == 0.0) | (track.start == 0.0)
    return "" if split(lane, known)[index].all() else "its norm, or what is predicted, is no number"


def _whole(
    clock: MixingClock, rows: list[GroupAudit], lanes: list[dict[str, Array]]
) -> GroupAudit | None:
    """All groups together, as one point of the product of their spheres, if there are several."""
    if len(rows) < 2:
        return None
    parts = {name: np.concatenate([lane[name] for lane in lanes]) for name in lanes[0]}
    moved = np.isfinite(parts["growth"])
    square = parts["norm"] ** 2
    share = np.where(moved, square, 0.0) / max(float(square[moved].sum()), 1e-300)

    def mean(name: str) -> float:
        """By the squares of the norms, over the parts that move."""
        return float((share[moved] * parts[name][moved]).sum()) if moved.any() else math.nan

    for name in ("rotation", "expected_rotation", "gradient_ratio", "cosine"):
        parts[name] = parts[name] ** 2
    numbers = {n: math.sqrt((parts[n] ** 2).sum()) for n in ("norm", "predicted", "equilibrium")}
    for name in ("rotation", "expected_rotation", "gradient_ratio", "cosine"):
        numbers[name] = math.sqrt(mean(name))
    for name in ("decay", "growth", "change"):
        numbers[name] = mean(name)
    grown = share * parts["growth"]
    numbers["alignment"] = _share(share * parts["alignment"], grown)
    numbers["pure_alignment"] = _share(grown * parts["pure_alignment"], grown)
    verdicts = [row.verdict for row in rows]
    verdict = next(v for v in (OFF, NOT_YET, NONE, AS_PREDICTED) if v in verdicts)
    to_go = [row.steps_to_go for row in rows if math.isfinite(row.rotation)]
    reason = "" if verdict == AS_PREDICTED else f"{verdicts.count(verdict)} of {len(rows)} groups"
    return GroupAudit(
        "the whole",
        1,
        **numbers,
        clock=clock.time,
        steps_to_go=max(to_go, default=math.nan),
        verdict=verdict,
        reason=reason,
    )


def _share(part: Array, whole: Array) -> float:
    total = float(np.nansum(whole))
    return float(np.nansum(part)) / total if total else math.nan


def decay_factor(rule: str, now: Options) -> float:
    """What a step makes of weights without gradient, in the long run; NaN for rates that are."""
    step = matrix(rule, now, np.full(1, 1e9))
    pair = np.array([[_one(step.xx), _one(step.xm)], [_one(step.mx), _one(step.mm)]])
    known = np.isfinite(pair).all()
    return float(np.abs(np.linalg.eigvals(pair)).max()) if known else math.nan


def rest_factor(rule: str, now: Options) -> float:
    """E|x|^2 at rest by what the same noise adds to it in a step, if the decay did not interfere.

    Source: exact, the stationary second moments of weights and buffer.
    """

    def after(noise: float, *moments: float) -> Array:
        step = matrix(rule, now, np.full(1, 1e9))
        return np.array([_one(z) for z in SecondMoments(*moments).after(step, noise)])

    columns = np.stack([after(0.0, *row) for row in np.eye(3)], axis=1)
    whole = float(np.linalg.solve(np.eye(3) - columns, after(1.0, 0.0, 0.0, 0.0))[0])
    if rule in LINEAR:
        return whole * ((1.0 - now.momentum) / (now.lr * (1.0 - now.dampening))) ** 2
    return whole / now.lr**2


def _one(value: Any) -> float:
    return float(np.reshape(value, -1)[0])


def _median(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _judged(
    group: ScaleGroup,
    numbers: dict[str, float],
    loss: float,
    power: float,
    speed: float,
    moved: bool,
    touched: float,
    damped: float,
    even: float,
) -> GroupAudit:
    """The verdict on a group."""
    norm, predicted, rest = numbers["norm"], numbers["predicted"], numbers["equilibrium"]
    stopped = numbers["effective_rate"] == 0.0
    to_go = math.inf if loss <= 0.0 else math.nan
    if loss > 0.0 and math.isfinite(rest) and rest > 0.0:
        off = abs((norm / rest) ** power - 1.0) / ((1.0 + AT_REST) ** power - 1.0)
        to_go = max(0.0, math.log(off)) / speed if off > 0.0 else 0.0
    verdict, reason = AS_PREDICTED, ""
    if not moved:
        verdict, reason = AS_PREDICTED, "frozen, it had no gradient"
    elif math.isnan(loss):
        verdict, reason = OFF, "its learning rate or weight decay is not finite now"
    elif numbers["cosine"] > EPS_MATTERS:
        verdict = OFF
        reason = f"it is not scale-invariant: cos(x, g) = {numbers['cosine']:.1e}"
    elif math.isfinite(predicted) and abs(norm / predicted - 1.0) > NORM_OFF:
        verdict, reason = OFF, _likely(numbers, touched, even)
    elif stopped:
        reason = STOPPED
    elif loss <= 0.0:
        verdict, reason = NONE, "without decay the norm grows for ever, and the clock slows down"
    elif to_go > 0.0:
        verdict = NOT_YET
    if not reason and INVARIANT < numbers["cosine"] <= EPS_MATTERS:
        reason = "the eps of its normalisation is seen at this norm"
    elif not reason and damped < EPS_SEEN:
        reason = "the optimizer's eps is not small against the gradients, and slows the clock"
    return GroupAudit(
        group.name, group.parts, **numbers, steps_to_go=to_go, verdict=verdict, reason=reason
    )


def _likely(numbers: dict[str, float], touched: float, even: float) -> str:
    """Why a norm is not what independent gradients make of it."""
    if touched > 1e-3:
        return "the weights are changed outside of optimizer.step()"
    if numbers["cosine"] > INVARIANT:
        return "the eps of its normalisation is too large for this norm"
    excess = numbers["alignment"] - numbers["pure_alignment"]
    if excess > ALIGNMENT_OFF or numbers["norm"] > numbers["predicted"]:
        return "successive gradients agree (signal): more growth than momentum and noise make"
    fallen = numbers["norm"] / numbers["predicted"]
    if even < UNEVEN and fallen > (1.0 - NORM_OFF) * math.sqrt(even):
        return (
            "its gradients are uneven (rare, or of heavy tails), and Adam divides the large ones "
            f"by more: their noise is {even:.2g} of that of even ones, which the prediction takes"
        )
    return (
        "successive gradients undo each other (directions that are steep for this rate, or every "
        "sample once an epoch): less growth than noise makes"
    )

"""The audit of runs that are over: of a log, or of a folder of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from manifold_sde.arguments import check_choice, check_path
from manifold_sde.errors import ArgumentError, NonFiniteError
from manifold_sde.number_arrays import Array
from manifold_sde.schedules import Schedule, ScheduleLike
from manifold_sde.training.expected import ADAM, LINEAR
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
from manifold_sde.training.log_files import Column, LogTable, checkpoints
from manifold_sde.training.recursions import RunningClock
from manifold_sde.training.report import AuditReport
from manifold_sde.training.rules import (
    Options,
    long_run_rate,
    matrix,
    relaxation_rate,
    variance,
)

_FITS, _JUMP = 0.1, 2.0
_PIECES, _LEAST = (2, 4, 8), 3
"""Into how many pieces a run is cut along which noise changes, and their least rows."""


def audit_log(
    path: str | Path,
    *,
    norms: Sequence[str] | None = None,
    step: str = "step",
    lr: str | ScheduleLike = "lr",
    weight_decay: str | ScheduleLike = 0.0,
    optimizer: str = "adamw",
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    sizes: Mapping[str, int] | None = None,
) -> AuditReport:
    """Audit norms that were written down, by the rates of the run.

    The norms are predicted from the first of them on. What is not known of the gradients is one
    number a group, fitted: the trace V of the noise at norm 1 (SGD), or the variance U^2 of an
    update (others), which for Adam and AdamW is the number of weights, and no fit, where it is
    known. Where one number does not do, a line is fitted along each half, quarter or eighth of the
    run: then the noise has changed, which is said and is no failure. A group whose norms do not
    follow that either is not scale-invariant, or was changed by something else.

    Args:
        path: A CSV file, a file of JSON lines, a JSON array of objects, or a folder of checkpoints
            (``state_dict`` files of ``torch.save``, or safetensors), whose names end in the step.
            Rows may lack what was not logged at their step.
        norms: Columns that hold norms; of a folder, names of tensors. By default the columns that
            end in "/norm", as a clock's do, or all with "norm" and without "grad" in their name,
            and all tensors of two dimensions or more: whether they are scale-invariant is then for
            you to know.
        step: Column of the step.
        lr: Column of the learning rate, or a number, a sequence or a callable of the step.
        weight_decay: The same of the weight decay.
        optimizer: ``"sgd"``, ``"sgdw"``, ``"adam"``, ``"adamw"``, or one of fixed step size.
        momentum: Of SGD.
        dampening: Of SGD.
        nesterov: Of SGD.
        betas: Of Adam and AdamW.
        sizes: Numbers of weights of the columns, for Adam and AdamW.

    Returns:
        The report, in which what a log does not tell is NaN.

    Raises:
        DataFileError: If a file cannot be read, or lacks a column.
        ArgumentError: If there are fewer than three rows.
    """
    check_choice("optimizer", optimizer, (*LINEAR, *ADAM, "signsgd", "lion"), 'optimizer="sgd"')
    path = check_path("path", path)
    known = dict(sizes or {})
    sources: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if path.is_dir():
        columns, counts = checkpoints(path, norms)
        known = {**counts, **known}
    else:
        table = LogTable(path, step)
        chosen = table.norms if norms is None else norms
        columns = {name: table.column(name, of_weights=True) for name in chosen}
        sources = {k: table.column(z) if isinstance(z, str) else z for k, z in sources.items()}
    if any(isinstance(z, str) for z in sources.values()):
        raise ArgumentError(
            "a folder of checkpoints does not say the learning rate",
            received=f"lr = {lr!r}, weight_decay = {weight_decay!r}",
            expected="numbers, sequences of one value a step, or callables of the step",
            remedy="audit(folder, lr=1e-3, weight_decay=0.1)",
        )
    usable = {
        name: column
        for name, column in columns.items()
        if len(column.steps) > 2 or not np.isfinite(column.values).all()
    }
    if not usable:
        most = max((len(column.steps) for column in columns.values()), default=0)
        raise ArgumentError(
            "there are too few norms to compare",
            received=f"{len(columns)} columns of norms, at {most} steps at most, in {path}",
            expected="one column of norms of weights or more, at three different steps or more",
            remedy="norms=[...] names the columns, or the tensors of checkpoints; norms of "
            "gradients do not say it",
        )
    steps = np.unique(np.concatenate([column.steps for column in usable.values()]))
    rates, decays = (_by_step(name, source, steps) for name, source in sources.items())
    for name, values in (("lr", rates), ("weight_decay", decays)):
        if not np.isfinite(values).all():
            k = int(np.argmin(np.isfinite(values)))
            raise NonFiniteError(
                f"the {name} of the log is not finite",
                received=f"{values[k]} at step {steps[0] + k}",
                expected="a finite number at each step",
                remedy=f"{name}=..., a number or a callable of the step",
            )
    options = [
        Options(eta, lam, momentum, dampening, nesterov, betas)
        for eta, lam in zip(rates.tolist(), decays.tolist(), strict=True)
    ]
    run = _Run(optimizer, options, int(steps[0]))

    def at_all(column: Column, values: Array) -> Array:
        """At all steps, NaN where this column has none."""
        found = np.full(len(steps), np.nan)
        found[np.searchsorted(steps, column.steps)] = values
        return found

    judged = {name: run.judge(name, column, known.get(name)) for name, column in usable.items()}
    return AuditReport(
        f"{path.name}: steps {steps[0]} to {steps[-1]}, {optimizer}",
        tuple(row for row, _ in judged.values()),
        (
            *([] if all(np.isfinite(c.values).all() for c in usable.values()) else [NOT_COME_BACK]),
            "Which of these are scale-invariant was not measured: scale_invariant_groups(model, "
            "inputs) does. Norms say nothing of mixing; the order of the data decides it.",
        ),
        math.nan,
        steps,
        {name: at_all(column, column.values) for name, column in usable.items()},
        {name: at_all(usable[name], prediction) for name, (_, prediction) in judged.items()},
        {name: at_all(column, run.clock(column)) for name, column in usable.items()},
        _FITS,
    )


class _Run:
    """The decay of a run, and what noise of size 1 adds, between the steps that were logged.

    For P = |x|^p, p = 4 for SGD and 2 for steps of fixed size, an interval gives
    P' = A P + c B, with c = V or U^2.
    """

    def __init__(self, rule: str, options: list[Options], first: int) -> None:
        self.rule, self.first, self.last = rule, first, options[-1]
        self.power = 4.0 if rule in LINEAR else 2.0
        clock = RunningClock()
        self.log_a = np.zeros(len(options) + 1)
        for k, now in enumerate(options):
            clock.advance(matrix(rule, now, np.full(1, min(k, 1))), 0.0)
            self.log_a[k + 1] = float(np.reshape(clock.log_factor, -1)[0])
        rates = np.array([long_run_rate(rule, z) for z in options])
        self.added = rates**2 * (2.0 if rule in LINEAR else 1.0)
        # What it tends to is that of the last step that had a learning rate.
        moving = max(np.flatnonzero(rates), default=len(rates) - 1)
        self.moving = options[moving]
        self.loss = -math.expm1(2.0 * float(self.log_a[moving + 1] - self.log_a[moving]))

    def _intervals(self, steps: Array) -> tuple[Array, Array]:
        """A and B of the intervals between steps."""
        log_a, starts = self.log_a, steps - self.first
        # (η/a)^2 in units of the interval's end; SGD's twin has the rate η/(a a').
        middle = log_a[1:] if self.rule not in LINEAR else 0.5 * (log_a[1:] + log_a[:-1])
        noise = [
            float((self.added[i:j] * np.exp(self.power * (log_a[j] - middle[i:j]))).sum())
            for i, j in pairwise(starts.tolist())
        ]
        return np.exp(self.power * np.diff(log_a[starts])), np.array(noise)

    def clock(self, column: Column) -> Array:
        """The angular clock v since the first of the norms: their growth without decay."""
        grown = self.log_a[column.steps - self.first]
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Array = 2.0 * (np.log(column.values / column.values[0]) - grown + grown[0])
        return found

    def judge(self, name: str, column: Column, size: int | None) -> tuple[GroupAudit, Array]:
        """The audit of a column, and its predicted norms."""
        norms = column.values
        finite = np.isfinite(norms)
        if not (finite & (norms > 0.0)).all():
            reason = "norms that are not positive"
            if not finite.all():
                reason = NOT_FINITE.format(int(column.steps[np.argmin(finite)]))
            row = GroupAudit(name, 1, float(norms[-1]), math.nan, verdict=OFF, reason=reason)
            return row, np.full(len(norms), np.nan)
        powers = norms**self.power
        factor, noise = self._intervals(column.steps)
        fitted = size is None or self.rule not in ADAM

        def followed(knots: int) -> tuple[list[float], Array, float]:
            """The noise at some knots, the norms that it makes, and how far these are off."""
            # Linear in the noise at the knots: the least squares of relative differences.
            at = np.linspace(0.0, len(noise) - 1.0, knots)
            hats = np.array([np.interp(range(len(noise)), at, e) for e in np.eye(knots)]).T
            decayed, made = np.full(len(powers), powers[0]), np.zeros((len(powers), knots))
            for k, (a, b) in enumerate(zip(factor, noise, strict=True)):
                decayed[k + 1], made[k + 1] = a * decayed[k], a * made[k] + b * hats[k]
            levels = np.linalg.lstsq(made / powers[:, None], 1.0 - decayed / powers, rcond=None)[0]
            if not fitted and size is not None:
                levels = np.array([size * variance(self.rule, self.last)])
            curve = (decayed + made @ np.maximum(levels, 0.0)) ** (1.0 / self.power)
            return levels.tolist(), curve, float(np.abs(norms / curve - 1.0).max())

        best = followed(1)
        if fitted and best[2] > _FITS:
            counts = [n + 1 for n in _PIECES if n * _LEAST <= len(noise)]
            tried = [found for found in map(followed, counts) if min(found[0]) > 0.0]
            best = min([best, *tried], key=lambda found: found[2])
        levels, curve, off = best
        row = self._row(name, norms, curve, levels, off, fitted)
        return replace(row, clock=float(self.clock(column)[-1])), curve

    def _row(
        self, name: str, norms: Array, curve: Array, levels: list[float], off: float, fitted: bool
    ) -> GroupAudit:
        now, norm, level = self.moving, float(norms[-1]), levels[-1]
        stopped = self.last.lr == 0.0
        scale = long_run_rate(self.rule, now) ** 2 * max(level, 0.0)
        rest, to_go = math.nan, math.inf
        if self.loss > 0.0:
            rest = (scale / self.loss) ** (1.0 / self.power)
            ratio = abs((norm / rest) ** self.power - 1.0) if rest > 0.0 else math.inf
            ratio /= (1.0 + AT_REST) ** self.power - 1.0
            speed = relaxation_rate(self.rule, now, self.loss)
            to_go = max(0.0, math.log(max(ratio, 1e-300))) / speed
        verdict, reason = AS_PREDICTED, ""
        if len(levels) > 1:
            reason = f"its noise has changed, from {levels[0]:.3g} to {level:.3g} at norm 1"
        if min(levels) <= 0.0:
            verdict, reason = OFF, "it falls faster than decay: it is not scale-invariant"
        elif not off <= _FITS:
            what = "noise, constant or slowly changing," if fitted else "its number of weights"
            verdict = OFF
            reason = (
                f"up to {100 * off:.0f} % from what {what} makes of it: it is not scale-invariant, "
                "its gradients have signal, or something else changed the weights"
            )
        elif stopped:
            reason = STOPPED
        elif self.loss <= 0.0:
            verdict, reason = NONE, "without decay the norm grows for ever"
        elif to_go > 0.0:
            verdict = NOT_YET
        return GroupAudit(
            name,
            1,
            norm,
            float(curve[-1]),
            equilibrium=rest,
            effective_rate=long_run_rate(self.rule, self.last) / norm ** (self.power / 2.0),
            decay=0.0 if stopped else -self.loss,
            growth=0.0 if stopped else scale / norm**self.power,
            steps_to_go=math.inf if stopped else to_go,
            verdict=verdict,
            reason=reason,
        )


def _by_step(name: str, source: Any, steps: Array) -> Array:
    """The value of each step between the first and the last that were logged."""
    first, last = int(steps[0]), int(steps[-1])
    if isinstance(source, Column):
        if not len(source.steps):
            raise ArgumentError(
                f"the column of {name} is empty",
                received="no row with a number",
                expected=f"the {name} of some steps",
                remedy=f"{name}=0.1, a number, or another column",
            )
        # Between two rows along a line; where it jumps, the earlier one until the later.
        at = np.arange(first, last)
        earlier = np.searchsorted(source.steps, at, side="right") - 1
        low, high = (source.values[np.clip(earlier + i, 0, len(source.steps) - 1)] for i in (0, 1))
        smooth = (high <= _JUMP * low) & (low <= _JUMP * high)
        return np.where(smooth, np.interp(at, source.steps, source.values), low)
    remedy = f"a callable of the step, or a column: {name}='column'"
    return Schedule.of(name, source).every(first, last, of="the log", remedy=remedy)

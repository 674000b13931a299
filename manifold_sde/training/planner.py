"""Steps until a run is mixed, at other rates; what changes would cost; and the cooldown."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manifold_sde.arguments import check_between, check_choice, check_positive, real
from manifold_sde.errors import ArgumentError
from manifold_sde.paper import implements
from manifold_sde.training.cooldown import COOLDOWNS, Cooldown, cooldown_of, count_of
from manifold_sde.training.norm_start import NormAtStart, norm_at_start
from manifold_sde.training.relaxation_time import Relaxation
from manifold_sde.training.training_settings import (
    Schedule,
    TrainingSettings,
    bisect,
)
from manifold_sde.writing import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Interval = tuple[float, float, float]
"""From, most likely, to."""

#: Distance from its balance at which the early phase of the norm is over.
_SETTLED = 0.05
_UNBOUNDED = (
    "Note: the relaxation time is not bounded from above, and so the steps are not, nor is told "
    "what changes would cost. A longer run at the large learning rate bounds it."
)


@dataclass(frozen=True)
class Change:
    """What a change costs, where the norm is at its balance when it is made.

    Attributes:
        name: The change.
        ratio: Steps with it over steps without.
        steps: Steps with it, at the most likely relaxation time.
    """

    name: str
    ratio: float
    steps: float


@dataclass(frozen=True)
class Plan:
    """How many steps a run takes until it is mixed.

    Attributes:
        settings: What it is trained with.
        tau: Relaxation time in the angular clock: from, most likely, to.
        relaxations: Relaxation times until it is mixed.
        steps: Steps until then, likewise.
        norm_steps: Steps until the norm is within 5 % (of its power p) of its balance, at the
            largest learning rate; infinite without weight decay.
        ratio: The power p of the norm at the start over that at its balance.
        changes: What changes would cost.
        cooldown: The window of the cooldown after a constant learning rate; ``None`` without
            weight decay.
        notes: Where the theory is not met.
    """

    settings: TrainingSettings
    tau: Interval
    relaxations: float
    steps: Interval
    norm_steps: float
    ratio: float
    changes: tuple[Change, ...]
    cooldown: Cooldown | None
    notes: tuple[str, ...]
    _start: NormAtStart

    def lr_for(self, steps: float) -> Interval:
        """Find the learning rates at which so many steps are enough, other things equal.

        Args:
            steps: The budget.

        Returns:
            For the shortest, the most likely and the longest relaxation time.

        Raises:
            ArgumentError: If there is none.
        """
        return self._inverse("lr", steps)

    def weight_decay_for(self, steps: float) -> Interval:
        """Find the weight decays at which so many steps are enough, other things equal.

        Args:
            steps: The budget.

        Returns:
            For the shortest, the most likely and the longest relaxation time; 0 where none is
            needed.

        Raises:
            ArgumentError: If there is none.
        """
        return self._inverse("weight_decay", steps)

    def _inverse(self, name: str, steps: float) -> Interval:
        budget = check_positive("steps", steps, "steps=100_000")
        found = [self._solved(name, budget, self.relaxations * tau) for tau in self.tau]
        return found[0], found[1], found[2]

    def _solved(self, name: str, budget: float, clock: float) -> float:
        if math.isinf(clock):
            return math.inf
        if name == "weight_decay" and self._start.norm is not None:
            without = self.settings.changed(weight_decay=0.0)
            if self._start.clock(without, budget) >= clock:
                return 0.0
        # kappa of 1 is the end, and momentum makes it less.
        now = getattr(self.settings, name)
        most = 0.999 / (self.settings.shrinkage / now if now else self.settings.step)
        if self.settings.optimizer == "sgd":
            most *= (1.0 - math.sqrt(self.settings.momentum)) ** 2 / (1.0 - self.settings.momentum)

        def beyond(log_value: float) -> float:
            changed = self.settings.changed(**{name: math.exp(log_value)})
            return self._start.clock(changed, budget) - clock

        return math.exp(bisect(beyond, math.log(most) - 60.0, math.log(most), name))

    def __str__(self) -> str:
        low, tau, high = self.tau
        clock = [self.relaxations * value for value in self.tau]
        whole = "" if self.settings.schedule == "constant" else ", the whole schedule"
        bounded = math.isfinite(high)
        mixed = (
            f"mixed after {self.relaxations:g} relaxation times of {tau:.3g} ({low:.3g} to "
            f"{high:.3g}): a clock of {clock[1]:.3g} ({clock[0]:.3g} to {clock[2]:.3g})"
        )
        if not bounded:
            known = f", of {low:.3g} or more: a clock of at least {clock[0]:.3g}" if low else ""
            mixed = f"mixed after {self.relaxations:g} relaxation times{known}"
        notes = list(self.notes)
        lines = textwrap.wrap(f"{self.settings}", 80) + textwrap.wrap(mixed, 80)
        if not bounded:
            lines += textwrap.wrap(notes.pop(notes.index(_UNBOUNDED)), 80, subsequent_indent="  ")
        if bounded:
            lines += ["", f"{'steps':36}{'':>14}{'from':>14}{'to':>14}"]
            lines.append(_row(f"until mixed{whole}", self.steps[1], self.steps[0], self.steps[2]))
        else:
            unknown = f"unknown, at least {count_of(self.steps[0])}" if low else "unknown"
            lines += ["", "steps", f"{f'until mixed{whole}':36}{unknown:>28}"]
        lines.append(_row("until the norm has settled", self.norm_steps))
        if self.changes and bounded:
            lines += ["", f"{'what if, once the norm has settled':36}{'steps':>14}{'ratio':>14}"]
            lines += [
                f"{change.name:36}{count_of(change.steps):>14}{change.ratio:>14.3f}"
                for change in self.changes
            ]
        lines.append("")
        if self.cooldown and bounded:
            notes.insert(0, str(self.cooldown))
        for text in notes:
            lines += textwrap.wrap(text, 80, subsequent_indent="  ")
        return "\n".join(lines).rstrip()

    __repr__ = __str__

    def to_json(self) -> str:
        """All numbers; what is infinite is null."""
        settings = {
            name: getattr(self.settings, name)
            for name in ("lr", "weight_decay", "batch_size", "momentum", "dampening", "optimizer")
        }
        data = {
            "settings": {**settings, "schedule": self.settings.schedule_name},
            "tau": self.tau,
            "relaxations": self.relaxations,
            "steps": self.steps,
            "norm_steps": self.norm_steps,
            "norm_ratio": self.ratio,
            "changes": [vars(change) for change in self.changes],
            "cooldown": vars(self.cooldown) if self.cooldown else None,
            "notes": self.notes,
        }
        return json.dumps(plain(data), indent=1, allow_nan=False)

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Axes:
        """Draw the steps until mixed against weight decay, for some learning rates.

        Args:
            ax: Axes to draw in; by default new ones.
            **kwargs: Passed on to each of the curves.

        Returns:
            The axes.
        """
        from matplotlib.figure import Figure

        ax = ax or Figure(figsize=(5.8, 3.8), layout="constrained").subplots()
        own = self.settings
        middle = own.weight_decay or 1e-4
        colours = ("#56B4E9", "#0072B2", "#000000", "#E69F00", "#D55E00")
        for factor, colour in zip((0.1, 0.32, 1.0, 3.2, 10.0), colours, strict=True):
            points = []
            for power in range(-8, 9):
                decay = middle * 10.0 ** (power / 8)
                try:
                    changed = own.changed(lr=own.lr * factor, weight_decay=decay)
                except ArgumentError:  # too strong a decay for this momentum
                    continue
                clocks = [self.relaxations * tau for tau in self.tau]
                points.append((decay, *(self._start.steps(changed, v) for v in clocks)))
            if not points:
                continue
            x, low, y, high = zip(*points, strict=True)
            style = {"color": colour, "lw": 1.5, "label": f"{own.lr * factor:.2g}", **kwargs}
            ax.plot(x, y, **style)
            if factor == 1.0 and math.isfinite(high[0]):
                ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        if own.weight_decay:
            ax.plot([own.weight_decay], [self.steps[1]], "o", color="black", ms=6, zorder=5)
        ax.set(xscale="log", yscale="log", xlabel="weight decay", ylabel="steps until mixed")
        ax.legend(frameon=False, fontsize="small", title="learning rate", title_fontsize="small")
        return ax


@implements("Theorem 5.5")
def plan(
    tau: Any,
    *,
    lr: float,
    weight_decay: float,
    batch_size: int = 1,
    momentum: float = 0.0,
    dampening: float = 0.0,
    schedule: Schedule = "constant",
    optimizer: str = "sgd",
    relaxations: float = 5.0,
    fresh: float | None = None,
    before: TrainingSettings | None = None,
    norm: float | None = None,
    noise: float | None = None,
    curvature: float | None = None,
    cooldown: str = "linear",
    residual: float = 0.1,
    drift: float = 0.05,
) -> Plan:
    r"""Say how many steps a run takes until it is mixed, from a relaxation time in the clock.

    The relaxation time is measured once, on a run at a large learning rate, and holds for every
    learning rate, weight decay, batch size, momentum and schedule of the same kind of optimizer,
    as long as the weights stay near the minimisers of one basin.

    At its balance of noise and decay the norm makes the clock run at 2 lr * weight_decay a step
    (with momentum b, over 1 - b). A run that starts off the balance takes longer or shorter until
    the norm has settled, and this is counted.

    Args:
        tau: Relaxation time in the angular clock v: a
            :class:`~manifold_sde.training.Relaxation`, a number, (from, to), or (from, most
            likely, to). In the intrinsic clock u it is times the trace V of the batch's gradient
            covariance at norm 1.
        lr: Learning rate; the largest of a schedule.
        weight_decay: Weight decay, in the optimizer's own convention.
        batch_size: Samples of a step.
        momentum: Momentum.
        dampening: Dampening of SGD's buffer.
        schedule: "constant", "cosine", "linear", or a function of progress, as in
            :class:`~manifold_sde.training.TrainingSettings`.
        optimizer: As there.
        relaxations: Relaxation times until the run counts as mixed; after 5, .7 % of a difference
            is left.
        fresh: Share f of the noise that is fresh at each visit in the planned run, if ``tau`` is in
            the effective clock f v: 1 with independent batches. By default that of a
            :class:`~manifold_sde.training.Relaxation`, or 1.
        before: Settings at whose balance the norm is at the start. By default it is at the balance
            of the planned run.
        norm: Instead, the norm of the weights at the start.
        noise: Trace of a single sample's gradient covariance at norm 1, for SGD; variance of an
            update (number of weights, for AdamW). Needed with ``norm``:
            :func:`~manifold_sde.training.plan_options` reads both off a clock, and the rates.
        curvature: Smallest eigenvalue of the Hessian, at norm 1, of the directions that are to
            come down in the cooldown (SGD).
        cooldown: Shape of the cooldown, "linear" or "cosine".
        residual: Share of their noise that the cooldown is to leave to these directions.
        drift: Part of a relaxation time by which the clock may move in the cooldown.

    Returns:
        The plan.

    Raises:
        ArgumentError, TimeScaleError: If an argument is out of range, or the run has no such plan.

    Example:
        >>> found = plan((1.5, 2.0, 3.0), lr=0.1, weight_decay=5e-4, momentum=0.9)
        >>> [round(steps) for steps in found.steps]  # 5 tau / (2 * 0.1 / (1 - 0.9) * 5e-4)
        [7498, 9997, 14996]
        >>> round(found.weight_decay_for(5000)[1] / 5e-4, 3)
        1.999

    Source: sums of the learning rates with decay taken out; from the balance a change of rates by
    the ratio R of the balances takes ln(1 + R(e^{pv/2} - 1)) / (p kappa) steps.
    """
    settings = TrainingSettings(
        lr, weight_decay, batch_size, momentum, dampening, schedule, optimizer
    )
    if fresh is None:
        fresh = tau.fresh if isinstance(tau, Relaxation) else 1.0
    above = math.nextafter(1.0, 2.0)
    fresh = check_between(fresh, 1e-12, above, "the share of fresh noise", "fresh=1")
    low, middle, high = _times(tau)
    times = low / fresh, middle / fresh, high / fresh
    relaxations = check_positive("relaxations", relaxations, "relaxations=5")
    start = norm_at_start(settings, before, norm, noise)
    check_choice("cooldown", cooldown, tuple(COOLDOWNS), 'cooldown="linear"')
    residual = check_between(residual, 1e-6, 1.0, "the residual", "residual=0.1")
    drift = check_between(drift, 1e-6, 1.0, "the drift", "drift=0.05")
    if curvature is not None:
        curvature = check_positive("curvature", curvature, "curvature=1e-2")
    low, middle, high = (start.steps(settings, relaxations * value) for value in times)
    kappa = settings.shrinkage
    ratio = start.ratio(settings)
    norm_steps = math.inf
    if kappa:
        off = max(abs(ratio - 1.0) / _SETTLED, 1.0)
        norm_steps = math.log(off) / (-settings.power * math.log1p(-kappa))
    return Plan(
        settings=settings,
        tau=times,
        relaxations=relaxations,
        steps=(low, middle, high),
        norm_steps=norm_steps,
        ratio=ratio,
        changes=_changes(settings, relaxations * times[1]) if kappa else (),
        cooldown=(
            cooldown_of(settings, times[1], cooldown, residual, drift, curvature, noise)
            if kappa and schedule == "constant"
            else None
        ),
        notes=tuple(_notes(settings, middle, norm_steps, times)),
        _start=start,
    )


def _changes(settings: TrainingSettings, clock: float) -> tuple[Change, ...]:
    from_here = NormAtStart(None, None, settings)
    own = from_here.steps(settings, clock)
    tried: list[tuple[str, dict[str, Any]]] = [
        ("half the learning rate", {"lr": settings.lr / 2}),
        ("twice the learning rate", {"lr": 2 * settings.lr}),
        ("twice the batch", {"batch_size": 2 * settings.batch_size}),
        ("half the weight decay", {"weight_decay": settings.weight_decay / 2}),
        ("twice the weight decay", {"weight_decay": 2 * settings.weight_decay}),
    ]
    for name in ("constant", "cosine", "linear"):
        if settings.schedule != name:
            tried.append((f"{name} learning rate", {"schedule": name}))
    found = []
    for name, change in tried:
        try:
            steps = from_here.steps(settings.changed(**change), clock)
        except ArgumentError:  # too strong a decay for this momentum
            continue
        found.append(Change(name, steps / own, steps))
    if settings.power == 4:
        # By equal clock: its norm is another one, so from its own balance.
        adam = settings.changed(optimizer="adamw", momentum=0.0, dampening=0.0)
        steps = adam.steps(clock, 1.0)
        found.append(Change("AdamW, same lr and weight decay", steps / own, steps))
    return tuple(found)


def _notes(
    settings: TrainingSettings, steps: float, norm_steps: float, tau: Interval
) -> Sequence[str]:
    notes = []
    if math.isinf(tau[2]):
        notes.append(_UNBOUNDED)
    elif steps < norm_steps < math.inf:
        notes.append(
            "Note: the run is mixed before its norm has settled. The steps until mixed count the "
            "clock while the norm moves: the two go on together, and not one after the other. The "
            "spread about the minimisers is that of the balance only once both are over."
        )
    if settings.momentum and steps * (1.0 - settings.momentum) < 50.0:
        notes.append(
            f"Note: the buffer remembers {1.0 / (1.0 - settings.momentum):.0f} steps, which is not "
            "little beside the run: the plan is off by about as many."
        )
    if settings.optimizer == "adamw" and 2.0 * settings.shrinkage > 1e-4:
        notes.append(
            f"Note: the norm changes in {1.0 / (2.0 * settings.shrinkage):.0f} steps, in which "
            "beta2=0.999 has not forgotten the old one: expected_clock counts this lag."
        )
    if settings.power == 2:
        notes.append(
            "Note: a relaxation time that was measured with SGD is not that of updates of fixed "
            "size: they diffuse otherwise. Measure it with the same optimizer."
        )
    elif settings.shrinkage:
        notes.append(
            "Note: AdamW is compared by its clock alone; its relaxation time is another one."
        )
    return notes


def _times(tau: Any) -> Interval:
    """From, most likely and to."""
    if isinstance(tau, Relaxation):
        return tau.interval[0], tau.estimate, tau.interval[1]
    values = [real(value) for value in (tau if isinstance(tau, Sequence) else [tau])]
    if len(values) == 1:
        values = values * 3
    if len(values) == 2:
        values.insert(1, math.sqrt(values[0] * values[1]))
    increasing = len(values) == 3 and 0.0 <= values[0] <= values[1] <= values[2]
    if not increasing or not 0.0 < values[1] < math.inf:
        raise ArgumentError(
            "this is no relaxation time",
            received=repr(tau),
            expected="a positive number, (from, to), (from, most likely, to), or a Relaxation",
            remedy="tau=relaxation(records)",
        )
    return values[0], values[1], values[2]


def _row(name: str, *values: float) -> str:
    return f"{name:36}" + "".join(f"{count_of(value):>14}" for value in values)

"""Has a run mixed: relaxation times of recorded functions, with intervals and verdicts."""

from __future__ import annotations

import json
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from manifold_sde.arguments import check_between, check_choice
from manifold_sde.errors import ArgumentError, MixingClockWarning
from manifold_sde.training.likelihood import Runs
from manifold_sde.training.profiles import LIGHT, QUICK, Profile, profiles_of, quantile
from manifold_sde.training.readings import checked
from manifold_sde.training.records import Clock, Records
from manifold_sde.writing import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Most records of a run that are used: more are thinned.
_MOST = 600
#: Relaxation times that a run of one mode has to last so that nine of ten are told to be mixed;
#: where another mode is possible, over the square of the weight.
_TELLS = 30.0


@dataclass(frozen=True, eq=False)
class Function:
    """What is known of the relaxation of one function.

    Attributes:
        name: Its name.
        interval: Interval of its relaxation time, in the clock, for itself alone.
        estimate: The most likely relaxation time.
        verdict: "mixed", "not mixed" or "cannot tell".
        needed: Length of run that would tell, in the clock, or the least where the interval has no
            upper end; ``None`` where it is told.
        profile: What is behind it.
    """

    name: str
    interval: tuple[float, float]
    estimate: float
    verdict: str
    needed: float | None
    profile: Profile


@dataclass(frozen=True, eq=False)
class Relaxation:
    """The relaxation time of a run, in its clock.

    Attributes:
        interval: From where to where it lies. The upper end is infinite where the run does not
            bound it.
        estimate: The most likely value, of the slowest function.
        verdict: "mixed", "not mixed" or "cannot tell".
        reason: Why, in a sentence.
        needed: Length of run that would tell, in the clock, or the least where the interval has no
            upper end; ``None`` where it is told.
        length: Length of the longest run.
        n_records, n_runs: Numbers of records of a function, and of runs.
        weight: Least share of the variance of a mode that counts.
        modes: Number of time scales that a function may have.
        level: Confidence.
        functions: The same for each function.
        fresh: What its clock is of the clock v: the share of noise that is fresh at each visit, of
            the training clock that was given with the records.
    """

    interval: tuple[float, float]
    estimate: float
    verdict: str
    reason: str
    needed: float | None
    length: float
    n_records: int
    n_runs: int
    weight: float
    modes: int
    level: float
    functions: tuple[Function, ...]
    fresh: float = 1.0

    def __str__(self) -> str:
        low, high = self.interval
        runs = "one run" if self.n_runs == 1 else f"{self.n_runs} runs"
        lines = [
            f"{self.n_records} records of {runs} over a clock of {self.length:.4g}: {self.verdict}",
            *textwrap.wrap(self.reason, 80),
            "",
            *textwrap.wrap(
                f"relaxation time {self.estimate:.3g}, between {low:.3g} and {high:.3g} "
                f"({self.level:.0%}), {self.scope}",
                80,
            ),
            "",
            f"{'function':30}{'time':>10}{'from':>10}{'to':>10}   verdict",
        ]
        for one in self.functions:
            name = one.name if len(one.name) < 30 else one.name[:26] + "..."
            numbers = f"{one.estimate:>10.3g}{one.interval[0]:>10.3g}{one.interval[1]:>10.3g}"
            lines.append(f"{name:30}{numbers}   {one.verdict}")
        return "\n".join(lines)

    __repr__ = __str__

    @property
    def scope(self) -> str:
        """Of which modes the interval speaks."""
        if self.modes == 1:
            return "if each function has one time scale"
        scope = f"of modes with at least {self.weight:g} of a function's variance"
        if self.verdict != "mixed":
            return scope
        cutoff = min(one.profile.cutoff for one in self.functions)
        return f"{scope}; nothing is said of modes slower than {cutoff:.3g}, or never visited"

    def to_json(self) -> str:
        """The numbers and the verdicts, without the profiles."""
        names = ["estimate", "verdict", "reason", "needed", "length", "n_records", "n_runs"]
        names += ["weight", "modes", "level"]
        data: dict[str, Any] = {name: getattr(self, name) for name in names}
        data["interval"] = self.interval
        data["functions"] = [
            {
                "name": one.name,
                "interval": one.interval,
                "estimate": one.estimate,
                "verdict": one.verdict,
                "needed": one.needed,
            }
            for one in self.functions
        ]
        return json.dumps(plain(data), indent=1)

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Axes:
        """Draw what each relaxation time lacks in likelihood, and the length that decides.

        Args:
            ax: Axes to draw in; by default new ones.
            **kwargs: Passed on to each of the curves.

        Returns:
            The axes.
        """
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter

        ax = ax or Figure(figsize=(5.6, 3.6), layout="constrained").subplots()
        top = 3.0 * quantile(self.level)
        shown = np.concatenate([one.profile.tau[one.profile.loss <= top] for one in self.functions])
        for one in self.functions:
            ax.plot(one.profile.tau, one.profile.loss, **{"label": one.name, "lw": 1.5, **kwargs})
        limit = f"limit of the {self.level:.0%} interval"
        ax.axhline(quantile(self.level), color="0.45", lw=1, ls="--", label=limit)
        cutoff = self.functions[0].profile.cutoff
        ax.axvline(cutoff, color="0.45", lw=1)
        beside = {"rotation": 90, "ha": "right", "va": "top", "fontsize": "small", "color": "0.3"}
        ax.text(cutoff, 0.97 * top, "a fifth of the run", beside)
        ends = (0.7 * min(cutoff, shown.min()), 1.4 * max(cutoff, shown.max()))
        ax.set(xscale="log", xlim=ends, ylim=(-0.02 * top, top), title=self.verdict)
        ax.set(xlabel="relaxation time, in the clock")
        ax.set_ylabel("2 log-likelihood, below the best")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.legend(frameon=False, fontsize="small")
        return ax


def relaxation(
    series: Any,
    clock: Any = None,
    *,
    weight: float = 0.3,
    modes: int = 2,
    level: float = 0.95,
    common_start: bool | None = None,
) -> Relaxation:
    r"""Estimate the relaxation time of a run from functions of its weights that were recorded.

    Each function is taken to be mu + a slow mode + another mode + white noise, and the modes to be
    Ornstein-Uhlenbeck processes in the clock. The relaxation time is that of the slowest mode with
    at least the share ``weight`` of the function's variance. Its interval is what a likelihood
    ratio against the best of all models does not reject, at the best of all other numbers.

    **What one run can say.** A mode that is lighter, or that stands still all through the run, is
    never seen. So the run is "mixed" if a mode of that weight with a relaxation time of a fifth of
    the run is rejected, and a faster one is not; the interval then speaks of relaxation times up
    to that fifth, and nothing is said of longer ones. It is "not mixed" if all relaxation times
    below a fifth of the run are rejected, and "cannot tell" otherwise. A basin that holds
    a share p of the equilibrium is excluded only if p is more than three times the relaxation time
    over the length of the run.

    **Below noise.** With two modes the run is not "mixed" either where a lighter slow mode may be
    there: where the records are not told from noise, and one of .3 of the weight is not rejected;
    or where modes faster than a fortieth of the run do not explain them. So records have to be no
    further apart than a relaxation time, or many.

    **Several functions.** The slowest decides. The run is mixed if each function says so, each at
    the level itself: that all are wrong together is no more likely than that the slowest is. It
    is not mixed if one says so at a level that is corrected for their number (Bonferroni), and the
    lower end of the interval is corrected in the same way.

    Args:
        series: :class:`~manifold_sde.training.Records`, or a list of them, one a run; or values at
            the clock readings: (K,) of one run, (R, K) of R runs, a list of R runs of unequal
            lengths; or a mapping of names to such values.
        clock: Clock readings, (K,) of all runs, (R, K), or a list likewise; that of the records
            by default. The clock has to be the one in which the weights diffuse: with data that
            are shuffled once an epoch, that of the fresh part of the noise. For records of a
            ``MixingClock``, that clock, which knows this part; of several runs, a list of clocks.
        weight: Least share of a function's variance of a mode that counts. To tell takes a run of
            about 30 relaxation times over its square.
        modes: 2, or 1 if each function is known to have one time scale: that takes 30 relaxation
            times where it is seen above the noise. With one mode where there are two, the interval
            is wrong nearly always.
        level: Confidence of the intervals.
        common_start: Whether several runs start from the same weights, at their first records; by
            default if these agree in each function.

    Returns:
        The relaxation time.

    Raises:
        ShapeError, ArgumentError, NonFiniteError: If there are too few records, a function or the
            clock does not move, the clock runs backwards, or an argument is out of range.

    Warns:
        MixingClockWarning: If the clock's share of fresh noise was measured, and the order of the
            data was not told.

    Example:
        >>> import numpy as np
        >>> noise = np.random.default_rng(0).standard_normal(3000)
        >>> x = np.zeros(3000)
        >>> for k in range(1, 3000):
        ...     x[k] = 0.8 * x[k - 1] + 0.6 * noise[k]
        >>> found = relaxation(x, np.arange(3000.0))
        >>> found.verdict, bool(found.interval[0] < -1 / np.log(0.8) < found.interval[1])
        ('mixed', True)
    """
    check_choice("modes", modes, (1, 2), "modes=2, unless one time scale is known")
    weight = check_between(weight, 0.02, 1.0, "the weight", "weight=0.3, a share of the variance")
    level = check_between(level, 0.5, 1.0, "the level", "level=0.95")
    readings, named = _named(series, clock)
    names = list(named)
    pairs = [checked(name, readings, named[name]) for name in names]
    values = np.stack([pair[1] for pair in pairs])
    if common_start is None:
        starts = values[:, :, 0]
        common_start = starts.shape[1] > 1 and np.allclose(starts, starts[:, :1], rtol=0, atol=1e-6)
    stride = -(-values.shape[2] // _MOST)
    runs = Runs(pairs[0][0][:, ::stride], values[:, :, ::stride], bool(common_start))
    means = Runs(pairs[0][0], values).means(stride) if stride > 1 else None
    corrected = 1.0 - (1.0 - level) / len(names)
    functions, strict = [], []
    for name, found in zip(names, profiles_of(runs, weight, modes, means), strict=True):
        one = _function(name, found, level, weight)
        if one.verdict == "not mixed":
            one = _function(name, found, corrected, weight)
        functions.append(one)
        strict.append(found.interval(corrected)[0])
    slowest = max(functions, key=lambda one: (one.needed or 0.0, one.interval[1]))
    verdicts = {one.verdict for one in functions}
    if "not mixed" in verdicts:
        verdict = "not mixed"
        slowest = max(
            (one for one in functions if one.verdict == verdict), key=lambda one: one.interval[0]
        )
    else:
        verdict = "mixed" if verdicts == {"mixed"} else "cannot tell"
    return Relaxation(
        interval=(max(strict), max(one.interval[1] for one in functions)),
        estimate=slowest.estimate,
        verdict=verdict,
        reason=_reason(verdict, slowest, modes, weight, level) + _unknown(series, clock),
        needed=None if verdict == "mixed" else slowest.needed,
        length=slowest.profile.length,
        n_records=int(np.isfinite(values[0]).sum()),
        n_runs=values.shape[1],
        weight=weight,
        modes=modes,
        level=level,
        functions=tuple(functions),
        fresh=_share(clock),
    )


def _function(name: str, found: Profile, level: float, weight: float) -> Function:
    verdict = found.verdict(level)
    low, high = found.interval(level)
    estimate = found.estimate(found.cutoff if verdict == "mixed" else found.length)
    estimate = max(min(estimate, high), low)
    needed = None
    if verdict != "mixed":
        tells = _TELLS if found.modes == 1 else _TELLS / weight**2
        known = verdict == "not mixed" and math.isfinite(high)
        needed = 5.0 * high if known else max(tells * estimate, 2.0 * found.length)
    return Function(name, (low, high), estimate, verdict, needed, found)


def _reason(verdict: str, one: Function, modes: int, weight: float, level: float) -> str:
    length, cutoff = one.profile.length, one.profile.cutoff
    kind = "" if modes == 1 else f" with a share of {weight:g} of the variance"
    if verdict == "mixed":
        return (
            f"The run is {length / one.interval[1]:.3g} relaxation times long or longer: a mode"
            f"{kind} that relaxes in {cutoff:.3g}, a fifth of the run, is rejected in every "
            f"function, {one.name!r} being the slowest."
        )
    bounded = math.isfinite(one.interval[1])
    if verdict == "not mixed":
        return (
            f"{one.name!r} relaxes in {one.interval[0]:.3g} or more, and the run is "
            f"{length / one.interval[0]:.3g} times that at most. "
            + (
                f"Of {one.needed:.3g} of the clock a run is mixed."
                if bounded
                else _least(one, level)
            )
        )
    hides = one.profile.hides(level) if one.profile.tells(level) == "mixed" else ""
    if hides == "noise":
        return (
            f"{one.name!r} is not told from noise, below which a mode with a share of "
            f"{LIGHT * weight:.2g} of the variance that relaxes in a fifth of the run or slower is "
            "not excluded. Record a function with less noise, such as directions_of(model), or "
            "more often."
        )
    if hides == "light":
        return (
            f"{one.name!r} holds a mode slower than {QUICK * cutoff:.3g}, a fortieth of the run, "
            f"with a share below {weight:g} of the variance: whether it relaxes in the run is not "
            f"told. {_least(one, level)}"
        )
    said = f"In {one.name!r} a mode{kind} that relaxes in {cutoff:.3g}, a fifth of the run, is not "
    if modes == 1 and one.profile.faster <= quantile(level):
        said = (
            f"{one.name!r} is not told from white noise, below which a mode that relaxes in "
            f"{cutoff:.3g}, a fifth of the run, is not "
        )
    return f"{said}rejected. {_least(one, level)}"


def _least(one: Function, level: float) -> str:
    """How long a run would tell: a least length where no end is known."""
    times = (one.needed or 0.0) / one.profile.length
    if math.isinf(one.interval[1]) or one.profile.hides(level):
        return f"To tell takes at least {one.needed:.3g} of the clock, {times:.3g} times this run."
    return f"A run of about {one.needed:.3g} of the clock, {times:.3g} times this one, would tell."


def _named(series: Any, clock: Any) -> tuple[Any, dict[str, Any]]:
    """The clock readings, and the values of each name."""
    if isinstance(series, list | tuple) and any(isinstance(run, Records) for run in series):
        return _of_runs(series, clock)
    if isinstance(series, Records):
        if clock is None:
            clock = series.clock
        elif hasattr(clock, "effective"):
            clock = _fresh_part(clock) * series.clock
        series = series.values
    if clock is None or hasattr(clock, "effective"):
        raise ArgumentError(
            "there are no clock readings",
            received="clock=None" if clock is None else f"{clock!r}, and values without steps",
            expected="one reading a record, or Records, which hold theirs",
            remedy="records.record(step, clock) and relaxation(records, clock); expected_clock "
            "gives the clock of a schedule",
        )
    if not isinstance(series, Mapping):
        series = {"series": series}
    if not series:
        raise ArgumentError(
            "nothing was recorded",
            received="no series",
            expected="values of one function of the weights at least",
            remedy="records.append(step, clock, loss=...) every few steps",
        )
    return clock, {str(name): values for name, values in series.items()}


def _of_runs(runs: Sequence[Any], clock: Any) -> tuple[Any, dict[str, Any]]:
    """The readings and values of several runs, each with its records."""
    names = [sorted(run.values) if isinstance(run, Records) else None for run in runs]
    if any(of_run is None or of_run != names[0] for of_run in names):
        raise ArgumentError(
            "the runs do not have the same records",
            received="; ".join("no Records" if of is None else ", ".join(of) for of in names[:4]),
            expected="Records of the same functions in each run",
            remedy="one Records a run, made with the same recorders",
        )
    each = clock if isinstance(clock, list | tuple) else [clock] * len(runs)
    if len(each) != len(runs):
        raise ArgumentError(
            "there is not one clock a run",
            received=f"{len(each)} clocks, {len(runs)} runs",
            expected="a clock of each run, one of all, or none: records hold their readings",
            remedy="relaxation([first, second], [clock_of_first, clock_of_second])",
        )
    pairs = [_named(run, own) for run, own in zip(runs, each, strict=True)]
    return (
        [readings for readings, _ in pairs],
        {name: [values[name] for _, values in pairs] for name in names[0] or ()},
    )


def _share(clock: Any) -> float:
    """The part of the clock v in which the relaxation time is; of several runs their mean."""
    clocks = clock if isinstance(clock, list | tuple) else [clock]
    clocks = [one for one in clocks if hasattr(one, "effective")]
    if any(getattr(one, "sampling", "") is None and one.effective is not None for one in clocks):
        warnings.warn(
            "The order of the data was not told to the clock. It is taken for that in which every "
            "sample comes once an epoch, where a share of the noise explores the minimisers. Tell "
            'it: MixingClock(..., sampling="iid") if batches are drawn independently, or '
            'sampling="reshuffled".',
            MixingClockWarning,
            stacklevel=3,
        )
    return float(np.mean([_fresh_part(one) for one in clocks])) if clocks else 1.0


def _unknown(series: Any, clock: Any) -> str:
    """What is said where a clock does not know how far minimisers are explored."""
    of = clock if clock is not None else series
    each = of if isinstance(of, list | tuple) else [of]
    if not any(
        one.unknown if isinstance(one, Records) else getattr(one, "effective", 0.0) is None
        for one in each
    ):
        return ""
    return (
        " How much of the clock explores the minimisers is unknown, as its sampling= was not told: "
        "this holds if all of it does."
    )


def _fresh_part(clock: Clock) -> float:
    """The share of a clock by which minimisers are explored; all of it where it is not known."""
    effective = clock.effective
    if effective is None or not clock.time:
        return 1.0
    if effective == 0.0:
        raise ArgumentError(
            "nothing explores the minimisers",
            received="a clock whose noise is not fresh at any visit: every sample once an epoch",
            expected="noise that is fresh at each visit, from augmentation or dropout",
            remedy='sampling="iid" if batches are drawn independently, or clock.measure(...)',
        )
    return effective / clock.time

"""The laws of section 5: the direction forgets where it started, and comes to its equilibrium."""

from __future__ import annotations

import importlib
import math
import warnings
from typing import Any

import numpy as np
import torch
from scipy import stats

from manifold_sde.errors import ClockRangeError, MissingDependencyError, NotMixedWarning
from manifold_sde.paper import implements
from manifold_sde.verification.assumptions.groups import NO_THEOREM
from manifold_sde.verification.laws.engine import Array, Extrapolated, Tests, judged, law, planned
from manifold_sde.verification.laws.long_runs import BURN_IN, CHAIN, STARTS, LongRuns
from manifold_sde.verification.result import Design, Picture, Result, Series, found
from manifold_sde.verification.sampling import farthest, unit
from manifold_sde.verification.two_sample import CELLS, compare_laws, total_variation

#: States of norm 1 that are nearer than this are the same run.
_SAME = 1e-9
#: Factor by which relaxation may be slower than supposed before chains count as not mixed.
_SLOWER = 2.0
#: eta lambda_max(H) / |x|^2 of the smaller step of SGD, in units of ``effort.step_size``, and the
#: largest eta / |x|^2 of it. Only this ratio matters for how far SGD is from its limit.
_STIFFNESS, _LARGEST = 20.0, 0.15
#: Most steps of SGD, by departure: so many / departure.
_BUDGET = 750.0
#: Shift of a mean that is to be found, in units of what the other laws find; and the part of the
#: change between the two steps that is allowed to be left after extrapolation.
_EFFECT, _LEFT = 1.5, 0.25
#: Change between the two steps, in units of the effect, from which extrapolation is not believed.
_TOO_FAR = 1.0

# Independence.


def repeated(directions: Array) -> int:
    """Runs whose end state is that of another one: of (n, D)."""
    order = np.lexsort(np.round(directions / _SAME).T)
    ordered = directions[order]
    same = np.linalg.norm(np.diff(ordered, axis=0), axis=1) <= _SAME * math.sqrt(ordered.shape[1])
    return int(same.sum())


def dependence(table: Array) -> float:
    """P-value of the hypothesis that no run knows of another one.

    Each function is correlated with each other one, of the run so many numbers later, for every
    such number that leaves a quarter of the runs: random numbers that repeat do so at some of them.

    Args:
        table: Values (N, m) of functions of the runs' ends, of mean 0 and variance 1.
    """
    n, count = table.shape
    spectrum = np.fft.rfft(table, 2 * n, axis=0)
    largest = n - max(n // 4, 20)
    smallest, tests = 1.0, 0
    overlap = n - np.arange(1, largest + 1)
    for k in range(count):
        for j in range(count):
            sums = np.fft.irfft(spectrum[:, k].conj() * spectrum[:, j], 2 * n)[1 : largest + 1]
            correlation = np.clip(sums / overlap, -0.999999, 0.999999)
            z = np.abs(np.arctanh(correlation)) * np.sqrt(overlap - 3.0)
            smallest = min(smallest, 2.0 * float(stats.norm.sf(z.max())))
            tests += len(z)
    return min(1.0, smallest * tests)


def _copies(runs: LongRuns) -> int:
    return sum(map(repeated, runs.end_directions()))


def _dependence(runs: LongRuns) -> float:
    """P-value of the declared functions at the ends, of mean 0 and variance 1 by start."""
    tables = map(runs.functionals.table, runs.end_directions())
    return dependence(
        np.concatenate([(t - t.mean(0)) / np.maximum(t.std(0), 1e-12) for t in tables])
    )


def _detectable(runs: LongRuns) -> float:
    """The correlation of runs a fixed number apart that is found."""
    n, effort = STARTS * runs.runs_per_start, runs.effort
    tests = n * len(runs.functionals) ** 2
    quantiles = stats.norm.isf(0.5 * effort.false_alarm / tests) + stats.norm.isf(effort.miss)
    return math.tanh(quantiles / math.sqrt(0.25 * n))


def independence(runs: LongRuns, made: Design) -> Result:
    """No run ends where another one does, and none knows of another."""
    copies, p = _copies(runs), _dependence(runs)
    return found(
        "fails" if copies or p <= made.false_alarm else "holds",
        f"{copies} of {made.sample_size} runs end where another one does; correlations between "
        f"runs at any distance: p = {p:.2g}",
        statistic=float(copies),
        limit=0.0,
        p_value=0.0 if copies else p,
    )


# One equilibrium.


@implements("Theorem 5.4")
def one_equilibrium(runs: LongRuns, made: Design | None) -> Result:
    """The laws at the end of runs from starts that are far apart are one."""
    degeneracy = runs.degeneracy
    if made is None:
        detail = (
            f"groups of weights: {len(degeneracy.groups)}; the noise has rank "
            f"{degeneracy.noise_rank} along the {degeneracy.manifold_dim} dimensions of Gamma_1"
        )
        return found("fails", detail, meaning=f"{NO_THEOREM} {degeneracy.statement}")
    ends = runs.end_directions()
    compared = {
        f"start {i}": compare_laws(
            ends[i], np.delete(ends, i, 0).reshape(-1, ends.shape[-1]), runs.functionals
        )
        for i in range(STARTS)
    }
    tests = Tests({name: c.p_value for name, c in compared.items()}, made.false_alarm)
    detail = (
        f"p = {tests.p:.2g} at T = {runs.end:.3g}, {runs.relaxations:.2g} relaxation times "
        f"({runs.relaxation.source}); most apart in {compared[tests.worst].worst}"
    )
    distances = _distances(runs)
    if distances:
        value, error = distances[-1].y[-1], (distances[-1].error or [0.0])[-1]
        detail += f"; total variation distance {value:.3f} +- {error:.3f} at the end"
    return judged(
        tests,
        made,
        detail,
        undecided="" if tests.rejected else _doubt(runs),
        tests={
            f"{start}, {name}": value
            for start, comparison in compared.items()
            for name, value in comparison.p_values.items()
        },
        pictures=_forgetting(runs, distances),
    )


def _doubt(runs: LongRuns) -> str:
    """Why equal laws at the end decide nothing; empty where they do."""
    degeneracy = runs.degeneracy
    if _copies(runs) or _dependence(runs) <= runs.effort.false_alarm:
        return "The runs are not independent, so that nothing follows from them."
    if degeneracy.noise_rank < degeneracy.manifold_dim:
        return str(degeneracy.statement)
    needed = runs.needed_relaxations
    if runs.relaxations < 0.999 * needed:
        return (
            f"The runs are too short to have mixed: T = {needed * runs.relaxation.time:.3g} is "
            "needed."
        )
    return ""


def _distances(runs: LongRuns) -> list[Series]:
    """Distance of the law of each start at the kept times from the law at the end.

    The law at the end is that of the other starts' runs, which are independent.
    """
    dimension = runs.degeneracy.manifold_dim
    if dimension not in CELLS:
        return []
    centers = farthest(runs.subject.walked, CELLS[dimension]).numpy()
    directions = runs.ends.directions.numpy()
    directions = directions.reshape(len(directions), STARTS, -1, directions.shape[-1])
    times, series = runs.ends.ts.tolist(), []
    for i in range(STARTS):
        common = np.delete(directions[-1], i, 0).reshape(-1, directions.shape[-1])
        pairs = [total_variation(now[i], common, centers) for now in directions]
        values, errors = ([pair[k] for pair in pairs] for k in (0, 1))
        series.append(Series(f"start {i + 1}", times, values, "points", errors))
    return series


def _forgetting(runs: LongRuns, distances: list[Series]) -> tuple[Picture, ...]:
    if not distances:
        return ()
    fine = [float(runs.ends.ts[-1]) * k / 60 for k in range(61)]
    decay = [math.exp(-t / runs.relaxation.time) for t in fine]
    return (
        Picture(
            "Distance of the law of the direction from that at the end",
            "time T of (13)",
            "total variation distance",
            (*distances, Series("exp(-T / relaxation time)", fine, decay, "dashed")),
        ),
    )


# Chains.


def diagnostics() -> Any:
    """ArviZ's diagnostics of arrays.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        return importlib.import_module("arviz_stats.base").array_stats
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "R-hat and the effective sample size need ArviZ",
            received="no module arviz_stats",
            expected="arviz-stats, an optional dependency",
            remedy='pip install "manifold_sde[verification]"',
        ) from error


def _design_of_chains(runs: LongRuns) -> Design:
    return Design(
        "each chain explores what the others do",
        1e-6,
        f"a relaxation slower than supposed by a factor of {2 * _SLOWER:g}",
        runs.effort.miss,
        runs.n_chains,
    )


def mixed_chains(runs: LongRuns, made: Design) -> Result:
    """R-hat and the effective sample size, by ArviZ.

    With the relaxation time as the unit, the mean of half a chain has the variance 2 / (length /
    2) of a state, and so R-hat^2 = 1 + 4 / length; chains whose relaxation is slower by a factor
    have that factor before 4 / length, and chains that are stuck a larger R-hat.
    """
    arviz, counted = diagnostics(), CHAIN - BURN_IN
    limit = math.sqrt(1.0 + _SLOWER * 4.0 / counted)
    solution = runs.chains
    table = np.stack([runs.functionals.table(y) for y in solution.ys])
    late = table[(solution.ts >= solution.ts[-1] * BURN_IN / CHAIN).numpy()]
    columns = dict(zip(runs.functionals, np.moveaxis(late, 2, 0), strict=True))
    r_hats = {name: float(arviz.rhat(c.T, method="split")) for name, c in columns.items()}
    draws = min(float(arviz.ess(c.T, method="mean")) for c in columns.values())
    worst = max(r_hats, key=lambda name: r_hats[name])
    good = r_hats[worst] <= limit and draws >= 0.5 * runs.runs(len(runs.functionals))
    shown = table[:, :4, list(runs.functionals).index(worst)]
    times = solution.ts.tolist()
    return found(
        "holds" if good else "undecided",
        f"R-hat of {r_hats[worst]:.3f} ({worst}), {limit:.3f} allowed; {draws:.0f} "
        f"effective draws from {table.shape[1]} chains of {counted:g} relaxation times",
        meaning=""
        if good
        else "The chains have not mixed: averages over them are not averages under the "
        f"equilibrium. A clock of more than {float(solution.ts[-1]):.3g} is needed, or there "
        "is no one equilibrium.",
        statistic=r_hats[worst],
        limit=limit,
        pictures=(
            Picture(
                "Some of the chains",
                "intrinsic clock u",
                worst,
                tuple(Series("", times, values.tolist()) for values in shown.T),
            ),
        ),
    )


def time_averages(runs: LongRuns, made: Design) -> Result:
    """Averages along chains, weighted by |Y|^4, against means over independent runs in time."""
    chains, names = runs.chains, list(runs.functionals)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", NotMixedWarning)
        burn_in = float(chains.ts[-1]) * BURN_IN / CHAIN
        mean = chains.equilibrium(runs.functionals.tensor, burn_in=burn_in)
    drifting = any(issubclass(warning.category, NotMixedWarning) for warning in told)
    ends = runs.functionals.table(runs.all_ends())
    error = np.sqrt(mean.standard_error.numpy() ** 2 + ends.var(0, ddof=1) / len(ends))
    z = np.abs(mean.mean.numpy() - ends.mean(0)) / error
    # The error is that of so many chains: Student's law.
    student = stats.t(mean.paths - 1)
    p_values = dict(zip(names, (2.0 * student.sf(z)).tolist(), strict=True))
    tests = Tests(p_values, made.false_alarm)
    draws = float(mean.effective_sample_size.min())
    # Whether the departure is found with both samples as they came out.
    independent = 1.0 / (1.0 / draws + 1.0 / (STARTS * runs.runs_per_start))
    enough = independent >= runs.runs(len(names), 1.0) or math.isinf(draws)
    undecided = not tests.rejected and (drifting or not enough)
    return judged(
        tests,
        made,
        f"p = {tests.p:.2g} between {mean.paths} chains ({draws:.0f} effective draws) and "
        f"{len(ends)} runs; most apart in {tests.worst}, by {z[names.index(tests.worst)]:.1f} "
        "standard errors",
        undecided="The chains are too short for their equilibrium." if undecided else "",
        statistic=float(z.max()),
        limit=float(student.isf(0.5 * made.false_alarm / len(names))),
    )


def _paths_of_sgd(runs: LongRuns) -> int:
    """Runs of SGD at the smaller step: n and 4 n have an extrapolated mean of variance 4.25 / n."""
    tests = len(runs.functionals) + 2
    return 2 * math.ceil(runs.runs(tests, (4.25 + 1.0) / _EFFECT**2) / 2)


def _sgd(runs: LongRuns, step: float, paths: int) -> tuple[int, Array, Array]:
    """SGD from two starts that are far apart, for as long as the diffusion takes to mix.

    The rates are those at which norm 1 is in equilibrium, where the trace is its mean.

    Args:
        runs: The runs of the diffusion.
        step: eta / |x|^2 at norm 1.
        paths: Number n of paths, even.

    Returns:
        Number of steps; directions of Phi(x) at the end (n, D); the declared functions and
        |x|^2 / R^2 there (n, m + 1).

    Raises:
        ClockRangeError: If these are more steps than the budget has.
    """
    subject, trace = runs.subject, float(runs.traces.mean())
    rates = step, 0.5 * step * trace
    scale = subject.time_scale(*rates)
    count = int(scale.steps(runs.end + 0.5 * abs(math.log(trace))))
    most = _BUDGET / runs.effort.departure
    if count > most:
        raise ClockRangeError(
            "SGD to its equilibrium is out of the reach of this effort",
            received=f"{count} steps at eta / |x|^2 = {step:.3g}",
            expected=f"at most {most:.0f}",
            remedy='effort="thorough"; the law at finite times does not need it',
        )
    x = subject.run_sgd(
        subject.problem,
        runs.starts[:2].repeat_interleave(paths // 2, 0),
        *rates,
        [0, count],
        seed=runs.seed("sgd"),
        compile=count * paths > 2e7,
    ).ys[-1]
    directions = unit(subject.limits(x)).numpy()
    squares = x.square().sum(1, keepdim=True).numpy() / float(scale.radius(count)) ** 2
    return count, directions, np.concatenate([runs.functionals.table(directions), squares], 1)


@implements("Theorem 5.5", "Conjecture 1.1")
def sgd_at_rest(runs: LongRuns, made: Design) -> Result:
    """Run SGD at two step sizes, and extrapolate its means to step size 0.

    What extrapolation leaves is of second order. A quarter of the change between the two step
    sizes is allowed for: m(2e) - m(e) = c_1 e + 3 c_2 e^2, of which 2 c_2 e^2 is left.
    """
    top = float(torch.linalg.eigvalsh(runs.subject.problem.hessian(runs.starts)).max())
    step = min(_STIFFNESS * runs.effort.step_size / top, _LARGEST)
    count, directions, fine = _sgd(runs, step, made.sample_size)
    coarser, _, coarse = _sgd(runs, 2.0 * step, 4 * made.sample_size)
    squares = runs.ends.norms[-1].numpy()[:, None] ** 2
    known = np.concatenate([runs.functionals.table(runs.all_ends()), squares], 1)
    if not (np.isfinite(fine).all() and np.isfinite(coarse).all()):
        return found(
            "undecided",
            "some runs of SGD blew up, or left the attraction set",
            meaning="The step sizes are too large for this loss.",
        )
    half = len(directions) // 2
    uniqueness = compare_laws(directions[:half], directions[half:], runs.functionals)
    sgd, limit = Extrapolated.of(fine, coarse, 2.0), Extrapolated.of(known)
    # In units in which the diffusion's mean and spread are of order 1.
    size = known.std(0, ddof=1)
    size[-1] = max(size[-1], limit.value[-1])
    change = np.maximum((np.abs(sgd.gap) - 2.0 * sgd.gap_error) / size, 0.0)
    left = np.maximum(np.abs(sgd.value - limit.value) - _LEFT * change * size, 0.0)
    z = left / np.maximum(np.hypot(sgd.error, limit.error), 1e-12 * size)
    names = [*runs.functionals, "|x|^2"]
    p_values = dict(zip(names, (2.0 * stats.norm.sf(z)).tolist(), strict=True))
    tests = Tests({"two starts": uniqueness.p_value, **p_values}, made.false_alarm)
    undecided = ""
    if not tests.rejected and float(change.max()) > _TOO_FAR * _EFFECT * runs.effect:
        undecided = (
            f"Means change by up to {change.max():.2g} standard deviations between the two step "
            "sizes: SGD is too far from its limit to be extrapolated. Smaller steps are needed."
        )
    return judged(
        tests,
        made,
        f"p = {tests.p:.2g} after {count} and {coarser} steps at eta / |x|^2 = "
        f"{step:.2g} and {2.0 * step:.2g}; between the two starts p = "
        f"{uniqueness.p_value:.2g}; from the diffusion at most {z.max():.1f} standard errors "
        f"({names[int(z.argmax())]})",
        undecided=undecided,
        tests=dict(uniqueness.p_values),
    )


INDEPENDENCE = law(
    "independence of the runs",
    (),
    LongRuns,
    planned(
        "the runs are independent",
        "two that are the same, and correlations of {size:.2f} between runs a fixed number apart",
        lambda runs: STARTS * runs.runs_per_start,
        _detectable,
    ),
    independence,
    "Runs share their random numbers: no test can be believed that takes them as independent. "
    "Look at the source of the Brownian paths.",
)
ONE_EQUILIBRIUM = law(
    "one equilibrium from every start",
    ("Theorem 5.4", "Theorem 1.2"),
    LongRuns,
    planned(
        f"the law of the direction at T is the same from {STARTS} starts that are far apart",
        "a mean of a declared function that differs by {size:g} standard deviations, as somewhere "
        "in laws at a total variation distance of {runs.effort.departure:g}",
        lambda runs: STARTS * runs.runs_per_start,
        lambda runs: runs.effect,
        when=lambda runs: runs.is_regular,
    ),
    one_equilibrium,
    "Where the direction ends depends on where it started. Either it takes longer than its "
    "relaxation time says, or there are several equilibria: Gamma_1 in several pieces, or noise "
    "that does not reach all of it.",
    applies=lambda runs: True,
)
MIXED_CHAINS = law(
    "chains that have mixed",
    ("Theorem 5.4",),
    LongRuns,
    _design_of_chains,
    mixed_chains,
    "",
)
TIME_AVERAGES = law(
    "time averages under the equilibrium",
    ("Theorem 5.4",),
    LongRuns,
    planned(
        "averages over the chains are means of the law in time",
        "a mean that differs by {runs.effect:g} standard deviations",
        lambda runs: STARTS * runs.runs_per_start + runs.n_chains,
    ),
    time_averages,
    "The average over a long run is not the mean over many runs. States that are kept in the clock "
    "u are to be weighted by the norm's fourth power.",
)
SGD_AT_REST = law(
    "SGD in equilibrium",
    ("Theorem 5.5", "Conjecture 1.1", "Theorem 1.2"),
    LongRuns,
    planned(
        "SGD beyond mixing has the law of the diffusion, from two starts that are far apart",
        lambda runs: f"a mean that differs by {_EFFECT * runs.effect:g} standard deviations",
        _paths_of_sgd,
    ),
    sgd_at_rest,
    "SGD does not come to the equilibrium of the diffusion: another noise, other rates, or step "
    "sizes that are too large for the limit.",
)

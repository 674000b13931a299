"""How often intervals of relaxation times hold the true one, and how often verdicts are wrong.

``python -m tests.training.calibration`` makes ``calibration.json`` anew, from which the tables of
docs/relaxation_and_plan.md are taken, and prints them: 200 runs of 300 records, at 3, 10, 30 and
100 relaxation times. It takes about half an hour of processor time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.signal import lfilter

from manifold_sde import problems
from manifold_sde.training import relaxation
from manifold_sde.verification.exact import AngleLaw, CircleDiffusion

Array = NDArray[np.float64]

FILE = Path(__file__).with_name("calibration.json")
RUNS, RECORDS = 200, 300
LENGTHS = (3.0, 10.0, 30.0, 100.0)
#: Ratio of the two time scales where there are two.
RATIO = 30.0
_FINE = 100


def ornstein(clock: Array, tau: float, runs: int, generator: np.random.Generator) -> Array:
    """Stationary paths of variance 1 at equally spaced clocks, (runs, K)."""
    decay = math.exp(-(clock[1] - clock[0]) / tau)
    noise = generator.standard_normal((runs, len(clock)))
    noise[:, 1:] *= math.sqrt(1.0 - decay**2)
    return np.asarray(lfilter([1.0], [1.0, -decay], noise))


def plain(clock: Array, runs: int, generator: np.random.Generator) -> Array:
    return ornstein(clock, 1.0, runs, generator)


def half_white(clock: Array, runs: int, generator: np.random.Generator) -> Array:
    return ornstein(clock, 1.0, runs, generator) + generator.standard_normal((runs, len(clock)))


def far_start(clock: Array, runs: int, generator: np.random.Generator) -> Array:
    """From 20 standard deviations away."""
    return ornstein(clock, 1.0, runs, generator) + 20.0 * np.exp(-clock)


def section_61(clock: Array, runs: int, generator: np.random.Generator) -> Array:
    """Cosine of the angle of section 6.1, whose relaxation time 2 r^2 / s^2 is made 1."""
    law = AngleLaw.of(problems.normalized_linear(design="orthogonal"))
    unit = 2.0 * law.radius**2 / law.noise_scale**2
    size = law.noise_scale / law.radius * math.sqrt(unit * (clock[1] - clock[0]))
    steps = size * generator.standard_normal((runs, len(clock)))
    return np.cos(generator.uniform(0, 2 * math.pi, (runs, 1)) + steps.cumsum(1))


def varying_circle(clock: Array, runs: int, generator: np.random.Generator) -> Array:
    """Cosine of the angle on the circle of varying pdet H, where the slowest mode has rate 1."""
    law = CircleDiffusion.reversible(problems.varying_circle())
    tau, a = law.relaxation_time, 0.5
    variance = float(law.variance[0])
    h = tau * (clock[1] - clock[0]) / _FINE
    angle = generator.uniform(0, 2 * math.pi, runs)
    values = np.empty((runs, len(clock)))
    burn = int(10.0 * tau / h)
    for k in range(-burn // _FINE, len(clock)):
        for _ in range(_FINE):
            # -(s^2 / 4) d/d theta of 2 log(1 + a cos theta)
            drift = 0.5 * variance * a * np.sin(angle) / (1.0 + a * np.cos(angle))
            angle += h * drift + math.sqrt(h * variance) * generator.standard_normal(runs)
        if k >= 0:
            values[:, k] = np.cos(angle)
    return values


def two_scales(weight: float) -> Callable[[Array, int, np.random.Generator], Array]:
    def paths(clock: Array, runs: int, generator: np.random.Generator) -> Array:
        slow = ornstein(clock, 1.0, runs, generator)
        fast = ornstein(clock, 1.0 / RATIO, runs, generator)
        return math.sqrt(weight) * slow + math.sqrt(1.0 - weight) * fast

    return paths


CASES: dict[str, Callable[[Array, int, np.random.Generator], Array]] = {
    "section 6.1": section_61,
    "varying pdet H": varying_circle,
    "slow mode of 0.4": two_scales(0.4),
    "one mode": plain,
    "half white noise": half_white,
    "start 20 sd away": far_start,
}
WEIGHT = 0.3
ENSEMBLES = "20 runs from one start"
ENSEMBLE_LENGTHS = (0.5, 1.0, 2.0)
PAIRS = "section 6.1, two functions"


@dataclass(frozen=True)
class Row:
    """What an estimator did on runs of one length.

    Attributes:
        case, length: The case, and the length in relaxation times.
        estimator: "one mode", "rule", or that of a broken twin.
        runs: Number of runs.
        covered: Share of the intervals that hold the true relaxation time.
        mixed, not_mixed: Shares of the verdicts; the rest cannot tell.
        wrong: Share of verdicts "mixed" with an upper end below the truth.
    """

    case: str
    length: float
    estimator: str
    runs: int
    covered: float
    mixed: float
    not_mixed: float
    wrong: float


Estimate = tuple[float, float, str]
Estimator = Callable[[Array, Array], list[Estimate]]


def estimates(paths: Array, clock: Array, **options: Any) -> list[Estimate]:
    """Interval and verdict of each path (n, K), as of a run of its own."""
    found = relaxation({str(i): path for i, path in enumerate(paths)}, clock, **options)
    return [
        (*one.profile.interval(found.level), one.profile.verdict(found.level))
        for one in found.functions
    ]


def one_mode(paths: Array, clock: Array) -> list[Estimate]:
    return estimates(paths, clock, modes=1)


def rule(paths: Array, clock: Array) -> list[Estimate]:
    return estimates(paths, clock, weight=WEIGHT)


def autocorrelation(paths: Array, clock: Array) -> list[Estimate]:
    """The broken twin: integrated autocorrelation time +- 1.96 standard errors (Sokal)."""
    return [_integrated(path, clock) for path in paths]


def _integrated(values: Array, clock: Array) -> Estimate:
    x = values - values.mean()
    n = len(x)
    spectrum = np.abs(np.fft.rfft(x, 2 * n)) ** 2
    rho = np.fft.irfft(spectrum)[:n]
    rho = rho / rho[0]
    sums = 2.0 * np.cumsum(rho) - 1.0
    window = int(np.argmax(np.arange(n) >= 5.0 * sums))
    tau = sums[window]
    error = tau * math.sqrt(2.0 * (2 * window + 1) / n)
    spacing = 0.5 * (clock[1] - clock[0])
    low, high = spacing * (tau - 1.96 * error), spacing * (tau + 1.96 * error)
    return low, high, "mixed" if high < np.ptp(clock) / 5.0 else "cannot tell"


ESTIMATORS: dict[str, Estimator] = {
    "one mode": one_mode,
    "rule": rule,
    "autocorrelation": autocorrelation,
}


def measure(
    case: str, length: float, runs: int, estimators: tuple[str, ...] = tuple(ESTIMATORS)
) -> list[Row]:
    """Draw runs, whose true relaxation time is 1, and look at intervals and verdicts."""
    clock = np.linspace(0.0, length, RECORDS)
    place = list(CASES).index(case)
    generator = np.random.default_rng((place, int(length)))
    paths = CASES[case](clock, runs, generator)
    rows = []
    for name in estimators:
        found = ESTIMATORS[name](paths, clock)
        verdicts = [verdict for _, _, verdict in found]
        rows.append(
            Row(
                case,
                length,
                name,
                runs,
                sum(bool(low <= 1.0 <= high) for low, high, _ in found) / runs,
                verdicts.count("mixed") / runs,
                verdicts.count("not mixed") / runs,
                sum(verdict == "mixed" and bool(high < 1.0) for _, high, verdict in found) / runs,
            )
        )
    return rows


def ensemble(length: float, runs: int, seed: int, start: float = 2.0) -> tuple[Array, Array]:
    """Short runs (runs, 25) from one start, of relaxation time 1."""
    generator = np.random.default_rng(seed)
    clock = np.linspace(0.0, length, 25)
    decay = math.exp(-clock[1])
    x = np.full(runs, start)
    rows = [x]
    for _ in clock[1:]:
        x = decay * x + math.sqrt(1 - decay**2) * generator.standard_normal(runs)
        rows.append(x)
    return clock, np.array(rows).T


def means_as_independent(clock: Array, values: Array) -> tuple[float, float]:
    """The broken twin: least squares on the means of the runs, their errors as independent."""

    def decaying(u: Array, mean: float, size: float, rate: float) -> Array:
        return np.asarray(mean + size * np.exp(-rate * u))

    means = values.mean(0)
    errors = values[:, 1:].std(0, ddof=1) / math.sqrt(len(values))
    try:
        fit, cov = curve_fit(
            decaying, clock[1:], means[1:], (0.0, 2.0, 1.0), errors, True, maxfev=20_000
        )
    except (RuntimeError, OptimizeWarning):
        return math.nan, math.nan
    half = 1.96 * math.sqrt(cov[2, 2])
    slowest = 1.0 / (fit[2] - half) if fit[2] > half else math.inf
    return 1.0 / (fit[2] + half), slowest


def measure_ensembles(length: float, runs: int) -> list[Row]:
    """The same for ensembles of 20 short runs."""
    found, twins = [], []
    for seed in range(runs):
        clock, values = ensemble(length, 20, seed)
        one = relaxation(values, clock, modes=1)
        found.append((*one.interval, one.verdict))
        twins.append((*means_as_independent(clock, values), ""))
    rows = []
    for name, estimates in (("one mode", found), ("independent errors", twins)):
        verdicts = [verdict for _, _, verdict in estimates]
        held = sum(bool(low <= 1.0 <= high) for low, high, _ in estimates) / runs
        told = [verdicts.count(kind) / runs for kind in ("mixed", "not mixed")]
        rows.append(Row(ENSEMBLES, length, name, runs, held, *told, 0.0))
    return rows


def measure_pairs(length: float, runs: int) -> list[Row]:
    """Section 6.1 with two functions of each run, cosine and sine of the angle."""
    clock = np.linspace(0.0, length, RECORDS)
    generator = np.random.default_rng((99, int(length)))
    size = math.sqrt(2.0 * clock[1])
    steps = (size * generator.standard_normal((runs, RECORDS))).cumsum(1)
    angle = generator.uniform(0, 2 * math.pi, (runs, 1)) + steps
    found = [relaxation({"cos": np.cos(x), "sin": np.sin(x)}, clock, modes=1) for x in angle]
    verdicts = [one.verdict for one in found]
    held = sum(one.interval[0] <= 1.0 <= one.interval[1] for one in found) / runs
    wrong = sum(one.verdict == "mixed" and one.interval[1] < 1.0 for one in found) / runs
    told = [verdicts.count(kind) / runs for kind in ("mixed", "not mixed")]
    return [Row(PAIRS, length, "one mode", runs, held, *told, wrong)]


def load() -> list[Row]:
    """The saved table."""
    return [Row(**row) for row in json.loads(FILE.read_text())]


def table(rows: list[Row], estimator: str) -> str:
    """A table in Markdown: covered, and how many are told to be mixed, for each length."""
    rows = [row for row in rows if row.estimator == estimator]
    lengths = sorted({row.length for row in rows})
    lines = [f"| {estimator} | " + " | ".join(f"{n:g} τ" for n in lengths) + " |"]
    lines.append("|---" * (1 + len(lengths)) + "|")
    found = {(row.case, row.length): row for row in rows}
    for case in dict.fromkeys(row.case for row in rows):
        cells = [found.get((case, n)) for n in lengths]
        texts = [f"{c.covered:.3f}, {c.mixed:.2f}" if c else "" for c in cells]
        lines.append(f"| {case} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


#: Cases, lengths, numbers of runs and estimators.
PLAN: list[tuple[str, float, int, tuple[str, ...]]] = [
    *((case, n, RUNS, tuple(ESTIMATORS)) for case in list(CASES)[:3] for n in LENGTHS),
    *(
        (case, n, RUNS, ("one mode", "autocorrelation"))
        for case in list(CASES)[3:]
        for n in LENGTHS
    ),
    *(("one mode", n, 60, ("rule",)) for n in (300.0, 1000.0)),
]


def main() -> None:
    """Make the table anew, and print it."""
    rows: list[Row] = []
    for case, length, runs, estimators in PLAN:
        new = measure(case, length, runs, estimators)
        print(*new, sep="\n", flush=True)
        rows += new
    for length in LENGTHS:
        rows += measure_pairs(length, RUNS)
    for length in ENSEMBLE_LENGTHS:
        rows += measure_ensembles(length, RUNS)
    FILE.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    for estimator in (*ESTIMATORS, "independent errors"):
        print(table(rows, estimator), end="\n\n")


if __name__ == "__main__":
    main()

"""Plans: steps until mixed against simulation and exact sums, inverses, and broken rules."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from manifold_sde import TimeScale, problems
from manifold_sde.errors import ArgumentError, DTypeError, MixingClockError, TimeScaleError
from manifold_sde.training import (
    Records,
    TrainingSettings,
    expected_clock,
    plan,
    plan_options,
    relaxation,
)
from manifold_sde.training.cooldown import COOLDOWNS
from manifold_sde.verification.exact import CircleDiffusion
from tests.training import calibration
from tests.training import test_audit as noisy

Array = NDArray[np.float64]
PATHS, DIM = 300, 60


def noise_cosine(
    rates: Array, weight_decay: float, norm: float, *, fixed: bool = False, seed: int = 0
) -> tuple[float, float]:
    """E cos of the direction with its start after steps of pure noise of V = 1, and its error.

    ``fixed``: updates of length 1, as of normalised gradients, and not of length 1/|x|.
    """
    generator = np.random.default_rng(seed)
    x = np.zeros((PATHS, DIM))
    x[:, 0] = norm
    for lr in rates:
        z = generator.standard_normal(x.shape)
        square = (x**2).sum(1, keepdims=True)
        z -= x * ((x * z).sum(1, keepdims=True) / square)
        size = (DIM - 1) * (1.0 if fixed else square)
        x = (1.0 - lr * weight_decay) * x - lr * z / np.sqrt(size)
    cosine = x[:, 0] / np.sqrt((x**2).sum(1))
    return float(cosine.mean()), float(cosine.std() / math.sqrt(PATHS))


def off(measured: tuple[float, float], clock: float) -> float:
    """Standard errors between E cos and e^{-v/2}, of which 1/D is no part."""
    mean, error = measured
    return abs(mean - math.exp(-clock / 2.0)) / (error + 0.25 / DIM)


RUNS: dict[str, dict[str, Any]] = {
    "from a small norm": {"lr": 0.1, "weight_decay": 0.02, "norm": 0.6, "noise": 1.0},
    "from a large norm": {"lr": 0.1, "weight_decay": 0.02, "norm": 2.0, "noise": 1.0},
    "without decay": {"lr": 0.1, "weight_decay": 0.0, "norm": 1.0, "noise": 1.0},
    "cosine": {"lr": 0.2, "weight_decay": 0.02, "norm": 1.2, "noise": 1.0, "schedule": "cosine"},
    "linear, fixed size": {
        "lr": 0.1,
        "weight_decay": 0.02,
        "norm": 1.2,
        "noise": 1.0,
        "schedule": "linear",
        "optimizer": "normalised_sgd",
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_planned_steps_turn_the_direction_so_far(name: str) -> None:
    """At a clock of 1.2, at most 4 standard errors; half the steps are rejected."""
    given = RUNS[name]
    found = plan(1.2, relaxations=1.0, **given)
    steps = round(found.steps[1])
    assert 30 < steps < 2000
    progress = (np.arange(steps) + 0.5) / steps
    shape = {"cosine": 0.5 * (1 + np.cos(math.pi * progress)), "linear": 1 - progress}
    rates = given["lr"] * shape.get(given.get("schedule", ""), np.ones(steps))
    fixed = given.get("optimizer") == "normalised_sgd"
    decay, norm = given["weight_decay"], given["norm"]
    measured = noise_cosine(rates, decay, norm, fixed=fixed)
    assert off(measured, 1.2) < 4.0
    half = noise_cosine(rates[::2], decay, norm, fixed=fixed)
    assert off(half, 1.2) > 4.0  # the broken twin


def test_the_early_phase_of_the_norm_is_counted() -> None:
    """Half the learning rate, from the balance of the whole: 1311 steps and not 1000 at v = 1.

    The broken twin ignores that the norm is too large for the new rate.
    """
    old = TrainingSettings(0.1, 0.01)
    found = plan(1.0, relaxations=1.0, lr=0.05, weight_decay=0.01, before=old)
    assert found.steps[1] == pytest.approx(1311.3, abs=1.0)
    ignored = 1.0 / (2 * 0.05 * 0.01)
    assert ignored == pytest.approx(1000.0)
    norm = (0.1 / 0.02) ** 0.25
    steps = round(found.steps[1])
    assert off(noise_cosine(np.full(steps, 0.05), 0.01, norm, seed=1), 1.0) < 4.0
    short = noise_cosine(np.full(1000, 0.05), 0.01, norm, seed=1)
    assert off(short, 1.0) > 4.0
    assert found.norm_steps == pytest.approx(math.log(1.0 / 0.05) / (4 * 0.05 * 0.01), rel=1e-3)


@pytest.mark.parametrize(
    ("clock", "expected"),
    [(3.0, (2.231, 0.442, 1.115, 1.770, 0.558)), (1.0, (2.623, 0.358, 1.312, 1.434, 0.656))],
)
def test_what_changes_cost(clock: float, expected: tuple[float, ...]) -> None:
    """Half and twice the rate, twice the batch, half and twice the decay."""
    found = plan(clock, relaxations=1.0, lr=1e-3, weight_decay=1e-3)
    ratios = [change.ratio for change in found.changes[:5]]
    assert ratios == pytest.approx(expected, abs=2e-3)
    adam = plan(clock, relaxations=1.0, lr=1e-3, weight_decay=1e-3, optimizer="adamw")
    batch = next(change for change in adam.changes if change.name == "twice the batch")
    assert batch.ratio == pytest.approx(1.0)  # the size of its updates is that of no gradient
    heavy = plan(clock, relaxations=1.0, lr=1e-3, weight_decay=1e-3, momentum=0.9)
    assert heavy.steps[1] == pytest.approx(0.1 * found.steps[1], rel=1e-3)
    assert heavy.changes[-1].ratio == pytest.approx(10.0, rel=1e-2)
    assert heavy.changes[-1].name == "AdamW, same lr and weight decay"


@pytest.mark.parametrize("optimizer", ["sgd", "sgdw", "adamw"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_steps_against_the_exact_recursion(schedule: str, optimizer: str) -> None:
    """The clock of a whole schedule, step by step, is the planned one within .5 %."""
    momentum = 0.0 if optimizer == "adamw" else 0.5
    noise = 1000.0 if optimizer == "adamw" else 1.0
    rates = {"lr": 1e-3, "weight_decay": 1.0, "momentum": momentum, "optimizer": optimizer}
    found = plan(
        3.0,
        relaxations=1.0,
        schedule=schedule,
        norm=1.0,
        noise=noise,
        **rates,  # type: ignore[arg-type]
    )
    steps = round(found.steps[1])
    progress = (np.arange(steps) + 0.5) / steps
    shape = {"cosine": 0.5 * (1 + np.cos(math.pi * progress)), "linear": 1 - progress}
    exact = expected_clock(
        1e-3 * shape.get(schedule, np.ones(steps)),
        optimizer=optimizer,
        weight_decay=1.0,
        momentum=momentum,
        betas=(0.0, 0.0) if optimizer == "adamw" else (0.9, 0.999),
        kurtosis=1.0,
        noise=1.0,
        size=1000 if optimizer == "adamw" else None,
    )
    assert exact.total == pytest.approx(3.0, rel=5e-3)


def test_long_cosines() -> None:
    """At X = lr * weight_decay * K: a clock of X - ln(X) / 3, from the balance on, for SGD."""
    settings = TrainingSettings(1e-3, 1e-1, schedule="cosine")
    for x in (32.0, 200.0):
        clock = settings.clock(x / 1e-4, 1.0)
        assert clock == pytest.approx(x - math.log(x) / 3.0, abs=0.03)
        assert settings.steps(clock, 1.0) == pytest.approx(x / 1e-4, rel=1e-9)


GIVEN = [
    {"momentum": 0.9, "before": TrainingSettings(1.0, 1e-3, momentum=0.9)},
    {"norm": 2.0, "noise": 3.0},
    {"schedule": "cosine"},
    {"optimizer": "adamw", "norm": 4.0, "noise": 100.0},
    {"schedule": lambda x: np.where(x < 0.8, 1.0, 0.1)},
]


@pytest.mark.parametrize("given", GIVEN)
def test_the_inverse_is_one_to_rounding(given: dict[str, Any]) -> None:
    rates = {"lr": 0.02, "weight_decay": 2e-3}
    found = plan((1.0, 1.3, 2.0), **rates, **given)
    for name, inverse in (("lr", found.lr_for), ("weight_decay", found.weight_decay_for)):
        assert inverse(found.steps[1])[1] == pytest.approx(rates[name], rel=1e-9)
        values = inverse(0.5 * found.steps[1])
        assert values[0] < values[1] < values[2]
        again = plan((1.0, 1.3, 2.0), **{**rates, name: values[1]}, **given)
        assert again.steps[1] == pytest.approx(0.5 * found.steps[1], rel=1e-9)
    more = plan((1.0, 1.3, 2.0), lr=0.02, weight_decay=4e-3, **given)
    assert all(a < b for a, b in zip(more.steps, found.steps, strict=True))


def test_no_decay_is_needed_where_there_is_time() -> None:
    found = plan(0.1, relaxations=1.0, lr=0.1, weight_decay=0.01, norm=1.0, noise=1.0)
    assert found.weight_decay_for(1e5) == (0.0, 0.0, 0.0)
    still = plan(0.1, relaxations=1.0, lr=0.1, weight_decay=0.0, norm=1.0, noise=1.0)
    assert still.steps[1] == pytest.approx(math.expm1(0.2) / (2 * 0.01), rel=1e-9)
    assert math.isinf(still.norm_steps)


@pytest.mark.parametrize("shape", list(COOLDOWNS))
@pytest.mark.parametrize("share", [0.05, 0.1])
def test_the_cooldown_leaves_that_share(shape: str, share: float) -> None:
    """The variance q of a fast direction, q' = -2 a K e (q - e) in progress, at its end."""
    moved, needed = COOLDOWNS[shape]
    length = needed(share)

    def rate(x: float) -> float:
        return 1.0 - x if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * x))

    def slope(x: float, q: Array) -> Array:
        return -2.0 * length * rate(x) * (q - rate(x))

    end = solve_ivp(slope, (0.0, 1.0), [1.0], rtol=1e-8, atol=1e-10).y[0, -1]
    assert end == pytest.approx(share, rel=0.1)
    grid = (np.arange(1000) + 0.5) / 1000
    assert np.mean([rate(x) ** 2 for x in grid]) == pytest.approx(moved, rel=1e-4)


def test_the_window_of_the_cooldown() -> None:
    rates: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-3, "noise": 0.5}
    open_, closed = (plan(2.0, curvature=h, residual=0.2, **rates).cooldown for h in (10.0, 1e-3))
    assert open_ is not None
    assert closed is not None
    assert open_.shortest is not None
    assert closed.shortest is not None
    assert open_.shortest < open_.longest == closed.longest < closed.shortest
    assert "cannot be had" in str(closed)
    assert "cannot be had" not in str(open_)
    small = math.sqrt(2e-6 / 0.5)
    assert open_.shortest == pytest.approx(0.25 * math.pi / 0.04 / (small * 10.0))
    assert open_.longest == pytest.approx(3.0 * 0.05 * 2.0 / 2e-6)


def test_the_plan_of_a_small_rate_from_a_run_at_a_large_one() -> None:
    """End to end on the circle: the truth is in the interval, and other rules miss it.

    Runs of 30 relaxation times, and plans at lr / 10. The number of steps at which the exact law
    has relaxed by e^{-1} is found by the exact sums of the time scale.
    """
    law = CircleDiffusion.reversible(problems.varying_circle())
    relaxed, trace, norm = law.relaxation_time, float(law.trace[0]), 1.5
    small = TimeScale(2e-3, 0.02)
    given: dict[str, Any] = {"relaxations": 1.0, "weight_decay": 0.02}
    start = {"lr": 2e-3, "norm": norm, "noise": trace}
    exact = plan(trace * relaxed, **given, **start).steps[1]
    assert float(small.clock(round(exact), trace, norm)) == pytest.approx(relaxed, rel=1e-4)
    clock = np.linspace(0.0, 30.0, 150)
    runs = calibration.varying_circle(clock, 6, np.random.default_rng(0))
    found = [relaxation(run, clock * relaxed * trace, modes=1) for run in runs]
    plans = [plan(one, **given, **start) for one in found]
    assert sum(made.steps[0] <= exact <= made.steps[2] for made in plans) >= 5
    # At ten times the rate, from the balance there: what rules of thumb make of it.
    large = plan(trace * relaxed, lr=2e-2, **given).steps[1]
    by_rule = {power: large * 10.0**power for power in (1, 2)}
    covered = {p: float(small.clock(round(k), trace, norm)) / relaxed for p, k in by_rule.items()}
    assert covered[1] < 0.8  # const/lr and const/(lr * weight_decay)
    assert covered[2] > 5.0  # const/lr^2


class Circle:
    """SGD on the circle of varying curvature with the noise of (18), many paths by NumPy."""

    amplitude, scale = 0.5, 0.3

    def run(
        self, lr: float, weight_decay: float, steps: int, norm: float, paths: int, every: int
    ) -> tuple[Array, Array]:
        """Intrinsic clock and cosine of the angle at every so many steps, (K, paths)."""
        generator = np.random.default_rng(3)
        x = np.zeros((3, paths))
        x[0] = norm
        clock = np.zeros(paths)
        clocks, cosines = [clock.copy()], [np.ones(paths)]
        for k in range(1, steps + 1):
            square = (x**2).sum(0)
            size = np.sqrt(square)
            u = x / size
            weight = 1.0 + self.amplitude * u[0]
            # The gradient of (weight u_3)^2 / 2 in u, then along the sphere, over |x|.
            slope = np.stack([weight * self.amplitude * u[2] ** 2, 0 * u[0], weight**2 * u[2]])
            slope += self.scale * generator.standard_normal(x.shape)
            slope -= u * (u * slope).sum(0)
            clock += lr**2 / ((1.0 - lr * weight_decay) ** 2 * square**2)
            x = (1.0 - lr * weight_decay) * x - lr * slope / size
            if k % every == 0:
                clocks.append(clock.copy())
                cosines.append(x[0] / np.hypot(x[0], x[1]))
        return np.array(clocks), np.array(cosines)


@pytest.mark.paper("Theorem 5.5")
@pytest.mark.thorough
@pytest.mark.parametrize(("smaller", "paths"), [(10, 1500), (100, 500)])
def test_the_plan_of_a_small_rate_with_sgd_itself(smaller: int, paths: int) -> None:
    """24 runs of SGD at lr, a plan from each for a tenth and a hundredth of it, and runs there."""
    law = CircleDiffusion.reversible(problems.varying_circle())
    relaxed, trace = law.relaxation_time, float(law.trace[0])
    lr, decay = 0.04, 0.01
    balance = (trace * lr / (2 * decay)) ** 0.25
    steps = round(30.0 * trace * relaxed / (2 * lr * decay))
    clocks, cosines = Circle().run(lr, decay, steps, balance, 24, steps // 200)
    plans = [
        plan(
            relaxation(cosines[:, i], trace * clocks[:, i], modes=1),
            relaxations=1.0,
            lr=lr / smaller,
            weight_decay=decay,
            norm=1.0,
            noise=trace,
        )
        for i in range(24)
    ]
    exact = plan(
        trace * relaxed, relaxations=1.0, lr=lr / smaller, weight_decay=decay, norm=1.0, noise=trace
    ).steps[1]
    assert sum(p.steps[0] <= exact <= p.steps[2] for p in plans) >= 20
    end = round(exact)
    _, small = Circle().run(lr / smaller, decay, end, 1.0, paths, end)
    mean, error = small[-1].mean(), small[-1].std() / math.sqrt(paths)
    assert abs(mean - law.expectation(np.cos, relaxed)) < 4.0 * error
    wrong = round(steps / 30.0 * smaller)  # const/lr and const/(lr * weight_decay)
    _, early = Circle().run(lr / smaller, decay, wrong, 1.0, paths, wrong)
    assert abs(early[-1].mean() - law.expectation(np.cos, relaxed)) > 4.0 * error


class PartlyFresh:
    """A clock of which a fifth explores minimisers."""

    time, effective = 300.0, 60.0


def test_a_relaxation_time_in_the_effective_clock() -> None:
    """It takes 1/f of the clock v: the plan that takes it for v itself is too short."""
    readings = np.linspace(0.0, 300.0, 300)
    path = calibration.plain(readings, 1, np.random.default_rng(1))[0]
    records = Records()
    for step, (reading, value) in enumerate(zip(readings, path, strict=True)):
        records.append(step, float(reading), value=float(value))
    given: dict[str, Any] = {"lr": 0.1, "weight_decay": 1e-3}
    whole = relaxation(records, modes=1)
    part = relaxation(records, PartlyFresh(), modes=1)
    assert (whole.fresh, part.fresh) == (1.0, 0.2)
    assert part.estimate == pytest.approx(0.2 * whole.estimate, rel=1e-3)
    steps = plan(part, **given).steps
    assert steps == pytest.approx(plan(whole, **given).steps, rel=1e-3)
    assert plan(part, fresh=1.0, **given).steps == pytest.approx(np.multiply(0.2, steps), rel=1e-3)
    with pytest.raises(ArgumentError, match="share of fresh noise"):
        plan(2.0, fresh=1.5, **given)


def test_as_text_data_and_picture() -> None:
    found = plan(
        (1.5, 2.0, math.inf),
        lr=0.1,
        weight_decay=5e-4,
        momentum=0.9,
        batch_size=128,
        noise=5.0,
        curvature=0.1,
    )
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    lines = text.splitlines()
    note = next(i for i, line in enumerate(lines) if "the relaxation time is not bounded" in line)
    assert note < lines.index("steps")  # above the table
    row = next(line for line in lines if line.startswith("until mixed"))
    assert row.split() == f"until mixed unknown, at least {found.steps[0]:,.0f}".split()
    assert f"{found.steps[1]:,.0f}" not in text  # no firm middle
    assert "what if" not in text
    assert found.changes
    from_zero = str(plan((0.0, 2.0, math.inf), lr=0.1, weight_decay=5e-4))
    assert re.search("until mixed +unknown$", from_zero, re.MULTILINE)
    data = json.loads(found.to_json())
    assert data["tau"] == [1.5, 2.0, None]
    assert data["steps"][2] is None
    assert data["settings"]["schedule"] == "constant"
    axes = found.plot()
    assert isinstance(axes, matplotlib.axes.Axes)
    assert len(axes.lines) == 6
    adam = plan(2.0, lr=1e-3, weight_decay=0.1, optimizer="adamw", schedule="cosine")
    assert "the whole schedule" in str(adam)
    assert "not one after the other" not in " ".join(str(adam).split())
    off = plan(0.01, lr=0.1, weight_decay=5e-3, norm=1.0, noise=1.0)
    assert 0 < off.steps[1] < off.norm_steps
    assert "not one after the other" in " ".join(str(off).split())
    assert "Measure it with the same optimizer" in " ".join(str(adam).split())
    assert max(map(len, str(adam).splitlines())) <= 80


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"tau": -1.0}, ArgumentError, "no relaxation time"),
        ({"tau": (2.0, 1.0)}, ArgumentError, "no relaxation time"),
        ({"tau": (0.0, math.inf)}, ArgumentError, "no relaxation time"),
        ({"lr": 0.0}, ArgumentError, "lr must be positive"),
        ({"weight_decay": 0.0}, ArgumentError, "norm has no balance"),
        ({"weight_decay": 0.2, "momentum": 0.9}, TimeScaleError, "too strong for this momentum"),
        ({"weight_decay": 20.0, "optimizer": "adamw"}, ArgumentError, "reverse the weights"),
        ({"optimizer": "adam"}, ArgumentError, "optimizer is not one"),
        ({"schedule": "exponential"}, ArgumentError, "schedule is not one"),
        ({"schedule": lambda x: -x}, ArgumentError, "no function of progress"),
        ({"schedule": lambda: 1.0}, ArgumentError, "no function of progress"),
        ({"norm": 1.0}, ArgumentError, "balance of the norm is not known"),
        (
            {"norm": 1.0, "noise": 1.0, "before": TrainingSettings(0.1, 0.1)},
            ArgumentError,
            "given twice",
        ),
        ({"before": TrainingSettings(0.1, 0.1, optimizer="lion")}, ArgumentError, "do not compare"),
        ({"before": 0.1}, ArgumentError, "no training settings"),
        ({"relaxations": 0}, ArgumentError, "relaxations must be positive"),
        ({"cooldown": "step"}, ArgumentError, "cooldown is not one"),
        ({"residual": 0.0}, ArgumentError, "the residual is out"),
        ({"curvature": -1.0}, ArgumentError, "curvature must be positive"),
    ],
)
def test_what_has_no_plan_is_told(given: dict[str, Any], error: type[Exception], said: str) -> None:
    arguments = {"tau": 1.0, "lr": 0.1, "weight_decay": 0.01, **given}
    with pytest.raises(error, match=said):
        plan(arguments.pop("tau"), **arguments)
    found = plan(1.0, lr=0.1, weight_decay=0.01)
    with pytest.raises(ArgumentError, match="no lr does it"):
        found.lr_for(0.01)


@pytest.mark.parametrize("optimizer", ["sgd", "normalised_sgd"])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 3.0])
def test_steps_that_are_not_small(ratio: float, optimizer: str) -> None:
    """A decay of a tenth a step, against the recursion of the mean square norm."""
    settings = TrainingSettings(0.1, 1.0, optimizer=optimizer)
    power = settings.power
    square = start = (ratio * settings.balance(1.0)) ** (2.0 / power)
    clock = 0.0
    for _ in range(40):
        decayed = 0.9**2 * square
        square = decayed + 0.1**2 * (1.0 / square if power == 4 else 1.0)
        clock += math.log(square / decayed)
    assert settings.clock(40, ratio) == pytest.approx(clock, abs=2e-4)
    assert settings.steps(clock, ratio) == pytest.approx(40.0, abs=1e-3)
    given = {"norm": start**0.5, "noise": 1.0, "lr": 0.1, "weight_decay": 1.0}
    found = plan(clock, relaxations=1.0, optimizer=optimizer, **given)
    assert found.steps[1] == pytest.approx(40.0, abs=1e-3)
    # Broken twin: the balance of infinitely small steps.
    small = 2.0 / power * math.log1p((0.9 ** (-40 * power) - 1.0) / ratio)
    assert abs(small - clock) > 0.02


def test_dampening_is_in_the_plan() -> None:
    rates = {"lr": 2e-3, "weight_decay": 0.5, "momentum": 0.5, "dampening": 0.4}
    found = plan(1.0, relaxations=1.0, norm=1.0, noise=1.0, **rates)  # type: ignore[arg-type]
    steps = round(found.steps[1])
    exact = expected_clock(rates.pop("lr"), steps, noise=1.0, norm=1.0, **rates)  # type: ignore[arg-type]
    assert exact.total == pytest.approx(1.0, rel=0.01)
    # The broken twin leaves it out.
    rates["dampening"] = 0.0
    twin = plan(1.0, relaxations=1.0, norm=1.0, noise=1.0, lr=2e-3, **rates)  # type: ignore[arg-type]
    assert twin.steps[1] < 0.9 * steps


@pytest.mark.parametrize("adam", [False, True])
def test_from_a_clock_to_a_plan_to_the_steps_that_it_says(adam: bool) -> None:
    """Trained with batches of 4; planned from there at other rates and batches of 2; run."""
    lr, own = (0.02, {"betas": (0.9, 0.99)}) if adam else (0.04, {"momentum": 0.5})
    rows, clock = noisy.run(0, adam=adam, lr=lr, weight_decay=0.1 if adam else 0.05, **own)
    (group,) = clock.optimizer.param_groups

    def train(steps: int, batch: int) -> None:
        for _ in range(steps):
            rows.fill()
            assert rows.weight.grad is not None
            rows.weight.grad /= math.sqrt(batch)
            clock.optimizer.step()

    train(600 if adam else 150, 4)  # Adam's v is behind while the norm grows
    options = plan_options(clock, batch_size=4)
    assert options["noise"] == pytest.approx(noisy.DIM if adam else 1.0, rel=0.06)
    assert options["norm"] == pytest.approx(float(rows.weight.detach().norm(dim=1).median()), 0.02)
    assert clock.values().get("rows/V", 0.25) == pytest.approx(0.25, rel=0.06)
    changed = {"lr": lr / 2, "batch_size": 2}
    planned = plan(1.0, relaxations=1.0, **options | changed)
    steps = round(planned.steps[1])
    assert 100 < steps < 1500
    start, before = rows.weight.detach().clone(), clock.time
    group["lr"] = changed["lr"]
    train(steps, 2)
    cosines = torch.cosine_similarity(start, rows.weight.detach(), dim=1)
    error = float(cosines.std()) / math.sqrt(noisy.PATHS)
    assert abs(float(cosines.mean()) - math.exp(-0.5)) < 4.0 * error + 0.01
    assert clock.time - before == pytest.approx(1.0, rel=0.06)
    # Broken twin: the trace of the batch at the present norm for that of a sample at norm 1.
    if not adam:
        twin = options | changed | {"noise": 0.25 / options["norm"] ** 2}
        assert abs(plan(1.0, relaxations=1.0, **twin).steps[1] / steps - 1.0) > 0.2


def test_a_clock_with_nothing_to_plan_from() -> None:
    _, clock = noisy.run(0)
    with pytest.raises(MixingClockError, match="nothing to plan from"):
        plan_options(clock)
    with pytest.raises(ArgumentError, match="group"):
        plan_options(clock, group="other")
    with pytest.raises(DTypeError, match="no run to plan from"):
        plan_options(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="plan_options"):
        plan(1.0, lr=0.1, weight_decay=0.1, norm=1.0)

"""Runs that would not end are refused with the number of their steps; long ones are said."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from manifold_sde import DirectionDiffusion, LimitingDiffusion, WeightDecaySDE, problems
from manifold_sde.errors import ArgumentError, LongRunWarning
from manifold_sde.solvers import extrapolate, multilevel, predict_sgd, run_sgd, solve
from manifold_sde.solvers.limits import MAX_STEPS, Watch

PROBLEM = problems.great_circle()
Y = PROBLEM.minimizer
DIRECTION, LIMIT = DirectionDiffusion(PROBLEM), LimitingDiffusion(PROBLEM)
#: Default step of the clock: V = 2 s^2 = 0.18.
STEP = 1.0 / (64.0 * 0.18)
#: That which is chosen here for an accuracy of 1e-3.
CHOSEN = 1.0 / (8.0 * 0.18)


def first(y: torch.Tensor) -> torch.Tensor:
    return y[:, 0]


ENDLESS: dict[str, tuple[Callable[[], Any], float]] = {
    # the call, and the steps that it would take
    "late start": (lambda: solve(DIRECTION, Y, [1e300, 1.1e300]), 1e299 / CHOSEN),
    "long": (lambda: solve(DIRECTION, Y, [0, 1e12]), 1e12 / CHOSEN),
    "long, with a norm": (lambda: solve(LIMIT, Y, [0, 1e12]), 1e12 / (0.18 * CHOSEN)),
    "long, of one scheme": (lambda: solve(LIMIT, Y, [0, 1e12], dt=5.0, method="euler"), 2e11),
    "in the whole space": (lambda: solve(WeightDecaySDE(PROBLEM, 0.01, 0.05), Y, [0, 1e12]), 1e12),
    "small dt": (lambda: solve(DIRECTION, Y, [0, 1], dt=1e-10), 1e10),
    "adaptive": (lambda: solve(DIRECTION, Y, [0, 1e12], rtol=1e-2), 1e12 / (32 * STEP)),
    "largest step": (lambda: solve(DIRECTION, Y, [0, 1], rtol=1e-2, dt_max=1e-9), 1e9),
    "of SGD": (lambda: run_sgd(PROBLEM, Y, 0.01, 0.05, 10**12), 1e12),
    # T = 2 eta lambda k = 10^8, at |Y|^4 = V
    "predicted": (lambda: predict_sgd(PROBLEM, Y, 0.01, 0.05, 10**11), 1e8 / (0.18 * CHOSEN)),
    "of an expectation": (
        lambda: extrapolate(DIRECTION, Y, [0, 1e12], first, n_paths=4, dt=10.0),
        1e11,
    ),
    "of levels": (lambda: multilevel(DIRECTION, Y, 1e12, first, tolerance=0.1, dt=10.0), 1e11),
}


@pytest.mark.parametrize("which", ENDLESS)
def test_a_run_without_end_is_refused_at_once_with_its_steps(which: str) -> None:
    call, steps = ENDLESS[which]
    began = time.process_time()
    with pytest.raises(ArgumentError, match="too many steps") as caught:
        call()
    assert time.process_time() - began < 5.0
    assert "max_steps=int(" in caught.value.remedy
    said = re.findall(r"about (\S+) steps", caught.value.received)
    assert float(said[0]) == pytest.approx(steps, rel=0.02)


def test_a_step_below_all_numbers_is_refused() -> None:
    with pytest.raises(ArgumentError, match="steps without end"):
        solve(DIRECTION, Y, [0, 1], rtol=1e-2, dt_max=1e-320)


def test_a_smallest_step_below_all_numbers_is_no_limit() -> None:
    run = solve(DIRECTION, Y, [0, 0.1], rtol=0.1, dt_min=1e-320)
    assert run.stats["lost_paths"] == 0


@pytest.mark.parametrize("max_steps", [0, 1.5, True, "many"])
def test_max_steps_is_a_number(max_steps: Any) -> None:
    with pytest.raises(ArgumentError, match="max_steps is not"):
        solve(DIRECTION, Y, [0, 1], max_steps=max_steps)
    with pytest.raises(ArgumentError, match="1000000000"):
        run_sgd(PROBLEM, Y, 0.01, 0.05, 1, max_steps=max_steps)


def test_what_takes_as_many_steps_as_are_allowed_is_run() -> None:
    assert solve(DIRECTION, Y, [0, 1], dt=0.125, max_steps=8).stats["steps"] == 8
    with pytest.raises(ArgumentError, match="about 8 steps"):
        solve(DIRECTION, Y, [0, 1], dt=0.125, max_steps=7)
    # The norm shrinks, and the clock runs the faster.
    made = solve(LIMIT, Y, [0, 1], dt=0.125).stats["steps"]
    assert solve(LIMIT, Y, [0, 1], dt=0.125, max_steps=made).stats["steps"] == made > 12
    with pytest.raises(ArgumentError, match="too many steps"):
        solve(LIMIT, Y, [0, 1], dt=0.125, max_steps=made - 2)


def test_memory_that_is_not_there_is_not_asked_for() -> None:
    for call in (
        lambda: solve(DIRECTION, Y, torch.linspace(0, 1, 1000), n_paths=10**9),
        lambda: run_sgd(PROBLEM, Y, 0.01, 0.05, [10], n_paths=10**12),
        lambda: run_sgd(PROBLEM, Y, 0.01, 0.05, list(range(10_000)), n_paths=10**6),
        lambda: run_sgd(PROBLEM, Y, 0.01, 0.05, range(10**12)),
        lambda: solve(DIRECTION, Y, range(10**12)),
    ):
        with pytest.raises(ArgumentError, match="does not fit into the memory"):
            call()


class Course:
    """A run of a given number of steps, as a watch sees it."""

    def __init__(self, steps: int, rtol: float | None, most: int = MAX_STEPS) -> None:
        self.steps = steps
        self.watch = Watch(most, rtol, 0)

    def go(self, position: int) -> None:
        for taken in range(16, position + 1, 16):
            self.watch.look(taken, lambda now=taken: max(0.0, 1.0 - now / self.steps))  # type: ignore[misc]


def test_a_small_tolerance_is_said_early_and_once() -> None:
    course = Course(500_000, rtol=1e-6)
    with pytest.warns(
        LongRunWarning, match=r"about 5e\+05 steps .* of the processor.*1e-06"
    ) as said:
        course.go(2000)
    assert len(said) == 1
    Course(500_000, rtol=None).go(2000)
    Course(10_000, rtol=1e-3).go(10_000)


def test_too_many_adaptive_steps_are_refused_early() -> None:
    course = Course(500_000, rtol=1e-6, most=100_000)
    with pytest.raises(ArgumentError, match=r"about 5e\+05 steps[^$]*rtol=1e-3"):
        course.go(64)


def test_more_steps_than_expected_are_refused_too() -> None:
    course = Course(100, rtol=None, most=100)
    course.go(96)
    with pytest.raises(ArgumentError, match="about 112 steps"):
        course.go(112)


def test_the_expected_number_of_adaptive_steps_is_right() -> None:
    """Of a run that is refused after 64 steps, and of a shorter one with its steps."""
    made = solve(DIRECTION, Y, [0.0, 2.0], n_paths=8, rtol=1e-2).stats
    tries = (made["steps"] + made["rejected_steps"]) / 8
    with pytest.raises(ArgumentError, match="rtol=1e-3") as caught:
        solve(DIRECTION, Y, [0.0, 200.0], n_paths=8, rtol=1e-2, max_steps=400)
    said = float(re.findall(r"about (\S+) steps", caught.value.received)[0])
    assert 0.5 < said / (100.0 * tries) < 2.0

"""Deadlines: loops give up when their time is over, or when what is left will not fit."""

from __future__ import annotations

import copyreg
import gc
import weakref
from typing import Any

import pytest
import torch

from manifold_sde import DirectionDiffusion, problems
from manifold_sde.deadline import (
    Attempts,
    Deadline,
    OutOfTimeError,
    consult,
    expecting,
    shared_property,
)
from manifold_sde.errors import ManifoldSDEError
from manifold_sde.progress import Progress
from manifold_sde.solvers import run_sgd, solve


class Clock:
    """A clock that a test turns on."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def loop(clock: Clock, *seconds: float, total: int | None) -> None:
    with Progress(False, "", total=total) as bar:
        for each in seconds:
            clock.now += each
            bar.update()


def test_time_that_is_over(clock: Clock) -> None:
    consult()
    with Deadline(10.0, clock):
        clock.now = 10.0
        consult()
        clock.now = 10.5
        with pytest.raises(OutOfTimeError, match="takes more than 10 s") as info:
            consult()
    assert not info.value.estimated
    consult()
    # What handles errors does not swallow it.
    assert not issubclass(OutOfTimeError, Exception)


def test_a_loop_is_given_up_as_soon_as_it_is_seen_that_it_is_too_long(clock: Clock) -> None:
    with (
        Deadline(10.0, clock),
        pytest.raises(OutOfTimeError, match="would take about 100 s") as info,
    ):
        loop(clock, *[1.0] * 100, total=100)
    assert clock.now == 2.0
    assert info.value.estimated
    with Deadline(10.0, clock):
        loop(clock, *[1.0] * 9, total=9)
    # Where nobody knows the total, the time itself ends it; or somebody does.
    clock.now = 0.0
    with Deadline(10.0, clock), pytest.raises(OutOfTimeError, match="takes more than"):
        loop(clock, *[1.0] * 100, total=None)
    assert clock.now == 11.0
    clock.now = 0.0
    with Deadline(10.0, clock), expecting(100), pytest.raises(OutOfTimeError, match="100 s"):
        loop(clock, *[1.0] * 100, total=None)
    assert clock.now == 2.0


def test_what_is_made_once_in_the_first_step_is_no_measure(clock: Clock) -> None:
    with Deadline(10.0, clock):
        loop(clock, 5.0, *[0.1] * 20, total=21)


class Maker:
    """Something that several ask for."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock = clock
        self.seconds = seconds
        self.made = 0

    @shared_property
    def thing(self) -> str:
        self.made += 1
        for _ in range(10):
            self.clock.now += 0.1 * self.seconds
            consult()
        return "made"

    @shared_property
    def broken(self) -> str:
        self.made += 1
        raise ManifoldSDEError("it cannot be made")


def test_what_was_given_up_is_tried_again_only_with_more_time(clock: Clock) -> None:
    maker = Maker(clock, 30.0)
    for _ in range(3):
        with Deadline(10.0, clock), pytest.raises(OutOfTimeError):
            assert maker.thing
    assert maker.made == 1
    for _ in range(3):
        with Deadline(40.0, clock):
            assert maker.thing == "made"
    assert maker.made == 2


def test_what_cannot_be_made_is_tried_once(clock: Clock) -> None:
    maker = Maker(clock, 1.0)
    for _ in range(3):
        with pytest.raises(ManifoldSDEError, match="cannot be made"):
            assert maker.broken
    assert maker.made == 1
    attempts = Attempts()
    for value in (1, 2):
        with pytest.raises(ManifoldSDEError, match="the first"), attempts.making("key"):
            raise ManifoldSDEError("the first" if value == 1 else "the second")


def with_frames(error: ManifoldSDEError) -> tuple[Any, ...]:
    """How packages copy errors that they send between processes (tblib, with distributed)."""
    rebuild, given = error.__reduce__()
    return lambda frames: rebuild(*given).with_traceback(frames), (error.__traceback__,)


def test_an_error_that_is_remembered_keeps_nothing_that_was_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(copyreg.dispatch_table, ManifoldSDEError, with_frames)  # type: ignore[arg-type]
    attempts, kept = Attempts(), []

    class Large:
        """What a check has under way."""

    def broken() -> None:
        large = Large()
        kept.append(weakref.ref(large))
        raise ManifoldSDEError("it cannot be made")

    def attempt() -> str:
        try:  # what pytest.raises gives back would keep the frames itself
            with attempts.making("key"):
                broken()
        except ManifoldSDEError as error:
            return str(error)
        return ""

    for _ in range(2):
        assert "cannot be made" in attempt()
        gc.collect()
        assert [ref() for ref in kept] == [None]


def test_solvers_consult_and_do_not_depend_on_it() -> None:
    problem = problems.great_circle()
    sde = DirectionDiffusion(problem)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        law = solve(sde, problem.minimizer, [0.0, 1.0], n_paths=8, seed=1, compile=False)
        return law.ys, run_sgd(problem, problem.minimizer, 0.1, 0.1, [20], n_paths=8).ys

    free = both()
    with Deadline(1e9):
        bound = both()
    assert all(map(torch.equal, free, bound))
    with Deadline(0.0), pytest.raises(OutOfTimeError):
        solve(sde, problem.minimizer, [0.0, 1.0], n_paths=8, compile=False)
    with Deadline(0.0), pytest.raises(OutOfTimeError):
        run_sgd(problem, problem.minimizer, 0.1, 0.1, [20], n_paths=8)

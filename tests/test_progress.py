"""What is said on a terminal of what a run costs: its steps, its seconds, and what is cheaper.

Times are those of a clock that the tests turn on, so that nothing depends on the machine.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from manifold_sde import DirectionDiffusion, TimeScale, problems, progress
from manifold_sde.progress import Pace, Progress, compiling, counted, duration, quiet
from manifold_sde.solvers import predict_sgd, prediction, run_sgd, solve
from manifold_sde.solvers.schemes.heun import Heun
from manifold_sde.solvers.schemes.weak2 import Weak2
from manifold_sde.verification import verify

PROBLEM = problems.mixed_noise_circle()
CIRCLE = problems.great_circle()
START = PROBLEM.minimizer
#: Seconds of what is made once, of a step, and of a path in it.
ONCE, STEP, PATH = 30.0, 0.02, 1e-4
#: How far the time that is left may be off, and the part of a run in which nothing is asked of it.
FACTOR, BEGINNING, END = 1.5, 0.2, 0.97


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=found))
    return found


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    found = Terminal()
    monkeypatch.setattr("sys.stderr", found)
    return found


def worst(marks: list[tuple[float, float | None]], end: float) -> float:
    """The largest factor between the time that was said to be left and that which was."""
    begin = marks[0][0]  # with the first update is what is made once
    found = 1.0
    for now, left in marks[1:]:
        if BEGINNING <= (now - begin) / (end - begin) <= END:
            true = end - now
            found = max(found, true / left, left / true) if left else float("inf")
    return found


# The pace of a loop.


def of_average(times: list[float]) -> list[float]:
    """What the mean over all that went before says: the broken twin."""
    total, now, found = len(times), 0.0, []
    for k, seconds in enumerate(times, 1):
        now += seconds
        found.append(now / k * (total - k))
    return found


def of_pace(times: list[float]) -> list[float | None]:
    pace, now, found = Pace(), 0.0, []
    for k, seconds in enumerate(times, 1):
        now += seconds
        pace.note(now, 1.0)
        found.append(pace.seconds(len(times) - k))
    return found


def rated(lefts: Any, times: list[float]) -> float:
    now, marks = 0.0, []
    for left, seconds in zip(lefts, times, strict=True):
        now += seconds
        marks.append((now, left))
    return worst(marks, now)


@pytest.mark.parametrize(
    "times",
    [
        [30.0, *[0.1] * 200],
        [30.0, *[0.05, 0.15] * 100],
        # Something else is made early on.
        [30.0, *[0.1] * 5, 2.0, *[0.1] * 195],
        # Steps that become slower.
        [30.0, *[0.1 + 0.0005 * k for k in range(200)]],
    ],
)
def test_the_time_that_is_left_after_compiling(times: list[float]) -> None:
    assert rated(of_pace(times), times) < FACTOR


def test_broken_twin_the_mean_over_all_steps() -> None:
    times = [30.0, *[0.1] * 200]
    assert rated(of_average(times), times) > 2 * FACTOR


def test_nothing_is_known_after_the_first_step() -> None:
    pace = Pace()
    assert pace.seconds(1.0) is None
    pace.note(10.0, 1.0)
    assert pace.seconds(1.0) is None
    pace.note(11.0, 1.0)
    assert pace.seconds(5.0) == 5.0


# Whole runs.


def marks_of(
    run: Callable[[], object], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[float, float | None]]:
    """When a bar of a run was updated, and what it then said to be left; steps take their time."""
    marks: list[tuple[float, float | None]] = []
    once = [ONCE]

    def slow(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(self: Any, sde: Any, x: Any, *others: Any) -> Any:
            clock.now += STEP + PATH * x.shape[1] + (once.pop() if once else 0.0)
            return real(self, sde, x, *others)

        return step

    for scheme in (Weak2, Heun):
        monkeypatch.setattr(scheme, "step", slow(scheme.step))
    monkeypatch.setattr(Progress, "_tell", lambda bar: marks.append((clock.now, bar._left)))
    run()
    return marks


RUNS: dict[str, Callable[..., object]] = {
    "direction": lambda **o: solve(
        DirectionDiffusion(PROBLEM), START, [0, 2, 5], n_paths=4, dt=0.05, **o
    ),
    "two chunks": lambda **o: solve(
        DirectionDiffusion(PROBLEM), START, [0, 5], n_paths=600, chunk_size=512, dt=0.1, **o
    ),
    "steps that are estimated": lambda **o: predict_sgd(
        PROBLEM, START, 0.02, 0.05, [500, 1500], n_paths=5, dt=0.05, **o
    ),
    "a start of another norm": lambda **o: predict_sgd(
        PROBLEM, 2 * START, 0.02, 0.05, [500, 3000], n_paths=5, dt=2.0, **o
    ),
    "adaptive": lambda **o: predict_sgd(
        PROBLEM, START, 0.02, 0.05, [500, 1500], n_paths=50, rtol=0.01, **o
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_time_that_is_left_of_a_run(
    name: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = marks_of(lambda: RUNS[name](progress=True), clock, monkeypatch)
    assert worst(marks, clock.now) < FACTOR


def test_broken_twin_steps_of_all_chunks_are_alike(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second chunk has fewer paths; and 400 paths' work beside a step is no guess too many."""
    monkeypatch.setattr("manifold_sde.solvers.solver._ALIKE", {True: 1e9, False: 1e9})
    marks = marks_of(lambda: RUNS["two chunks"](progress=True), clock, monkeypatch)
    assert worst(marks, clock.now) > FACTOR


# What is said.


def loop(clock: Clock, seconds: float, steps: int = 100, **options: Any) -> None:
    with Progress(None, "SDE", total=steps, unit="step", about="7 paths", **options) as bar:
        with compiling():
            clock.now += 5.0
        for _ in range(steps):
            clock.now += seconds
            bar.update()


def test_the_cost_is_said_once_it_is_measured(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = terminal(monkeypatch)
    loop(clock, 0.5)
    said = shown.getvalue()
    assert "SDE: compiling" in said
    line = "SDE: 100 steps of 7 paths, about 49 s; compiling and the like took 6 s"
    assert said.count(line) == 1
    assert said.index("SDE: compiling") < said.index(line)


def test_short_runs_say_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    with Progress(None, "SDE", total=100) as bar:
        for _ in range(100):
            clock.now += 0.005
            bar.update()
    assert shown.getvalue() == ""


def test_a_bar_over_items_counts_them(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    assert list(counted([3, 1, 2], False, "items")) == [3, 1, 2]
    assert capfd.readouterr().err == ""
    assert list(counted([3, 1, 2], True, "items")) == [3, 1, 2]
    assert "items:   0%" in capfd.readouterr().err


def test_nothing_is_said_where_nobody_looks_on(
    clock: Clock, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop(clock, 0.5)
    assert capfd.readouterr() == ("", "")
    shown = terminal(monkeypatch)
    with quiet():
        loop(clock, 0.5)
    assert shown.getvalue() == ""


def test_bars_are_on_in_a_notebook(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the error stream is no terminal."""
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", SimpleNamespace())
    loop(clock, 0.5)
    assert "about 49 s" in shown.getvalue()


def test_the_bar_of_a_notebook_is_its_own() -> None:
    """With widgets, which stand in here for those of a notebook."""
    program = """
import sys, types
class Widget:
    def __init__(self, *args, **options):
        self.children = options.get("children", ()); self.layout = types.SimpleNamespace()
        self.style = types.SimpleNamespace(bar_color=None)
        self.bar_style = ""
class Shell: pass
shown = []
ipython = types.ModuleType("IPython"); ipython.get_ipython = Shell
screen = types.ModuleType("IPython.display"); screen.display = shown.append
widgets = types.ModuleType("ipywidgets")
widgets.HTML = widgets.FloatProgress = widgets.HBox = Widget
sys.modules.update({"IPython": ipython, "IPython.display": screen, "ipywidgets": widgets})
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
from manifold_sde.progress import Progress
with Progress("run", "SDE", total=3) as bar:
    for _ in range(3):
        bar.update()
print(type(shown[0]).__name__, bar.container.children[1].value)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["TqdmHBox", "3"]
    assert found.stderr == ""


def test_a_time_in_words() -> None:
    assert [duration(s) for s in (0.04, 3.2, 119.0, 600.0, 8e4)] == [
        "0.0 s",
        "3 s",
        "119 s",
        "10 minutes",
        "22 hours",
    ]


# What SGD itself would take.


def instead(seconds: float, steps: int = 1000, paths: int = 50) -> str:
    start = CIRCLE.minimizer[None]
    return prediction._sgd_instead(CIRCLE, start, TimeScale(0.01, 0.05), steps, paths, seconds)


def test_sgd_is_named_where_it_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    said = instead(1e4)
    assert said.startswith("SGD itself takes about ")
    assert said.endswith(" s: run_sgd with the same arguments")
    # Where the prediction is short, or SGD takes as long, nothing is.
    assert instead(1e4, steps=10**12) == ""
    monkeypatch.setattr(prediction, "run_sgd", lambda *_, **__: pytest.fail("it was tried"))
    assert instead(1.0) == ""


def test_what_sgd_would_take_is_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of a clock that SGD's steps turn on: 0.01 s a step, and 2 s at the beginning."""
    clock, made = Clock(), []

    def run(problem: Any, x0: Any, lr: Any, wd: Any, steps: int, **options: Any) -> None:
        clock.now += 0.01 * steps + 0.02 + (0.0 if made else 2.0)
        made.append(steps)

    monkeypatch.setattr(prediction, "run_sgd", run)
    monkeypatch.setattr(prediction, "time", SimpleNamespace(perf_counter=clock))
    assert "about 30 s" in instead(1e3, steps=3000)


def test_a_prediction_says_what_sgd_would_take(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "_WORTH_TRYING", 0.0)
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    paths = predict_sgd(CIRCLE, CIRCLE.minimizer, 0.01, 0.05, [400], n_paths=5, dt=0.01)
    real = Weak2.step

    def slow(self: Any, *arguments: Any) -> Any:
        clock.now += 100.0
        return real(self, *arguments)

    monkeypatch.setattr(Weak2, "step", slow)
    shown = terminal(monkeypatch)
    again = predict_sgd(CIRCLE, CIRCLE.minimizer, 0.01, 0.05, [400], n_paths=5, dt=0.01)
    assert "SGD itself takes about" in shown.getvalue()
    torch.testing.assert_close(again.ys, paths.ys, rtol=0, atol=0)


def test_sgd_says_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    shown = terminal(monkeypatch)
    run_sgd(CIRCLE, CIRCLE.minimizer, 0.01, 0.05, 50, n_paths=3, compile=False)
    assert "SGD: 50 steps of 3 paths, about" in shown.getvalue()


def test_a_verification_says_how_long_it_takes_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks are too different for a time that is left, and none is shown."""
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    shown = terminal(monkeypatch)
    verify(CIRCLE, checks=["compactness", "one scaling group"], budget=30.0)
    last = shown.getvalue().split("\r")[-1]
    assert "2/2" in last
    assert "at most 30 s of processor time" in last
    assert "<" not in last
    assert "about" not in shown.getvalue()

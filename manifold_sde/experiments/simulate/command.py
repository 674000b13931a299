"""What ``manifold-sde simulate`` does: predict, compare, draw, say what was found and where."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from manifold_sde.compiling import compiler_available
from manifold_sde.degeneracy import Degeneracy
from manifold_sde.errors import (
    ArgumentError,
    ManifoldSDEWarning,
    NoDiffusionWarning,
)
from manifold_sde.experiments.files import output_of, save_figure
from manifold_sde.experiments.loading import load_problem, make_known_to_workers
from manifold_sde.experiments.simulate.inputs import (
    at_batch_size,
    load_start,
    numbers,
)
from manifold_sde.experiments.simulate.plots import plot_law
from manifold_sde.experiments.simulate.summary import Row, law_table, summarize
from manifold_sde.geometry import Geometry
from manifold_sde.problem import Problem
from manifold_sde.sdes import FixedRatioDiffusion, LimitingDiffusion
from manifold_sde.solvers.chunk import CHUNK
from manifold_sde.solvers.clock import clock_at, log_time_at_zero_ratio
from manifold_sde.solvers.prediction import on_manifold, predict_sgd
from manifold_sde.solvers.sgd import run_sgd
from manifold_sde.solvers.solution import Solution
from manifold_sde.solvers.solver import solve
from manifold_sde.time_scale import TimeScale

#: Paths from one start, where their number is left to us.
PATHS = 1000
#: Moments that the figure shows beside those asked for.
_DRAWN = 9
#: Clock times trace at the start from which on kernels are compiled: some 200 steps.
_LONG = 3.0


@dataclass(frozen=True)
class Settings:
    """What is asked for; the attributes are the options of the command."""

    target: str
    lr: float | None = None
    weight_decay: float | None = None
    steps: str | None = None
    ratio: float | None = None
    times: str | None = None
    x0: Path | None = None
    norm: float | None = None
    paths: int | None = None
    batch_size: int | None = None
    seed: int = 0
    dt: float | None = None
    rtol: float | None = None
    workers: int | None = None
    checkpoint: Path | None = None
    output: Path | None = None
    compare_sgd: bool = False

    @property
    def in_steps(self) -> bool:
        """Whether moments are steps of SGD, and not times of (8).

        Raises:
            ArgumentError: If it is neither or both.
        """
        sgd = (self.lr, self.weight_decay, self.steps)
        own = (self.ratio, self.times)
        for wanted, others in ((sgd, own), (own, sgd)):
            if None not in wanted and all(value is None for value in others):
                if wanted is own and self.compare_sgd:
                    break
                return wanted is sgd
        names = ("lr", "weight_decay", "steps", "ratio", "times")
        given = [f"--{n.replace('_', '-')}" for n in names if getattr(self, n) is not None]
        given += ["--compare-sgd"] if self.compare_sgd else []
        raise ArgumentError(
            "what to simulate is not clear",
            received=", ".join(given) or "none of the options below",
            expected="--lr, --weight-decay and --steps for the weights of SGD; or --ratio and "
            "--times for (8) in its own time, where there is no SGD to compare with",
            remedy="--lr 0.01 --weight-decay 0.05 --steps 1000,5000, or --ratio 0.5 --times "
            "0.5,1 for (13)",
        )

    @property
    def moments(self) -> list[Any]:
        """The step counts or times asked for.

        Raises:
            ArgumentError: If they are none.
        """
        if self.in_steps:
            return numbers("--steps", self.steps or "", int)
        return numbers("--times", self.times or "", float)

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rate and weight decay, where moments are steps."""
        assert self.lr is not None
        assert self.weight_decay is not None
        return self.lr, self.weight_decay


def simulate_law(settings: Settings, console: Console, notes: Console) -> list[Path]:
    """Simulate the law, write its files, and print what was found.

    Args:
        settings: What is asked for.
        console: Where results are printed.
        notes: Where progress and warnings are printed.

    Returns:
        The files written: the solution, the figure, and SGD's solution if it was run.

    Raises:
        ManifoldSDEError: If an argument cannot be used, or the simulation fails.
    """
    steps = settings.in_steps
    if steps:
        TimeScale(*settings.rates)
    asked = settings.moments
    problem = at_batch_size(load_problem(settings.target), settings.batch_size)
    output = output_of(settings.output, "simulate", settings.target, ".npz")
    if settings.workers is not None:
        make_known_to_workers(settings.target)
    x0 = load_start(problem, settings.x0, settings.norm)
    with _told(notes):
        sde = LimitingDiffusion(problem)
        y0 = on_manifold(sde, x0.reshape(-1, problem.dim)).reshape(x0.shape)
        state = Degeneracy.of(problem, y0.reshape(-1, problem.dim)[0])
        _announce(problem, x0, y0, state, console)
        run = _Run(settings, problem, x0, y0, state.noise_rank > 0, notes.is_terminal)
        moments = _drawn(asked, steps)
        law = run.in_steps(moments) if steps else run.in_time(moments)
        law.save(output)
        files = [output]
        sgd = run.sgd(asked) if settings.compare_sgd else None
        if sgd is not None:
            files.append(output.with_name(f"{output.stem}_sgd.npz"))
            sgd.save(files[-1])
        rows = summarize(problem, law)
        found = [] if sgd is None else summarize(problem, sgd.limit(Geometry(problem)))
    files.append(output.with_suffix(".png"))
    figure = plot_law(rows, found, *_labels(settings, problem))
    save_figure(figure, files[-1], dpi=150)
    _conclude(settings, rows, found, asked, law, console)
    for file in files:
        console.print(Text(str(file)), soft_wrap=True)
    return files


class _Run:
    """The simulations of one call."""

    def __init__(
        self,
        settings: Settings,
        problem: Problem,
        x0: Tensor,
        y0: Tensor,
        diffuses: bool,
        progress: bool,
    ) -> None:
        self.settings = settings
        self.problem = problem
        self.x0 = x0
        self.y0 = y0
        self.progress = progress
        # A flow without noise along the manifold is the same for all paths.
        self.paths = settings.paths
        if x0.dim() == 1:
            self.paths = (settings.paths or PATHS) if diffuses else None
        n = self.paths or len(x0.reshape(-1, problem.dim))
        workers = settings.workers
        size = CHUNK if workers is None else min(CHUNK, -(-n // workers))
        self.options: dict[str, Any] = {
            "n_paths": self.paths,
            "dt": settings.dt,
            "rtol": settings.rtol,
            "seed": settings.seed,
            "progress": "law" if progress else False,
            "checkpoint": settings.checkpoint,
            "workers": workers,
            "chunk_size": size,
            "compile": True if self._long() and compiler_available() else "auto",
        }

    def _long(self) -> bool:
        """Whether the clock asks for so many steps that compiling them is sooner done."""
        s = self.settings
        asked = s.moments[-1]
        if s.in_steps:
            log_time = torch.tensor(float(TimeScale(*s.rates).log_accumulated(asked)))
        else:
            assert s.ratio is not None
            log_time = log_time_at_zero_ratio(torch.tensor(float(asked)), s.ratio)
        start = self.y0.reshape(-1, self.problem.dim)[:1]
        trace = self.problem.noise_trace(start / start.norm())
        clock = clock_at(log_time - 4.0 * start.norm().log(), trace)
        return bool((trace * clock > _LONG).all())

    def in_steps(self, steps: Sequence[int]) -> Solution:
        """The law of SGD's weights after these steps."""
        return predict_sgd(self.problem, self.y0, *self.settings.rates, steps, **self.options)

    def in_time(self, times: Sequence[float]) -> Solution:
        """Solution of (8) in its own time."""
        assert self.settings.ratio is not None
        sde = FixedRatioDiffusion(self.problem, self.settings.ratio)
        return solve(sde, self.y0, times, **self.options)

    def sgd(self, steps: Sequence[int]) -> Solution:
        """SGD itself, from the start that was given."""
        return run_sgd(
            self.problem,
            self.x0,
            *self.settings.rates,
            steps,
            n_paths=self.paths,
            seed=self.settings.seed,
            progress="SGD" if self.progress else False,
        )


@contextmanager
def _told(notes: Console) -> Iterator[None]:
    """Warnings of the toolkit as short messages, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ManifoldSDEWarning)
        warnings.simplefilter("ignore", NoDiffusionWarning)  # announced
        try:
            yield
        finally:
            texts = [str(w.message) for w in caught if issubclass(w.category, ManifoldSDEWarning)]
            for text in dict.fromkeys(texts):
                notes.print(Text("Warning: ", style="bold yellow") + Text(text), soft_wrap=True)


def _drawn(asked: Sequence[Any], whole: bool) -> list[Any]:
    """The moments of the figure: those asked for, the start, and some between."""
    between = np.linspace(0.0, asked[-1], _DRAWN)
    if whole:
        return sorted({*asked, *(round(t) for t in between.tolist())})
    return np.unique(np.concatenate([asked, between])).tolist()


def _announce(
    problem: Problem, x0: Tensor, y0: Tensor, state: Degeneracy, console: Console
) -> None:
    console.print(Text(repr(problem)), soft_wrap=False)
    unit = [x.reshape(-1, problem.dim) / x.norm(dim=-1).reshape(-1, 1) for x in (x0, y0)]
    moved = float((unit[0] - unit[1]).norm(dim=1).max())
    if moved > 0.0:
        console.print(
            "The start is not on the manifold of minimisers: the law starts where gradient flow "
            f"leads from it, {moved:.3g} away at norm 1 (SGD goes there first)."
        )
    if state.statement is not None:
        console.print(Text(state.statement, style="bold"))


def _conclude(
    settings: Settings,
    rows: Sequence[Row],
    sgd: Sequence[Row],
    asked: Sequence[float],
    law: Solution,
    console: Console,
) -> None:
    steps = settings.in_steps
    wanted = [row for row in rows if row.moment in asked]
    flow = law.ys.dim() == 2
    title = "Deterministic flow" if flow else "Law of the theory"
    title += " for SGD's weights" if steps else f" (8) at ratio {settings.ratio:g}"
    times = None
    if steps:
        scale = TimeScale(*settings.rates)
        times = [float(scale.discrete_time(int(row.moment))) for row in wanted]
    console.print()
    console.print(law_table(title, wanted, "steps" if steps else "t", times))
    if sgd:
        console.print(
            law_table("SGD itself, by gradient flow from its weights", sgd, "steps", times)
        )
        failed = rows[-1].paths - sgd[-1].paths
        if failed > 0:
            console.print(f"{failed} runs of SGD blew up, or gradient flow did not arrive.")
    if not flow:
        console.print("± is a standard error; spread is 1 - |mean direction|.")
    stats = law.stats
    if stats["lost_paths"]:
        console.print(f"Lost: {stats['lost_paths']} of {stats['paths']} paths; a smaller --dt.")
    if "step_size" in stats:
        console.print(
            f"Steps of SGD on the sphere, η/|x|²: at most {stats['step_size']:.3g}; times "
            f"λmax(H): {stats['stability']:.3g} (to be well below 2); distance from the manifold "
            f"{stats['off_manifold']:.3g} of the norm. The law is the limit of small steps."
        )
    console.print()


def _labels(settings: Settings, problem: Problem) -> tuple[str, str]:
    """Title and axis label of the figure."""
    name = problem.name or "problem"
    if settings.in_steps:
        return rf"{name}: $\eta={settings.lr:g}$, $\lambda={settings.weight_decay:g}$", "steps"
    label = "$T$" if settings.ratio == 0.5 else r"$t=\eta^2k$"
    return rf"{name}: $\lambda/\eta={settings.ratio:g}$", label

"""What ``manifold-sde simulate`` does: predict, compare, draw, say what was found and where."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from manifold_sde.arguments import check_point
from manifold_sde.compile import compiler_available
from manifold_sde.errors import ArgumentError, ManifoldSDEWarning, NoDiffusionWarning
from manifold_sde.experiments.experiment import discard, print_files, save_figure
from manifold_sde.experiments.problem_file import (
    load_problem,
    make_known_to_workers,
    output_of,
    read_array,
)
from manifold_sde.experiments.run_folder import Run
from manifold_sde.experiments.settings.simulate import Settings
from manifold_sde.experiments.simulate.plots import plot_law
from manifold_sde.experiments.simulate.summary import Row, law_table, summarize
from manifold_sde.geometry import Geometry
from manifold_sde.geometry.tangent_noise import Degeneracy
from manifold_sde.noise import LabelNoise, SamplingNoise, SphericalNoise
from manifold_sde.problem import Problem
from manifold_sde.sdes import FixedRatioDiffusion, LimitingDiffusion
from manifold_sde.solvers.chunk import CHUNK
from manifold_sde.solvers.clock import clock_at, log_time_at_zero_ratio
from manifold_sde.solvers.exports import start_statement
from manifold_sde.solvers.prediction import on_manifold, predict_sgd, way_to_manifold
from manifold_sde.solvers.sgd import run_sgd
from manifold_sde.solvers.solution import Solution
from manifold_sde.solvers.solver import solve
from manifold_sde.time_scale import TimeScale
from manifold_sde.verification import Subject

#: Default number of paths from one start.
PATHS = 1000
#: Moments that the figure shows beside those of the settings.
_DRAWN = 9
#: Clock times trace at the start above which kernels are compiled: some 200 steps.
_LONG = 3.0


def simulate_law(settings: Settings, run: Run, console: Console, notes: Console) -> list[Path]:
    """Simulate the law, write its files, and print what was found; warnings go to ``notes``."""
    steps = settings.in_steps
    if steps:
        TimeScale(*settings.rates)
    asked = settings.moments
    problem = at_batch_size(load_problem(settings.target), settings.batch_size)
    output = output_of(settings.output, run.folder, "simulate", settings.target, ".npz")
    run = dataclasses.replace(run, folder=output.parent)
    run.require_free(output.stem)
    unfinished = settings.checkpoint or output.with_suffix(".unfinished")
    if settings.workers is not None:
        make_known_to_workers(settings.target)
    x0 = load_start(problem, settings.x0, settings.norm)
    files = [output]
    with _told(notes), contextlib.ExitStack() as stack:
        y0 = on_manifold(LimitingDiffusion(problem), x0.reshape(-1, problem.dim)).reshape(x0.shape)
        state = Degeneracy.of(problem, y0.reshape(-1, problem.dim)[0])
        _announce(problem, x0, y0, state, console)
        options = _options(settings, problem, y0, state.noise_rank > 0)
        options["checkpoint"] = unfinished
        stack.enter_context(run.noted(output.stem, settings))
        bar, moments = notes.is_terminal, _drawn(asked, steps)
        options["progress"] = "law" if bar else False
        if settings.ratio is None:
            law = predict_sgd(problem, y0, *settings.rates, moments, **options)
        else:
            law = solve(FixedRatioDiffusion(problem, settings.ratio), y0, moments, **options)
        law.save(output)
        rows, found = summarize(problem, law), []
        if settings.compare_sgd:
            shared: dict[str, Any] = {name: options[name] for name in ("n_paths", "seed")}
            shared["progress"] = "SGD" if bar else False
            sgd = run_sgd(problem, x0, *settings.rates, asked, **shared)
            files.append(output.with_name(f"{output.stem}_sgd.npz"))
            sgd.save(files[-1])
            found = summarize(problem, sgd.limit(Geometry(problem)))
    files.append(output.with_suffix(".png"))
    save_figure(plot_law(rows, found, *_labels(settings, problem)), files[-1], dpi=150)
    if settings.checkpoint is None:
        discard(unfinished)
    files.append(output.with_suffix(".toml"))
    _conclude(settings, rows, found, asked, law, console)
    print_files(console, files)
    return files


def load_start(problem: Problem, file: Path | None, norm: float | None) -> Tensor:
    """The weights at step 0, in double precision and scaled to a norm: (D,), or (B, D).

    Without a file they are the minimiser that the problem knows, or else that gradient flow finds:
    that of ``info`` and ``verify``.

    Raises:
        ArgumentError: If there is no start, or it cannot be used.
    """
    if file is None:
        try:
            x = Subject(problem, Geometry(problem)).find_minimizer().clone()
        except ArgumentError as error:
            raise ArgumentError(
                error.problem,
                received=error.received,
                expected=f"the weights at step 0, a file with a vector of {problem.dim} numbers",
                remedy="--x0 x0.npy, written by numpy.save, or --x0 x0.pt, by torch.save; they "
                "need not be a minimiser: gradient flow leads from them to one",
            ) from error
    else:
        x = check_point(read_array(file), problem.dim, name="--x0")
        if x.dim() > 2:
            raise ArgumentError(
                "--x0 holds too many dimensions",
                received=f"shape {tuple(x.shape)}",
                expected=f"({problem.dim},), or (B, {problem.dim}) for B starts",
                remedy=f"x0.reshape(-1, {problem.dim})",
            )
    if norm is None:
        return x
    if not 0 < norm < float("inf"):
        raise ArgumentError(
            "--norm is not the norm of weights",
            received=f"{norm:g}",
            expected="a positive number",
            remedy="leave it out for the norm of the start",
        )
    return norm * x / x.norm(dim=-1, keepdim=True)


def at_batch_size(problem: Problem, batch_size: int | None) -> Problem:
    """The problem with the noise of another batch size; that of (18) counts as one sample's.

    Raises:
        ArgumentError, NoiseError: If its noise has no batches, or not of this size.
    """
    if batch_size is None:
        return problem
    noise = problem.noise
    if isinstance(noise, SamplingNoise):
        return problem.with_noise(SamplingNoise(batch_size, replacement=noise.replacement))
    if isinstance(noise, LabelNoise):
        return problem.with_noise(LabelNoise(noise.scale, batch_size))
    if isinstance(noise, SphericalNoise):
        return problem.with_noise(SphericalNoise(noise.scale / batch_size**0.5))
    raise ArgumentError(
        "the noise of the problem has no batch size",
        received=f"--batch-size {batch_size} with {noise!r}",
        expected="SamplingNoise, LabelNoise or SphericalNoise",
        remedy="divide the factor of the noise by the root of the batch size, in the file",
    )


def _options(settings: Settings, problem: Problem, y0: Tensor, diffuses: bool) -> dict[str, Any]:
    """How the law is simulated."""
    paths = settings.paths
    if y0.dim() == 1:
        # A flow without noise along the manifold is the same for all paths.
        paths = (paths or PATHS) if diffuses else None
    n = paths or len(y0.reshape(-1, problem.dim))
    workers = settings.workers
    return {
        "n_paths": paths,
        "dt": settings.dt,
        "rtol": settings.rtol,
        "seed": settings.seed,
        "workers": workers,
        "chunk_size": CHUNK if workers is None else min(CHUNK, -(-n // workers)),
        "compile": True if _long(settings, problem, y0) and compiler_available() else "auto",
    }


def _long(settings: Settings, problem: Problem, y0: Tensor) -> bool:
    """Whether the clock asks for so many steps that compiling them is sooner done."""
    asked = settings.moments[-1]
    if settings.ratio is None:
        log_time = torch.tensor(float(TimeScale(*settings.rates).log_accumulated(asked)))
    else:
        log_time = log_time_at_zero_ratio(torch.tensor(float(asked)), settings.ratio)
    start = y0.reshape(-1, problem.dim)[:1]
    trace = problem.noise_trace(start / start.norm())
    clock = clock_at(log_time - 4.0 * start.norm().log(), trace)
    return bool((trace * clock > _LONG).all())


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
    """The moments of the figure: those of the settings, the start, and some between."""
    between = np.linspace(0.0, asked[-1], _DRAWN)
    if whole:
        return sorted({*asked, *(round(t) for t in between.tolist())})
    return np.unique(np.concatenate([asked, between])).tolist()


def _announce(
    problem: Problem, x0: Tensor, y0: Tensor, state: Degeneracy, console: Console
) -> None:
    console.print(Text(repr(problem)), soft_wrap=False)
    moved = way_to_manifold(x0.reshape(-1, problem.dim), y0.reshape(-1, problem.dim))
    if moved > 0.0:
        console.print(f"The start is {start_statement(moved)}.")
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
    target = Path(settings.target).name
    name = f"{problem.name} ({target})" if problem.name else target
    if settings.in_steps:
        return rf"{name}: $\eta={settings.lr:g}$, $\lambda={settings.weight_decay:g}$", "steps"
    label = "$T$" if settings.ratio == 0.5 else r"$t=\eta^2k$"
    return rf"{name}: $\lambda/\eta={settings.ratio:g}$", label

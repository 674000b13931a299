"""``python -m benchmarks.work_precision [--quick]``: weak error against time, in one picture.

Each scheme of this toolkit, and Euler-Maruyama in JAX, diffrax and torchsde, on section 6.1 and on
the circle of varying curvature. The bias of E cos(angle) at T = 1 has no sampling in it, except for
torchsde, which leaves the manifold: it is paired with our Euler on the same Brownian paths.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.diffusion_programs import (
    Ours,
    TorchSde,
    paired_difference,
    scheme_name,
    without_retraction,
)
from benchmarks.rows import installed, one_thread, seconds
from benchmarks.weak_errors import Setting, Step, bias, our_step
from manifold_sde import problems
from manifold_sde.compile import compiler_available

OUTPUT = Path("results/work_precision.png")
#: Amplitude of the circle of varying curvature.
AMPLITUDE = 0.5
#: Our schemes, whether in the clock u, and colours that colour-blind people can tell apart.
OURS = (
    ("weak2", True, "#D55E00"),
    ("midpoint", True, "#0072B2"),
    ("heun", True, "#009E73"),
    ("euler", True, "#CC79A7"),
    ("midpoint", False, "#0072B2"),
    ("heun", False, "#009E73"),
    ("euler", False, "#CC79A7"),
)
#: A mark for each scheme and peer; those in the time T are hollow.
MARKS = {"weak2": "o", "midpoint": "D", "heun": "^", "euler": "v"}
MARKS |= {"JAX": "s", "diffrax": "X", "torchsde": "P"}
PEERS = {"JAX": "#000000", "diffrax": "#7F7F7F", "torchsde": "#B8860B"}
#: The bias at which the targets are set.
_WANTED = 1e-3
#: Share of lost paths from which on a point is left out.
_LOST = 1e-3


@dataclass(frozen=True)
class Sizes:
    """How much is run: steps to T = 1, paths and steps that are timed, paths that are paired."""

    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    paths: int = 4096
    timed_steps: int = 16
    rule: tuple[int, int] = (12, 8)
    paired: int = 1024
    paired_steps: tuple[int, ...] = (32, 64, 128, 256)


QUICK = Sizes((1, 2), 4, 1, (3, 3), 8, (2,))


@dataclass(frozen=True)
class Curve:
    """What a scheme reaches.

    Attributes:
        name: The scheme, or the peer.
        microseconds: Time of a path to T = 1, (k,).
        error: Size of the bias, (k,).
        spread: Standard error of the bias (k,), 0 where nothing was sampled.
    """

    name: str
    microseconds: list[float]
    error: list[float]
    spread: list[float]


def settings(quick: bool) -> list[Setting]:
    """The problems of the two panels."""
    return [
        Setting("section 6.1, D = 10", problems.normalized_linear(), 3),
        Setting(
            "circle of varying curvature, D = 3",
            problems.varying_circle(AMPLITUDE),
            5 if quick else 33,
        ),
    ]


def curves(setting: Setting, sizes: Sizes, *, compiled: bool, jax_there: bool) -> list[Curve]:
    """All curves of a panel."""
    found = [_ours(setting, method, clock, sizes, compiled) for method, clock, _ in OURS]
    if jax_there:
        found += _jax(setting, sizes)
    found.append(_torchsde(setting, sizes, compiled))
    return found


def _curve(
    setting: Setting, name: str, step: Step, cost: float, sizes: Sizes, *, clock: bool, flows: int
) -> Curve:
    """Errors by quadrature, at a cost in microseconds for each step of a path."""
    curve = Curve(name, [], [], [])
    for steps in sizes.steps:
        rule = sizes.rule[flows - 1]
        found = bias(setting, step, steps, clock=clock, flows=flows, rule=rule)
        if np.isfinite(found.value) and abs(found.lost) <= _LOST:
            _add(curve, steps * cost, abs(found.value), 0.0)
    return curve


def _add(curve: Curve, microseconds: float, error: float, spread: float) -> None:
    curve.microseconds.append(microseconds)
    curve.error.append(error)
    curve.spread.append(spread)


def _cost(run: Callable[[], object], sizes: Sizes, steps: int) -> float:
    return 1e6 * seconds(run, 1 if sizes is QUICK else 3) / (sizes.paths * steps)


def _ours(setting: Setting, method: str, clock: bool, sizes: Sizes, compiled: bool) -> Curve:
    start = setting.problem.minimizer
    step = our_step(setting.problem, start, method, clock=clock, compiled=compiled)
    program = Ours(
        setting,
        method,
        max(64, sizes.timed_steps),
        sizes.paths,
        clock=clock,
        compiled=compiled,
        timed_steps=sizes.timed_steps,
    )
    cost = _cost(partial(program.run, 0), sizes, sizes.timed_steps)
    flows = 2 if method == "weak2" else 1
    name = scheme_name(method, clock)
    return _curve(setting, name, step, cost, sizes, clock=clock, flows=flows)


def _jax(setting: Setting, sizes: Sizes) -> list[Curve]:
    from benchmarks import jax_diffusion, jax_equation

    problem = setting.problem
    if isinstance(problem, problems.NormalizedLinear):
        loss = jax_equation.normalized_linear(problem.inputs, problem.targets)
    else:
        loss = jax_equation.varying_circle(AMPLITUDE)
    arguments: tuple[Any, ...] = (
        loss,
        problem.rank,
        setting.scale,
        problem.minimizer,
        sizes.paths,
        sizes.timed_steps,
        sizes.timed_steps / 64.0,
    )
    found = []
    for program in (jax_diffusion.EulerMaruyama(*arguments), jax_diffusion.Diffrax(*arguments)):
        cost = _cost(partial(program.run, 0), sizes, sizes.timed_steps)

        def step(x: Any, dw: Any, extra: Any, h: float, program: Any = program) -> Any:
            return program.step(x.T, dw.T, h).T

        found.append(_curve(setting, program.name, step, cost, sizes, clock=False, flows=1))
    return found


def _torchsde(setting: Setting, sizes: Sizes, compiled: bool) -> Curve:
    problem, start = setting.problem, setting.problem.minimizer
    ours = our_step(problem, start, "euler", clock=False, compiled=compiled)
    free = without_retraction(problem, compiled=compiled)
    short = min(2, sizes.timed_steps)
    program = TorchSde(setting, 64, sizes.paths, timed_steps=short)
    cost = _cost(partial(program.run, 0), sizes, short)
    curve = Curve("torchsde", [], [], [])
    for steps in sizes.paired_steps:
        known = bias(setting, ours, steps, clock=False, flows=1, rule=sizes.rule[0]).value
        mean, error = paired_difference(setting, free, ours, steps, sizes.paired)
        _add(curve, steps * cost, abs(known + mean), error)
    return curve


# The picture.


def plot_curves(setting: Setting, found: list[Curve], ax: Axes) -> Axes:
    """Weak error against time of a path, both logarithmic.

    Args:
        setting: The problem.
        found: The curves.
        ax: Axes to draw into.
    """
    colours = {scheme_name(method, clock): colour for method, clock, colour in OURS} | PEERS
    for curve in found:
        peer, in_clock = curve.name in PEERS, curve.name.endswith(" in u")
        ax.errorbar(
            curve.microseconds,
            curve.error,
            yerr=curve.spread if any(curve.spread) else None,
            label=curve.name,
            color=colours[curve.name],
            linestyle="--" if peer else "-" if in_clock else ":",
            marker=MARKS[curve.name.removesuffix(" in u")],
            markerfacecolor=None if peer or in_clock else "white",
            markersize=6.0,
            linewidth=1.4,
            capsize=2,
        )
    ax.axhline(_WANTED, color="#AAAAAA", linewidth=0.8, zorder=0)
    ax.set(xscale="log", yscale="log", title=setting.name)
    ax.set_xlabel("processor time of a path to T = 1 (µs)")
    ax.grid(True, which="major", alpha=0.25)
    return ax


def draw(panels: list[tuple[Setting, list[Curve]]], output: Path) -> None:
    """Write the picture, and its numbers beside it."""
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 5.2), layout="constrained")
    for (setting, found), ax in zip(panels, axes, strict=True):
        plot_curves(setting, found, ax)
    axes[0].set_ylabel("bias of E cos(angle) at T = 1")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    plt.close(figure)
    numbers = {s.name: [dataclasses.asdict(c) for c in found] for s, found in panels}
    output.with_suffix(".json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")


def draw_all(quick: bool) -> Path:
    """Run everything and draw it; where it was written."""
    sizes = QUICK if quick else Sizes()
    compiled = compiler_available() and not quick
    jax_there = installed("jax") and installed("diffrax")
    output = OUTPUT.with_stem("work_precision_quick") if quick else OUTPUT
    with one_thread():
        panels = [
            (setting, curves(setting, sizes, compiled=compiled, jax_there=jax_there))
            for setting in settings(quick)
        ]
    draw(panels, output)
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.work_precision", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: figures mean nothing")
    print(draw_all(parser.parse_args().quick))

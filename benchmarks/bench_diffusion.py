"""The limiting diffusion (13) on the model of section 6.1, against JAX, diffrax and torchsde.

No program uses a closed form of Phi. Before anything is timed, one step with the same increment has
to be the same where the schemes are the same, and runs must have the same law. Work is compared at
equal weak error: the steps to T = 1 that bring the bias of E cos(angle) down to 1e-3, as
:mod:`benchmarks.weak_errors` finds it. :mod:`benchmarks.work_precision` draws the whole picture.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory_use
from benchmarks.bench_sgd import LARGEST_Z, max_z
from benchmarks.diffusion_programs import (
    Ours,
    Program,
    TorchSde,
    paired_difference,
    scheme_name,
    without_retraction,
)
from benchmarks.rows import Row, in_turns, installed, one_thread, seconds
from benchmarks.weak_errors import Setting, Step, bias, fewest_steps, our_step
from manifold_sde import DirectionDiffusion, LimitingDiffusion, Problem, TimeScale, problems
from manifold_sde.compile import compiler_available
from manifold_sde.solvers import DirectionSolution, run_sgd, solve

TITLE = "The diffusion (13) on section 6.1, D = 10, float64: a path"
PEERS = ("jax", "diffrax")
AS_FAST_AS_JAX, FIFTH, HUNDREDTH, THOUSANDTH, FLAT = 1.0, 0.2, 0.01, 0.001, 1.05
LR, WEIGHT_DECAY = 1e-4, 0.05
#: Standard deviation of cos(angle) at T = 1 on section 6.1, from below.
SPREAD = 0.3
#: Share of lost paths from which on a step is too large, whatever its bias.
LOST = 1e-3
#: Steps of one unit of T where the cost of a step is compared.
PER_UNIT = 64
#: Schemes that may reach the bias asked for: name, and whether in the clock u.
CANDIDATES = (
    ("weak2", True),
    ("midpoint", True),
    ("euler", True),
    ("midpoint", False),
    ("heun", False),
    ("euler", False),
)


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        paths: Numbers of paths of the rows of one step; the first is that of all other rows.
        steps: Steps that are timed.
        rounds: Rounds of timing.
        bias: The bias that is reached.
        candidates: Of our schemes.
        rule: Nodes for each normal of a rule, of schemes with one flow and with two.
        paired: Paths and steps of the comparison with a scheme that leaves the manifold.
        sgd_steps: Steps of SGD that are timed.
        memory: Paths, steps (a whole block of them, which is held at once), and the factor by
            which the steps grow.
    """

    paths: tuple[int, ...] = (4096, 256)
    steps: int = 16
    rounds: int = 7
    bias: float = 1e-3
    candidates: tuple[tuple[str, bool], ...] = CANDIDATES
    rule: tuple[int, int] = (12, 8)
    paired: tuple[int, int] = (2048, 512)
    sgd_steps: int = 200
    memory: tuple[int, int, int] = (1_000_000, 16, 8)


QUICK = Sizes((6,), 1, 1, 0.02, (("midpoint", True),), (3, 3), (8, 2), 5, (4, 1, 2))


@functools.cache
def setting() -> Setting:
    """Section 6.1, whose circle looks the same from each angle."""
    return Setting("section 6.1", problems.normalized_linear(), 3)


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: Few paths and steps, nothing compiled by torch: it shows that everything runs.
    """
    sizes = QUICK if quick else Sizes()
    compiled = compiler_available() and not quick
    jax_there = installed("jax") and installed("diffrax")
    with one_thread():
        found = check_and_time_steps(sizes, compiled, jax_there)
        found += at_equal_error(sizes, compiled, jax_there)
        found += against_sgd(sizes, compiled)
        found.append(memory(sizes))
        if not quick:
            from benchmarks import work_precision

            work_precision.draw_all(quick=False)
    return found


# Validity.


def points_and_increments(n: int, h: float) -> tuple[Tensor, Tensor]:
    """Points of the manifold of norms around 1, and increments over a step h: (n, D) each."""
    problem = setting().problem
    generator = torch.Generator().manual_seed(1)
    x, dw = torch.randn(2, n, problem.dim, dtype=torch.float64, generator=generator)
    norms = 0.8 + 0.4 * torch.rand(n, 1, dtype=torch.float64, generator=generator)
    assert problem.facts is not None
    assert problem.facts.limit_map is not None
    return problem.facts.limit_map(norms * x / x.norm(dim=1, keepdim=True)), math.sqrt(h) * dw


def check_moves(step: Callable[[Tensor, Tensor, float], Tensor], n: int = 64) -> None:
    """Check that a step without retraction is Euler's for (13).

    Args:
        step: Function of points (n, D), increments (n, D) and the step.
        n: Number of points.

    Raises:
        AssertionError: If it differs by more than rounding from torchsde's on our coefficients.
    """
    h = 0.01
    x, dw = points_and_increments(n, h)
    sde, t = LimitingDiffusion(setting().problem), torch.zeros(())
    expected = x + h * sde.f(t, x) + sde.g_prod(t, x, dw)
    torch.testing.assert_close(step(x, dw, h), expected, rtol=0.0, atol=1e-10)


def check_landings(step: Callable[[Tensor, Tensor, float], Tensor], n: int = 64) -> None:
    """Check that a step lands on the manifold where our Euler does, up to a higher order.

    Two retractions differ by the square of the distance from the manifold, which is O(h).

    Args:
        step: Function of points (n, D), increments (n, D) and the step.
        n: Number of points.

    Raises:
        AssertionError: If it does not.
    """
    problem, apart = setting().problem, []
    ours = our_step(problem, problem.minimizer, "euler", clock=False, compiled=False)
    for h in (1e-3, 1e-5):
        x, dw = points_and_increments(n, h)
        expected = ours(x.T.contiguous(), dw.T.contiguous(), dw, h).T
        found = step(x, dw, h)
        left = float(problem.gradient(found).norm(dim=1).max())
        if not left <= 1e-9:
            raise AssertionError(f"a step ends off the manifold, where the gradient is {left:.2g}")
        apart.append(float((found - expected).abs().max()))
    if not apart[1] <= 0.02 * apart[0] + 1e-12:
        raise AssertionError(
            f"the steps differ by {apart[0]:.2g}, a hundredth of it {apart[1]:.2g}"
        )


def check_law(ours: Program, peer: Program) -> None:
    """Check that two programs have the same law at their end.

    Raises:
        AssertionError: If the mean or the variance of the norm or of a coordinate in the plane of
            the circle differs by more than ``LARGEST_Z`` standard errors.
    """
    a, b = (features(program.end(seed)) for program, seed in ((ours, 1), (peer, 2)))
    z = max_z(a, b)
    if not z <= LARGEST_Z:
        raise AssertionError(f"the runs of {peer.name} have another law: {z:.3g} standard errors")


def features(x: Tensor) -> Tensor:
    """Norm and coordinates in the plane, and the squares of their deviations: (n, 6)."""
    plane = setting().circle.plane_coordinates(x)
    values = torch.cat([x.norm(dim=1, keepdim=True), plane], dim=1)
    return torch.cat([values, (values - values.mean(0)).square()], dim=1)


# One step.


def check_and_time_steps(sizes: Sizes, compiled: bool, jax_there: bool) -> list[Row]:
    """Euler's step of all paths: ours against the peers', which are checked first."""
    here, found = setting(), []
    n, steps = sizes.paths[0], sizes.steps
    own = without_retraction(here.problem, compiled=compiled)
    check_moves(lambda x, dw, h: own(x.T.contiguous(), dw.T.contiguous(), dw, h).T)
    if jax_there:
        for peer in jax_peers(n, steps):
            check_landings(peer.step)
        check_moves(diffrax_unprojected(n, steps).step)
    for paths in sizes.paths:
        for form, problem in (("", None), (", plain", here.plain())):
            if not jax_there:
                break
            peer = jax_peers(paths, steps)[0]
            ours = euler(paths, steps, compiled, problem)
            if paths == n:
                check_law(ours, peer)
            timing = in_turns(partial(ours.run, 0), partial(peer.run, 0), sizes.rounds)
            note = f"{steps} steps a run; JAX {peer.form}"
            name = f"step, {paths} paths{form}"
            target = AS_FAST_AS_JAX
            found.append(timing.row(name, "JAX", per=steps * paths, target=target, note=note))
    ours = euler(n, steps, compiled, None)
    if jax_there:
        peer = jax_peers(n, steps)[1]
        check_law(ours, peer)
        timing = in_turns(partial(ours.run, 0), partial(peer.run, 0), max(1, sizes.rounds // 3))
        note = f"its {peer.form}; the retraction is that of the scan by hand"
        found.append(timing.row(f"step, {n} paths", "diffrax", per=steps * n, note=note))
    for own_paths in (True, False):
        short = max(1, steps // 4)
        sde = TorchSde(here, PER_UNIT, n, ours=own_paths, timed_steps=short)
        timing = in_turns(partial(ours.run, 0), partial(sde.run, 0), 1)
        note = f"{short} steps a run, uncompiled and without retraction; {sde.form}"
        row = timing.with_peer_times(steps / short).row(
            f"step, {n} paths", "torchsde", per=steps * n, note=note
        )
        found.append(row)
    return found


def euler(n_paths: int, steps: int, compiled: bool, problem: Problem | None) -> Ours:
    """Our Euler at the step 1/64, so far as the steps go."""
    return Ours(
        setting(),
        "euler",
        PER_UNIT,
        n_paths,
        clock=False,
        compiled=compiled,
        problem=problem,
        timed_steps=steps,
    )


def jax_arguments(n_paths: int, steps: int) -> tuple[Any, ...]:
    """What the programs in JAX are made of, for such steps."""
    from benchmarks import jax_equation

    here = setting()
    inputs, targets = here.problem.inputs, here.problem.targets  # type: ignore[attr-defined]
    loss = jax_equation.normalized_linear(inputs, targets)
    start = here.problem.minimizer
    return loss, here.problem.rank, here.scale, start, n_paths, steps, steps / PER_UNIT


@functools.cache
def jax_peers(n_paths: int, steps: int) -> tuple[Any, Any]:
    """The scan by hand, and diffrax with the faster of its Brownian paths."""
    from benchmarks import jax_diffusion

    arguments = jax_arguments(n_paths, steps)
    by_hand = jax_diffusion.EulerMaruyama(*arguments)
    sources = [
        jax_diffusion.Diffrax(*arguments, source=source, contraction=by_hand.form)
        for source in ("UnsafeBrownianPath", "VirtualBrownianTree")
    ]
    return by_hand, min(sources, key=lambda peer: seconds(partial(peer.run, 0), 1))


def diffrax_unprojected(n_paths: int, steps: int) -> Any:
    """Euler as diffrax has it, without retraction."""
    from benchmarks import jax_diffusion

    return jax_diffusion.Diffrax(*jax_arguments(n_paths, steps), retracted=False)


# Equal weak error.


def steps_to(sizes: Sizes, step: Step, method: str, clock: bool) -> int:
    """Steps to T = 1 at which a scheme has the bias asked for, and loses next to no path."""
    flows = 2 if method == "weak2" else 1

    @functools.cache
    def found(steps: int) -> float:
        rule = sizes.rule[flows - 1]
        there = bias(setting(), step, steps, clock=clock, flows=flows, rule=rule)
        return there.value if abs(there.lost) <= LOST else math.nan

    return fewest_steps(found, sizes.bias)


def steps_of_ours(sizes: Sizes, problem: Problem, method: str, clock: bool, compiled: bool) -> int:
    """The same for one of ours."""
    start = setting().problem.minimizer
    step = our_step(problem, start, method, clock=clock, compiled=compiled)
    return steps_to(sizes, step, method, clock)


def at_equal_error(sizes: Sizes, compiled: bool, jax_there: bool) -> list[Row]:
    """Time to T = 1 at the bias asked for: our schemes against the peers."""
    here, n = setting(), sizes.paths[0]
    found: list[Row] = []
    programs: list[tuple[str, Ours]] = []
    for method, clock in sizes.candidates:
        steps = steps_of_ours(sizes, here.problem, method, clock, compiled)
        name = f"{scheme_name(method, clock)}, {steps} steps"
        programs.append((name, Ours(here, method, steps, n, clock=clock, compiled=compiled)))
        if method == "weak2" and clock:
            split = Ours(here, "split", steps, n, clock=False, compiled=compiled)
            programs.append((f"split, {steps} steps", split))
    best = min(programs, key=lambda entry: seconds(partial(entry[1].run, 0), 1))[1]
    method, clock = best.method, best.name.endswith(" in u") or best.method == "split"
    scheme = "weak2" if method == "split" else method
    plain = here.plain()
    plain_steps = steps_of_ours(sizes, plain, scheme, clock, compiled)
    again = Ours(here, method, plain_steps, n, clock=clock, compiled=compiled, problem=plain)
    programs.append((f"{best.name}, {plain_steps}, plain", again))
    if jax_there:
        peer = jax_peers(n, sizes.steps)[0]
        peer_steps = steps_to(sizes, jax_step(peer), "euler", False)
        for name, ours in programs:
            timing = in_turns(partial(ours.run, 0), partial(peer.run, 0), sizes.rounds // 2 + 1)
            timing = timing.with_peer_times(peer_steps / sizes.steps)
            note = f"JAX {peer_steps} steps, of which {sizes.steps} were timed"
            target = FIFTH if ours in (best, again) else None
            found.append(timing.row(name, "JAX", per=n, target=target, note=note))
    return found + against_torchsde(sizes, [p for p in programs if p[1] in (best, again)], compiled)


def jax_step(peer: Any) -> Step:
    """The step of a program in JAX, points last."""
    return lambda x, dw, extra, h: peer.step(x.T, dw.T, h).T


def against_torchsde(sizes: Sizes, programs: list[tuple[str, Ours]], compiled: bool) -> list[Row]:
    """Time to T = 1 of torchsde's Euler at a number of steps that does not bring it so far.

    What it does off the manifold is compared with our Euler on the same Brownian paths, whose bias
    is known.
    """
    here, n = setting(), sizes.paths[0]
    paired, steps = sizes.paired
    start = here.problem.minimizer
    ours = our_step(here.problem, start, "euler", clock=False, compiled=compiled)
    free = without_retraction(here.problem, compiled=compiled)
    known = bias(here, ours, steps, clock=False, flows=1, rule=sizes.rule[0]).value
    mean, error = paired_difference(here, free, ours, steps, paired)
    found = []
    for name, program in programs:
        short = max(1, sizes.steps // 4)
        peer = TorchSde(here, steps, n, timed_steps=min(short, steps))
        timing = in_turns(partial(program.run, 0), partial(peer.run, 0), 1)
        timing = timing.with_peer_times(steps / min(short, steps))
        note = f"its {steps} steps, of which {min(short, steps)} were timed, have the bias "
        note += f"{known + mean:.2g} ± {error:.1g}"
        found.append(timing.row(name, "torchsde", per=n, target=HUNDREDTH, note=note))
    return found


# The law of SGD.


def against_sgd(sizes: Sizes, compiled: bool) -> list[Row]:
    """The law of SGD at T = 1 against SGD, with as many paths and a bias below half their error.

    Once by ``at_steps``, which answers for any noise, and once by solving to the clock of that
    step, which is known where the noise has a constant trace.
    """
    here, n, method = setting(), sizes.paths[0], "weak2"
    scale = TimeScale(LR, WEIGHT_DECAY)
    wanted = int(scale.steps(1.0))
    clock = math.log1p(2.0 * here.trace * float(scale.accumulated(wanted))) / (2.0 * here.trace)
    allowed = replace(sizes, bias=0.5 * SPREAD / math.sqrt(n))
    steps = steps_of_ours(allowed, here.problem, method, True, compiled)
    sde = DirectionDiffusion(here.problem, "stratonovich")
    h = clock / steps

    def paths(times: list[float]) -> DirectionSolution:
        found = solve(
            sde, here.problem.minimizer, times, n_paths=n, method=method, dt=h, compile=compiled
        )
        assert isinstance(found, DirectionSolution)
        return found

    def by_at_steps() -> Tensor:
        # The last grid point before that moment is kept, and one after it.
        kept = [0.0, *([(steps - 1) * h] if steps > 1 else []), (steps + 1) * h]
        return paths(kept).at_steps(lr=LR, weight_decay=WEIGHT_DECAY, steps=wanted).ys[-1]

    def at_the_clock() -> Tensor:
        return paths([0.0, clock]).ys[-1]

    def sgd() -> object:
        x0 = here.problem.minimizer
        return run_sgd(
            here.problem, x0, LR, WEIGHT_DECAY, sizes.sgd_steps, n_paths=n, compile=compiled
        )

    rows_of_sgd = []
    for name, law in (("law of SGD, at its clock", at_the_clock), ("same, at_steps", by_at_steps)):
        cosine = here.cosine(law())
        error = float(cosine.std()) / math.sqrt(n)
        off = (float(cosine.mean()) - here.exact) / error
        if not abs(off) <= LARGEST_Z:
            raise AssertionError(f"E cos(angle) is off by {off:.3g} standard errors")
        timing = in_turns(law, sgd, max(1, sizes.rounds // 2))
        timing = timing.with_peer_times(wanted / sizes.sgd_steps)
        note = f"eta = {LR:g} at T = 1; {n} paths each, standard error {error:.2g}; SGD's {wanted} "
        note += f"steps, of which {sizes.sgd_steps} were timed; ours {method} in u, {steps} steps"
        target = THOUSANDTH
        row = timing.row(name, "run_sgd", unit="ms", per=n, target=target, note=note)
        rows_of_sgd.append(row)
    return rows_of_sgd


# Memory.


def memory(sizes: Sizes) -> Row:
    """Peak memory of a run that keeps observables, at eight times the steps."""
    n, steps, factor = sizes.memory
    ours, peer = (memory_use.measured(n, k) for k in (factor * steps, steps))
    note = f"euler on the great circle, {n} paths, {factor * steps} steps against {steps}; peak "
    note += "memory of the process, torch included"
    name = f"memory, {factor} times the steps"
    return Row(name, ours, peer, "itself", "MB", ours / peer, FLAT, note)

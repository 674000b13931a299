r"""How far SGD at a finite learning rate is from its limit: an estimate beside a prediction.

With the step on the sphere :math:`\varepsilon = \eta/\|x\|^2`, expectations of SGD and of the
limit differ by :math:`b_1 c + b_2 c^2 + O(c^3)`, where c multiplies :math:`\varepsilon` all along
the path (:mod:`manifold_sde.solvers.coarser_rates`). Runs of SGD with c above 1 are cheap, as they
have :math:`c^2` times fewer steps; the difference is measured there, and the polynomial through it
and through 0 at c = 0 gives it at c = 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.arguments import integer
from manifold_sde.errors import ArgumentError, LimitMapError, LostPathsWarning, ShapeError
from manifold_sde.geometry import Geometry
from manifold_sde.paper import implements
from manifold_sde.points import point_of
from manifold_sde.problem import Problem, require_problem
from manifold_sde.sdes import LimitingDiffusion
from manifold_sde.solvers.arguments import listed
from manifold_sde.solvers.coarser_rates import CoarserRates, coarser_rates, largest_merge
from manifold_sde.solvers.moments import Observable, moments_of
from manifold_sde.solvers.prediction import weights_of_limit
from manifold_sde.solvers.sgd import Rate, run_sgd
from manifold_sde.solvers.step_sizes import STABLE, StepSizes, Terrain
from manifold_sde.time_scale import TimeScale

#: What the coarser runs may have at most: steps times the largest eigenvalue of H.
_LIMIT = 0.3
#: Steps that the coarsest run has at least up to the first count.
_FEWEST = 16
#: Paths that look at the manifold beforehand.
_PILOTS = 32
#: Points whose limit map is computed together.
_AT_ONCE = 4096


@dataclass(frozen=True)
class FiniteLrError:
    r"""What a finite learning rate changes: E f under SGD, less E f under the limit.

    Attributes:
        steps: Step counts (K,).
        estimate: The estimate (K, ...).
        standard_error: Its standard error, from the number of paths alone (K, ...).
        curvature: The part of the estimate that is not proportional to the learning rate at fixed
            lambda / eta, its absolute value (K, ...): the size of what may be missing beyond the
            standard error. NaN where the run itself was measured, alone.
        coarseness: How many times as large the steps of the coarser runs were, (L, K).
        measured: Difference that each of them has from the limit (L, K, ...).
        measured_error: Standard error of these (L, K, ...).
        step_sizes: The steps of the run itself.
    """

    steps: Tensor
    estimate: Tensor
    standard_error: Tensor
    curvature: Tensor
    coarseness: Tensor
    measured: Tensor
    measured_error: Tensor
    step_sizes: StepSizes

    def covers(self, difference: Tensor, error: Tensor | float = 0.0, *, z: float = 4.0) -> Tensor:
        """Whether a difference that was measured agrees with the estimate.

        Args:
            difference: Difference (K, ...).
            error: Its standard error.
            z: Number of standard errors, of the difference between the two, that are allowed
                besides the curvature.

        Returns:
            Booleans (K, ...).
        """
        both = (self.standard_error.square() + torch.as_tensor(error).square()).sqrt()
        return (difference - self.estimate).abs() <= z * both + self.curvature.nan_to_num(nan=0.0)


@implements("Theorem 4.4")
def finite_lr_error(
    problem: Problem,
    x0: Tensor,
    lr: Rate,
    weight_decay: Rate,
    steps: int | Sequence[int] | Tensor,
    f: Observable,
    *,
    limit: tuple[Tensor, Tensor] | None = None,
    n_paths: int = 16384,
    merge: Sequence[int] | None = None,
    limit_map: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    compile: bool | str = "auto",
) -> FiniteLrError:
    r"""Estimate E f(Phi(x_k)) under SGD, less the expectation that the limit predicts.

    SGD is run with several steps in place of one, at rates that leave the limit as it is and
    make the bias larger, and the bias is extrapolated from there to the given rates. It costs a
    part of what SGD at these rates would.

    Args:
        problem: The problem.
        x0: Start of SGD, (D,).
        lr: Learning rate eta: a number, a sequence, a callable of the step or a torch scheduler.
        weight_decay: Weight decay lambda, likewise.
        steps: Step counts, increasing, positive.
        f: Function of weights (n, D) on Gamma, with a value for each, (n, ...).
        limit: Mean and standard error of f under the limit, (K, ...) each, if they are known:
            ``solution.at_steps(lr, weight_decay, steps).expectation(f)``. Otherwise (13) is
            solved.
        n_paths: Paths of SGD in each run, and of the diffusion; even.
        merge: Numbers of steps that become one, each in a run of its own: increasing, two of them
            or more; ``[1]`` measures the run itself. By default as many as keep the run stable
            with some margin, and a fourth of that.
        limit_map: Phi, (n, D) -> (n, D), where it is known in closed form; by default that of
            :class:`Geometry`.
        seed: Seed of SGD and, in a stream of its own, of the diffusion.
        compile: Whether kernels are compiled.

    Returns:
        The estimate, with its standard error and the size of what it may miss.

    Raises:
        ArgumentError: If an argument is out of range, or a coarser run leaves the manifold.
        TimeScaleError: If the rates cannot be used.
        NotOnManifoldError, RankError, NoiseError: If Phi(x0) is not on the manifold, or the noise
            vanishes there.

    Example:
        >>> import torch
        >>> from manifold_sde import TimeScale, problems
        >>> from manifold_sde.solvers import finite_lr_error
        >>> problem = problems.great_circle(noise_scale=0.3)
        >>> def first(y):
        ...     return y[:, 0] / y.norm(dim=1)
        >>> clock = TimeScale(0.01, 0.05).clock(400, 0.18, 1.0)
        >>> limit = torch.tensor([-0.045 * clock]).exp(), torch.zeros(1)
        >>> found = finite_lr_error(
        ...     problem, problem.minimizer, 0.01, 0.05, 400, first,
        ...     limit=limit, n_paths=64, merge=[4, 16],
        ... )
        >>> found.coarseness.round().tolist(), float(found.standard_error) < 0.02
        ([[2.0], [4.0]], True)

    Source: Theorem 4.4; Richardson's extrapolation.
    """
    scale = TimeScale(lr, weight_decay)
    counts = _check_counts(steps)
    size = integer(n_paths)
    if size is None or size < 2 or size % 2:
        raise ArgumentError(
            "n_paths is not a number of paths with a standard error",
            received=repr(n_paths),
            expected="an even number, 2 or more",
            remedy="leave it out: 16384",
        )
    phi = limit_map or Geometry(problem).limit_map
    x0 = point_of(require_problem(problem), x0, name="x0", values=True)
    if x0.dim() != 1:
        raise ShapeError(
            "the error is that of one start",
            received=f"x0 of shape {tuple(x0.shape)}",
            expected=f"({problem.dim},)",
            remedy="one call for each start",
        )
    y0 = phi(x0[None])[0]
    equation = LimitingDiffusion(problem)
    equation.require_on_manifold(y0)
    norm = float(y0.norm())
    terrain = Terrain.of(equation, y0[None] / norm)
    sizes = StepSizes.of(scale, int(counts[-1]), norm, terrain)
    pilot = largest_merge(sizes.stability, int(counts[0]), limit=_LIMIT, fewest=_FEWEST)
    coarser = coarser_rates(scale, counts, pilot)
    reached = _weights(problem, x0, coarser, pilot, phi, n_paths=_PILOTS, seed=seed)
    seen = torch.cat([y0[None], reached.reshape(-1, problem.dim)])
    seen = seen / seen.norm(dim=1, keepdim=True)
    terrain = Terrain.of(equation, seen)
    sizes = StepSizes.of(scale, int(counts[-1]), norm, terrain)
    merges = _check_merge(merge, sizes, counts)
    if limit is None:
        options: dict[str, Any] = {"n_paths": size, "seed": seed, "compile": compile}
        weights = weights_of_limit(equation, y0, scale, counts, antithetic=True, **options)
        limit = weights.expectation(f)
    mean, error = limit
    measured, errors, coarseness = [], [], []
    for number, m in enumerate(merges):
        coarser = coarser_rates(scale, counts, m)
        own = (seed + number) % 2**64
        x = _weights(problem, x0, coarser, m, phi, n_paths=size, seed=own, compile=compile)
        found, spread = moments_of("f", f, x).result()
        if mean.shape != found.shape or error.shape != found.shape:
            raise ShapeError(
                "the limit does not fit f and the steps",
                received=f"a mean {tuple(mean.shape)} and an error {tuple(error.shape)}",
                expected=f"{tuple(found.shape)} each: a value of f for each step count",
                remedy="solution.at_steps(lr, weight_decay, steps).expectation(f)",
            )
        measured.append(found - mean)
        errors.append(spread)
        coarseness.append(torch.from_numpy(coarser.coarseness))
    stacked, spreads = torch.stack(measured), torch.stack(errors)
    ratios = torch.stack(coarseness).to(stacked)
    shape = (len(merges), len(counts), *(1,) * (stacked.dim() - 2))
    total, curved = (w.reshape(shape) for w in _coefficients(ratios))
    variance = (total.square() * spreads.square()).sum(0) + (total.sum(0) * error).square()
    curvature = (curved * stacked).sum(0).abs()
    return FiniteLrError(
        steps=torch.from_numpy(counts),
        estimate=(total * stacked).sum(0),
        standard_error=variance.sqrt(),
        curvature=curvature if len(merges) > 1 else curvature * torch.nan,
        coarseness=ratios,
        measured=stacked,
        measured_error=(spreads.square() + error.square()).sqrt(),
        step_sizes=sizes,
    )


def _check_counts(steps: object) -> np.ndarray:
    """Positive increasing step counts (K,)."""
    counts = [integer(k) for k in listed("steps", steps)]
    whole = [k for k in counts if k is not None and k > 0]
    if not counts or len(whole) < len(counts) or sorted(set(whole)) != whole:
        raise ArgumentError(
            "steps are not step counts",
            received=repr(steps)[:80],
            expected="a positive integer, or increasing ones",
            remedy="steps=1000, or steps=[500, 1000]",
        )
    return np.array(whole, dtype=np.int64)


def _check_merge(merge: object, sizes: StepSizes, counts: np.ndarray) -> list[int]:
    """Numbers of steps that become one."""
    first = int(counts[0])
    if merge is None:
        coarsest = largest_merge(sizes.stability, first, limit=_LIMIT, fewest=_FEWEST)
        return [coarsest // 4, coarsest] if coarsest >= 8 else [1]
    found = [integer(m) for m in listed("numbers", merge)]
    merges = [m for m in found if m is not None and m >= 1]
    increasing = len(merges) == len(found) and sorted(set(merges)) == merges
    if not increasing or not (len(merges) > 1 or merges == [1]):
        raise ArgumentError(
            "merge is not the numbers of steps that become one",
            received=repr(merge)[:80],
            expected="two or more increasing positive integers, or [1]",
            remedy="merge=[4, 16], or leave it out",
        )
    if merges[-1] > first:
        raise ArgumentError(
            "there are too few steps for the coarser runs",
            received=f"{merges[-1]} steps in one, where {first} are asked for",
            expected="several steps of the coarser run up to the first count",
            remedy="a smaller merge, or later counts",
        )
    if math.sqrt(merges[-1]) * sizes.stability > STABLE:
        raise ArgumentError(
            "the coarser runs of SGD would be unstable",
            received=f"steps of {math.sqrt(merges[-1]) * sizes.stability:.3g} / lambda_max(H)",
            expected=f"less than {STABLE:g}, and below 0.3 for an estimate of use",
            remedy=f"merge up to {largest_merge(sizes.stability, first, limit=0.3, fewest=1)}",
        )
    return merges


def _weights(
    problem: Problem,
    x0: Tensor,
    coarser: CoarserRates,
    merge: int,
    phi: Callable[[Tensor], Tensor],
    **options: Any,
) -> Tensor:
    """Phi of the weights of a coarser run, (K, n, D)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LostPathsWarning)  # an error below
        run = run_sgd(
            problem,
            x0,
            coarser.lr.tolist(),
            coarser.weight_decay.tolist(),
            coarser.counts.tolist(),
            **options,
        )
    lost, paths = run.stats["non_finite_paths"], run.stats["paths"]
    try:
        if not lost:
            found = torch.stack([torch.cat([phi(x) for x in y.split(_AT_ONCE)]) for y in run.ys])
            lost = int((~torch.isfinite(found).all(-1)).any(0).sum())
            if not lost:
                return found
    except LimitMapError as failure:
        lost = paths if failure.failed is None else int(failure.failed.sum())
    raise ArgumentError(
        "a coarser run of SGD leaves the neighbourhood of the manifold",
        received=f"{lost} or more of {paths} paths without a limit, with {merge} steps in one",
        expected="paths from which gradient flow leads to the manifold",
        remedy=f"merge with fewer than {merge}; [1] measures the run itself",
    )


def _coefficients(ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the measured differences in the estimate, and in its quadratic part: (L, K).

    The polynomial b_1 c + b_2 c^2 is fitted by least squares, of b / c; of one run it is b_1 c.
    """
    if len(ratios) == 1:
        return 1.0 / ratios, torch.zeros_like(ratios)
    design = torch.stack([torch.ones_like(ratios.T), ratios.T], dim=-1)
    inverse = torch.linalg.pinv(design) / ratios.T[:, None]  # (K, 2, L)
    return inverse.sum(1).T.contiguous(), inverse[:, 1].T.contiguous()

"""SGD on the model of section 6.1 against an eager torch loop and hand-written JAX.

Every peer makes the same step (18), with noise of its own generator. Before it is timed, it has to
give the step of this toolkit when fed the same noise, and runs with the same law.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.func import grad, vmap

from benchmarks.rows import Row, in_turns, installed, one_thread
from manifold_sde import problems
from manifold_sde.compile import compiler_available
from manifold_sde.problems import NormalizedLinear
from manifold_sde.solvers import run_sgd
from manifold_sde.solvers.sgd_step import update

TITLE = "SGD with the noise (18), D = 10, float64: one step of all paths"
PEERS = ("jax",)
LR, WEIGHT_DECAY = 1e-2, 0.05
#: Paths, steps of a run, and rounds against the eager loop and against JAX.
SIZES = ((60, 1000, 5, 25), (4096, 50, 5, 25))
QUICK_SIZES = ((60, 20, 2, 2),)
FASTER_THAN_EAGER, AS_FAST_AS_JAX = 0.1, 1.15
#: Standard errors that means and variances may differ by: of the 22 comparisons of a peer one fails
#: by chance with probability 1e-6, and some 5e-6 at 60 paths.
LARGEST_Z = 5.5


class Peer(Protocol):
    """SGD by someone else, for a fixed number of paths and steps."""

    name: str

    def step(self, x: Tensor, normals: Tensor) -> Tensor:
        """One step with its noise given: (n, D) each -> (n, D)."""

    def run(self, seed: int) -> object:
        """All steps, until they are done."""

    def end(self, seed: int) -> Tensor:
        """Where a run ends, (n, D)."""


class EagerTorch:
    """The loop that one would write down: ``vmap(grad)`` and ``torch.randn``.

    Args:
        problem: The model, whose data and noise scale are used.
        lr: Learning rate.
        weight_decay: Weight decay.
        n_paths: Number of paths, which start at the minimiser.
        steps: Number of steps of a run.
    """

    name = "eager torch"

    def __init__(
        self, problem: NormalizedLinear, lr: float, weight_decay: float, n_paths: int, steps: int
    ) -> None:
        inputs, targets = problem.inputs, problem.targets

        def loss(x: Tensor) -> Tensor:
            return 0.5 * (inputs @ (x / x.norm()) - targets).square().mean()

        self._gradient = vmap(grad(loss))
        self._scale: float = problem.noise.scale  # type: ignore[attr-defined]
        self._rates = lr, weight_decay
        self._start = problem.minimizer.expand(n_paths, -1).contiguous()
        self._steps = steps

    def step(self, x: Tensor, normals: Tensor) -> Tensor:
        lr, weight_decay = self._rates
        norm = x.norm(dim=1, keepdim=True)
        u = x / norm
        noise = (self._scale / norm) * (normals - u * (u * normals).sum(1, keepdim=True))
        return (1.0 - lr * weight_decay) * x - lr * (self._gradient(x) + noise)

    def end(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = self._start
        for _ in range(self._steps):
            x = self.step(x, torch.randn(x.shape, dtype=x.dtype, generator=generator))
        return x

    run = end


def our_end(
    problem: NormalizedLinear, n_paths: int, steps: int, seed: int, compiled: bool
) -> Tensor:
    """Where our runs end, (n, D)."""
    solution = run_sgd(
        problem,
        problem.minimizer,
        LR,
        WEIGHT_DECAY,
        steps,
        n_paths=n_paths,
        seed=seed,
        compile=compiled,
    )
    return solution.ys[-1]


def check_peer(problem: NormalizedLinear, peer: Peer, ours: Tensor) -> None:
    """Check that a peer computes the same, step by step and in law.

    Args:
        problem: The problem.
        peer: The peer.
        ours: Where our runs of as many steps end, (n, D).

    Raises:
        AssertionError: If a step with the same noise differs by more than rounding, or the mean
            or the variance of the squared norm or of a coordinate at the end by more than
            ``LARGEST_Z`` standard errors.
    """
    generator = torch.Generator().manual_seed(1)
    x, normals = torch.randn(2, len(ours), problem.dim, dtype=torch.float64, generator=generator)
    lr, weight_decay = (torch.tensor(rate, dtype=x.dtype) for rate in (LR, WEIGHT_DECAY))
    clock, none = x.new_zeros(len(x)), x.new_zeros(0, len(x))
    expected, _ = update(problem, x.T, clock, lr, weight_decay, normals.T, none)
    torch.testing.assert_close(peer.step(x, normals), expected.T, rtol=1e-12, atol=1e-13)
    z = max_z(features(ours), features(peer.end(2)))
    if not z <= LARGEST_Z:
        raise AssertionError(f"the runs of {peer.name} have another law: {z:.3g} standard errors")


def features(x: Tensor) -> Tensor:
    """Squared norm and coordinates, and the squares of their deviations: (n, D) -> (n, 2 D + 2)."""
    values = torch.cat([x.square().sum(1, keepdim=True), x], dim=1)
    return torch.cat([values, (values - values.mean(0)).square()], dim=1)


def max_z(a: Tensor, b: Tensor) -> float:
    """Largest difference of the means of two samples, in standard errors; NaN if one is NaN."""
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    return float(((a.mean(0) - b.mean(0)).abs() / error).max())


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: Few steps, nothing compiled by torch: it shows that everything runs.
    """
    problem = problems.normalized_linear()
    compiled = compiler_available() and not quick
    found = []
    with one_thread():
        for n_paths, steps, eager_rounds, jax_rounds in QUICK_SIZES if quick else SIZES:
            arguments = (problem, LR, WEIGHT_DECAY, n_paths, steps)
            ours = our_end(problem, n_paths, steps, 0, compiled)
            target = FASTER_THAN_EAGER if n_paths == 60 else None
            peers: list[tuple[Peer, int, float | None]]
            peers = [(EagerTorch(*arguments), eager_rounds, target)]
            if installed("jax"):
                from benchmarks import jax_peers

                peers.append((jax_peers.Sgd(*arguments), jax_rounds, AS_FAST_AS_JAX))
            for peer, rounds, target in peers:
                check_peer(problem, peer, ours)
                timing = in_turns(
                    lambda n=n_paths, k=steps: our_end(problem, n, k, 0, compiled),  # type: ignore[misc]
                    lambda peer=peer: peer.run(0),  # type: ignore[misc]
                    rounds,
                )
                note = f"{steps} steps a run, {'' if compiled else 'not '}compiled"
                if form := getattr(peer, "form", ""):
                    note += f"; JAX {form}"
                name = f"{n_paths} paths"
                found.append(timing.row(name, peer.name, per=steps, target=target, note=note))
    return found

"""The direction diffusion with the noise of 1,000 samples: against steps of torch, and by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.network_problems import against, disputed_digits
from benchmarks.rows import Row, in_turns, one_thread
from manifold_sde import DirectionDiffusion, Geometry, Problem
from manifold_sde.solvers.schemes import SCHEMES, StepNoise

TITLE = "Sampling noise of a digits network, float64, one thread: one path"
PEERS: tuple[str, ...] = ()
#: Samples, width of the hidden layer, and rounds; the steps a second that are aimed at.
FULL, QUICK = (1001, 145, 7), (25, 4, 1)
STEPS_A_SECOND = 5.0
#: A step of the clock, times tr Sigma.
STEP = 2.0**-10


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: A small network: it shows that everything runs.
    """
    samples, width, rounds = QUICK if quick else FULL
    with one_thread(), torch.no_grad():
        found = []
        for columns in (1, 4, None):
            problem, y, module, data = disputed_digits(samples, width)
            where = f"{problem.dim} weights, {samples} samples; the peer is a step over all samples"
            by = "exact" if columns is None else f"{columns} column{'s' * (columns > 1)}"
            name = f"step, rank {problem.rank}, {by}"
            timing = in_turns(step(problem, y, columns), full_batch(module, data), rounds)
            found.append(timing.row(name, "SGD", unit="ms", note=where))
            if columns == 1:
                limit = 1.0 / STEPS_A_SECOND
                said = f"{1.0 / timing.ours:.2g} steps a second; the limit is {STEPS_A_SECOND:g}"
                numbers = 1e3 * timing.ours, 1e3 * limit
                row = Row(name, *numbers, "limit", "ms", timing.ours / limit, 1.0, said)
                found.append(row)
        loss = problem.pointwise
        check(problem.noise.trace(loss, y), by_hand(problem, module, data, y)())
        timing = in_turns(
            lambda: problem.noise.trace(loss, y), by_hand(problem, module, data, y), rounds
        )
        found.append(timing.row("tr Sigma", "vmap(grad)", unit="ms", note="all gradients at once"))
    return found


def step(problem: Problem, y: Tensor, columns: int | None) -> Callable[[], object]:
    """A step of the walk as ``solve`` takes it, with the trace at its end."""
    geometry = Geometry(problem, "matrix_free", drift_columns=columns)
    sde = DirectionDiffusion(problem, geometry=geometry)
    sde.require_on_manifold(y)
    x = y[:, None].contiguous()
    basis = sde.reference_basis(x)
    h = STEP / problem.noise_trace(y)
    generator = torch.Generator().manual_seed(2)

    def normals(count: int) -> Tensor:
        return torch.randn(count, 1, dtype=torch.float64, generator=generator)

    def run() -> Tensor:
        noise = StepNoise(h.sqrt() * normals(sde.n_noise), normals)
        end = SCHEMES["walk"].step(sde, x, basis, h, noise)[0]
        if not bool(torch.isfinite(end).all()):
            raise AssertionError("the path was lost")
        return sde.noise_trace(end)

    return run


def full_batch(module: nn.Module, data: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """A step of ``torch.optim.SGD`` over all samples."""
    own, (inputs, targets) = copy.deepcopy(module), data
    optimizer = torch.optim.SGD(own.parameters(), lr=1e-9)

    def run() -> None:
        with torch.enable_grad():
            optimizer.zero_grad()
            against(own(inputs), targets).mean().backward()
            optimizer.step()

    return run


def by_hand(
    problem: Problem, module: nn.Module, data: tuple[Tensor, Tensor], y: Tensor
) -> Callable[[], Tensor]:
    """The trace of the covariance from the gradients of all samples, by ``torch.func``."""
    own = copy.deepcopy(module)
    problem.load_into(own, y)
    parameters = {name: value.detach() for name, value in own.named_parameters()}

    def loss(values: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = functional_call(own, values, (inputs[None],))
        return against(outputs, targets[None])[0]

    def run() -> Tensor:
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, *data)
        found = [(g - g.mean(0)).square().sum() for g in gradients.values()]
        return torch.stack(found).sum() / len(data[0])

    return run


def check(ours: Tensor, theirs: Tensor) -> None:
    """Check that both sides compute the same.

    Raises:
        AssertionError: If they do not.
    """
    if not torch.allclose(ours, theirs, rtol=1e-9):
        raise AssertionError(f"traces {float(ours)} and {float(theirs)}")

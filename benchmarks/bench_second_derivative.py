"""The Hessian and the second derivative of Phi: compiled against eager, and against JAX.

The points lie on the manifold of the model of section 6.1, and Sigma is that of its noise. The
calls of this toolkit also check what they are given (finite, symmetric, on the manifold, of one
rank), which the peer in JAX does not do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from benchmarks.rows import Row, in_turns, installed, one_thread, seconds
from manifold_sde import Geometry, problems
from manifold_sde.compile import compile_batched, compile_function, compiler_available
from manifold_sde.geometry.dense import DenseSpace
from manifold_sde.geometry.kernels import Kernels
from manifold_sde.problems import NormalizedLinear

TITLE = "Second derivative of Phi, model of section 6.1, D = 10, float64: a batch"
PEERS = ("jax",)
BATCH, QUICK_BATCH = 4096, 5
#: Points that one call of a compiled kernel takes.
CHUNK = 256
FASTER_THAN_EAGER, HALF_THE_TIME = 0.05, 0.5


def setting(batch: int) -> tuple[NormalizedLinear, Tensor, Tensor]:
    """The problem, points of norm 1 of its manifold (n, D), and Sigma there (n, D, D)."""
    problem = problems.normalized_linear()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, problem.dim, dtype=torch.float64, generator=generator)
    assert problem.facts.limit_map is not None
    y = problem.facts.limit_map(x / x.norm(dim=1, keepdim=True))
    return problem, y, problem.noise_covariance(y)


def check_same(found: Tensor, expected: Tensor) -> None:
    """Check that two computations give the same.

    Raises:
        AssertionError: If they differ by more than 1e-9 of the largest number.
    """
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-9 * float(expected.abs().max()))


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: Few points, nothing compiled by torch: it shows that everything runs.
    """
    problem, y, sigma = setting(QUICK_BATCH if quick else BATCH)
    compiled = compiler_available() and not quick
    with one_thread():
        found = [
            _hessian(problem, y, compiled, 2 if quick else 15),
            _second_derivative(problem, y, sigma, compiled, 2 if quick else 5),
        ]
        if compiled:
            found += _layouts(problem, y[:CHUNK], sigma[:CHUNK])
        if installed("jax"):
            found.append(_against_jax(problem, y, sigma, compiled, 2 if quick else 21))
    return found


def _hessian(problem: NormalizedLinear, y: Tensor, compiled: bool, rounds: int) -> Row:
    ours, eager = Kernels(problem, compiled), Kernels(problem, False)
    check_same(ours.hessian(y), eager.hessian(y))
    timing = in_turns(lambda: ours.hessian(y), lambda: eager.hessian(y), rounds)
    note = f"batch {len(y)}"
    return timing.row("Hessian", "eager torch", unit="ms", target=FASTER_THAN_EAGER, note=note)


def _second_derivative(
    problem: NormalizedLinear, y: Tensor, sigma: Tensor, compiled: bool, rounds: int
) -> Row:
    ours = Geometry(problem, method="dense", compile=compiled)
    eager = Geometry(problem, method="dense", compile=False)
    check_same(ours.second_derivative(y, sigma), eager.second_derivative(y, sigma))
    timing = in_turns(
        lambda: ours.second_derivative(y, sigma), lambda: eager.second_derivative(y, sigma), rounds
    )
    matrices = problem.hessian(y)
    eigh = seconds(lambda: torch.linalg.eigh(matrices), 5 * rounds)
    note = (
        f"batch {len(y)}; torch.linalg.eigh alone takes {1e3 * eigh:.1f} ms, "
        f"{eigh / timing.ours:.0%} of ours and {eigh / timing.peer:.1%} of the peer's"
    )
    return timing.row("∂²Φ[Σ]", "eager torch", unit="ms", target=FASTER_THAN_EAGER, note=note)


def _layouts(problem: NormalizedLinear, y: Tensor, sigma: Tensor) -> list[Row]:
    """The kernel of the contraction, compiled with the points last and by plain ``vmap``."""
    rank = problem.facts.rank
    values, basis = torch.linalg.eigh(problem.hessian(y))

    space = DenseSpace(problem, rank)

    def contract(point: Tensor, values: Tensor, basis: Tensor, sigma: Tensor) -> Tensor:
        kernel, q, curvatures = basis[:, :-rank], basis[:, -rank:], values[-rank:]
        along, across = space.contract_at(
            point, kernel, curvatures, q, sigma, mixed=2.0, normal=1.0, tangent=True
        )
        return -(q @ ((q.T @ along) / curvatures) + kernel @ (kernel.T @ across))

    first = tuple(a.contiguous() for a in (y, values, basis, sigma))
    last = tuple(a.movedim(0, -1).contiguous() for a in first)
    ours = compile_batched(contract, last)
    peers: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
        "vmap, last": (vmap(contract, in_dims=-1, out_dims=-1), last, -1),
        "vmap, first": (vmap(contract), first, 0),
    }
    found = []
    for name, (mapped, arguments, axis) in peers.items():
        peer = compile_function(mapped, arguments)
        check_same(ours(*last).movedim(-1, 0), peer(*arguments).movedim(axis, 0))
        timing = in_turns(
            lambda: ours(*last),
            lambda peer=peer, arguments=arguments: peer(*arguments),  # type: ignore[misc]
            101,
        )
        note = (
            f"the contraction without eigh, compiled for {len(y)} points; the peer is vmap of the "
            f"same function with the points {name.split()[-1]}"
        )
        found.append(timing.row("∂²Φ[Σ], points last", name, target=HALF_THE_TIME, note=note))
    return found


def _against_jax(
    problem: NormalizedLinear, y: Tensor, sigma: Tensor, compiled: bool, rounds: int
) -> Row:
    from benchmarks import jax_peers

    ours = Geometry(problem, method="dense", compile=compiled)
    peer = jax_peers.SecondDerivative(problem, y, sigma)
    check_same(jax_peers.to_torch(peer.run()), ours.second_derivative(y, sigma))
    timing = in_turns(lambda: ours.second_derivative(y, sigma), peer.run, rounds)
    note = f"batch {len(y)}; JAX by {peer.form}, with jnp.linalg.eigh"
    return timing.row("∂²Φ[Σ]", peer.name, unit="ms", note=note)

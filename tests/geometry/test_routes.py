"""The symbolic and the compiled route against the dense eager one."""

import pytest
import sympy
import torch
from torch import Tensor
from torch.func import jacrev, jvp, vmap

from manifold_sde import Geometry, Problem, SphericalNoise, problems
from manifold_sde.errors import LimitMapError, NotOnManifoldError

A, B, C = sympy.symbols("a b c", real=True)
LENGTH = sympy.sqrt(A**2 + B**2 + C**2)


def crossing() -> Problem:
    """L = (a b)^2 / 2 |x|^4: a^2 - b^2 is kept along the flow; where |a| > |b| it ends at b = 0."""
    end = sympy.sqrt(A**2 - B**2 + C**2)
    phi = [LENGTH * A * sympy.sqrt(1 - B**2 / A**2) / end, 0, LENGTH * C / end]
    loss = (A * B) ** 2 / LENGTH**4 / 2
    return Problem.from_sympy(loss, (A, B, C), SphericalNoise(0.3), limit_map=phi, rank=1)


START = torch.tensor([[1.0, 0.5, 0.3], [-1.2, 0.3, 0.8], [2.0, 0.1, -0.4]], dtype=torch.float64)


@pytest.mark.paper("Definition 2.6", "Lemma 2.8")
def test_symbolic_route_agrees_with_the_dense_one() -> None:
    problem = crossing()
    symbolic, dense = Geometry(problem), Geometry(problem, method="dense")
    assert "symbolic" in repr(symbolic)
    y = symbolic.limit_map(START)
    torch.testing.assert_close(dense.limit_map(START), y, rtol=1e-9, atol=1e-9)
    # Off Gamma: the derivative of the closed form against that of the numerical flow.
    exact, numerical = vmap(jacrev(symbolic.limit_map))(START), vmap(jacrev(dense.limit_map))(START)
    torch.testing.assert_close(numerical, exact, rtol=1e-8, atol=1e-8)
    v = START.flip(0)
    torch.testing.assert_close(
        symbolic.tangent_projection(y, v), dense.tangent_projection(y, v), rtol=1e-9, atol=1e-9
    )
    factor = torch.stack([START, v], -1)
    torch.testing.assert_close(
        symbolic.second_derivative(y, factor=factor),
        dense.second_derivative(y, factor=factor),
        rtol=1e-8,
        atol=1e-8,
    )
    assert symbolic.rank(y).tolist() == [1, 1, 1]
    torch.testing.assert_close(symbolic.retract(y), y)


def test_symbolic_route_refuses_what_it_cannot_do() -> None:
    geometry = Geometry(crossing())
    x = torch.stack([START[0], torch.tensor([0.3, 1.0, 0.2], dtype=torch.float64)])
    with pytest.raises(LimitMapError, match=r"1 of 2 points, the first at x = .0.3, 1.0") as caught:
        geometry.limit_map(x)
    assert caught.value.failed.tolist() == [False, True]
    torch.testing.assert_close(caught.value.partial[0], geometry.limit_map(START[0]))
    with pytest.raises(NotOnManifoldError):
        geometry.tangent_projection(START, START)
    with pytest.raises(NotOnManifoldError):
        geometry.second_derivative(START)


@pytest.mark.compile
@pytest.mark.slow
def test_compiled_route_agrees_with_the_eager_one() -> None:
    problem = problems.varying_circle(0.5)
    eager, compiled = Geometry(problem), Geometry(problem, compile=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, dtype=torch.float64, generator=generator)
    x[:, 2] *= 0.3
    v = torch.randn(50, 3, dtype=torch.float64, generator=generator)

    def compare(f, g, *arguments: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        found, expected = f(*arguments), g(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        return found

    y = compare(compiled.limit_map, eager.limit_map, x)
    compare(
        lambda a, b: jvp(compiled.limit_map, (a,), (b,))[1],
        lambda a, b: jvp(eager.limit_map, (a,), (b,))[1],
        x[:20],
        v[:20],
    )
    compare(compiled.second_derivative, eager.second_derivative, y)
    compare(compiled.second_derivative, eager.second_derivative, y[:40])
    compare(compiled.tangent_projection, eager.tangent_projection, y, v)
    compare(compiled.retract, eager.retract, y + 1e-3 * v)
    assert problem.kernels

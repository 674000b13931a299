"""Functions that are other ones in batches, or constants in a branch that no test point is in.

The truth is the same function written so that torch has nothing to get wrong.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from manifold_sde import CustomNoise, Problem, SphericalNoise, errors, loss_checks, loss_trials
from manifold_sde.compile import compile_points
from manifold_sde.loss import Loss
from manifold_sde.noise import custom
from manifold_sde.torch_norms import elementary
from tests.operations import normal

DIM = 4
SLOPES = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum().sqrt()


def plain(x: Tensor) -> Tensor:
    return 0.5 * unit(x)[2:].square().sum()


def made(loss: Callable[[Tensor], Tensor], dim: int = DIM) -> Problem:
    return Problem(loss, dim, SphericalNoise(0.3))


def in_a_branch(cut: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where(unit(x)[0] > 0.97, cut(x), plain(x))


@torch.no_grad()
def without_graph(x: Tensor) -> Tensor:
    return plain(x)


CUT = {
    "detach": in_a_branch(lambda x: plain(x).detach()),
    "torch.detach": in_a_branch(lambda x: torch.detach(plain(x))),
    "no_grad": in_a_branch(without_graph),
    "second derivative": in_a_branch(
        lambda x: plain(x) + (unit(x)[2] - unit(x)[2].detach()).square()
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_a_derivative_that_is_cut_in_a_branch_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test point is there: without the look at many points the problem is made, the twin."""
    with pytest.raises(errors.DifferentiationError, match="not everywhere") as caught:
        made(CUT[name])
    assert "detach" in caught.value.remedy
    monkeypatch.setattr(loss_checks, "require_uncut", lambda *_: None)
    x = torch.tensor([10.0, 0.5, 0.3, -0.2], dtype=torch.float64)
    got, want = (made(loss).hessian(x) for loss in (CUT[name], plain))
    assert float((got - want).norm() / want.norm()) > 0.1


def test_what_is_cut_in_vain_is_taken() -> None:
    def stabilised(x: Tensor) -> Tensor:
        y = 3.0 * unit(x)
        largest = y.amax().detach()
        return (y - largest).exp().sum().log() + largest

    def of_data(x: Tensor) -> Tensor:
        with torch.no_grad():
            weights = SLOPES.square()
        return (weights * unit(x)[:3].square()).sum()

    x = normal(DIM)
    torch.testing.assert_close(
        made(stabilised).hessian(x), made(lambda x: torch.logsumexp(3.0 * unit(x), 0)).hessian(x)
    )
    made(of_data)


def test_the_factor_of_a_noise_may_not_be_cut_in_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = normal(DIM, 2)

    def factor(x: Tensor) -> Tensor:
        y = unit(x)
        whole = (columns - torch.outer(y, y @ columns)) / x.norm()
        return torch.where(y[0] > 0.97, whole.detach(), whole)

    with pytest.raises(errors.DifferentiationError, match="factor of the custom noise"):
        Problem(plain, DIM, CustomNoise(factor))
    monkeypatch.setattr(custom, "require_uncut", lambda *_: None)
    Problem(plain, DIM, CustomNoise(factor))


def sometimes_a_number(x: Tensor) -> Tensor:
    try:
        scale = 1.0 + float(unit(x)[0]) ** 2
    except RuntimeError:
        scale = 1.0
    return scale * plain(x)


OTHERWISE = {
    "a caught error": sometimes_a_number,
    "as_strided": lambda x: unit(x).as_strided((2,), (1,)).pow(3).sum(),
}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
@pytest.mark.parametrize("name", OTHERWISE)
def test_a_function_that_is_another_one_in_a_batch_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = OTHERWISE[name]
    with pytest.raises(errors.DifferentiationError, match="another one among other points"):
        made(loss)
    monkeypatch.setattr(loss_checks, "require_alike", lambda *_, **__: None)
    x = normal(3, DIM)
    alone = torch.stack([loss(z) for z in x])
    among = vmap(made(loss).pointwise.loss, in_dims=-1)(x.T.contiguous())
    assert float((alone - among).norm() / alone.norm()) > 1e-3


def test_a_value_that_changes_later_is_refused() -> None:
    calls = [0]

    def loss(x: Tensor) -> Tensor:
        calls[0] += 1
        return plain(x) * (1.0 if calls[0] < 6 else 1.001)

    with pytest.raises(errors.DifferentiationError, match="not a fixed function"):
        made(loss)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: torch.tensor((x.numpy() ** 2).sum() / (x.numpy() ** 2).sum()),
        lambda x: x.div_(x.norm())[2].square(),
        lambda x: plain(x) * inference(x),
    ],
)
def test_what_torch_cannot_differentiate_is_told(loss: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(errors.DifferentiationError, match="first derivative fails") as caught:
        made(loss)
    assert caught.value.remedy.startswith(
        ("torch operations", "nothing written", "no torch.inference_mode")
    )


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.norm() / x.norm()


def test_what_torch_cannot_differentiate_in_a_module_is_told() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.first(x)
            return h * inference(h)

    def by_numpy(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.tensor((outputs.numpy() ** 2).sum(1))

    for module, criterion in ((Net(), nn.MSELoss()), (nn.Linear(3, 2), by_numpy)):
        with pytest.raises(errors.DifferentiationError, match="first derivative fails"):
            Problem.from_module(
                module.double(), criterion, normal(5, 3), normal(5, 2), SphericalNoise(0.1)
            )


PRELU: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "one slope": (
        lambda w: F.prelu(w, SLOPES[:1]),
        lambda w: torch.where(w > 0, w, SLOPES[0] * w),
    ),
    "channels": (lambda w: torch.prelu(w, SLOPES), lambda w: torch.where(w > 0, w, SLOPES * w)),
    "slopes of x": (lambda w: w.prelu(w[0]), lambda w: torch.where(w > 0, w, w[0] * w)),
    "a vector": (
        lambda w: F.prelu(w[0], w[1, :1]),
        lambda w: w[0].relu() - w[1, 0] * (-w[0]).relu(),
    ),
    "images": (
        lambda w: F.prelu(torch.stack([w, w.T, w @ w])[None], w[0]),
        lambda w: torch.stack(
            [torch.where(v > 0, v, s * v) for v, s in zip([w, w.T, w @ w], w[0], strict=True)]
        )[None],
    ),
}


@pytest.mark.parametrize("name", PRELU)
def test_prelu_at_several_points_is_that_at_each(name: str) -> None:
    """Torch's own second derivatives in a batch are those of other points, or raise: the twin."""

    def of(function: Callable[[Tensor], Tensor]) -> Loss:
        def loss(x: Tensor) -> Tensor:
            return function(unit(x).reshape(3, 3)).pow(3).sum()

        return Loss(elementary(loss, normal(9)), 9, None)

    found, want = map(of, PRELU[name])
    points = normal(3, 9, 9)
    for order, count in (("loss", 1), ("gradient", 1), ("hessian", 1), ("third_derivative", 3)):
        got, exact = (vmap(getattr(f, order))(*points[:count]) for f in (found, want))
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    twin = Loss(found.function.as_written, 9, None)  # type: ignore[attr-defined]
    twin_hessian, exact = vmap(twin.hessian)(points[0]), vmap(want.hessian)(points[0])
    assert float((twin_hessian - exact).norm() / exact.norm()) > 1e-3
    with pytest.raises(errors.DifferentiationError):
        loss_checks.require_derivatives(twin, twin.function, "loss")


def test_celu_has_all_its_digits() -> None:
    """Torch's own have nine: the twin."""
    x = normal(5)
    want = torch.where(x > 0, 1.0, (x / 0.7).exp())
    for function in (torch.celu, F.celu, lambda w, a: nn.CELU(a)(w)):

        def total(w: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function(w, 0.7).sum()

        torch.testing.assert_close(
            torch.func.grad(elementary(total, x))(x), want, rtol=1e-14, atol=0.0
        )
        twin = torch.func.grad(total)(x)
        assert float((twin - want).abs().max()) > 1e-10


def test_prelu_in_a_module() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2), nn.PReLU()).double()
    inputs, targets = normal(5, 3), normal(5, 2)
    problem = Problem.from_module(module, nn.MSELoss(), inputs, targets, SphericalNoise(0.1))
    x = problem.vector(module)
    F.mse_loss(module(inputs), targets).backward()
    gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    torch.testing.assert_close(problem.gradient(x), gradient)
    points = x + 0.1 * normal(3, len(x))
    alone = torch.stack([problem.hessian(z) for z in points])
    torch.testing.assert_close(problem.hessian(points), alone, rtol=1e-12, atol=1e-12)


def test_tensors_without_storage_end_no_process() -> None:
    """Torch makes them where a derivative is 0, and dies of their products in a recording."""

    def third(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return loss.third_derivative(x, a, b)

    loss = Loss(lambda x: F.smooth_l1_loss(x.square(), torch.ones(3).to(x), beta=0.0), 3, None)
    loss.reverses = True
    points = tuple(normal(3, 3, 4))
    compiled = compile_points(third, points)
    assert compiled is not None
    torch.testing.assert_close(compiled(*points), torch.zeros(3, 4, dtype=torch.float64))


def saturated(seed: int, scale: float, n: int) -> Callable[[Tensor], Tensor]:
    """Softmax over cosines, stabilised by its largest, whose samples are nearly all fitted."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    q = q / q.norm(dim=1, keepdim=True)

    def loss(x: Tensor) -> Tensor:
        z = scale * q @ (x / x.norm())
        z = torch.stack([z, -z], 1)
        m = z.max(1, keepdim=True).values.detach()
        return ((z - m).exp().sum(1).log() + m[:, 0] - z[:, 0]).mean()

    return loss


@pytest.mark.parametrize("scale", [16.0, 30.0, 64.0])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_rounding_of_a_saturated_loss_is_no_cut(scale: float, n: int) -> None:
    for seed in range(10):
        loss_trials.require_uncut(saturated(seed, scale, n), torch.ones(4).double() / 2, "loss")


def test_a_saturated_loss_is_a_problem() -> None:
    for seed in range(5):
        Problem(saturated(seed, 30.0, 4), 4, SphericalNoise(0.1))


def test_what_a_loss_requires_of_its_constants_is_no_error() -> None:
    def loss(x: Tensor) -> Tensor:
        y = x / x.norm()
        m = y.detach().max()
        assert not m.requires_grad
        return (y - m).exp().sum().log() + m

    Problem(loss, 3, SphericalNoise(0.1))


def test_fewer_points_are_looked_at_together_where_they_hold_more() -> None:
    rows = torch.randn(1000, 3, dtype=torch.float64)

    def held(n: int) -> int:
        return loss_trials._bytes_held(lambda x: (rows[:n] @ x).exp().sum(), torch.ones(3).double())

    assert 8_000 <= held(1000) < 100_000
    assert held(1000) > 50 * held(10)


def test_a_loss_that_detaches_and_differentiates_within_is_a_problem() -> None:
    """Functions of ``torch.func`` refuse what counts the bytes."""

    def loss(x: Tensor) -> Tensor:
        y = x / x.norm()
        slope = torch.func.grad(lambda z: (z**3).sum())(y)
        m = slope.detach().max()
        return (slope - m).exp().sum().log() + m

    Problem(loss, 3, SphericalNoise(0.1))

"""Problems from modules: plain backward as the truth, and what is refused before any run."""

import copy
import pickle
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifold_sde import (
    LabelNoise,
    LeastSquaresProblem,
    Problem,
    SamplingNoise,
    SphericalNoise,
    errors,
)
from manifold_sde.loss import LeastSquaresLoss, Loss
from manifold_sde.loss_checks import derivative_errors, fixed_directions, require_derivatives
from manifold_sde.networks import (
    GhostBatchNorm,
    LayerNorm,
    NormalizedMLP,
    ScaleInvariantPreResNet,
)
from manifold_sde.networks.data import digits
from manifold_sde.noise.base import Noise
from manifold_sde.noise.sampling import draws
from manifold_sde.solvers import run_sgd, sgd

GENERATOR = torch.Generator().manual_seed(7)
INPUTS = torch.randn(12, 6, dtype=torch.float64, generator=GENERATOR)
CLASSES = torch.randint(3, (12,), generator=GENERATOR)
ROWS = torch.randn(12, 3, dtype=torch.float64, generator=GENERATOR)
CE = nn.CrossEntropyLoss()


def mlp(**options: Any) -> NormalizedMLP:
    return NormalizedMLP((6, 5, 4, 3), **options).double()


def sequence(*layers: nn.Module) -> nn.Sequential:
    """A network with weights that do not depend on torch's global generator."""
    module = nn.Sequential(nn.Linear(6, 4), *layers, nn.Linear(4, 3)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return module


def made(
    module: nn.Module | None = None,
    criterion: Any = CE,
    inputs: Any = INPUTS,
    targets: Any = CLASSES,
    noise: Any = None,
    **options: Any,
) -> Problem:
    module = mlp() if module is None else module
    noise = SamplingNoise() if noise is None else noise
    return Problem.from_module(module, criterion, inputs, targets, noise, **options)


CRITERIA: dict[str, tuple[Any, Tensor]] = {
    "cross entropy": (nn.CrossEntropyLoss(), CLASSES),
    "cross entropy of probabilities": (nn.CrossEntropyLoss(label_smoothing=0.1), ROWS.softmax(1)),
    "squares": (nn.MSELoss(), ROWS),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0])), (ROWS > 0).double()),
    "smooth": (nn.SmoothL1Loss(), ROWS),
    "a function": (partial(F.cross_entropy, reduction="none"), CLASSES),
    "a function of entries": (lambda outputs, targets: (outputs - targets) ** 4, ROWS),
}
MEANS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a function": F.cross_entropy,
    "a function of entries": lambda outputs, targets: ((outputs - targets) ** 4).mean(),
}


@pytest.mark.parametrize("which", CRITERIA)
def test_loss_and_gradient_are_those_of_plain_backward(which: str) -> None:
    criterion, targets = CRITERIA[which]
    module = mlp()
    before = copy.deepcopy(module.state_dict())
    problem = made(module, criterion, targets=targets)
    x = problem.vector(module)
    mean = MEANS.get(which, criterion)
    if isinstance(mean, nn.Module):
        mean = copy.deepcopy(mean).double()
    loss = mean(module(INPUTS), targets)
    loss.backward()
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    torch.testing.assert_close(problem.loss(x), loss.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(problem.gradient(x), torch.cat(gradients), rtol=1e-11, atol=1e-14)
    assert problem.n_samples == 12
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert isinstance(problem, LeastSquaresProblem) == isinstance(criterion, nn.MSELoss)


def test_sample_losses_one_by_one() -> None:
    for criterion, targets in ((CE, CLASSES), (nn.MSELoss(), ROWS)):
        module = mlp()
        problem = made(module, criterion, targets=targets)
        one_by_one = [criterion(module(INPUTS[i : i + 1]), targets[i : i + 1]) for i in range(12)]
        got = problem.sample_losses(problem.vector())
        torch.testing.assert_close(got, torch.stack(one_by_one).detach())


def test_least_squares_has_residuals_jacobian_and_label_noise() -> None:
    """H = J^T J / Xi where the residuals vanish: against the Hessian by automatic means."""
    module = mlp()
    targets = module(INPUTS).detach()
    problem = made(module, nn.MSELoss(), targets=targets, noise=LabelNoise(0.3))
    assert isinstance(problem, LeastSquaresProblem)
    x = problem.vector()
    assert float(problem.residuals(x).abs().max()) < 1e-14
    jacobian = problem.jacobian(x)
    assert jacobian.shape == (36, problem.dim)
    torch.testing.assert_close(jacobian.T @ jacobian / 12, problem.hessian(x))
    want = 0.3**2 * problem.hessian(x)
    torch.testing.assert_close(problem.noise_covariance(x), want, rtol=1e-10, atol=1e-12)


def test_dtype_follows_x() -> None:
    problem = made(copy.deepcopy(mlp()).float(), inputs=INPUTS.float())
    assert problem.vector().dtype == torch.float32
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x = problem.vector().to(dtype)
        assert problem.gradient(x).dtype == dtype
        double = problem.gradient(x.double())
        assert float((problem.gradient(x) - double).abs().max()) < tolerance


def test_weights_to_vector_and_back() -> None:
    module = mlp()
    problem = made(module)
    x = 2.0 * problem.vector(module) + 0.1
    other = copy.deepcopy(module)
    problem.load_into(other, x)
    assert torch.equal(problem.vector(other), x)
    assert torch.equal(problem.vector(module), problem.vector())
    torch.testing.assert_close(CE(other(INPUTS), CLASSES).detach(), problem.loss(x))
    assert list(problem.layers) == ["hidden.0.weight", "hidden.1.weight"]
    block = problem.layers["hidden.1.weight"]
    assert (block.shape, block.start, block.stop) == ((4, 5), 30, 50)
    assert torch.equal(x[block.index].reshape(block.shape), other.hidden[1].weight)
    batch = x.expand(2, -1)
    assert torch.equal(problem.part(batch, "hidden.1"), batch[:, 30:])
    assert torch.equal(problem.part(batch, "hidden"), batch)
    torch.testing.assert_close(problem.outputs(x), other(INPUTS).detach())


def test_copies_and_pickles() -> None:
    problem = made(frozen="hidden.0")
    x = problem.vector()
    for other in (copy.deepcopy(problem), pickle.loads(pickle.dumps(problem))):
        assert torch.equal(other.gradient(x), problem.gradient(x))
        assert repr(other) == repr(problem)
    assert problem.with_noise(SphericalNoise(0.3)).vector().equal(x)


POINTWISE: dict[str, Callable[[], Problem]] = {
    "cross entropy": made,
    "in elementary operations": lambda: made(sequence(nn.LayerNorm(4), nn.Tanh())),
    "squares": lambda: made(criterion=nn.MSELoss(), targets=ROWS),
    "ghost batches": lambda: made(mlp(norm="ghost", ghost_size=3)),
    "squares of ghost batches": lambda: made(
        mlp(norm="ghost", ghost_size=3), nn.MSELoss(), targets=ROWS
    ),
}


@pytest.mark.parametrize("which", POINTWISE)
def test_gradients_sample_by_sample_are_those_of_all_losses(which: str) -> None:
    """Samples by themselves against the same from the function of x alone."""
    problem = POINTWISE[which]()
    loss, x = problem.pointwise, problem.vector()
    assert loss.per_sample is not None
    assert loss.n_samples is not None
    drawn = torch.tensor([2, 0, 2])
    close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)
    whole = Loss(lambda z: loss.sample_losses(z), loss.dim, loss.n_samples)
    assert whole.per_sample is None
    close(loss.sample_gradients(x), whole.sample_gradients(x))
    close(loss.drawn_gradient(x, drawn), whole.drawn_gradient(x, drawn))
    close(loss.drawn_gradient(x, drawn), loss.sample_gradients(x)[drawn].mean(0))
    many = drawn.repeat(20)
    close(loss.drawn_gradient(x, many), loss.sample_gradients(x)[drawn].mean(0))
    if isinstance(loss, LeastSquaresLoss):
        shape = loss.dim, loss.n_samples, loss.n_outputs
        squares = LeastSquaresLoss(lambda z: loss.residuals(z), *shape)
        rows = squares.jacobian(x)
        close(loss.jacobian(x), rows)
        k = loss.n_outputs
        for first, last in ((0, 1), (1, loss.n_samples)):
            own = rows.flip(0)[first * k : last * k]
            close(loss.rows(x, first, last), rows[first * k : last * k])
            close(squares.rows(x, first, last), rows[first * k : last * k])
            bent = loss.bend(x, first, last, own)
            close(bent, squares.bend(x, first, last, own))
            hessians = torch.func.jacrev(torch.func.jacrev(loss.residuals))(x)
            close(bent, torch.einsum("ide,ie->d", hessians[first * k : last * k], own))


@pytest.mark.paper("Equation (2)")
def test_a_step_of_sgd_is_a_step_of_torch_on_the_samples_drawn() -> None:
    module = mlp()
    problem = made(module, noise=SamplingNoise(4))
    x = problem.vector(module)
    after = run_sgd(problem, x, lr=0.1, weight_decay=0.01, steps=[0, 1], seed=3, compile=False)
    gradient = (0.999 * x - after.ys[-1]) / 0.1
    gradients = problem.pointwise.sample_gradients(x)
    counts = torch.linalg.lstsq(gradients.T, 4 * gradient[:, None]).solution[:, 0]
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-8)
    assert int(counts.round().sum()) == 4
    chosen = torch.arange(12).repeat_interleave(counts.round().long())
    optimiser = torch.optim.SGD(
        [p for p in module.parameters() if p.requires_grad], lr=0.1, weight_decay=0.01
    )
    CE(module(INPUTS[chosen]), CLASSES[chosen]).backward()
    optimiser.step()
    torch.testing.assert_close(problem.vector(module), after.ys[-1])


class Counted(nn.Module):
    """Counts its calls, and the samples in them."""

    calls: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.net(x)


def test_one_path_costs_one_path_and_is_that_of_many() -> None:
    """A step calls the module once, on the samples drawn; in company it goes another way."""
    problem = made(Counted(), noise=SamplingNoise(4))
    x = problem.vector()
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01, "steps": [0, 3, 7], "seed": 3}
    Counted.calls.clear()
    alone = run_sgd(problem, x, **options)
    looked = [8]  # whether there is a clock
    assert Counted.calls == [4] * 7 + looked
    Counted.calls.clear()
    three = run_sgd(problem, x, n_paths=3, **options)
    assert Counted.calls == [4] * 21 + looked
    many = run_sgd(problem, x, n_paths=5, **options)
    assert torch.equal(three.ys[:, 0], alone.ys)
    assert torch.equal(three.clock[:, 0], alone.clock)
    for name in ("ys", "clock"):
        torch.testing.assert_close(
            getattr(many, name)[:, :3], getattr(three, name), rtol=1e-12, atol=1e-12
        )
    assert not torch.equal(three.ys[-1, 1], three.ys[-1, 0])


@pytest.mark.parametrize(
    "noise",
    [
        SphericalNoise(0.1),
        SamplingNoise(3, replacement=False),
        SamplingNoise(12),
        LabelNoise(0.3, 4),
        LabelNoise(0.3, 12),
    ],
    ids=str,
)
def test_one_path_with_other_noise_is_that_of_many(noise: Noise) -> None:
    for criterion, targets in ((CE, CLASSES), (nn.MSELoss(), ROWS)):
        if criterion is CE and isinstance(noise, LabelNoise):
            continue
        problem = made(criterion=criterion, targets=targets, noise=noise)
        x = problem.vector()
        one, many = (run_sgd(problem, x, 0.1, 0.01, 3, n_paths=n) for n in (1, 5))
        torch.testing.assert_close(many.ys[:, :1], one.ys, rtol=1e-12, atol=1e-12)


def test_a_step_with_label_noise_evaluates_the_samples_drawn() -> None:
    """By the residuals and Jacobian of all samples, with the draws and labels of the step."""
    noise = LabelNoise(0.3, 4)
    problem = made(Counted(), criterion=nn.MSELoss(), targets=ROWS, noise=noise)
    loss, x = problem.pointwise, problem.vector()
    assert isinstance(loss, LeastSquaresLoss)
    normals, uniforms = (
        torch.linspace(-1.0, 1.0, 12).double(),
        torch.tensor([0.1, 0.8, 0.3, 0.82]).double(),
    )
    Counted.calls.clear()
    found = noise.stochastic_gradient(loss, x, normals, uniforms)
    assert Counted.calls == [4]
    drawn = draws(uniforms, 12)
    residuals = loss.of_samples(loss.residuals(x))[drawn] + 0.3 * normals.reshape(4, 3)
    jacobian = loss.of_samples(loss.jacobian(x))[drawn]
    want = torch.einsum("bk,bkd->d", residuals, jacobian) / 4
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)


def test_one_path_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = made(noise=SamplingNoise(4))
    x, kept = problem.vector(), [0, 5, 9]
    whole = run_sgd(problem, x, 0.1, 0.01, kept)
    monkeypatch.setattr("manifold_sde.solvers.stopping._CHECKPOINT_SECONDS", 0.0)
    write = sgd.write_archive

    def stop(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sgd, "write_archive", stop)
        with pytest.raises(KeyboardInterrupt):
            run_sgd(problem, x, 0.1, 0.01, kept, checkpoint=tmp_path / "one")
    resumed = run_sgd(problem, x, 0.1, 0.01, kept, checkpoint=tmp_path / "one")
    assert torch.equal(resumed.ys, whole.ys)
    assert torch.equal(resumed.clock, whole.clock)


class Tied(nn.Module):
    """The same weights twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.norm = LayerNorm(6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))[:, :3]


def test_shared_parameters_are_counted_once_and_said() -> None:
    module = Tied().double()
    problem = made(module)
    assert problem.dim == 36
    assert "second.weight shared with first.weight" in repr(problem)
    CE(module(INPUTS), CLASSES).backward()
    assert module.first.weight.grad is not None
    x = problem.vector(module)
    torch.testing.assert_close(problem.gradient(x), module.first.weight.grad.flatten())
    with pytest.raises(errors.ArgumentError, match="no trained parameters"):
        made(module, frozen="second.weight")


def test_frozen_by_name_prefix_or_requires_grad() -> None:
    assert "frozen: hidden.0.weight, head.weight" in repr(made(frozen=["hidden.0"]))
    assert made(frozen="hidden.0.weight").dim == 20
    module = sequence(nn.Tanh())
    assert made(module).dim == 28 + 15
    assert made(module, frozen=("2",)).dim == 28
    module[0].bias.requires_grad_(False)
    assert made(module, frozen="2.weight").dim == 24 + 3


def test_ghost_batches_are_the_samples() -> None:
    module = mlp(norm="ghost", ghost_size=4)
    for criterion, targets in ((CE, CLASSES), (nn.MSELoss(), ROWS)):
        problem = made(module, criterion, targets=targets)
        assert problem.n_samples == 3
        blocks = [
            criterion(module(INPUTS[i : i + 4]), targets[i : i + 4]).detach() for i in (0, 4, 8)
        ]
        got = problem.sample_losses(problem.vector())
        torch.testing.assert_close(got, torch.stack(blocks))


class Blocks(nn.Module):
    """Couples the samples of blocks of three, without a layer that says so."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.reshape(-1, 3, 4).mean(1).repeat_interleave(3, 0)


def test_ghost_batches_of_a_module_of_its_own() -> None:
    assert made(sequence(Blocks()), ghost_size=3).n_samples == 4
    with pytest.raises(errors.NoiseError, match="no losses of their own"):
        made(sequence(Blocks()))
    with pytest.raises(errors.NoiseError, match="ghost batches of 2"):
        made(sequence(Blocks()), ghost_size=2)


def test_coupled_samples_are_one_loss_for_other_noise() -> None:
    """Batch normalisation over the whole batch, where no noise of the samples is asked for."""
    module = sequence(nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh())
    problem = made(module, noise=SphericalNoise(0.1))
    assert problem.n_samples is None
    torch.testing.assert_close(problem.loss(problem.vector()), CE(module(INPUTS), CLASSES).detach())
    squares = made(module, nn.MSELoss(), targets=ROWS, noise=SphericalNoise(0.1))
    assert isinstance(squares, LeastSquaresProblem)
    assert squares.n_samples == 1
    want = nn.MSELoss()(module(INPUTS), ROWS).detach()
    torch.testing.assert_close(squares.loss(problem.vector()), want)
    for other in (problem, squares):
        with pytest.raises(errors.NoiseError):
            other.with_noise(SamplingNoise())


def test_batch_norm_in_eval_is_a_fixed_function() -> None:
    module = sequence(nn.BatchNorm1d(4)).eval()
    problem = made(module)
    torch.testing.assert_close(problem.loss(problem.vector()), CE(module(INPUTS), CLASSES).detach())


def test_third_derivatives_through_torchs_layer_norm_are_right() -> None:
    problem = made(sequence(nn.LayerNorm(4), nn.Tanh()))
    assert max(problem.derivative_errors(problem.vector()).values()) < 1e-5


def test_several_inputs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, a: Tensor, index: Tensor) -> Tensor:
            return self.net(a) + index[:, None]

    module, index = Sum(), torch.arange(12)
    problem = made(module, inputs=(INPUTS, index))
    want = CE(module(INPUTS, index), CLASSES).detach()
    torch.testing.assert_close(problem.loss(problem.vector()), want)


def test_kinks_of_relu_are_no_wrong_derivatives() -> None:
    """At the first test point, a kink lies between the nodes of all but the smallest steps.

    Quotients at steps of 1e-3 and 1e-4 are off by the same 0.2 %, as a wrong derivative would be.
    """
    data = digits(1000)
    module = ScaleInvariantPreResNet(8, 16, in_channels=1)
    problem = made(module, inputs=data.inputs[:50], targets=data.targets[:50])
    few = problem.require_network().of_blocks([0, 12, 25, 37])
    loss = Loss(few, problem.dim, 4)
    off, _ = derivative_errors(loss, fixed_directions(problem.dim, 1)[0])["gradient"]
    assert off < 1e-8
    require_derivatives(loss, few, "loss")


def test_making_a_problem_of_many_parameters_is_quick() -> None:
    """Twenty gradients' time or so, and nothing of size D x D or D x Xi."""
    module = NormalizedMLP((64, 1000, 40, 10))
    inputs = torch.randn(400, 64, generator=GENERATOR)
    targets = torch.randint(10, (400,), generator=GENERATOR)
    start = time.perf_counter()
    problem = made(module, inputs=inputs, targets=targets)
    problem.require_scale_invariance()
    assert problem.dim == 104_000
    assert time.perf_counter() - start < 60.0


# What is refused.


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


class Counter(nn.Module):
    """Changes a buffer that it uses, in every forward pass."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.calls.add_(1)
        else:
            self.calls = self.calls + 1
        return x * self.calls


class Constant(nn.Module):
    """Keeps a tensor that is no buffer, in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.ones(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class First(nn.Module):
    def __init__(self, take: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.take = take
        self.net = mlp()

    def forward(self, x: Tensor) -> Any:
        return self.take(self.net(x))


NAN = INPUTS.clone()
NAN[3, 2] = torch.nan
A, S, D, N = errors.ArgumentError, errors.ShapeError, errors.DTypeError, errors.NoiseError
REFUSED: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "no module": (D, lambda: made(lambda x: x), "nn.Module"),  # type: ignore[arg-type]
    "a class": (D, lambda: made(NormalizedMLP), "brackets"),  # type: ignore[arg-type]
    "lazy": (A, lambda: made(nn.Sequential(nn.LazyLinear(3))), "lazy layers"),
    "dropout": (A, lambda: made(sequence(nn.Dropout(0.1))), "dropout is on.*(\n.*)*: 1"),
    "dropout function": (A, lambda: made(sequence(Random())), "random"),
    "running": (A, lambda: made(sequence(nn.BatchNorm1d(4))), "GhostBatchNorm"),
    "in place": (A, lambda: made(sequence(Counter(True))), "1.calls"),
    "assigned": (A, lambda: made(sequence(Counter(False))), "1.calls"),
    "constant": (A, lambda: made(sequence(Constant())), "register_buffer"),
    "batch norm": (
        N,
        lambda: made(sequence(nn.BatchNorm1d(4, track_running_stats=False))),
        "through 1",
    ),
    "labels of coupled samples": (
        N,
        lambda: made(
            sequence(GhostBatchNorm(None)), nn.MSELoss(), targets=ROWS, noise=LabelNoise(1)
        ),
        "LabelNoise",
    ),
    "one ghost batch": (N, lambda: made(mlp(norm="ghost", ghost_size=12)), "one sample"),
    "ghost size": (S, lambda: made(mlp(norm="ghost", ghost_size=5)), "multiple of 5"),
    "ghost sizes": (A, lambda: made(mlp(norm="ghost", ghost_size=4), ghost_size=2), "2 and 4"),
    "ghost size of nothing": (A, lambda: made(ghost_size=0), "at least 1"),
    "ghost size in words": (A, lambda: made(ghost_size="four"), "at least 1"),
    "no inputs": (D, lambda: made(inputs=()), "a sample a row"),
    "frozen by number": (D, lambda: made(frozen=3), "names of parameters"),
    "all frozen": (A, lambda: made(frozen=["hidden", "head"]), "no trained parameters"),
    "unknown": (A, lambda: made(frozen="hiden.0"), "did you mean 'hidden.0"),
    "unknown far": (A, lambda: made(frozen="zzz"), "named_parameters"),
    "criterion class": (D, lambda: made(criterion=nn.CrossEntropyLoss), "brackets"),
    "criterion": (D, lambda: made(criterion="ce"), "criterion of torch.nn"),
    "reduced": (S, lambda: made(criterion=F.cross_entropy), "reduction='none'"),
    "range": (A, lambda: made(targets=CLASSES + 1), "class 3, with 3 outputs"),
    "negative": (A, lambda: made(targets=CLASSES - 1), "class -1"),
    "dtype": (D, lambda: made(targets=CLASSES.int()), r"targets.long\(\)"),
    "floating classes": (D, lambda: made(targets=CLASSES.double()), r"targets.long\(\)"),
    "class column": (S, lambda: made(targets=CLASSES[:, None]), "squeeze"),
    "broadcast": (S, lambda: made(criterion=nn.MSELoss(), targets=ROWS[:, :1]), "broadcast"),
    "squares of classes": (S, lambda: made(criterion=nn.MSELoss()), "one_hot"),
    "criterion raises": (
        A,
        lambda: made(criterion=lambda outputs, targets: outputs @ targets),
        "does not take",
    ),
    "one output": (
        S,
        lambda: made(First(lambda outputs: outputs[:, 0])),
        "BCEWithLogitsLoss",
    ),
    "number": (S, lambda: made(targets=CLASSES[:5]), "same samples"),
    "empty": (S, lambda: made(inputs=INPUTS[:0], targets=CLASSES[:0]), "at least 1"),
    "nan": (errors.NonFiniteError, lambda: made(inputs=NAN), "first number 3"),
    "nan target": (
        errors.NonFiniteError,
        lambda: made(criterion=nn.MSELoss(), targets=ROWS / 0.0),
        "targets hold NaN",
    ),
    "array": (D, lambda: made(inputs=INPUTS.numpy()), "as_tensor"),
    "outputs": (D, lambda: made(First(lambda outputs: (outputs,))), "a module around it"),
    "mean output": (S, lambda: made(First(lambda outputs: outputs.mean(0))), "for 12 samples"),
    "nan outputs": (
        errors.NonFiniteError,
        lambda: made(First(lambda outputs: outputs / 0.0)),
        "outputs of the module",
    ),
    "raises": (A, lambda: made(inputs=INPUTS[:, :4]), "raised"),
    "detached": (
        errors.DifferentiationError,
        lambda: made(First(lambda outputs: outputs.detach() * outputs)),
        "detach",
    ),
    "no noise": (N, lambda: made(noise=0.3), "noise model"),
    "rank": (A, lambda: made(rank=50), "rank"),
    "one coordinate": (
        A,
        lambda: made(nn.Sequential(nn.Linear(1, 1, bias=False)), inputs=INPUTS[:, :1]),
        "dimension",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_bad_input_is_refused_with_the_way_out(which: str) -> None:
    kind, call, words = REFUSED[which]
    with pytest.raises(kind, match=words) as caught:
        call()
    assert isinstance(caught.value, errors.ManifoldSDEError)
    assert caught.value.remedy


WRONG_MODULE: dict[str, tuple[type[Exception], Callable[[Problem], Any], str]] = {
    "another class": (A, lambda p: p.vector(sequence()), "only one of them has"),
    "another width": (S, lambda p: p.vector(NormalizedMLP((6, 7, 4, 3))), "another shape"),
    "no module": (D, lambda p: p.vector(INPUTS), "belong to a module"),  # type: ignore[arg-type]
    "another head": (A, lambda p: p.load_into(mlp(seed=1), p.vector()), "head.weight"),
    "a batch": (S, lambda p: p.load_into(mlp(), p.vector()[None]), r"x\[i\]"),
    "another size": (S, lambda p: p.load_into(mlp(), p.vector()[1:]), "shape"),
    "a part": (A, lambda p: p.part(p.vector(), "hidden.2"), "did you mean"),
}


@pytest.mark.parametrize("which", WRONG_MODULE)
def test_modules_that_do_not_belong_are_refused(which: str) -> None:
    kind, call, words = WRONG_MODULE[which]
    with pytest.raises(kind, match=words):
        call(made())


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p.vector(mlp()),
        lambda p: p.load_into(mlp(), INPUTS[0]),
        lambda p: p.layers,
        lambda p: p.part(INPUTS[0], "hidden"),
        lambda p: p.outputs(INPUTS[0]),
    ],
)
def test_other_problems_have_no_module(call: Callable[[Problem], Any]) -> None:
    problem = Problem(lambda x: (x[0] / x.norm()) ** 2, 6, SphericalNoise(0.3))
    with pytest.raises(errors.ArgumentError, match=r"Problem\.from_module"):
        call(problem)


def test_outputs_on_other_inputs() -> None:
    module = mlp().double()
    problem = made(module)
    x, other = problem.vector(module), torch.eye(2, 6, dtype=torch.float64)
    torch.testing.assert_close(problem.outputs(x, other), module(other).detach())
    torch.testing.assert_close(problem.outputs(x), module(INPUTS.double()).detach())
    both = problem.outputs(torch.stack([x, 2.0 * x])[None], other)
    torch.testing.assert_close(both, problem.outputs(x, other).expand(1, 2, -1, -1))
    with pytest.raises(errors.ArgumentError, match="cannot be called with these inputs"):
        problem.outputs(x, torch.ones(2, 5, dtype=torch.float64))

"""Samples in several passes: the values of one pass, and memory below a limit."""

import functools
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from manifold_sde import Geometry, Problem, SamplingNoise, SphericalNoise, errors, problems
from manifold_sde.loss import LeastSquaresLoss
from manifold_sde.networks import NormalizedMLP, passes
from manifold_sde.networks.randomness import Generators
from manifold_sde.solvers import run_sgd

GENERATOR = torch.Generator().manual_seed(12)
INPUTS = torch.randn(24, 6, dtype=torch.float64, generator=GENERATOR)
CLASSES = torch.randint(3, (24,), generator=GENERATOR)
ROWS = torch.randn(24, 3, dtype=torch.float64, generator=GENERATOR)


def made(memory: Any, criterion: nn.Module, targets: Tensor, **options: Any) -> Problem:
    module = NormalizedMLP((6, 5, 4, 3), **options).double()
    return Problem.from_module(module, criterion, INPUTS, targets, SamplingNoise(4), memory=memory)


KINDS: dict[str, Callable[[Any], Problem]] = {
    "cross entropy": lambda m: made(m, nn.CrossEntropyLoss(), CLASSES),
    "squares": lambda m: made(m, nn.MSELoss(), ROWS),
    "ghost batches": lambda m: made(m, nn.MSELoss(), ROWS, norm="ghost", ghost_size=3),
}


def values(problem: Problem) -> dict[str, Tensor]:
    """Everything that is computed from the samples, at one point and in a batch."""
    loss, x = problem.pointwise, problem.vector()
    batch = torch.stack([x, x + 0.1, -x])
    a = torch.linspace(-1.0, 1.0, problem.dim, dtype=torch.float64)
    weights = torch.linspace(-1.0, 2.0, loss.n_samples or 1, dtype=torch.float64)
    few, many = torch.arange(3), torch.arange(60) % weights.numel()
    found = {
        "loss": problem.loss(batch),
        "gradient": problem.gradient(batch),
        "hessian": problem.hessian(x),
        "third": loss.third_derivative(x, a, x),
        "one": problem.gradient(x),
        "product": loss.hessian_product(x, a),
        "sample losses": problem.sample_losses(batch),
        "sample gradients": loss.sample_gradients(x),
        "sample derivatives": loss.sample_derivatives(x, a),
        "weighted": loss.weighted_gradient(x, weights),
        "few drawn": loss.drawn_gradient(x, few),
        "many drawn": loss.drawn_gradient(x, many),
        "outputs": problem.outputs(batch),
        "noise": problem.noise_covariance(x),
        "by reverse mode": torch.func.vmap(torch.func.grad(loss.loss))(batch),
        "traced": make_fx(lambda z: torch.func.vmap(loss.gradient)(z))(batch)(batch),
        "run": run_sgd(problem, x, lr=0.1, weight_decay=0.01, steps=[0, 3], compile=False).ys,
    }
    if isinstance(loss, LeastSquaresLoss):
        outputs = torch.linspace(-1.0, 2.0, loss.n_residuals, dtype=torch.float64)
        found["residuals"] = loss.residuals(x)
        found["forward"] = loss.residual_product(x, a)
        found["reverse"] = loss.residual_transposed_product(x, outputs)
        found["jacobian"] = loss.jacobian(x)
    return found


@pytest.mark.parametrize("which", KINDS)
def test_several_passes_give_what_one_gives(which: str) -> None:
    whole, small = KINDS[which]("1 TiB"), KINDS[which](32_000 if "ghost" in which else 22_400)
    assert whole.pointwise.per_sample is not None
    assert small.pointwise.per_sample is not None
    assert len(whole.pointwise.per_sample.passes()) == 1
    assert len(small.pointwise.per_sample.passes()) >= 3
    want, got = values(whole), values(small)
    close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)
    for name, value in want.items():
        close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")
    uneven = [s.stop - s.start for s in small.pointwise.per_sample.passes()]
    assert sum(uneven) == whole.n_samples


def test_a_pass_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: the last samples forgotten."""
    whole, small = KINDS["squares"]("1 TiB"), KINDS["squares"](22_400)
    names, x = ("loss", "gradient", "hessian"), whole.vector()
    want = [getattr(whole, name)(x) for name in names]
    samples = type(small.pointwise.per_sample)
    monkeypatch.setattr(samples, "passes", lambda self, copies=1: [slice(0, 5), slice(5, 20)])
    for name, value in zip(names, want, strict=True):
        assert float((getattr(small, name)(x) - value).norm()) > 1e-3


def test_coupled_samples_are_seen_in_passes_and_need_one() -> None:
    layers = [nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)]
    module = nn.Sequential(*layers).double()
    make = functools.partial(Problem.from_module, module, nn.CrossEntropyLoss(), INPUTS, CLASSES)
    with pytest.raises(errors.NoiseError, match="no losses of their own"):
        make(SamplingNoise(), memory=19_200)
    with pytest.raises(errors.ArgumentError, match="one pass over all samples"):
        make(SphericalNoise(0.1), memory=19_200)
    problem = make(SphericalNoise(0.1), memory="1 GiB")
    want = nn.functional.cross_entropy(module(INPUTS), CLASSES).detach()
    torch.testing.assert_close(problem.loss(problem.vector()), want)


@pytest.mark.parametrize("memory", ["x", "2 XiB", "-1 GiB", 0, -1, 1.5, True, "0 GiB"])
def test_what_is_no_memory_is_refused(memory: Any) -> None:
    for call in (
        lambda: KINDS["squares"](memory),
        lambda: Geometry(problems.great_circle(), memory=memory),
    ):
        with pytest.raises(errors.ArgumentError, match="2 GiB"):
            call()


def test_memory_for_less_than_two_samples_is_refused_with_what_is_needed() -> None:
    with pytest.raises(errors.ArgumentError, match="two samples") as caught:
        KINDS["squares"](100)
    KINDS["squares"](caught.value.expected.removeprefix("at least "))


def test_no_measure_of_memory_is_an_error() -> None:
    """What fails with a few samples is evaluated in one pass, where the checks name it."""

    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("my own")

    with pytest.raises(errors.ArgumentError, match="my own"):
        Problem.from_module(Raises(), nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise())


def test_measured_memory_grows_with_the_width() -> None:
    usages = []
    for width in (50, 100):
        module = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()
        problem = Problem.from_module(
            module, nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise()
        )
        usages.append(passes.measure(problem.require_network(), Generators()))
    narrow, wide = usages
    assert narrow is not None
    assert wide is not None
    assert 1.7 < wide.per_block / narrow.per_block < 2.1
    assert narrow.per_block > 2 * 50 * 8  # two layers of this width, at least


MEASURE = """
    import torch
    from torch import nn
    from benchmarks.memory_use import peak
    from manifold_sde import Problem, SamplingNoise

    def block(before, after):
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        return convolution, nn.GroupNorm(2, after), nn.Tanh()

    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    module = nn.Sequential(*block(3, 8), *block(8, 8), *head).double()
    inputs, targets = torch.randn(400, 3, 16, 16), torch.randint(10, (400,))

    def run(memory, n=400):
        start = peak()
        problem = Problem.from_module(
            module, nn.CrossEntropyLoss(), inputs[:n], targets[:n], SamplingNoise(), memory=memory
        )
        x = problem.vector()
        loss, gradient = problem.loss(x), problem.gradient(x)
        if problem.require_network().per_pass < n:
            problem.gradient(torch.stack([x, -x]))
        return peak() - start, loss, gradient

    run("1 GiB", 16)  # what torch takes once
    few, loss, gradient = run("24 MiB")
    many, same_loss, same_gradient = run("1 TiB")
    assert abs(loss - same_loss) < 1e-12 * loss
    assert (gradient - same_gradient).norm() < 1e-12 * gradient.norm()
    print(few, many)
"""


def test_peak_memory_stays_below_the_limit() -> None:
    """24 MiB for 400 images of which one pass takes more than 48; checks, loss and gradient."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    few, many = map(float, done.stdout.split())
    assert few < 24.0
    assert many > 48.0

"""Modules that keep tensors, hooks that make weights, layouts: torch's own SGD as the truth."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from manifold_sde import Problem, SamplingNoise, SphericalNoise, errors
from manifold_sde.networks import copies
from tests.modules import compare_with_torch

GENERATOR = torch.Generator().manual_seed(16)
INPUTS = torch.randn(32, 6, dtype=torch.float64, generator=GENERATOR)
CLASSES = torch.randint(3, (32,), generator=GENERATOR)


def with_fixed_weights(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(1))
    return module


def network() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    with_fixed_weights(module)
    return module


class Keeps(nn.Module):
    """Keeps activations: as an attribute, in a dictionary, in a list inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.last: Tensor | None = None
        self.kept: dict[str, Any] = {"all": []}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.net[:2](x)
        self.kept["last"] = self.last
        self.kept["all"].append(self.last)
        return self.net[2](self.last)


def called(module: nn.Module) -> nn.Module:
    """The module after a call and a backward pass, as in the middle of training."""
    F.cross_entropy(module(INPUTS), CLASSES).backward()
    return module


def weight_norm(dim: int | None) -> nn.Module:
    module = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of the old form
        nn.utils.weight_norm(module[0], dim=dim)  # type: ignore[arg-type]
    return module


def parametrised() -> nn.Module:
    module = network()
    parametrizations.weight_norm(module[0])
    return module


def pruned() -> nn.Module:
    module = network()
    prune.l1_unstructured(module[0], "weight", 0.4)  # type: ignore[no-untyped-call]
    return module


MADE: dict[str, Callable[[], nn.Module]] = {
    "kept activations": lambda: called(Keeps()),
    "weight_norm of all": lambda: weight_norm(None),
    "weight_norm of columns, trained": lambda: called(weight_norm(1)),
    "prune": pruned,
    "prune, trained": lambda: called(pruned()),
}


@pytest.mark.parametrize("which", MADE)
def test_loss_gradient_and_five_steps_are_those_of_torch(which: str) -> None:
    module = MADE[which]()
    problem = Problem.from_module(module, nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise(4))
    x = problem.vector(module)
    compare_with_torch(problem, module, INPUTS, CLASSES)
    assert max(problem.derivative_errors(x).values()) < 1e-4
    for other in (copy.deepcopy(problem), pickle.loads(pickle.dumps(problem))):
        assert torch.equal(other.gradient(x), problem.gradient(x))
    batch = torch.stack([x, 2.0 * x])
    torch.testing.assert_close(problem.outputs(batch, INPUTS[:3]), problem.outputs(batch)[:, :3])


def test_derivatives_through_weight_norm_are_right_where_torch_has_none() -> None:
    problem = Problem.from_module(
        parametrised(), nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise()
    )
    function, x = problem.require_network(), problem.vector()
    a = torch.linspace(-1.0, 1.0, problem.dim, dtype=torch.float64)
    ahead, behind = (problem.gradient(x + h * a) for h in (1e-4, -1e-4))
    got = problem.pointwise.hessian_product(x, a)
    torch.testing.assert_close(got, (ahead - behind) / 2e-4, rtol=1e-6, atol=1e-8)
    with pytest.raises(NotImplementedError, match="_weight_norm"):
        torch.func.jvp(torch.func.grad(lambda z: function(z).sum()), (x,), (a,))


def test_a_call_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin that does not look into containers leaves its activations there."""
    module = called(Keeps())
    assert isinstance(module, Keeps)
    last, count = module.last, len(module.kept["all"])
    problem = Problem.from_module(module, nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise())
    problem.gradient(problem.vector()[None])
    inner = problem.require_network().module
    assert isinstance(inner, Keeps)
    assert torch.equal(inner.last, last)
    assert len(inner.kept["all"]) == len(module.kept["all"]) == count
    assert module.last is last

    monkeypatch.setattr(copies, "_containers", lambda values: iter(()))
    problem.gradient(problem.vector()[None])
    assert len(inner.kept["all"]) == count + 1


class Remembers(nn.Module):
    """The output depends on the call before: on an attribute, or on a list."""

    def __init__(self, in_list: bool) -> None:
        super().__init__()
        self.net, self.in_list = network(), in_list
        self.mean, self.means = torch.zeros(()), [torch.zeros(())]

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        if self.in_list:
            self.means[0] = 0.9 * self.means[0] + out.mean()
            return out * self.means[0]
        self.mean = 0.9 * self.mean + out.mean()
        return out * self.mean


class FixedSize(nn.Module):
    """Takes 32 samples and no other number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(32, -1))


def with_attribute(value: Any) -> nn.Module:
    module = network()
    module.attribute = value
    return module


def scripted(make: Callable[..., Any], *arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return make(network(), *arguments)


def on_meta() -> nn.Module:
    return network().to("meta")


A = errors.ArgumentError
REFUSED: dict[str, tuple[type[Exception], Callable[[], nn.Module], Any, str]] = {
    "script": (A, lambda: scripted(torch.jit.script), INPUTS, "torch.jit.script"),
    "trace": (A, lambda: scripted(torch.jit.trace, INPUTS), INPUTS, "torch.jit"),
    "script inside": (
        A,
        lambda: nn.Sequential(scripted(torch.jit.script), nn.Tanh()),
        INPUTS,
        "compiled: 0",
    ),
    "meta": (A, on_meta, INPUTS, "to_empty"),
    "meta inputs": (errors.DTypeError, network, INPUTS.to("meta"), "no values"),
    "number of samples": (A, FixedSize, INPUTS, r"x\.flatten\(1\)"),
    "parallel": (A, lambda: nn.DataParallel(network()), INPUTS, r"module\.module"),
    "lock": (A, lambda: with_attribute(threading.Lock()), INPUTS, "cannot be copied"),
    "generator": (A, lambda: with_attribute(i for i in "ab"), INPUTS, "cannot be copied"),
    "attribute that counts": (A, lambda: Remembers(False), INPUTS, "the same outputs"),
    "list that counts": (A, lambda: Remembers(True), INPUTS, "the same outputs"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_used_is_refused_with_the_way_out(which: str) -> None:
    kind, make, inputs, words = REFUSED[which]
    with pytest.raises(kind, match=words) as caught:
        Problem.from_module(make(), nn.CrossEntropyLoss(), inputs, CLASSES, SamplingNoise())
    assert isinstance(caught.value, errors.ManifoldSDEError)
    assert caught.value.remedy


def test_one_number_of_samples_is_enough_for_one_loss() -> None:
    """Samples that act on each other are only ever evaluated together."""
    module = nn.Sequential(FixedSize(), nn.BatchNorm1d(3, track_running_stats=False)).double()
    problem = Problem.from_module(
        module, nn.CrossEntropyLoss(), INPUTS, CLASSES, SphericalNoise(0.1)
    )
    want = F.cross_entropy(module(INPUTS), CLASSES).detach()
    torch.testing.assert_close(problem.loss(problem.vector()), want)


def test_criterion_with_weights_that_were_computed() -> None:
    raw = torch.ones(3, dtype=torch.float64, requires_grad=True)
    criterion = nn.CrossEntropyLoss(weight=raw.softmax(0))
    problem = Problem.from_module(network(), criterion, INPUTS, CLASSES, SamplingNoise())
    # Equal weights leave the mean over the samples alone.
    want = F.cross_entropy(problem.outputs(problem.vector()), CLASSES)
    torch.testing.assert_close(problem.loss(problem.vector()), want)

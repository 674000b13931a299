"""The report on scale invariance: what it measures, and that it names each way to break it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifold_sde import (
    DirectionDiffusion,
    LimitingDiffusion,
    Problem,
    SamplingNoise,
    SphericalNoise,
    errors,
)
from manifold_sde.networks import (
    GroupNorm,
    LayerNorm,
    NormalizedMLP,
    ScaleInvarianceReport,
    ScaleInvariantPreResNet,
    WeightNorm,
    scale_invariance_report,
)

GENERATOR = torch.Generator().manual_seed(9)
INPUTS = torch.randn(20, 6, dtype=torch.float64, generator=GENERATOR)
IMAGES = torch.randn(12, 1, 8, 8, dtype=torch.float64, generator=GENERATOR)
CLASSES = torch.randint(3, (20,), generator=GENERATOR)


def drawn(module: nn.Module) -> nn.Module:
    """The module with weights that do not depend on torch's global generator."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.double().parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
    return module


def mlp(
    first: nn.Module | None = None, *, bias: bool = False, head: nn.Module | None = None
) -> nn.Module:
    return drawn(
        nn.Sequential(
            nn.Linear(6, 8, bias=bias),
            LayerNorm(8) if first is None else first,
            nn.Tanh(),
            nn.Linear(8, 4, bias=bias),
            LayerNorm(4),
            nn.Tanh(),
            nn.Linear(4, 3, bias=False) if head is None else head,
        )
    )


def report(module: nn.Module, x: Tensor | None = None, **options: Any) -> ScaleInvarianceReport:
    images = isinstance(module, ScaleInvariantPreResNet)
    inputs = IMAGES if images else INPUTS
    options.setdefault("noise", SphericalNoise(0.1))
    problem = Problem.from_module(
        module, nn.CrossEntropyLoss(), inputs, CLASSES[: len(inputs)], **options
    )
    return scale_invariance_report(problem, x)


def causes(found: ScaleInvarianceReport) -> set[tuple[str, str]]:
    return {(cause.name, cause.kind) for cause in found.causes}


def breaking(found: ScaleInvarianceReport) -> set[str]:
    return {p.name for p in found.parameters if p.breaks}


@pytest.mark.paper("Definition 2.2")
@pytest.mark.parametrize("norm", ["layer", "group", "ghost", "batch"])
def test_an_invariant_network_passes(norm: str) -> None:
    module = ScaleInvariantPreResNet(8, 4, in_channels=1, classes=3, norm=norm, ghost_size=4)
    found = report(module)
    assert found.passed
    assert found.violation < 1e-12
    assert not found.causes
    assert not breaking(found)
    by_name = {p.name: p for p in found.parameters}
    # The convolutions of the stream are scale-invariant together, those inside of blocks alone.
    assert by_name["blocks.0.conv1.weight"].violation < 1e-12
    assert by_name["stem.weight"].violation > 1e-3
    assert by_name["stem.weight"].verdict == "with others"


def test_filters_that_are_invariant_one_by_one() -> None:
    """Each filter before a normalisation of its own channel; with the layer's, all together."""
    found = report(ScaleInvariantPreResNet(8, 4, in_channels=1, classes=3, norm="batch"))
    first = {p.name: p for p in found.parameters}["blocks.0.conv1.weight"]
    assert (first.invariant_rows, first.verdict) == (4, "each of 4 rows")
    found = report(NormalizedMLP((6, 8, 4, 3)))
    assert [p.invariant_rows for p in found.parameters] == [0, 0]
    assert [p.verdict for p in found.parameters] == ["by itself", "by itself"]
    found = report(
        drawn(nn.Sequential(WeightNorm(nn.Linear(6, 5, bias=False)), nn.Tanh(), nn.Linear(5, 3))),
        frozen="2",
    )
    assert [p.verdict for p in found.parameters] == ["each of 5 rows"]


def test_violations_by_hand() -> None:
    """A trained last layer without bias: the terms of Euler's theorem from plain backward."""
    module = mlp()
    found = report(module)
    assert breaking(found) == {"6.weight"}
    assert causes(found) == {("6.weight", "last layer")}
    losses = nn.CrossEntropyLoss(reduction="none")(module(INPUTS), CLASSES)
    weights = list(module.parameters())
    terms, sizes = [], []
    norm = torch.cat([w.detach().flatten() for w in weights]).norm()
    for each in losses:
        gradients = torch.autograd.grad(each, weights, retain_graph=True)
        terms.append(sum((w.detach() * g).sum() for w, g in zip(weights, gradients, strict=True)))
        sizes.append(norm * torch.cat([g.flatten() for g in gradients]).norm())
    by_hand = float(torch.stack(terms).abs().max() / torch.stack(sizes).max())
    # The report also looks near the weights, and at few samples for the sizes.
    assert 0.5 * by_hand < found.violation < 3.0 * by_hand


class Functional(nn.Module):
    """Normalises in its forward pass, with an eps that no layer shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8, bias=False)
        self.outer = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(F.layer_norm(self.inner(x), (8,))))


class Gain(nn.Module):
    """A parameter that multiplies, as some normalisation layers of users have."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


def resnet_with_eps() -> nn.Module:
    module = ScaleInvariantPreResNet(8, 4, in_channels=1, classes=3).double()
    module.norm = nn.GroupNorm(1, 16, affine=False)
    return module


TWINS: dict[str, tuple[Callable[[], ScaleInvarianceReport], set[tuple[str, str]], set[str]]] = {
    "eps": (
        lambda: report(mlp(nn.LayerNorm(8, elementwise_affine=False)), frozen="6"),
        {("1", "eps")},
        {"0.weight"},
    ),
    "eps of a residual network": (
        lambda: report(resnet_with_eps()),
        {("norm", "eps")},
        # Behind the normalisation of its shortcut, the last stage is a stream of its own.
        {"blocks.2.conv2.weight", "blocks.2.shortcut.1.weight"},
    ),
    "bias": (
        lambda: report(mlp(head=nn.Linear(4, 3)), frozen="6.weight"),
        {("6.bias", "bias")},
        {"6.bias"},
    ),
    "last layer": (lambda: report(mlp()), {("6.weight", "last layer")}, {"6.weight"}),
    "last layer with bias": (
        lambda: report(mlp(head=nn.Linear(4, 3))),
        {("6.weight", "last layer"), ("6.bias", "bias")},
        {"6.weight", "6.bias"},
    ),
    "affine parameters": (
        lambda: report(
            drawn(nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3))),
            frozen="2",
        ),
        {("1.weight", "affine"), ("1.bias", "affine"), ("1", "eps")},
        {"0.weight", "1.weight", "1.bias"},
    ),
    "a gain": (
        lambda: report(
            drawn(
                nn.Sequential(nn.Linear(6, 4, bias=False), LayerNorm(4), Gain(), nn.Linear(4, 3))
            ),
            frozen="3",
        ),
        {("2.gain", "affine")},
        {"2.gain"},
    ),
    "fixed statistics": (
        lambda: report(mlp(nn.BatchNorm1d(8, affine=False, eps=0.0)).eval(), frozen="6"),
        {("1", "fixed statistics")},
        {"0.weight"},
    ),
    "eps in the forward pass": (
        lambda: report(drawn(Functional()), frozen="outer"),
        {("inner.weight", "constant")},
        {"inner.weight"},
    ),
    "nothing normalised": (
        lambda: report(
            drawn(
                nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False))
            )
        ),
        {("0.weight", "not normalised"), ("2.weight", "last layer")},
        {"0.weight", "2.weight"},
    ),
}


@pytest.mark.parametrize("which", TWINS)
def test_broken_twins_are_named(which: str) -> None:
    call, wanted, at_fault = TWINS[which]
    found = call()
    assert not found.passed
    assert causes(found) == wanted
    assert breaking(found) == at_fault
    assert all(cause.remedy for cause in found.causes)


def test_what_only_looks_like_a_fault_is_not_called_one() -> None:
    """Biases whose sum with the weights' outputs is normalised scale together with the weights."""
    found = report(mlp(bias=True), frozen="6")
    assert found.passed
    assert {p.name: p.verdict for p in found.parameters}["0.bias"] == "with others"
    # A bias before the normalisation of its own channel cancels.
    module = drawn(nn.Sequential(nn.Linear(6, 4), GroupNorm(1, 4), nn.Linear(4, 3)))
    module[1] = nn.BatchNorm1d(4, affine=False, eps=0.0, track_running_stats=False)
    found = report(module, frozen="2")
    assert found.passed
    assert {p.name: p.verdict for p in found.parameters}["0.bias"] == "no effect on the loss"


def test_it_prints_in_eighty_columns() -> None:
    found = report(
        drawn(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)))
    )
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "NOT scale-invariant",
        "BREAKS IT",
        "1 (eps)",
        "bias=False",
        "frozen=['3.weight']",
    ):
        assert words in text
    text = str(
        report(ScaleInvariantPreResNet(14, 4, in_channels=1, classes=3, norm="ghost", ghost_size=4))
    )
    assert max(map(len, text.splitlines())) <= 80
    assert "frozen, constants of the loss: head.weight" in text
    assert "a ghost batch of 4 samples" in text


def test_the_error_names_layers() -> None:
    problem = Problem.from_module(
        mlp(), nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise(), name="a network"
    )
    with pytest.raises(errors.ScaleInvarianceError, match=r"6\.weight \(last layer\)") as caught:
        problem.require_scale_invariance()
    block = problem.layers["6.weight"]
    assert caught.value.coordinates == tuple(range(block.start, block.stop))


def test_another_point_and_bad_input() -> None:
    problem = Problem.from_module(mlp(), nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise())
    x = problem.vector() * 3.0
    assert scale_invariance_report(problem, x).violation != report(mlp()).violation
    with pytest.raises(errors.ShapeError, match="one point"):
        scale_invariance_report(problem, x[None])
    with pytest.raises(errors.ArgumentError, match="from_module"):
        scale_invariance_report(Problem(lambda z: (z[0] / z.norm()) ** 2, 3, SphericalNoise(1)))


def test_equations_refuse_a_trained_last_layer_with_its_way_out() -> None:
    """Also where the layer starts at 0, so that at the start nothing of it is seen."""
    for head_size in (1.0, 0.0):
        module = mlp()
        with torch.no_grad():
            module[-1].weight.mul_(head_size)  # type: ignore[operator]
        data = nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise(4)
        with pytest.raises(errors.ScaleInvarianceError, match=r"caused by 6\.weight") as error:
            LimitingDiffusion(Problem.from_module(module, *data))
        assert "frozen=['6.weight']" in str(error.value)
        assert "MixingClock" in str(error.value)
        LimitingDiffusion(Problem.from_module(module, *data, frozen=["6.weight"]))


def test_equations_refuse_affine_gains_with_their_way_out() -> None:
    module = mlp(nn.LayerNorm(8, bias=False), head=LayerNorm(4))
    problem = Problem.from_module(
        module, nn.CrossEntropyLoss(), INPUTS, CLASSES, SphericalNoise(0.1)
    )
    with pytest.raises(errors.ScaleInvarianceError, match="elementwise_affine=False"):
        DirectionDiffusion(problem)

"""Architectures: scale-invariant in all trained weights, the published sizes, no global seed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifold_sde import Problem, SphericalNoise, errors
from manifold_sde.networks import NormalizedMLP, ScaleInvariantPreResNet

GENERATOR = torch.Generator().manual_seed(5)
IMAGES = torch.randn(8, 1, 8, 8, dtype=torch.float64, generator=GENERATOR)
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
NORMS = ("layer", "group", "ghost", "batch")


def network(kind: str, norm: str) -> nn.Module:
    if kind == "mlp":
        return NormalizedMLP((64, 12, 8, 3), norm=norm, groups=2, ghost_size=4)
    return ScaleInvariantPreResNet(
        8, 4, in_channels=1, classes=3, norm=norm, ghost_size=4, activation=F.softplus
    )


def made(module: nn.Module, **options: object) -> Problem:
    return Problem.from_module(
        module, nn.CrossEntropyLoss(), IMAGES, CLASSES, SphericalNoise(0.1), **options
    )


@pytest.mark.paper("Assumption 2.3")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["mlp", "preresnet"])
def test_scale_invariant_at_every_norm(kind: str, norm: str) -> None:
    problem = made(network(kind, norm))
    start = problem.vector().double()
    directions = torch.stack([start / start.norm(), torch.ones_like(start)])
    here = problem.loss(directions)
    for norm_of_x in (1e-3, 1.0, 1e3):
        x = norm_of_x * directions
        assert float((problem.loss(x) - here).abs().max()) < 1e-12
        assert float(problem.scale_invariance_violation(x)) < 1e-12


@pytest.mark.parametrize("twin", ["eps", "bias", "head"])
def test_broken_twin_scale_invariance(twin: str) -> None:
    module = network("mlp", "layer")
    assert isinstance(module, NormalizedMLP)
    match twin:
        case "eps":
            module.norms[0] = nn.LayerNorm(12, elementwise_affine=False)
        case "bias":
            module.head = nn.Linear(8, 3)
            module.head.weight.requires_grad_(False)
        case "head":
            module.head.requires_grad_(True)
    problem = made(module)
    x = (1e-3 if twin == "eps" else 1.0) * problem.vector().double()
    assert float(problem.scale_invariance_violation(x)) > 1e-4


def test_published_sizes() -> None:
    """Depth 32 and width 16: 31 convolutions, two shortcuts, 64 features, counted by hand."""
    module = ScaleInvariantPreResNet(32, 16)
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.kernel_size == (3, 3) for m in convolutions) == 31
    assert sum(m.kernel_size == (1, 1) for m in convolutions) == 2
    assert module.head.weight.shape == (10, 64)
    by_hand = 9 * (3 * 16 + 10 * 16**2 + 16 * 32 + 9 * 32**2 + 32 * 64 + 9 * 64**2)
    by_hand += 16 * 32 + 32 * 64
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == by_hand
    assert not module.head.weight.requires_grad
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["head.weight"]
    x = torch.zeros(2, 3, 32, 32)
    assert module.blocks(module.stem(x)).shape == (2, 64, 8, 8)
    assert module(x).shape == (2, 10)


def test_the_stream_has_degree_one() -> None:
    """Scaling all convolutions scales what is added to the stream: as in the paper's network."""
    module = ScaleInvariantPreResNet(8, 4, in_channels=1).double()
    before = module.blocks(module.stem(IMAGES))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 3.0
    torch.testing.assert_close(module.blocks(module.stem(IMAGES)), 3.0 * before)


@pytest.mark.parametrize("kind", ["mlp", "preresnet"])
def test_seeds_and_no_global_generator(kind: str) -> None:
    def weights(seed: int | torch.Generator) -> Tensor:
        if kind == "mlp":
            module: nn.Module = NormalizedMLP((6, 5, 2), seed=seed)
        else:
            module = ScaleInvariantPreResNet(8, 2, seed=seed)
        return nn.utils.parameters_to_vector(module.parameters())

    before = torch.random.get_rng_state()
    first, again, other = weights(1), weights(1), weights(2**63 + 1)
    drawn = weights(torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert torch.equal(first, drawn)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: NormalizedMLP((64, 10)), "at least three"),
        (lambda: NormalizedMLP((64, 0, 10)), "positive integers"),
        (lambda: NormalizedMLP((64, 8, 10), norm="instance"), "'layer', 'group'"),
        (lambda: NormalizedMLP((64, 8, 10), norm="ghost"), "ghost_size=32"),
        (lambda: NormalizedMLP((64, 8, 10), seed=-1), "seed"),
        (lambda: ScaleInvariantPreResNet(10), r"6n \+ 2"),
        (lambda: ScaleInvariantPreResNet(8, 0), "width"),
        (lambda: ScaleInvariantPreResNet(8, 6, norm="group"), "multiple"),
    ],
)
def test_errors_name_the_way_out(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(errors.ArgumentError, match=words):
        call()

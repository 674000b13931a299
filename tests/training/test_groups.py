"""Scale-invariant groups against what is known of each architecture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifold_sde.errors import ArgumentError, DTypeError, MixingClockWarning, NonFiniteError
from manifold_sde.networks import NormalizedMLP, ScaleInvariantPreResNet
from manifold_sde.training import ScaleGroups, scale_invariant_groups


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def found(module: nn.Module, inputs: Any, **options: Any) -> dict[str, str]:
    groups = scale_invariant_groups(module, inputs, **options)
    return {" ".join(group.parameters): group.described for group in groups}


def reasons(module: nn.Module, inputs: Any) -> dict[str, str]:
    return {o.name: o.reason for o in scale_invariant_groups(module, inputs).others}


class Own(nn.Module):
    """A module of a function of parameters w0, w1, ... and x."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for i, shape in enumerate(shapes):
            self.register_parameter(f"w{i}", nn.Parameter(0.5 * randn(*shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters())


def mlp(norm: nn.Module, bias: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12, bias=bias), norm, nn.GELU(), nn.Linear(12, 4))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


@pytest.mark.paper("Definition 2.2", "Lemma 2.5")
@pytest.mark.parametrize(
    ("norm", "parts"),
    [
        (nn.LayerNorm(12), "whole"),
        (nn.RMSNorm(12), "whole"),
        (nn.BatchNorm1d(12), "each row"),
        (nn.GroupNorm(3, 12), "each 4 rows"),
        (nn.LayerNorm(12, elementwise_affine=False), "whole"),
    ],
)
def test_normalisation_after_a_layer(norm: nn.Module, parts: str) -> None:
    assert found(mlp(norm), randn(32, 6)) == {"0.weight": parts}


@pytest.mark.parametrize(
    ("norm", "bias"),
    [(nn.LayerNorm(12), True), (nn.RMSNorm(12), True), (nn.BatchNorm1d(12), False)],
)
def test_a_bias_scales_with_its_weight_or_has_no_effect(norm: nn.Module, bias: bool) -> None:
    module = mlp(norm, bias=True)
    if bias:
        assert found(module, randn(32, 6)) == {"0.weight 0.bias": "jointly"}
    else:
        assert found(module, randn(32, 6)) == {"0.weight": "each row"}
        assert reasons(module, randn(32, 6))["0.bias"] == "no effect on the output"


def test_weight_norm_and_spectral_norm() -> None:
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    assert found(linear, randn(16, 6)) == {"parametrizations.weight.original1": "each row"}
    g = reasons(linear, randn(16, 6))["parametrizations.weight.original0"]
    assert g == "its bias stays"


def test_weight_standardisation() -> None:
    def standardised(x: Tensor, w: Tensor, head: Tensor) -> Tensor:
        flat = w.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True) + 1e-8).sqrt()
        return F.relu(F.conv2d(x, flat.view_as(w))).mean((2, 3)) @ head

    module = Own(standardised, (5, 3, 3, 3), (5, 2))
    assert found(module, randn(8, 3, 6, 6)) == {"w0": "each row"}
    others = scale_invariant_groups(module, randn(8, 3, 6, 6)).others
    assert others[0].degree == pytest.approx(1.0)


class Attention(nn.Module):
    """Self-attention, with queries and keys normalised per head or not."""

    def __init__(self, dim: int, heads: int, *, normalised: bool, fused: bool) -> None:
        super().__init__()
        self.heads, self.normalised = heads, normalised
        self.qkv = nn.Linear(dim, 3 * dim, bias=False) if fused else None
        if not fused:
            self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).chunk(3, -1) if self.qkv else (self.q(x), self.k(x), self.v(x))
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in qkv)
        if self.normalised:
            q, k = (4.0 * F.normalize(z, dim=-1) for z in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_attention_with_normalised_queries_and_keys() -> None:
    module = Attention(16, 2, normalised=True, fused=False)
    assert found(module, randn(8, 5, 16)) == {"q.weight": "each 8 rows", "k.weight": "each 8 rows"}
    fused = Attention(16, 2, normalised=True, fused=True)
    assert found(fused, randn(8, 5, 16)) == {"qkv.weight": "each 8 rows in 0:32"}
    groups = scale_invariant_groups(fused, randn(8, 5, 16))
    assert groups["qkv.weight"].parts == 4
    with pytest.warns(MixingClockWarning, match="nothing decays: weight_decay=0.1"):
        own = groups.optimizer_groups(weight_decay=0.1)
    assert [group["weight_decay"] for group in own] == [0.0]  # rows only
    assert groups.optimizer_groups(lr=0.1)[0]["weight_decay"] == 0.0
    assert found(Attention(16, 2, normalised=False, fused=False), randn(8, 5, 16)) == {}


def test_pre_norm_transformer() -> None:
    layer = nn.TransformerEncoderLayer(
        16, 2, 24, batch_first=True, norm_first=True, dropout=0.1, activation="gelu"
    )
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
    module = nn.Sequential(nn.Linear(6, 16), encoder, nn.Linear(16, 3))
    (names,) = found(module, randn(8, 5, 6))
    written = {"0.weight", "0.bias"} | {
        f"1.layers.{i}.{name}.{kind}"
        for kind in ("weight", "bias")
        for i in (0, 1)
        for name in ("self_attn.out_proj", "linear2")
    }
    assert set(names.split()) == written
    assert reasons(module, randn(8, 5, 6))["1.layers.0.linear1.weight"] == "its bias stays"


def test_biases_that_have_hardly_moved_from_zero_are_seen() -> None:
    module = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 4))
    with torch.no_grad():
        module[0].bias.copy_(1e-9 * randn(12))
    assert found(module, randn(16, 6)) == {"0.weight 0.bias": "jointly"}


def test_a_gain_beside_a_bias_that_is_zero_is_not_scale_invariant() -> None:
    module = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.RMSNorm(8)
    )
    names = found(module, randn(32, 6))
    assert names["1.weight 1.bias"] == "jointly"
    assert "1.weight" not in names


def test_post_norm_transformer() -> None:
    """The skip keeps what is written into it from being scale-invariant."""
    layer = nn.TransformerEncoderLayer(
        16, 2, 24, batch_first=True, dropout=0.0, activation="gelu", bias=False
    )
    module = nn.Sequential(nn.Linear(6, 16, bias=False), nn.LayerNorm(16), layer)
    assert found(module, randn(8, 5, 6)) == {"0.weight": "whole"}
    why = reasons(module, randn(8, 5, 6))
    assert why["2.self_attn.out_proj.weight"] == "added to a skip or a bias"
    assert why["2.linear2.weight"] == "added to a skip or a bias"


class Block(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if width != width_in:
            conv = nn.Conv2d(width_in, width, 1, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def test_resnet_with_shortcuts() -> None:
    module = nn.Sequential(Block(3, 6), Block(6, 6), nn.Flatten(), nn.Linear(6 * 25, 3))
    convolutions = {
        f"{n}.weight": "each row" for n, m in module.named_modules() if isinstance(m, nn.Conv2d)
    }
    assert len(convolutions) == 5
    assert found(module, randn(16, 3, 5, 5)).items() >= convolutions.items()
    running = module[0].bn1.running_mean.clone()
    assert torch.equal(running, torch.zeros(6))  # left as it was
    module.eval()
    groups = scale_invariant_groups(module, randn(16, 3, 5, 5))
    assert not convolutions.keys() & {n for g in groups for n in g.parameters}
    assert "running statistics (eval mode)" in str(groups)


def test_networks_of_this_package_are_scale_invariant() -> None:
    net = ScaleInvariantPreResNet(depth=8, width=4, in_channels=1, classes=3, norm="group")
    groups = scale_invariant_groups(net.double(), randn(4, 1, 8, 8).double())
    assert groups.share == 1.0
    assert max(group.violation for group in groups) < 1e-10
    perceptron = NormalizedMLP((6, 8, 8, 3)).double()
    assert scale_invariant_groups(perceptron, randn(9, 6).double()).share == 1.0


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)))


def test_tied_embeddings() -> None:
    tokens = torch.arange(24).reshape(4, 6) % 10  # one token is never seen
    assert found(Tied(tied=False), tokens)["embed.weight"] == "each row"
    tied = scale_invariant_groups(Tied(tied=True), tokens)
    assert "embed.weight" not in {n for g in tied for n in g.parameters}


def test_cosine_head() -> None:
    def cosine(x: Tensor, w: Tensor) -> Tensor:
        return 10.0 * F.normalize(x, dim=-1) @ F.normalize(w, dim=-1).T

    assert found(Own(cosine, (4, 6)), randn(16, 6)) == {"w0": "each row"}


@pytest.mark.paper("Definition 2.2", "Lemma 2.5")
def test_columns_of_a_transposed_layer() -> None:
    module = Own(lambda x, w: torch.tanh(F.batch_norm(x @ w, None, None, training=True)), (6, 5))
    assert found(module, randn(32, 6)) == {"w0": "each column"}


def test_plain_networks_have_none_and_it_says_so() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
    groups = scale_invariant_groups(module, randn(16, 6))
    assert len(groups) == 0
    assert groups.share == 0.0
    assert "No tensor, row or set of tensors can be scaled" in str(groups)
    (head,) = [o for o in groups.others if o.name == "2.weight"]
    assert head.degree == pytest.approx(1.0)
    assert head.reason == "output of degree 1"
    # Two layers without bias: degree 1 in each, and the logits are no group.
    plain = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    assert [o.degree for o in scale_invariant_groups(plain, randn(16, 6)).others] == [
        pytest.approx(1.0)
    ] * 2


def test_large_eps_is_seen() -> None:
    small = mlp(nn.LayerNorm(12, elementwise_affine=False))
    with torch.no_grad():
        small[0].weight.mul_(0.05)
    (group,) = scale_invariant_groups(small, randn(64, 6))
    assert group.eps_matters
    assert 1e-3 < group.violation < 2e-2
    with torch.no_grad():
        small[0].weight.mul_(0.05)
    assert found(small, randn(64, 6)) == {}
    assert reasons(small, randn(64, 6))["0.weight"] == "the eps of a normalisation is too large"


def test_the_size_of_a_tensor_does_not_make_it_invariant() -> None:
    """Of 10^6 weights even what is not invariant has a small cosine with its gradient."""
    module = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Tanh())
    with torch.no_grad():
        module[0].weight.mul_(3.0)
    x = randn(8, 1000)
    out = module(x)
    (g,) = torch.autograd.grad(out, module[0].weight, randn(*out.shape))
    w = module[0].weight.detach()
    cosine = float((w * g).sum() / (w.norm() * g.norm()))
    assert abs(cosine) < 1e-3  # a threshold of 1e-3 on the cosine would take it
    groups = scale_invariant_groups(module, x, passes=4)
    assert len(groups) == 0
    assert groups.others[0].violation > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    module = mlp(nn.LayerNorm(12)).to(dtype)
    assert found(module, randn(64, 6).to(dtype))["0.weight"] == "whole"
    assert "3.weight" in reasons(module, randn(64, 6).to(dtype))


class PatchTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.position = nn.Parameter(0.02 * torch.randn(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", 1e-5, True, True)
        self.blocks = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class ResidualStream(nn.Module):
    """Gated layers without bias and a root-mean-square norm of one's own, as language models have.

    Scaling the gates' second factor instead of what is written into the stream would do too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 12), nn.Linear(12, 11, bias=False)
        self.gate, self.up = (
            nn.ModuleList(nn.Linear(12, 16, bias=False) for _ in (0, 1)) for _ in (0, 1)
        )
        self.down = nn.ModuleList(nn.Linear(16, 12, bias=False) for _ in (0, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for gate, up, down in zip(self.gate, self.up, self.down, strict=True):
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            x = x + down(F.silu(gate(y)) * up(y))
        return self.head(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_what_is_written_into_a_residual_stream() -> None:
    tokens = torch.arange(24).reshape(4, 6) % 11
    assert found(ResidualStream(), tokens) == {
        "embed.weight down.0.weight down.1.weight": "jointly"
    }


def test_vision_transformer() -> None:
    (names,) = found(PatchTransformer(), randn(8, 3, 8, 8))
    assert set(names.split()) >= {"token", "position", "patch.weight", "patch.bias"}
    assert len(names.split()) == 8


def test_the_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = torch.get_rng_state()
    first = scale_invariant_groups(module, randn(16, 6))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in module.parameters())
    assert str(scale_invariant_groups(module, randn(16, 6))) == str(first)


def test_no_more_than_the_passes_asked_for() -> None:
    calls = 0

    def backward_counted(module: nn.Module, x: Tensor) -> Tensor:
        def count(_: Tensor) -> None:
            nonlocal calls
            calls += 1

        out = module(x)
        out.register_hook(count)
        return out

    module = mlp(nn.LayerNorm(12)).requires_grad_(True)
    with torch.enable_grad():
        scale_invariant_groups(
            module,
            randn(16, 6),
            forward=lambda m, x: backward_counted(m, x) if torch.is_grad_enabled() else m(x),
        )
    assert calls == 12
    with pytest.raises(ArgumentError, match=r"integer in \[4, 20\]"):
        scale_invariant_groups(module, randn(16, 6), passes=21)


def test_inputs_of_any_kind() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(6, 4, bias=False), nn.LayerNorm(4)

        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
            return {"logits": self.norm(self.layer(x)) * scale, "ids": torch.arange(3)}

    for inputs in (randn(8, 6), (randn(8, 6), 2.0), {"x": randn(8, 6), "scale": 2.0}):
        assert found(Model(), inputs) == {"layer.weight": "whole"}
    frozen = Model()
    frozen.layer.weight.requires_grad_(False)
    assert found(frozen, randn(8, 6)) == {}


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(DTypeError, match="not a torch module"):
        scale_invariant_groups(torch.tanh, randn(2, 3))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no parameter of the module is trained"):
        scale_invariant_groups(nn.Linear(3, 3).requires_grad_(False), randn(2, 3))
    with pytest.raises(ArgumentError, match="no tensor of real numbers"):
        scale_invariant_groups(nn.Linear(3, 3), randn(2, 3), forward=lambda m, x: 1.0)
    with pytest.raises(ArgumentError, match="do not depend on its parameters"):
        scale_invariant_groups(nn.Linear(3, 3), randn(2, 3), forward=lambda m, x: m(x).detach())
    groups = scale_invariant_groups(mlp(nn.LayerNorm(12)), randn(16, 6))
    with pytest.raises(ArgumentError, match="no scale-invariant group of this name"):
        groups["3.weight"]


def test_what_is_not_finite_is_named_with_its_place() -> None:
    inputs = randn(16, 6)
    module = nn.Sequential(mlp(nn.LayerNorm(12)), nn.Flatten())
    spoilt = inputs.clone()
    spoilt[3, 2] = spoilt[4, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"inputs are not") as error:
        scale_invariant_groups(module, spoilt)
    assert error.value.received == "nan in inputs at [3, 2], the first of 2"
    with pytest.raises(NonFiniteError, match=r"nan in inputs\['x'\] at \[3, 2\]"):
        scale_invariant_groups(module, {"x": spoilt}, forward=lambda m, x: m(x["x"]))
    mended = scale_invariant_groups(module, spoilt, forward=lambda m, x: m(x.nan_to_num()))
    assert mended.names == ("0.0.weight",)
    with pytest.raises(NonFiniteError, match=r"outputs are not[^\n]*\n[^\n]* inf in outputs at"):
        scale_invariant_groups(module, inputs, forward=lambda m, x: m(x).exp() / 0.0)
    # Finite outputs of a root at 0, whose gradient is not: Euler's sum is NaN, and not small.
    with pytest.raises(NonFiniteError, match=r"gradients are not[^\n]*\n[^\n]* in 0.0.weight at"):
        scale_invariant_groups(module, inputs, forward=lambda m, x: (0.0 * m(x)).sqrt())
    module[0][0].weight.data[1, 2] = torch.inf
    with pytest.raises(NonFiniteError, match=r"inf in 0\.0\.weight at \[1, 2\]"):
        scale_invariant_groups(module, inputs)


def test_inputs_of_another_dtype_are_named() -> None:
    module = mlp(nn.LayerNorm(12))
    with pytest.raises(DTypeError, match=r"hint:     inputs.float\(\), or model.double\(\)"):
        scale_invariant_groups(module, randn(16, 6).double())
    with pytest.raises(RuntimeError, match="cannot be multiplied"):  # the module's own errors stay
        scale_invariant_groups(module, randn(16, 5))

    def wrong(module: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("a type of my own")

    with pytest.raises(RuntimeError, match="of my own"):
        scale_invariant_groups(module, randn(16, 6), forward=wrong)


def test_optimizer_groups_and_the_table() -> None:
    groups: ScaleGroups = scale_invariant_groups(mlp(nn.LayerNorm(12), bias=True), randn(16, 6))
    own = groups.optimizer_groups(lr=0.1, weight_decay=0.01, betas=(0.9, 0.95))
    optimizer = torch.optim.AdamW(own)
    decayed, rest = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [(12, 6), (12,)]
    assert (decayed["weight_decay"], rest["weight_decay"], rest["lr"]) == (0.01, 0.0, 0.1)
    assert sum(len(g["params"]) for g in own) == 6
    text = str(groups)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "0.weight + 1 more" in text
    assert "    with 0.bias" in text.splitlines()
    assert "affine weight of a LayerNorm" in text
    assert repr(groups) == "<1 scale-invariant groups of Sequential>"


def test_a_training_loops_autocast_does_not_hide_groups() -> None:
    """Weights in single precision: the sums are not rounded to half."""
    module, inputs = mlp(nn.LayerNorm(12)), randn(16, 6)
    expected = scale_invariant_groups(module, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = scale_invariant_groups(module, inputs)
    assert inside.groups == expected.groups != ()


def test_a_forward_that_casts_by_itself_has_no_false_eps() -> None:
    """As Accelerate patches it: single precision outside, half inside."""
    module, inputs = mlp(nn.LayerNorm(12)), randn(64, 6)
    plain = type(module).forward

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(module, x).float()

    module.forward = forward  # type: ignore[method-assign]
    groups = scale_invariant_groups(module, inputs)
    assert [group.name for group in groups] == ["0.weight"]
    assert not groups[0].eps_matters
    # The broken twin takes the rounding from the weights alone.
    assert groups[0].violation > 1e-3

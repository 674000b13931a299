"""Modules as people build them, and what becomes of each: the table in docs/networks.md.

``python -m tests.modules`` makes a problem of each and writes the table.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from manifold_sde import Problem, SamplingNoise, errors, rng
from manifold_sde.loss import PerSampleFunction
from manifold_sde.noise.sampling import draws
from manifold_sde.solvers import run_sgd
from manifold_sde.torch_norms import ElementaryFunction

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
MARK = "| Module | What becomes of it |\n| --- | --- |"
GENERATOR = torch.Generator().manual_seed(7)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


ROWS, SEQUENCES, IMAGES = normal(8, 4), normal(8, 3, 4), normal(8, 4, 4, 2)
PERMUTED = IMAGES.permute(0, 3, 1, 2)
CHANNELS_LAST = PERMUTED.contiguous(memory_format=torch.channels_last)
WORDS = torch.randint(1, 5, (8, 3), generator=GENERATOR)
PADDED = WORDS.masked_fill(torch.arange(8)[:, None] + torch.arange(3) > 7, 0)
CLASSES = torch.randint(3, (8,), generator=GENERATOR)
CAUSAL = torch.ones(3, 3, dtype=torch.bool).tril()
BIAS = normal(3, 3).masked_fill(~CAUSAL, -torch.inf)


class Module(nn.Module):
    """Layers, and a function of them and of the input."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def pooled(layer: nn.Module, call: Callable[[Any, Tensor], Tensor] | None = None) -> nn.Module:
    """Outputs from the mean over the places of a sequence."""
    call = call or (lambda m, x: m.layer(x))
    return Module(lambda m, x: m.head(call(m, x).mean(1)), layer=layer, head=nn.Linear(4, 3))


def encoder(**options: Any) -> nn.Module:
    options = {"dropout": 0.0, "batch_first": True} | options
    return nn.TransformerEncoderLayer(4, 2, 4, **options)


def decoder(m: Any, x: Tensor) -> Tensor:
    return m.layer(x, x)


def attention(call: Callable[[Any, Tensor], Tensor] | None = None, **options: Any) -> nn.Module:
    return pooled(
        nn.MultiheadAttention(4, 2, batch_first=True, **options),
        call or (lambda m, x: m.layer(x, x, x)[0]),
    )


def heads(
    of_pair: Callable[[Any, Tensor], Tensor] = lambda m, t: t,
    norm: Callable[[], nn.Module] = nn.Identity,
    **options: Any,
) -> nn.Module:
    """Attention of two heads, with queries and keys made by a function."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
        q, k = of_pair(m.q_norm, q), of_pair(m.k_norm, k)
        v = F.scaled_dot_product_attention(q, k, v, **options)
        return m.head(v.transpose(1, 2).flatten(2).mean(1))

    return Module(forward, qkv=nn.Linear(4, 12), q_norm=norm(), k_norm=norm(), head=nn.Linear(4, 3))


def rotated(_: Any, t: Tensor) -> Tensor:
    """Rotary embedding by halves."""
    angle = torch.arange(t.shape[-2], dtype=t.dtype, device=t.device)[:, None]
    a, b = t.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def rotated_by_numbers(_: Any, t: Tensor) -> Tensor:
    """Rotary embedding by complex numbers."""
    angle = torch.arange(t.shape[-2], dtype=t.dtype, device=t.device)[:, None]
    pairs = torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


class SingleRMSNorm(nn.Module):
    """As in published language models."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float32)
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        return F.conv2d(x, (self.weight - mean) / deviation, self.bias)


def mlp(*middle: nn.Module, width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), *(middle or (nn.Tanh(),)), nn.Linear(4, 3))


def normed(how: Callable[..., Any], **options: Any) -> nn.Module:
    """A network whose first layer has a weight that is computed."""
    module = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of the old form
        how(module[0], **options)
    return module


def convolutions(convolution: Callable[..., nn.Module] = nn.Conv2d, first: Any = None) -> nn.Module:
    layers = [convolution(2, 2, 3), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*([first] if first else []), *layers)


def words(masked: bool = False, **options: Any) -> nn.Module:
    def forward(m: Any, tokens: Tensor) -> Tensor:
        rows = m.rows(tokens)
        return m.head(torch.tanh(rows * (tokens != 0)[..., None] if masked else rows).mean(1))

    module = Module(forward, rows=nn.Embedding(5, 4, **options), head=nn.Linear(4, 3))
    with torch.no_grad():
        module.rows.weight[0] = 0.0  # type: ignore[index]
    return module


def last(layer: nn.Module) -> nn.Module:
    return Module(lambda m, x: m.layer(x)[0][:, -1], layer=layer)


def two_steps(cell: nn.Module) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = m.cell(x[:, 1], m.cell(x[:, 0]))
        return state if isinstance(state, Tensor) else state[0]

    return Module(forward, cell=cell)


def checkpointed(**options: Any) -> nn.Module:
    return Module(
        lambda m, x: m.head(checkpoint(m.body, x, **options)), body=mlp()[:2], head=nn.Linear(4, 3)
    )


@dataclass
class Case:
    """A module, its inputs, and a module that takes its place where it is refused.

    Attributes:
        make: Makes the module.
        inputs: The inputs.
        instead: What to write instead.
        other: Makes the module that is written so.
    """

    make: Callable[[], nn.Module]
    inputs: Tensor
    instead: str = ""
    other: Callable[[], nn.Module] | None = None


def evaluated(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make().eval()


MODULES: dict[str, Case] = {
    "`TransformerEncoderLayer`": Case(lambda: pooled(encoder()), SEQUENCES),
    "`TransformerEncoderLayer`, norm first, `gelu`, `eval`": Case(
        lambda: pooled(encoder(norm_first=True, activation="gelu")).eval(), SEQUENCES
    ),
    "`TransformerEncoder`, causal, `eval`": Case(
        lambda: pooled(
            nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=False),
            lambda m, x: m.layer(x, BIAS.masked_fill(CAUSAL, 0.0), is_causal=True),
        ).eval(),
        SEQUENCES,
    ),
    "`TransformerDecoderLayer`": Case(
        lambda: pooled(nn.TransformerDecoderLayer(4, 2, 4, dropout=0.0, batch_first=True), decoder),
        SEQUENCES,
    ),
    "`MultiheadAttention`": Case(attention, SEQUENCES),
    "`MultiheadAttention`, `eval`": Case(evaluated(attention), SEQUENCES),
    "`MultiheadAttention`, masked, without weights": Case(
        lambda: attention(
            lambda m, x: m.layer(x, x, x, need_weights=False, attn_mask=~CAUSAL)[0],
            add_bias_kv=True,
        ),
        SEQUENCES,
    ),
    "`scaled_dot_product_attention`": Case(heads, SEQUENCES),
    "`scaled_dot_product_attention`, causal": Case(lambda: heads(is_causal=True), SEQUENCES),
    "`scaled_dot_product_attention`, a mask that hides all": Case(
        lambda: heads(attn_mask=CAUSAL.tril(-1), scale=0.3), SEQUENCES
    ),
    "`scaled_dot_product_attention`, a mask that is added": Case(
        lambda: heads(attn_mask=BIAS), SEQUENCES
    ),
    "qk-norm, `LayerNorm`": Case(
        lambda: heads(lambda m, t: m(t), lambda: nn.LayerNorm(2)), SEQUENCES
    ),
    "qk-norm, `RMSNorm`": Case(lambda: heads(lambda m, t: m(t), lambda: nn.RMSNorm(2)), SEQUENCES),
    "qk-norm, `normalize`": Case(lambda: heads(lambda m, t: F.normalize(t, dim=-1)), SEQUENCES),
    "rotary embedding": Case(lambda: heads(rotated), SEQUENCES),
    "rotary embedding, complex": Case(lambda: heads(rotated_by_numbers), SEQUENCES),
    "`RMSNorm`": Case(lambda: mlp(nn.RMSNorm(4), nn.Tanh()), ROWS),
    "`RMSNorm` by `.to(torch.float32)`": Case(
        lambda: mlp(SingleRMSNorm(4), nn.Tanh()),
        ROWS,
        "`nn.RMSNorm`, or the same without `.to(torch.float32)`",
        lambda: mlp(nn.RMSNorm(4, eps=1e-6), nn.Tanh()),
    ),
    "`weight_norm`, hook": Case(lambda: normed(nn.utils.weight_norm), ROWS),
    "`weight_norm`, parametrization": Case(lambda: normed(parametrizations.weight_norm), ROWS),
    "`spectral_norm`, hook": Case(
        lambda: normed(nn.utils.spectral_norm),
        ROWS,
        "`module.eval()`: the iteration of the norm stands still",
        lambda: normed(nn.utils.spectral_norm).eval(),
    ),
    "`spectral_norm`, parametrization": Case(
        lambda: normed(parametrizations.spectral_norm),
        ROWS,
        "`module.eval()`",
        lambda: normed(parametrizations.spectral_norm).eval(),
    ),
    "`orthogonal`": Case(lambda: normed(parametrizations.orthogonal), ROWS),
    "`orthogonal`, Householder": Case(
        lambda: normed(parametrizations.orthogonal, orthogonal_map="householder"),
        ROWS,
        '`orthogonal_map="cayley"`: weights are rounded to integers in this one',
        lambda: normed(parametrizations.orthogonal, orthogonal_map="cayley"),
    ),
    "weight standardisation": Case(lambda: convolutions(StandardisedConv2d), PERMUTED),
    "`Embedding`": Case(words, PADDED),
    "`Embedding`, `padding_idx` with padding": Case(
        lambda: words(padding_idx=0),
        PADDED,
        "`rows * (tokens != 0)[..., None]` without `padding_idx`",
        lambda: words(masked=True),
    ),
    "`Embedding`, `padding_idx` without padding": Case(lambda: words(padding_idx=0), WORDS),
    "`EmbeddingBag`": Case(
        lambda: nn.Sequential(nn.EmbeddingBag(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        WORDS,
        "`Embedding` and `.mean(1)`",
        lambda: Module(
            lambda m, x: m.head(torch.tanh(m.rows(x).mean(1))),
            rows=nn.Embedding(5, 4),
            head=nn.Linear(4, 3),
        ),
    ),
    "`GLU`": Case(lambda: mlp(nn.GLU(), width=8), ROWS),
    "SwiGLU": Case(
        lambda: Module(
            lambda m, x: m.head(F.silu(m.gate(x)) * m.value(x)),
            gate=nn.Linear(4, 4),
            value=nn.Linear(4, 4),
            head=nn.Linear(4, 3),
        ),
        ROWS,
    ),
    "gradient checkpointing": Case(
        lambda: checkpointed(use_reentrant=False),
        ROWS,
        "the layers themselves; `memory=` bounds what a pass takes",
        mlp,
    ),
    "`RNN`, `relu`, two layers": Case(
        lambda: last(nn.RNN(4, 3, 2, nonlinearity="relu", batch_first=True)), SEQUENCES
    ),
    "`LSTM`, both directions": Case(
        lambda: last(nn.LSTM(4, 3, batch_first=True, bidirectional=True, bias=False)), SEQUENCES
    ),
    "`LSTM`, projected": Case(
        lambda: last(nn.LSTM(4, 4, proj_size=3, batch_first=True)), SEQUENCES
    ),
    "`GRU`": Case(lambda: last(nn.GRU(4, 3, batch_first=True)), SEQUENCES),
    "`GRU` on packed sequences": Case(
        lambda: Module(
            lambda m, x: m.layer(
                pack_padded_sequence(x, torch.full((len(x),), x.shape[1]), batch_first=True)
            )[1][0],
            layer=nn.GRU(4, 3, batch_first=True),
        ),
        SEQUENCES,
        "the padded ones, and of each the output at its last place",
        lambda: last(nn.GRU(4, 3, batch_first=True)),
    ),
    "`RNNCell`": Case(lambda: two_steps(nn.RNNCell(4, 3)), SEQUENCES),
    "`LSTMCell`": Case(lambda: two_steps(nn.LSTMCell(4, 3)), SEQUENCES),
    "`GRUCell`": Case(lambda: two_steps(nn.GRUCell(4, 3)), SEQUENCES),
    "permuted data": Case(convolutions, PERMUTED),
    "`channels_last` data and weights": Case(
        lambda: convolutions().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        CHANNELS_LAST,
    ),
    "`channels_last` in the forward pass": Case(
        lambda: convolutions(
            first=Module(lambda m, x: x.contiguous().to(memory_format=torch.channels_last))
        ),
        PERMUTED,
    ),
}


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    """The module in double precision with fixed generic weights."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return make().double()


def problem_of(module: nn.Module, inputs: Tensor, batch_size: int = 4) -> Problem:
    return Problem.from_module(
        module, nn.CrossEntropyLoss(), inputs, CLASSES, SamplingNoise(batch_size)
    )


def what_becomes_of(case: Case) -> tuple[str, nn.Module, Problem | None]:
    """What the table says of a module, the module, and its problem where it has one."""
    module = prepared(case.make)
    try:
        problem = problem_of(module, case.inputs)
    except errors.ManifoldSDEError:
        return f"refused; write {case.instead}", module, None
    function = problem.pointwise.function
    assert isinstance(function, PerSampleFunction)
    replaced = isinstance(function.function, ElementaryFunction)
    return "replaced" if replaced else "works", module, problem


def drawn(seed: int, step: int, batch_size: int, n_samples: int) -> Tensor:
    """The numbers of the samples that a step of path 0 draws."""
    key, zero = rng.seed_key(seed), torch.zeros(1, dtype=torch.int64)
    uniforms = rng.uniforms(
        key, rng.STREAM_SGD_UNIFORM, zero, torch.tensor(step), batch_size, torch.float64
    )
    return draws(uniforms[:, 0], n_samples)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def compare_with_torch(
    problem: Problem, module: nn.Module, inputs: Tensor, classes: Tensor
) -> None:
    """Loss, gradient and five steps of ``torch.optim.SGD`` on the module, which it trains."""
    x = problem.vector(module)
    close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    module.zero_grad()
    loss = F.cross_entropy(module(inputs), classes)
    loss.backward()
    close(problem.loss(x), loss.detach())
    close(problem.gradient(x), torch.cat([p.grad.flatten() for p in module.parameters()]))

    run = run_sgd(problem, x, lr=0.1, weight_decay=0.01, steps=[0, 5], seed=3, compile=False)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.01)
    for step in range(5):
        chosen = drawn(3, step, 4, len(classes))
        optimiser.zero_grad()
        F.cross_entropy(module(inputs[chosen]), classes[chosen]).backward()
        optimiser.step()
    close(run.ys[-1], weights(module))
    assert float((run.ys[-1] - x).norm()) > 0.01


# The table.

_ROW = re.compile(r"^\| (.+?) \| (works|replaced|refused.*?) \|$", re.MULTILINE)


def table() -> dict[str, str]:
    """What docs/networks.md says of each module."""
    return dict(_ROW.findall(PAGE.read_text(encoding="utf-8").partition(MARK)[2]))


def write_table() -> None:
    """Make a problem of every module, and write the table."""
    rows = [f"| {name} | {what_becomes_of(case)[0]} |" for name, case in tqdm(MODULES.items())]
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    _, _, tail = rest.partition("\n\n")
    PAGE.write_text(head + MARK + "\n".join(["", *rows]) + "\n\n" + tail, encoding="utf-8")


if __name__ == "__main__":
    write_table()

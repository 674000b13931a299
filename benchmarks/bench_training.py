"""What the training clock adds to a step of a transformer, and what finding its groups takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import group_memory
from benchmarks.rows import Row, one_thread, seconds
from manifold_sde.training import MixingClock

TITLE = "The training clock beside a step, pre-norm transformer, float32"
PEERS: tuple[str, ...] = ()
#: Share of a step that the clock may take.
OVERHEAD = 0.02
#: Width, layers, sequences and their length; steps whose hooks are timed.
SIZES, QUICK_SIZES = (384, 6, 8, 128), (16, 1, 2, 4)
STEPS = 20
#: Width of the transformer whose groups are looked for, of 28 million parameters.
GROUPS_WIDTH = 768


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: A small network: it shows that everything runs.
    """
    found = []
    with one_thread():
        for name, make in OPTIMIZERS.items():
            found.append(against_a_step(name, make, *(QUICK_SIZES if quick else SIZES)))
    if not quick:
        found.append(group_memory.row(GROUPS_WIDTH))
    return found


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "clock, AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "clock, SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-4),
}


def against_a_step(
    name: str,
    make: Callable[[Any], torch.optim.Optimizer],
    width: int,
    layers: int,
    batch: int,
    length: int,
) -> Row:
    """The hooks of a step and reading the clock every 20 steps, over a step without them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(
        layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
    )
    model = nn.Sequential(nn.Linear(64, width), encoder, nn.Linear(width, 100))
    x, y = torch.randn(batch, length, 64), torch.randint(100, (batch * length,))
    optimizer = make(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y).backward()
        optimizer.step()

    alone = seconds(step, 3)
    optimizer = make(model.parameters())  # one that has made no step
    clock = MixingClock(model, optimizer, inputs=x[:2], sampling="iid")
    clock.detach()
    clock.steps = 100  # past the first hundred, which are no different with every=1
    spent = 0.0

    def timed(hook: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            nonlocal spent
            start = time.process_time()
            hook(*args)
            spent += time.process_time() - start

        return call

    before = optimizer.register_step_pre_hook(timed(clock._before))
    after = optimizer.register_step_post_hook(timed(clock._after))
    for _ in range(STEPS):
        optimizer.step()
    timed(lambda: clock.values())()
    before.remove()
    after.remove()
    count = sum(p.numel() for p in model.parameters())
    return Row(
        name,
        1e3 * spent / STEPS,
        1e3 * alone,
        "the step",
        "ms",
        spent / STEPS / alone,
        OVERHEAD,
        f"{count / 1e6:.3g} million parameters, {batch * length} tokens a step",
    )

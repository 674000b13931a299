"""``python -m benchmarks.group_memory WHAT WIDTH``: peak memory beside a transformer's weights.

``groups`` looks for its scale-invariant groups, ``training`` makes two steps of AdamW on the same
inputs, in a process of its own each, which prints how many megabytes its peak lies above what the
model took.
"""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from benchmarks.memory_use import peak
from benchmarks.rows import Row
from manifold_sde.training import scale_invariant_groups

LAYERS = 4
#: No more memory than training.
SAME = 1.0


def spend(what: str, width: int) -> float:
    """Megabytes that it takes beside the model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(8, width), encoder, nn.LayerNorm(width), nn.Linear(width, 10))
    x, before = torch.randn(2, 16, 8), peak()
    if what == "groups":
        scale_invariant_groups(model, x)
    else:
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    return peak() - before


def row(width: int) -> Row:
    """The row of the table."""
    costs = [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for command in (
            [sys.executable, "-m", "benchmarks.group_memory", what, str(width)]
            for what in ("groups", "training")
        )
    ]
    note = f"megabytes beside the weights, {LAYERS} layers of width {width}; two steps of AdamW"
    ratio = costs[0] / costs[1]
    return Row("groups, peak memory", *costs, "training", "MB", ratio, SAME, note)


if __name__ == "__main__":
    print(f"{spend(sys.argv[1], int(sys.argv[2])):.1f}")

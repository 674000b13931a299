"""The noise of a batch: its trace, the signal beside it, and how much of it is fresh each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_sde.errors import ArgumentError
from manifold_sde.number_arrays import Array
from manifold_sde.training.watch import Watch


@dataclass(frozen=True)
class BatchNoise:
    """The noise of the gradients of batches, of all scale-invariant weights together.

    Attributes:
        trace: tr Σ of a batch, from the difference of the gradients of its halves.
        signal: Squared norm of the mean gradient, from their product; it may come out negative.
        repeated: Half the squared difference of two passes over the same batch.
        batches: Number of batches that this is a mean of.
    """

    trace: float
    signal: float
    repeated: float
    batches: int = 1

    @property
    def fresh(self) -> float:
        """Share f of the noise that is fresh at each visit, between 0 and 1."""
        return min(1.0, max(0.0, self.repeated / self.trace)) if self.trace > 0.0 else 0.0

    @property
    def share(self) -> float:
        """Share of E |g|^2 that is noise, between 0 and 1."""
        whole = self.trace + max(self.signal, 0.0)
        return self.trace / whole if whole > 0.0 else 0.0

    def merged(self, other: BatchNoise) -> BatchNoise:
        """The mean over the batches of both."""
        n, m = self.batches, other.batches
        mine, theirs = ((z.trace, z.signal, z.repeated) for z in (self, other))
        trace, signal, repeated = (
            (n * a + m * b) / (n + m) for a, b in zip(mine, theirs, strict=True)
        )
        return BatchNoise(trace, signal, repeated, n + m)

    def state(self) -> dict[str, Any]:
        """Its numbers."""
        return dict(vars(self))


def measure_noise(
    model: nn.Module,
    lanes: Sequence[tuple[Watch, Array]],
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    again: Any,
    seed: int,
) -> BatchNoise:
    """Measure the noise of a batch by four backward passes; see ``MixingClock.measure``."""
    size = _size(batch)
    if size < 2:
        raise ArgumentError(
            "a batch of one sample has no halves",
            received=f"{size} sample",
            expected="at least two samples",
            remedy="measure with a batch of the size that is trained with",
        )
    half = size // 2
    tensors = {name: t for watch, _ in lanes for name, t in watch.tensors.items()}
    tensors = {name: t for name, t in tensors.items() if t.requires_grad}
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = sorted({t.device.index or 0 for t in tensors.values() if t.is_cuda})

    def gradient(samples: Any, draw: int) -> list[Tensor]:
        torch.manual_seed(seed + draw)
        value = loss(model, samples)
        if value.dim():
            raise ArgumentError(
                "loss does not give a number",
                received=f"a tensor of shape {tuple(value.shape)}",
                expected="the mean loss of the batch",
                remedy="loss=lambda model, batch: criterion(model(batch[0]), batch[1])",
            )
        found = torch.autograd.grad(value, list(tensors.values()), allow_unused=True)
        return [
            torch.zeros_like(t) if g is None else g
            for g, t in zip(found, tensors.values(), strict=True)
        ]

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return float(sum((x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)))

    with torch.random.fork_rng(devices), torch.enable_grad():
        first = gradient(_part(batch, 0, half), 1)
        second = gradient(_part(batch, half, 2 * half), 2)
        squares, product = dot(first, first) + dot(second, second), dot(first, second)
        first = gradient(batch, 3)
        second = gradient(batch if again is None else again, 4)
        repeated = dot(first, first) + dot(second, second) - 2.0 * dot(first, second)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    scale = 2 * half / size
    return BatchNoise((squares - 2.0 * product) / 4.0 * scale, product, repeated / 2.0)


def what_explores(told: bool) -> str:
    """What little fresh noise means, going on in a line of a clock.

    Args:
        told: Whether it is known that every sample comes once an epoch.
    """
    line = (
        f";\n{'' if told else 'if '}every sample comes once an epoch, "
        "the noise of an epoch sums to 0, and only\nwhat is fresh at each visit explores "
        "the minimisers, though norms turn the same"
    )
    if told:
        return line
    return f'{line};\nif batches are drawn independently, all of it does: sampling="iid"'


def _size(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((len(v) for v in values if isinstance(v, Tensor) and v.dim()), 0)


def _part(batch: Any, start: int, stop: int) -> Any:
    """The samples from start to stop."""
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: _part(value, start, stop) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_part(value, start, stop) for value in batch)
    return batch

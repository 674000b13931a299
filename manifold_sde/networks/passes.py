"""How many samples of a network go into one pass, so that its memory stays below a limit.

The gradient of a few samples is computed while the tensors that are alive are counted; memory grows
with each sample by the same amount.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manifold_sde import reverse_mode
from manifold_sde.arguments import describe_bytes
from manifold_sde.errors import ArgumentError
from manifold_sde.loss import follow
from manifold_sde.networks.function import NetworkFunction
from manifold_sde.networks.randomness import Generators
from manifold_sde.torch_norms import ElementaryFunction

#: Memory of one pass, where the user gives none: fixed, so that results do not depend on the
#: machine.
DEFAULT_MEMORY = 1 << 30
#: Part of the memory that the tensors of a pass are planned to take. With half of it, what glibc's
#: allocator holds between passes went to the limit.
_PLANNED = 0.25
_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


@dataclass(frozen=True)
class Usage:
    """Memory of one gradient in bytes: what it takes anyway, and for each block of samples."""

    fixed: int
    per_block: int

    def needed(self, blocks: int) -> str:
        """The memory that so many blocks take in one pass, in words."""
        return describe_bytes((self.fixed + blocks * self.per_block) / _PLANNED)


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and what convolutions take inside.

    Attributes:
        most: The largest number of bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._seen: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from loading a compiler to keep this mode away from it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value)
        inside = _columns(func, args, result) if func in _CONVOLUTIONS else 0
        self.most = max(self.most, self._now + inside)
        return result

    def _count(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self._now += size

        def release() -> None:
            self._seen.discard(key)
            self._now -= size

        weakref.finalize(storage, release)


def _columns(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Bytes of the patches that a convolution writes out side by side."""
    backward = func is _CONVOLUTIONS[1]
    outputs, weight = (args[0], args[2]) if backward else (result, args[1])
    groups = args[-2] if backward else args[8]
    places = outputs.numel() // outputs.shape[1]
    return int(places * weight[0].numel() * groups * outputs.element_size())


def measure(function: NetworkFunction, generators: Generators) -> Usage | None:
    """Memory of the gradient of the network's mean loss, from two and four blocks of samples.

    Args:
        function: The network.
        generators: The generators of random numbers, which are as before then.

    Returns:
        What it takes; ``None`` where there are no more than four blocks, or the network cannot be
        called with so few: it is then evaluated in one pass.
    """
    if function.n_blocks <= 4:
        return None
    try:
        with generators.unmoved_by("the module"):
            two, four = (_most_alive(function.of_blocks(range(count))) for count in (2, 4))
    except Exception:  # what is wrong with the network is told by the checks that follow
        return None
    per_block = max(1, (four - two) // 2)
    return Usage(max(0, two - 2 * per_block), per_block)


def blocks_per_pass(usage: Usage, memory: int) -> int:
    """The number of blocks of samples whose gradient fits into a memory.

    Raises:
        ArgumentError: If two do not: whether samples act on each other could not be seen.
    """
    blocks = math.floor((_PLANNED * memory - usage.fixed) / usage.per_block)
    if blocks < 2:
        raise ArgumentError(
            "the memory is not enough for the gradient of two samples",
            received=describe_bytes(memory),
            expected=f"at least {usage.needed(2)}",
            remedy=f'memory="{usage.needed(16)}" for passes of sixteen; a smaller network',
        )
    return blocks


def require_one_pass(usage: Usage, memory: int, blocks: int) -> None:
    """Refuse a memory that one pass over all blocks exceeds, where it cannot be divided.

    Raises:
        ArgumentError: With the memory that is needed.
    """
    if _PLANNED * memory < usage.fixed + blocks * usage.per_block:
        raise ArgumentError(
            "the memory is not enough for one pass over all samples, which depend on each other",
            received=describe_bytes(memory),
            expected=f"at least {usage.needed(blocks)} for {blocks} blocks of samples",
            remedy="fewer samples; LayerNorm, GroupNorm or GhostBatchNorm, after which samples "
            "can be evaluated in several passes",
        )


def _most_alive(few: NetworkFunction) -> int:
    x = few.test_point
    constants = {name: value.clone() for name, value in few.constants_for(x).items()}

    def loss(z: Tensor) -> Tensor:
        outputs = few.outputs(z, dict(constants))
        return few.criterion.sample_losses(outputs, follow(few.targets, z)).mean()

    with _Alive() as alive:
        reverse_mode.gradient(ElementaryFunction(loss), x)
    return alive.most

"""Counter-based random numbers: a path's noise depends on its own indices alone.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) written in torch integer arithmetic. It has no state, so the noise of a path is the same
alone or among thousands, in any order, on any device and after a resume; and it compiles together
with the step that uses it. Every number is a function of

    (seed, stream, path, step, component),

and where the noise belongs to the nodes of a tree, of (seed, stream, path, level, position,
component). Streams keep the uses apart: SGD and the SDEs never share a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.arguments import check_integer

Key = tuple[Tensor | int, Tensor | int]
"""Two 32-bit words, as ints or 0-dimensional tensors."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_STEP_BITS = 48
# The level of a node takes the top bits of the word that counts blocks of four components.
_LEVEL_SHIFT = 24

#: Number of steps that are told apart, or of positions in one level of a tree.
STEPS = 1 << _STEP_BITS
#: Number of levels of a tree that are told apart, and of components that a node can have.
LEVELS = 1 << (32 - _LEVEL_SHIFT)
NODE_COMPONENTS = 4 << _LEVEL_SHIFT

STREAM_SGD_NORMAL = 1
STREAM_SGD_UNIFORM = 2
STREAM_SDE = 3
STREAM_SDE_AUXILIARY = 4
STREAM_SGD_EPOCH = 5


def seed_key(seed: int) -> tuple[int, int]:
    """The two 32-bit words of Philox' key that belong to a seed.

    Raises:
        ArgumentError: If the seed is not an integer in [0, 2^64).
    """
    value = check_integer("seed", seed, 0, 2**64 - 1, "pass seed=0, 1, 2, ...")
    return value & _MASK, value >> 32


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Key
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on broadcastable int64 tensors holding 32-bit words.

    Args:
        counter: Four tensors of 32-bit words.
        key: Two 32-bit words.

    Returns:
        Four int64 tensors of 32-bit words, uniform and independent of each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two 32-bit words.

    The product itself would overflow int64, and compiled code may not let a signed integer
    overflow: compilers drop the masks that would repair it. Both multipliers exceed 2^31, so that
    the product with (multiplier - 2^32) fits, and differs by the word times 2^32.
    """
    short = word * (multiplier - (1 << 32))
    return (short >> 32) + word, short & _MASK


def _words(
    key: Key,
    stream: int,
    paths: Tensor,
    step: Tensor,
    blocks: int,
    level: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox words for (blocks, *step): component block first; the last of step is the path's."""
    block = torch.arange(blocks, dtype=torch.int64, device=paths.device)
    block = block.reshape(-1, *([1] * step.dim()))
    step = step.unsqueeze(0)
    if level is not None:
        block = block + (level << _LEVEL_SHIFT)
    zero = torch.zeros_like(block) + torch.zeros_like(step) + torch.zeros_like(paths)
    counter = (
        block + zero,
        paths + zero,
        (step & _MASK) + zero,
        (step >> 32) + (stream << (_STEP_BITS - 32)) + zero,
    )
    return philox(counter, key)


def _unit_interval(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Words to numbers strictly inside (0, 1): 32 bits in double, 23 bits in single precision.

    The half that keeps them away from 0 takes one bit of the 24 that single precision has.
    """
    if dtype == torch.float64:
        return (words.to(dtype) + 0.5) * 2.0**-32
    return ((words >> 9).to(dtype) + 0.5) * 2.0**-23


def uniforms(
    key: Key,
    stream: int,
    paths: Tensor,
    step: Tensor,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """Independent uniforms on (0, 1).

    Args:
        key: From :func:`seed_key`, as ints or 0-dimensional tensors.
        stream: Number of the stream, below 2^16.
        paths: Path indices (n,), int64, below 2^32.
        step: Step or cell indices, int64, any shape (*s), below 2^48.
        count: Number of components.
        dtype: float64 or float32.

    Returns:
        Tensor (count, *s, n).
    """
    words = _words(key, stream, paths, step.unsqueeze(-1), -(-count // 4))
    return _components([_unit_interval(w, dtype) for w in words], count)


def normals(
    key: Key,
    stream: int,
    paths: Tensor,
    step: Tensor,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """Independent standard normals by Box–Muller from 32-bit uniforms.

    The arguments are those of :func:`uniforms`. The largest value that can occur is 6.8 in double
    and 5.8 in single precision; the mass beyond it is 1e-11 and 8e-9.

    Returns:
        Tensor (count, *s, n).
    """
    words = _words(key, stream, paths, step.unsqueeze(-1), -(-count // 4))
    return _components(_box_muller(words, dtype), count)


def node_normals(
    key: Key,
    stream: int,
    paths: Tensor,
    level: Tensor,
    position: Tensor,
    scale: Tensor,
    count: int,
) -> Tensor:
    """Independent normals that belong to the nodes of a tree, drawn in double precision.

    Nodes of level 0 have the numbers of the steps that are their positions. The components come
    next to last, so that each node's numbers lie together.

    Args:
        key: From :func:`seed_key`, as ints or 0-dimensional tensors.
        stream: Number of the stream, below 2^16.
        paths: Path indices (n,), int64, below 2^32.
        level: Levels of the nodes, int64, below :data:`LEVELS`; broadcasts with ``position``.
        position: Positions of the nodes, int64, below 2^48: ``(*s, n)``, or ``(*s, 1)`` where they
            are those of all paths.
        scale: Standard deviations, which broadcast with the nodes of the paths, ``(*s, n)``.
        count: Number of components, at most :data:`NODE_COMPONENTS`.

    Returns:
        Tensor (*s, count, n).
    """
    words = _words(key, stream, paths, position, -(-count // 4), level)
    # Scaled one by one: after stacking, compiled code would compute all the words four times.
    values = [(v * scale).movedim(0, -2) for v in _box_muller(words, torch.float64)]
    return torch.stack(values, dim=-2).flatten(-3, -2)[..., :count, :]


def _box_muller(words: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Four words to four independent standard normals."""
    u = [_unit_interval(w, dtype) for w in words]
    values = []
    for radius_source, angle_source in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2.0 * torch.log(radius_source))
        angle = (2.0 * torch.pi) * angle_source
        values += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return values


def _components(values: list[Tensor], count: int) -> Tensor:
    """Interleave the four words of each block: component 4 b + w does not depend on ``count``."""
    return torch.stack(values, dim=1).flatten(0, 1)[:count]

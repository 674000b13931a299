"""Counter-based random numbers: a path's noise depends on its own indices alone.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) written in torch integer arithmetic. It has no state, so the noise of a path is the same
alone or among thousands, in any order, on any device and after a resume; and it compiles together
with the step that uses it. Every number is a function of

    (seed, stream, path, step, component).

Streams keep the uses apart: SGD and the SDEs never share a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.derivatives import integer
from manifold_sde.errors import ArgumentError

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_STEP_BITS = 48

#: Number of steps that are told apart.
STEPS = 1 << _STEP_BITS

STREAM_SGD_NORMAL = 1
STREAM_SGD_UNIFORM = 2


def seed_key(seed: int) -> tuple[int, int]:
    """The two 32-bit words of Philox' key that belong to a seed.

    Raises:
        ArgumentError: If the seed is not an integer in [0, 2^64).
    """
    value = integer(seed)
    if value is None or not 0 <= value < 2**64:
        raise ArgumentError(
            "the seed is not usable",
            received=repr(seed),
            expected="an integer in [0, 2**64)",
            remedy="pass seed=0, 1, 2, ...",
        )
    return value & _MASK, value >> 32


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor | int, Tensor | int]
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
    key: tuple[Tensor | int, Tensor | int], stream: int, paths: Tensor, step: Tensor, blocks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox words for (blocks, *step, paths): component block first, path last."""
    block = torch.arange(blocks, dtype=torch.int64, device=paths.device)
    block = block.reshape(-1, *([1] * step.dim()), 1)
    step = step.reshape(1, *step.shape, 1)
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
    key: tuple[Tensor | int, Tensor | int],
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
    words = _words(key, stream, paths, step, -(-count // 4))
    return _components([_unit_interval(w, dtype) for w in words], count)


def normals(
    key: tuple[Tensor | int, Tensor | int],
    stream: int,
    paths: Tensor,
    step: Tensor,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """Independent standard normals by Box and Muller from 32-bit uniforms.

    The arguments are those of :func:`uniforms`. The largest value that can occur is 6.8 in double
    and 5.8 in single precision; the mass beyond it is 1e-11 and 8e-9.

    Returns:
        Tensor (count, *s, n).
    """
    words = _words(key, stream, paths, step, -(-count // 4))
    u = [_unit_interval(w, dtype) for w in words]
    values = []
    for radius_source, angle_source in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2.0 * torch.log(radius_source))
        angle = (2.0 * torch.pi) * angle_source
        values += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return _components(values, count)


def _components(values: list[Tensor], count: int) -> Tensor:
    """Interleave the four words of each block: component 4 b + w does not depend on ``count``."""
    return torch.stack(values, dim=1).flatten(0, 1)[:count]

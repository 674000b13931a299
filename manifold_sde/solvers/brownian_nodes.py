"""The normals of the nodes of a Brownian tree, and the checks of what names a node."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from manifold_sde import rng
from manifold_sde.arguments import check_integer, is_known_false
from manifold_sde.compile import compile_function
from manifold_sde.compile.random_numbers import fill, fills
from manifold_sde.errors import ArgumentError, DTypeError, ShapeError
from manifold_sde.solvers.brownian_times import DEEPEST, check_time

#: Level of a node that stands for the increment over a whole cell. The bridge that halves an
#: interval of level l has level 1 + l, so that no two numbers are the same.
CELL = 0
BRIDGE = 1
#: Numbers that are drawn at once: few enough for what is computed on the way to stay in the cache.
AT_ONCE = 1 << 16
#: Nodes that a compiled kernel draws: few sizes, as compiling takes seconds.
KERNEL_NODES = (512, 64, 8, 1)

_kernels: dict[tuple[object, ...], Callable[..., Tensor]] = {}


class Nodes:
    """Normals of the nodes of the trees of n paths, scaled as the Brownian bridge needs them.

    Args:
        seed: Seed.
        paths: Path indices (n,).
        cell: Length of a cell.
        antithetic: Whether paths 2i and 2i + 1 have the same numbers with opposite signs.
        compiled: Whether drawing is compiled.
    """

    def __init__(
        self, seed: int, paths: Tensor, cell: float, antithetic: bool, compiled: bool
    ) -> None:
        self.paths = paths
        self.device = paths.device
        self.compiled = compiled
        self._drawn = paths >> 1 if antithetic else paths
        odd = (paths & 1).to(torch.float64)
        self._signs = 1.0 - 2.0 * odd if antithetic else torch.ones_like(odd)
        bridges = [0.5 * math.sqrt(cell * 2.0**-level) for level in range(DEEPEST)]
        self._mirrored: int | None = None
        self._scales = self.tensor([math.sqrt(cell), *bridges], torch.float64)
        self._antithetic = antithetic
        self._words = rng.seed_key(seed)
        self._key = tuple(self.tensor(word) for word in self._words)
        self._fills = compiled and fills(torch.float64, self.device)

    def mirror(self, level: int) -> None:
        """Exchange the halves of the intervals of a level; numbers beside W change their sign."""
        self._mirrored = level
        self._scales[BRIDGE + level] *= -1.0

    def at_once(self, count: int) -> int:
        """How many nodes of so many components are best drawn together; a size of a kernel."""
        fit = AT_ONCE // max(1, count * len(self.paths))
        return next((size for size in KERNEL_NODES if size <= fit), 1)

    def draw(self, stream: int, count: int, levels: Tensor, positions: Tensor) -> Tensor:
        """Normals of nodes; those of the stream of W are scaled.

        Args:
            stream: The stream.
            count: Number of components.
            levels: Levels of the nodes, (k, n), or (k, 1) for all paths.
            positions: Their positions, of the same shape.

        Returns:
            Tensor (k, count, n), double precision.
        """
        parts = list(self._parts(stream, count, levels, positions))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def each(self, stream: int, count: int, levels: Tensor, positions: Tensor) -> Iterator[Tensor]:
        """As :meth:`draw`, one node after the other, (count, n): fewer are held at once."""
        for part in self._parts(stream, count, levels, positions):
            yield from part

    def _parts(
        self, stream: int, count: int, levels: Tensor, positions: Tensor
    ) -> Iterator[Tensor]:
        if stream == rng.STREAM_SDE:
            scales = self._scales[levels]
        else:
            scales = torch.ones_like(levels, dtype=torch.float64)
        if self._mirrored is not None:
            # Nodes of the two halves of an interval change places, with all that is below them.
            below = levels - self._mirrored - (2 if stream == rng.STREAM_SDE else 1)
            positions = torch.where(below < 0, positions, positions ^ (1 << below.clamp(min=0)))
            scales = scales if stream == rng.STREAM_SDE else -scales
        most = self.at_once(count)
        begin, k = 0, len(levels)
        while begin < k:
            size = min(most, k - begin)
            if self.compiled and not self._fills:
                # Half of what a kernel draws may be wasted.
                size = next(s for s in KERNEL_NODES if s <= most and s < 2 * (k - begin))
            part = [t[begin : begin + size] for t in (levels, positions, scales)]
            yield self._draw_part(stream, count, size, part)
            begin += size

    def _draw_part(self, stream: int, count: int, size: int, nodes: list[Tensor]) -> Tensor:
        def draw(
            key0: Tensor,
            key1: Tensor,
            paths: Tensor,
            signs: Tensor,
            levels: Tensor,
            positions: Tensor,
            scales: Tensor,
        ) -> Tensor:
            scale = scales * signs
            return rng.node_normals((key0, key1), stream, paths, levels, positions, scale, count)

        shared = (*self._key, self._drawn, self._signs)
        if not self.compiled:
            return draw(*shared, *nodes)
        if self._fills:
            levels, positions, scales = nodes
            return fill(
                torch.empty(len(positions), count, len(self.paths), dtype=torch.float64),
                normal=True,
                key=self._words,
                stream=stream,
                paths=self._drawn,
                steps=positions,
                levels=levels,
                scales=scales * self._signs if self._antithetic else scales,
                components_first=False,
            )
        k, width = nodes[0].shape
        # A kernel takes the layout that it was compiled for.
        if k < size:
            nodes = [torch.nn.functional.pad(t, (0, 0, 0, size - k)) for t in nodes]
        nodes = [t.contiguous() for t in nodes]
        key = (stream, count, len(self.paths), size, width, self.device)
        if key not in _kernels:
            _kernels[key] = compile_function(draw, (*shared, *nodes))
        drawn: Tensor = _kernels[key](*shared, *nodes)
        return drawn[:k]

    def tensor(self, values: object, dtype: torch.dtype = torch.int64) -> Tensor:
        """A tensor on the device of the paths."""
        return torch.tensor(values, dtype=dtype, device=self.device)

    # Checks of what each path has for itself.

    def check_levels(self, level: int | Tensor, max_level: int | None) -> tuple[Tensor, int]:
        """Levels as a tensor (n,) or (1,), and the largest one that can occur."""
        if isinstance(level, Tensor):
            if max_level is None:
                raise ArgumentError(
                    "max_level is missing",
                    received="a tensor of levels without it",
                    expected="the largest level that can occur",
                    remedy="max_level=20 for steps down to 2**-20 cells",
                )
            deepest = check_integer("max_level", max_level, 0, DEEPEST)
            return self.check_own("level", level, torch.int64), deepest
        most = DEEPEST if max_level is None else check_integer("max_level", max_level, 0, DEEPEST)
        number = check_integer("level", level, 0, most)
        return self.tensor([number]), number

    def check_own(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Check a tensor that has a value for each path."""
        n = len(self.paths)
        if not isinstance(value, Tensor) or value.dtype != dtype:
            got = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise DTypeError(
                f"{name} is not a tensor of the right kind",
                received=got,
                expected=f"a tensor ({n},) of {dtype}",
                remedy=f"{name}.to({dtype})",
            )
        if tuple(value.shape) != (n,):
            raise ShapeError(
                f"{name} does not have one value for each path",
                received=str(tuple(value.shape)),
                expected=str((n,)),
                remedy=f"{name}.expand({n}) where all the paths share it",
            )
        return value


def check_cell(value: object) -> float:
    """A length of time, or an error."""
    cell = check_time("cell", value)
    if cell <= 0.0:
        raise ArgumentError(
            "cell is not a length of time",
            received=repr(value),
            expected="a positive number",
            remedy="the step size, or the step size times a power of two",
        )
    return cell


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """Double or single precision, or an error."""
    if dtype not in (torch.float64, torch.float32):
        raise DTypeError(
            "Brownian paths are real numbers of double or single precision",
            received=f"dtype={dtype}",
            expected="torch.float64 or torch.float32",
            remedy="dtype=torch.float64",
        )
    return dtype


def check_paths(paths: int | Tensor, device: torch.device | str | None) -> Tensor:
    """Indices (n,) of n paths, or those that are given."""
    if not isinstance(paths, Tensor):
        number = check_integer("paths", paths, 1, 2**32)
        return torch.arange(number, dtype=torch.int64, device=device)
    if paths.dtype != torch.int64:
        raise DTypeError(
            "path indices are not integers",
            received=f"dtype {paths.dtype}",
            expected="torch.int64",
            remedy="paths.to(torch.int64)",
        )
    if paths.dim() != 1:
        raise ShapeError(
            "path indices are not a vector",
            received=str(tuple(paths.shape)),
            expected="(n,)",
            remedy="paths.reshape(-1)",
        )
    if is_known_false(((paths >= 0) & (paths < 2**32)).all()):
        raise ArgumentError(
            "path indices are out of range",
            received=f"from {int(paths.min())} to {int(paths.max())}",
            expected="indices in [0, 2**32)",
            remedy="number the paths from 0 on",
        )
    return (paths if device is None else paths.to(device)).contiguous()


def halves(values: Tensor, bridge: Tensor) -> Tensor:
    """Increments (c, m, n) to those of the halves, (2 c, m, n)."""
    both = values.new_empty(len(values), 2, *values.shape[1:])
    torch.add(bridge, values, alpha=0.5, out=both[:, 0])
    torch.sub(values, both[:, 0], out=both[:, 1])
    return both.flatten(0, 1)

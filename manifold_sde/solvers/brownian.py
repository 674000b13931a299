r"""Brownian paths that are functions of time: a virtual Brownian tree on counter-based numbers.

The time axis is divided into cells of one length. The increment over a cell is drawn; an increment
dW over an interval of length h is halved by the Brownian bridge, with a normal Z of its own,

.. math::

    dW_\text{left} = \tfrac12 dW + \tfrac12\sqrt h\, Z, \qquad
    dW_\text{right} = dW - dW_\text{left},

and the halves again. The 2^l parts of a cell are its dyadic intervals of level l. Z is a function
of (seed, path, level, position, component), so that W is the same function of time for every step
size, order of queries and number of paths, and nothing has to be stored (Salmon et al., SC 2011;
the tree goes back to Gaines and Lyons, SIAM J. Appl. Math. 57, 1997, and was made virtual by Li,
Wong, Chen and Duvenaud, AISTATS 2020).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manifold_sde import rng
from manifold_sde.arguments import check_flag, check_integer
from manifold_sde.errors import ArgumentError, ShapeError
from manifold_sde.solvers.brownian_nodes import (
    BRIDGE,
    CELL,
    DEEPEST,
    Nodes,
    check_cell,
    check_dtype,
    check_paths,
    halves,
)
from manifold_sde.solvers.brownian_times import (
    cell_ticks_of,
    check_time,
    require_times,
    ticks_of,
    wrong_order,
)

_TICKS = 1 << DEEPEST
_BLOCKS_KEPT = 4
_CELLS_AT_ONCE = 512


class BrownianPath:
    r"""Independent m-dimensional Brownian motions, one a path, each a function of its time.

    W is evaluated to rounding at every dyadic time. Other times are read to the nearest multiple
    of 2^-(40 - b) cells, where b is the number of bits of the cell's number: a change of the time
    since ``start`` by at most one part in 2^40, or by 2^-41 cells in the first cell. The variance
    of an increment is therefore exact but for that change of its ends. (Times on a grid that
    were added up are so read as what was meant.)

    It can be handed to ``torchsde.sdeint`` as ``bm``, with ``ts`` in double precision. A step that
    is a dyadic part of a cell costs about one normal a component; at any other time W needs up to
    40. So let the cell be the step times a power of two.

    Numbers are drawn and added up in double precision; ``dtype`` float32 rounds what comes out. It
    is the same path in both.

    Args:
        seed: Seed, an integer in [0, 2^64).
        n_components: Number m of components of a path.
        paths: Number n of paths, or their indices (n,), int64, in [0, 2^32).
        cell: Length of a cell in time.
        start: Time at which W is 0.
        dtype: float64 or float32.
        device: Device of the results; that of ``paths`` if these are indices.
        antithetic: Whether paths 2i and 2i + 1 have the same numbers with opposite signs (the
            auxiliary numbers too).
        compiled: Whether drawing is compiled: a fourth of the time for large n, after some ten
            seconds for each new n that the disk then remembers.

    Raises:
        ArgumentError, DTypeError, ShapeError: If an argument cannot be used.

    Example:
        >>> path = BrownianPath(seed=0, n_components=3, paths=5)
        >>> path(0.25, 0.5).shape
        torch.Size([5, 3])
        >>> halves = path.increments(level=1, first=0, count=2)
        >>> torch.allclose(halves.sum(0).T, path(0.0, 1.0))
        True

    Attributes:
        shape: (n, m), the shape of what a call returns.
        dtype, device: Of what is returned.
        cell, start: As given.
        levy_area_approximation: "none", for torchsde.
    """

    levy_area_approximation = "none"

    def __init__(
        self,
        seed: int,
        n_components: int,
        paths: int | Tensor,
        *,
        cell: float = 1.0,
        start: float = 0.0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        antithetic: bool = False,
        compiled: bool = False,
    ) -> None:
        self._m = check_integer("n_components", n_components, 1, rng.NODE_COMPONENTS)
        self.paths = check_paths(paths, device)
        self.dtype = check_dtype(dtype)
        self.cell = check_cell(cell)
        self.start = check_time("start", start)
        self.seed = seed
        self.shape = torch.Size((len(self.paths), self._m))
        self.device = self.paths.device
        self.antithetic = check_flag("antithetic", antithetic)
        self.compiled = check_flag("compiled", compiled)
        self._nodes = Nodes(seed, self.paths, self.cell, self.antithetic, self.compiled)
        # What is kept of the tree: the last pair of siblings of each level, and blocks.
        self._pairs: dict[int, tuple[int, Tensor]] = {}
        self._blocks: dict[int, tuple[int, Tensor]] = {}
        self._last: dict[int, int] = {}

    def __repr__(self) -> str:
        n, m = self.shape
        return (
            f"BrownianPath(seed={self.seed}, n_components={m}, paths={n}, cell={self.cell}, "
            f"start={self.start}, dtype={self.dtype}, device={self.device}, "
            f"antithetic={self.antithetic})"
        )

    def size(self) -> torch.Size:
        """The shape (n, m), for torchsde."""
        return self.shape

    # One time for all paths.

    def __call__(
        self,
        ta: float | Tensor,
        tb: float | Tensor | None = None,
        return_U: bool = False,
        return_A: bool = False,
    ) -> Tensor:
        """W(tb) - W(ta), or W(ta) - W(start) where tb is left out: (n, m), paths first.

        Args:
            ta: Time, a number or a tensor () on the CPU; not before ``start``.
            tb: Later time.
            return_U: Must be false: no integrals in time are drawn.
            return_A: Must be false: no Levy area is drawn.

        Raises:
            ArgumentError: If a time is before the start, or the two are in the wrong order; or
                if U or A is wanted.
        """
        if return_U or return_A:
            raise ArgumentError(
                "these Brownian paths have increments alone",
                received=f"return_U={return_U}, return_A={return_A}",
                expected="neither: no time integral and no Levy area is drawn",
                remedy="a method that needs increments alone, as euler, midpoint or heun",
            )
        first, last = (self.start, ta) if tb is None else (ta, tb)
        a, b = (ticks_of(time, self.start, self.cell) for time in (first, last))
        if a > b:
            raise wrong_order(float(first), float(last), "-W(tb, ta) is the increment backwards")
        if a == b:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        pieces = self._pieces(a, b)
        total = next(pieces)
        for piece in pieces:
            total = total + piece
        # A tensor of its own, as what is kept must not change.
        return torch.empty(self.shape, dtype=self.dtype, device=self.device).copy_(total.T)

    def increments(self, level: int, first: int, count: int) -> Tensor:
        """Increments over consecutive dyadic intervals of one level, for all paths.

        About one normal a component and increment is drawn, and up to ``level`` more a call.

        Args:
            level: Level l, at most 40: the intervals are cell 2^-l long.
            first: Position of the first: it begins at start + first cell 2^-l.
            count: Number of intervals.

        Returns:
            Tensor (count, m, n), paths last.

        Raises:
            ArgumentError: If the intervals do not exist.
        """
        level = check_integer("level", level, 0, DEEPEST)
        first = check_integer("first", first, 0, rng.STEPS - 1)
        count = check_integer("count", count, 1, rng.STEPS - first)
        return self._increments(level, first, count).to(self.dtype, copy=True)

    def _pieces(self, a: int, b: int) -> Iterator[Tensor]:
        """Increments that add up to the one between two times, the largest that fit.

        From either end the smallest comes first: the others are then siblings on the way to it.
        """
        first, last = -(-a // _TICKS), b // _TICKS
        if first > last:  # inside a cell: up to the time of the lowest level, and on from there
            shift = (a ^ b).bit_length() - 1
            top = bottom = a if a & -a > 1 << shift else b >> shift << shift
        else:
            top, bottom = first * _TICKS, last * _TICKS
        while a < top:
            size = a & -a
            yield self._piece(DEEPEST + 1 - size.bit_length(), a // size)
            a += size
        many = self._nodes.at_once(self._m)
        while first < last:
            cells = min(last - first, many)
            one = cells == 1
            yield self._piece(0, first) if one else self._increments(0, first, cells).sum(0)
            first += cells
        while b > bottom:
            size = b & -b
            b -= size
            yield self._piece(DEEPEST + 1 - size.bit_length(), b // size)

    def _piece(self, level: int, position: int) -> Tensor:
        """Increment over one dyadic interval, (m, n); from a block where one runs along a grid."""
        first, values = self._blocks.get(level, (0, None))
        if values is None or not 0 <= position - first < len(values):
            length = self._nodes.at_once(self._m)
            if length == 1 or self._last.get(level) != position - 1:
                self._last[level] = position
                return self._increments(level, position, 1)[0]
            first = position - position % length
            values = self._increments(level, first, length)
            self._blocks.pop(level, None)
            self._blocks[level] = (first, values)
            if len(self._blocks) > _BLOCKS_KEPT:
                del self._blocks[next(iter(self._blocks))]
        self._last[level] = position
        return values[position - first]

    def _increments(self, level: int, first: int, count: int) -> Tensor:
        """Double-precision increments (count, m, n), which may share memory with what is kept.

        From the smallest kept interval around them all, level by level, the tree is halved where
        it has to be. All the normals are drawn at once.
        """
        last = first + count - 1
        spans = [(first >> level - j, last >> level - j) for j in range(level + 1)]
        single = sum(a == b for a, b in spans) - 1  # level of the smallest interval around all
        known, values = self._kept([a for a, _ in spans[: single + 1]])
        nodes = [(BRIDGE + j, *spans[j]) for j in range(known, level)]
        if values is None:
            nodes.insert(0, (CELL, *spans[0]))
        noise = self._draw_spans(nodes)
        if values is None:
            values = noise.pop(0)
            if single >= 0:
                values = values.clone() if noise else values  # kept: no part of a larger one
                self._pairs[0] = (first >> level, values)
        for j, bridge in enumerate(noise, known):
            values = halves(values, bridge)
            begin = 2 * spans[j][0]
            if j < single:
                self._pairs[j + 1] = (begin, values)
            a, b = spans[j + 1]
            values = values[a - begin : b - begin + 1]
        return values

    def _kept(self, positions: list[int]) -> tuple[int, Tensor | None]:
        """The deepest of these ancestors, one a level, that is kept: level and (1, m, n)."""
        for level in reversed(range(len(positions))):
            first, values = self._pairs.get(level, (0, None))
            place = positions[level] - first
            if values is not None and 0 <= place < len(values):
                return level, values[place : place + 1]
        return 0, None

    def _draw_spans(self, spans: list[tuple[int, int, int]]) -> list[Tensor]:
        """Scaled normals of nodes (level, first, last), a tensor (nodes, m, n) for each entry."""
        if not spans:
            return []
        counts = [last - first + 1 for _, first, last in spans]
        levels = self._nodes.tensor([level for level, _, _ in spans])
        positions = self._nodes.tensor([first for _, first, _ in spans])
        if len(spans) < sum(counts):
            levels = levels.repeat_interleave(self._nodes.tensor(counts), output_size=sum(counts))
            positions = torch.cat(
                [torch.arange(first, last + 1, device=self.device) for _, first, last in spans]
            )
        drawn = self._nodes.draw(
            rng.STREAM_SDE, self._m, levels.unsqueeze(-1), positions.unsqueeze(-1)
        )
        return list(drawn.split(counts))

    # Each path at its own time.

    def dyadic(
        self, level: int | Tensor, position: Tensor, *, max_level: int | None = None
    ) -> Tensor:
        """Increment of each path over a dyadic interval of its own.

        The work depends on ``max_level`` alone, and nothing waits for the device.

        Args:
            level: Level of each path's interval, (n,) int64, or one for all.
            position: Its position, (n,) int64.
            max_level: Largest level that can occur; needed where ``level`` is a tensor.

        Returns:
            Tensor (m, n); NaN for paths whose level is not in [0, max_level], or whose position is
            not in [0, 2^48).

        Raises:
            ArgumentError, DTypeError, ShapeError: If an argument cannot be used.
        """
        level, deepest = self._nodes.check_levels(level, max_level)
        position = self._nodes.check_own("position", position, torch.int64)
        usable = (level >= 0) & (level <= deepest) & (position >= 0) & (position < rng.STEPS)
        steps = torch.arange(deepest, dtype=torch.int64, device=self.device).unsqueeze(-1)
        above = (level - steps).clamp(0, DEEPEST)  # from the interval up to its ancestor
        ancestors = position >> above
        cell = position >> level.clamp(0, DEEPEST)
        nodes = torch.cat([cell.unsqueeze(0), ancestors]).clamp(0, rng.STEPS - 1)
        levels = torch.arange(deepest + 1, dtype=torch.int64, device=self.device).unsqueeze(-1)
        noise = self._nodes.each(rng.STREAM_SDE, self._m, levels.expand_as(nodes), nodes)
        right = ((position >> (above - 1).clamp(min=0)) & 1).bool()
        value = next(noise)
        for j, bridge in enumerate(noise):
            left = 0.5 * value + bridge
            half = torch.where(right[j], value - left, left)
            value = torch.where(level > j, half, value)
        return torch.where(usable, value, torch.nan).to(self.dtype)

    def halve(
        self, increment: Tensor, level: int | Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Increments of each path over the two halves of a dyadic interval of its own.

        The cheap way down the tree: one normal a component where :meth:`dyadic` draws one for
        each level.

        Args:
            increment: Increment over the interval, (m, n).
            level: Its level, (n,) int64, or one for all; below 40.
            position: Its position, (n,) int64.

        Returns:
            Increments over the halves, at positions 2 position and 2 position + 1 of the next
            level: (m, n) each; NaN for paths whose interval does not exist.
        """
        if tuple(increment.shape) != (self._m, len(self.paths)):
            raise ShapeError(
                "the increment does not fit the paths",
                received=str(tuple(increment.shape)),
                expected=f"{(self._m, len(self.paths))}: components, and paths last",
                remedy="the result of dyadic, or one entry of increments",
            )
        level, _ = self._nodes.check_levels(level, DEEPEST - 1)
        position = self._nodes.check_own("position", position, torch.int64)
        usable = (level >= 0) & (level < DEEPEST) & (position >= 0) & (position < rng.STEPS)
        nodes = (BRIDGE + level.clamp(0, DEEPEST - 1)).expand_as(position).unsqueeze(0)
        positions = position.clamp(0, rng.STEPS - 1).unsqueeze(0)
        bridge = self._nodes.draw(rng.STREAM_SDE, self._m, nodes, positions)[0]
        value = increment.to(torch.float64)
        left = 0.5 * value + torch.where(usable, bridge, torch.nan)
        return left.to(self.dtype), (value - left).to(self.dtype)

    def beginning(self, level: int | Tensor, position: Tensor, part: Tensor) -> Tensor:
        """Increment of each path over the first part of a dyadic interval of its own.

        Args:
            level: Level of each path's interval, (n,) int64, or one for all.
            position: Its position, (n,) int64.
            part: Part of its length, in [0, 1], (n,) float64; read to 2^-40 cells.

        Returns:
            Tensor (m, n); NaN for paths whose interval does not exist, or whose part is not one.

        Raises:
            ArgumentError, DTypeError, ShapeError: If an argument cannot be used.
        """
        level, _ = self._nodes.check_levels(level, DEEPEST)
        position = self._nodes.check_own("position", position, torch.int64)
        part = self._nodes.check_own("part", part, torch.float64)
        usable = (level >= 0) & (level <= DEEPEST) & (position >= 0) & (position < rng.STEPS)
        usable = usable & (part >= 0) & (part <= 1)
        level = level.clamp(0, DEEPEST)
        length = _TICKS >> level
        ticks = torch.round(torch.where(usable, part, 0.0) * length).to(torch.int64)
        begin = (position << (DEEPEST - level)) & (_TICKS - 1)
        total = self._within(position >> level, begin, level, ticks)
        return torch.where(usable, total, torch.nan).to(self.dtype)

    def between(self, ta: Tensor, tb: Tensor, *, cells: int | None = None) -> Tensor:
        """W(tb) - W(ta) at times of each path's own.

        Both ends are sought in the tree down to level 40: about 80 normals a component.

        Args:
            ta: Times (n,), float64, not before ``start``.
            tb: Later times (n,), float64.
            cells: Largest number of cells' ends between the two times of a path. With it nothing
                waits for the device; it is looked up where it is left out.

        Returns:
            Tensor (m, n). With ``cells``, which leaves no time for an error, it is NaN for paths
            whose times are out of order, before ``start``, not finite, or further apart than that.

        Raises:
            ArgumentError: If a time is before ``start`` or not finite, or two are in the wrong
                order, and ``cells`` is left out.
            DTypeError, ShapeError: If an argument cannot be used.
        """
        ta = self._nodes.check_own("ta", ta, torch.float64)
        tb = self._nodes.check_own("tb", tb, torch.float64)
        (cell_a, within_a, good_a), (cell_b, within_b, good_b) = (
            cell_ticks_of(time, self.start, self.cell) for time in (ta, tb)
        )
        apart = cell_b - cell_a
        order = (apart > 0) | ((apart == 0) & (within_a <= within_b))
        if cells is None:
            require_times(ta, tb, self.start, good_a & good_b, order)
            cells = int(apart.clamp(min=0).max()) if len(apart) else 0
        cells = check_integer("cells", cells, 0, rng.STEPS - 1)
        usable = good_a & good_b & order & (apart <= cells)
        zero = torch.zeros_like(within_a)
        total = self._within(cell_b, zero, zero, within_b)
        total = total - self._within(cell_a, zero, zero, within_a)
        for begin in range(0, cells, _CELLS_AT_ONCE):
            steps = torch.arange(begin, min(begin + _CELLS_AT_ONCE, cells), device=self.device)
            steps = steps.unsqueeze(-1)
            positions = (cell_a + steps).clamp(max=rng.STEPS - 1)
            whole = self._nodes.draw(
                rng.STREAM_SDE, self._m, torch.zeros_like(positions), positions
            )
            inside = (steps < apart).unsqueeze(1)
            total = total + torch.where(inside, whole, 0.0).sum(0)
        return torch.where(usable, total, torch.nan).to(self.dtype)

    def _within(self, cell: Tensor, begin: Tensor, level: Tensor, part: Tensor) -> Tensor:
        """Increment over the first ticks, at most all, of an interval in a cell, (m, n)."""
        length = _TICKS >> level
        whole = part >= length
        ticks = begin + part.clamp(min=0).minimum(length - 1)
        levels = torch.arange(DEEPEST, dtype=torch.int64, device=self.device).unsqueeze(-1)
        path_down = (cell << levels) + (ticks >> (DEEPEST - levels))
        # Far out the deepest positions do not exist; times there have no such bits.
        nodes = torch.cat([cell.unsqueeze(0), path_down & (rng.STEPS - 1)])
        tree = torch.arange(DEEPEST + 1, dtype=torch.int64, device=self.device).unsqueeze(-1)
        noise = self._nodes.each(rng.STREAM_SDE, self._m, tree.expand_as(nodes), nodes)
        value = next(noise)
        total = torch.where(whole & (level == 0), value, 0.0)
        for j, bridge in enumerate(noise):
            right = ((ticks >> (DEEPEST - 1 - j)) & 1).bool()
            left = 0.5 * value + bridge
            total = torch.where(right & ~whole & (level <= j), total + left, total)
            value = torch.where(right, value - left, left)
            total = torch.where(whole & (level == j + 1), value, total)
        return total

    # Numbers that are independent of W.

    def auxiliary(self, level: int | Tensor, position: int | Tensor, count: int) -> Tensor:
        """Standard normals that belong to a dyadic interval and are independent of W.

        Args:
            level: Level of the interval, at most 40: one for all paths, or (n,) int64.
            position: Its position, one for all paths, or (n,) int64.
            count: Number of normals of each path; the first ones do not depend on it.

        Returns:
            Tensor (count, n); NaN where a tensor holds an interval that does not exist.

        Raises:
            ArgumentError, DTypeError, ShapeError: If an argument cannot be used.
        """
        count = check_integer("count", count, 1, rng.NODE_COMPONENTS)
        level, _ = self._nodes.check_levels(level, DEEPEST)
        if isinstance(position, Tensor):
            position = self._nodes.check_own("position", position, torch.int64)
        else:
            position = self._nodes.tensor([check_integer("position", position, 0, rng.STEPS - 1)])
        usable = (level >= 0) & (level <= DEEPEST) & (position >= 0) & (position < rng.STEPS)
        levels, positions = torch.broadcast_tensors(
            level.clamp(0, DEEPEST), position.clamp(0, rng.STEPS - 1)
        )
        drawn = self._nodes.draw(
            rng.STREAM_SDE_AUXILIARY, count, levels.unsqueeze(0), positions.unsqueeze(0)
        )[0]
        return torch.where(usable, drawn, torch.nan).to(self.dtype)

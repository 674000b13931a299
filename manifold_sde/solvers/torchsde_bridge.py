"""The SDE (3) integrated by ``torchsde.sdeint``, on our grid and our Brownian paths.

torchsde takes the steps; what it does badly is left to :mod:`manifold_sde.solvers.march`. It is
asked for grid points alone, where its linear interpolation has nothing to do, and a time between
two of them is reached by a shorter step of its own from the one before. Its adaptive steps are not
used: their error norm is one for the whole batch, and its Euler scheme does not converge with them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchsde
from torch import Tensor

from manifold_sde.equations import StochasticEquation
from manifold_sde.errors import ArgumentError
from manifold_sde.solvers.bookkeeping import Book
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.march import Block, Goal, Grid, March, Origin, State
from manifold_sde.solvers.schemes import SCHEMES

#: What the names of its methods begin with.
PREFIX = "torchsde:"
#: Its methods that are sound for noise that does not commute, by the calculus that they need.
TORCHSDE: dict[str, str] = {
    f"{PREFIX}euler": "ito",
    f"{PREFIX}heun": "stratonovich",
    f"{PREFIX}midpoint": "stratonovich",
    f"{PREFIX}euler_heun": "stratonovich",
}
_UNSOUND = {
    "reversible_heun": "it is unstable for any step where a drift contracts, as gradient flow does",
    "log_ode": "it needs Levy areas, which the Brownian paths here do not have",
    "milstein": "it needs noise that commutes",
    "srk": "it needs noise that is diagonal, additive or scalar",
}
#: Our scheme of the same noise terms.
_SAME_NOISE = {"euler": "euler", "midpoint": "midpoint", "heun": "heun", "euler_heun": "heun"}


def refuse_unsound(method: str) -> None:
    """Refuse a method of torchsde by its reason.

    Raises:
        ArgumentError: If torchsde has the method, and it is wrong here.
    """
    reason = _UNSOUND.get(method.removeprefix(PREFIX)) if method.startswith(PREFIX) else None
    if reason is not None:
        raise ArgumentError(
            "this method of torchsde does not solve the SDE (3)",
            received=f"{method!r}: {reason}",
            expected=", ".join(map(repr, TORCHSDE)),
            remedy='"torchsde:heun" with the Stratonovich form, "torchsde:euler" with the Ito form',
        )


class _Equation:
    """An equation as torchsde takes it, paths first, the noise by products."""

    noise_type = "general"

    def __init__(self, sde: StochasticEquation) -> None:
        self.sde = sde
        self.sde_type = sde.calculus

    def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Diffusion times v: (n, D), (n, m) -> (n, D)."""
        x = y.T.contiguous()
        return self.sde.noise(x, self.sde.reference_basis(x), v.T.contiguous()).T

    def f_and_g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Drift, and diffusion times v."""
        x = y.T.contiguous()
        anchor = self.sde.reference_basis(x)
        return self.sde.drift(x, anchor).T, self.sde.noise(x, anchor, v.T.contiguous()).T


class TorchsdeMarch(March):
    """A march whose steps torchsde takes.

    Args:
        sde: The equation, in the whole space.
        method: Name of the method, one of :data:`TORCHSDE`.
        grid: The grid.
        book: What is added up on the way.
        brownian: Brownian paths of any set of path indices, (p,) int64.
        paths: Indices of the chunk's paths (n,).
    """

    def __init__(
        self,
        sde: StochasticEquation,
        method: str,
        grid: Grid,
        book: Book,
        brownian: Callable[[Tensor], BrownianPath],
        paths: Tensor,
    ) -> None:
        self.method = method.removeprefix(PREFIX)
        super().__init__(sde, SCHEMES[_SAME_NOISE[self.method]], grid, book, brownian, paths)
        self._equation = _Equation(sde)

    def advance(self, state: State, goal: Goal) -> Block:
        """Take a block of steps, changing the state, and return the states on the way."""
        first, steps = state.position, self._next_steps(state, goal)
        points = torch.arange(first, first + steps + 1, dtype=torch.float64)
        xs = self._integrate(self._path, state.x, self.grid.start + self.grid.h * points)
        h = torch.tensor(self.grid.h, dtype=state.x.dtype, device=state.x.device)
        rates, sums = [state.rate], [state.sums]
        for x in xs[1:]:
            rates.append(self._rate(x))
            sums.append(self.book.advance(sums[-1], h, rates[-2], rates[-1]))
        state.x, state.rate, state.sums = xs[-1], rates[-1], sums[-1]
        state.position = first + steps
        return Block(first, xs, torch.stack(rates), torch.stack(sums))

    def _moved(self, paths: Tensor, origin: Origin, h: Tensor) -> Tensor:
        """States after one step of one length from one grid point."""
        start = self.grid.start + int(origin.position[0]) * self.grid.h
        times = torch.tensor([start, start + float(h[0])], dtype=torch.float64)
        return self._integrate(self._brownian(paths), origin.x, times)[-1]

    def _integrate(self, path: BrownianPath, x: Tensor, times: Tensor) -> Tensor:
        """States at equally spaced times, one step from each to the next: (D, n) -> (k, D, n)."""
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # torchsde draws numbers to look at shapes
            ys = torchsde.sdeint(
                self._equation,
                x.T.contiguous(),
                times,
                bm=path,
                method=self.method,
                dt=float(times[1] - times[0]),
            )
        states: Tensor = ys.movedim(1, -1).contiguous()
        return states

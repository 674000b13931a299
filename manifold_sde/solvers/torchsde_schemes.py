"""The schemes of ``torchsde`` for the SDE (3), as schemes of ``solve``.

torchsde takes the step; what it does badly (times between two steps, Brownian paths) is left to
:mod:`manifold_sde.solvers.fixed`. Its adaptive steps are not used: their error norm is one for the
whole batch, and its Euler scheme does not converge with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchsde._core.methods import select

from manifold_sde.equations import StochasticEquation
from manifold_sde.errors import ArgumentError
from manifold_sde.solvers.schemes import SCHEMES, Scheme, StepNoise

#: What the names of its methods begin with.
PREFIX = "torchsde:"
_UNSOUND = {
    "reversible_heun": "it is unstable for any step where a drift contracts, as gradient flow does",
    "log_ode": "it needs Levy areas, which the Brownian paths here do not have",
    "milstein": "it needs noise that commutes",
    "srk": "it needs noise that is diagonal, additive or scalar",
}


@dataclass(frozen=True)
class _Equation:
    """An equation as torchsde takes it, paths first, the noise by products."""

    sde: StochasticEquation
    noise_type = "general"

    @property
    def sde_type(self) -> str:
        """The calculus."""
        return self.sde.calculus

    def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Diffusion times v: (n, D), (n, m) -> (n, D)."""
        x = y.T.contiguous()
        return self.sde.noise(x, self.sde.reference_basis(x), v.T.contiguous()).T

    def f_and_g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Drift, and diffusion times v."""
        x = y.T.contiguous()
        basis = self.sde.reference_basis(x)
        return self.sde.drift(x, basis).T, self.sde.noise(x, basis, v.T.contiguous()).T


@dataclass(frozen=True)
class _Increment:
    """The increment of one step, as torchsde takes a Brownian motion."""

    dw: Tensor
    levy_area_approximation = "none"

    @property
    def shape(self) -> torch.Size:
        """(n, m)."""
        return self.dw.T.shape

    def __call__(self, ta: Tensor, tb: Tensor) -> Tensor:
        """The increment (n, m)."""
        return self.dw.T


class TorchsdeScheme(Scheme):
    """A method of torchsde that is sound for noise that does not commute.

    Args:
        method: Its name in torchsde.
        calculus: Form of the equation that it integrates.
    """

    calculus: str
    weak_order = 1
    cost = "that of torchsde"

    def __init__(self, method: str, calculus: str) -> None:
        self.name = PREFIX + method
        self.calculus = calculus
        self.strong_order_commutative = 0.5 if calculus == "ito" else 1.0
        self._solver = select(method, calculus)

    def step(
        self, sde: StochasticEquation, x: Tensor, basis: Tensor, h: Tensor, noise: StepNoise
    ) -> tuple[Tensor, Tensor]:
        """One step of torchsde, whose equation does not depend on the time."""
        solver = self._solver(
            _Equation(sde),
            bm=_Increment(noise.dw),
            dt=h,
            adaptive=False,
            rtol=0.0,
            atol=0.0,
            dt_min=0.0,
            options={},
        )
        h = h if h.dim() == 0 else h[:, None]
        y, _ = solver.step(torch.zeros_like(h), h, x.T.contiguous(), ())
        return y.T.contiguous(), basis


#: The schemes of torchsde that are sound here, by the names that ``solve`` takes.
TORCHSDE: dict[str, TorchsdeScheme] = {
    scheme.name: scheme
    for scheme in (
        TorchsdeScheme("euler", "ito"),
        TorchsdeScheme("heun", "stratonovich"),
        TorchsdeScheme("midpoint", "stratonovich"),
        TorchsdeScheme("euler_heun", "stratonovich"),
    )
}


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


def scheme_named(name: str) -> Scheme:
    """The scheme of a name: on the manifold, or of torchsde."""
    return TORCHSDE[name] if name in TORCHSDE else SCHEMES[name]

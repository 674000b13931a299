"""The logarithm of the gamma function and its first two derivatives, right in every order.

torch differentiates digamma by ``torch.polygamma(1, t)``, which near 0 is right to nine digits only
and further out to all (torch 2.13). So the argument is moved there by the recurrence
Gamma(t + 1) = t Gamma(t), whose terms are elementary.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: How far the argument is moved: the error of ``torch.polygamma(1, t)`` is 1 / 30 (t + 6)^9.
_STEPS = 20


def _passed(t: Tensor) -> Tensor:
    """The numbers t, t + 1, ... that the recurrence passes: (...) -> (..., n)."""
    return t.unsqueeze(-1) + torch.arange(_STEPS, dtype=t.dtype, device=t.device)


def loggamma(t: Tensor) -> Tensor:
    """Log |Gamma(t)|, entry by entry."""
    return torch.lgamma(t + _STEPS) - _passed(t).abs().log().sum(-1)


def digamma(t: Tensor) -> Tensor:
    """Its derivative."""
    return torch.digamma(t + _STEPS) - _passed(t).reciprocal().sum(-1)


def trigamma(t: Tensor) -> Tensor:
    """Its second derivative."""
    return torch.polygamma(1, t + _STEPS) + _passed(t).square().reciprocal().sum(-1)

"""Tensors in the examples that Hypothesis prints: with all digits, as code that makes them."""

from __future__ import annotations

from typing import Any

from hypothesis.vendor import pretty
from torch import Tensor


def tensor_code(x: Tensor) -> str:
    """An expression that makes a tensor again, bit for bit.

    Example:
        >>> import torch
        >>> tensor_code(torch.tensor([0.1, 2.0], dtype=torch.float64))
        'torch.tensor([0.1, 2.0], dtype=torch.float64)'
    """
    return f"torch.tensor({x.detach().cpu().tolist()!r}, dtype={x.dtype})"


def _print(x: Tensor, printer: Any, cycle: bool) -> None:
    printer.text(tensor_code(x))


def register() -> None:
    """Print tensors so in Hypothesis' falsifying examples; torch shows four digits."""
    pretty.for_type_by_name("torch", "Tensor", _print)

"""A set of weights that is scale-invariant by itself, and a tensor that is in none."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScaleGroup:
    """Weights of one tensor, or of several, of which each part can be scaled by itself.

    Attributes:
        name: The tensor, or the tensors.
        parameters: Names of the tensors.
        axis: Dimension along which the parts are cut.
        size: Rows of a part along that dimension, or 0 where all is one part.
        rows: First and last but one row that belongs to the group, or ``None`` for all.
        parts: Number of parts, each of them scale-invariant by itself.
        weights: Number of weights.
        violation: Euler's sum <w, grad f> of a part, relative to the root of the sum of squares of
            its terms; the largest of them all.
        eps_matters: Whether the violation is that of an eps which is not small against the
            variance that it is added to.
    """

    name: str
    parameters: tuple[str, ...]
    axis: int
    size: int
    rows: tuple[int, int] | None
    parts: int
    weights: int
    violation: float
    eps_matters: bool = False

    def cut(self, tensor: Tensor) -> Tensor:
        """The weights of a tensor, or of its gradient, as (parts, weights of a part)."""
        if not self.size:
            return tensor.reshape(1, -1)
        if tensor.dim() > 1 and self.axis:
            tensor = tensor.transpose(0, self.axis)
        if self.rows is not None:
            tensor = tensor[self.rows[0] : self.rows[1]]
        return tensor.reshape(self.parts, -1)

    @property
    def described(self) -> str:
        """What its parts are, in words."""
        if not self.size:
            return "jointly" if len(self.parameters) > 1 else "whole"
        what = "row" if self.axis == 0 else "column"
        each = f"each {what}" if self.size == 1 else f"each {self.size} {what}s"
        if self.rows is not None:
            each += f" in {self.rows[0]}:{self.rows[1]}"
        return each


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that is in no scale-invariant group.

    Attributes:
        name: Its name.
        weights: Number of weights.
        violation: As that of a group.
        degree: The degree in which the output is homogeneous in it, or ``None``.
        reason: Why it is not scale-invariant.
    """

    name: str
    weights: int
    violation: float
    degree: float | None
    reason: str

"""Images with their classes, for training and for testing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manifold_sde.arguments import check_integer


@dataclass(frozen=True)
class Images:
    """Images with their classes.

    Attributes:
        inputs: Training images (N, channels, height, width).
        targets: Their classes (N,), whole numbers.
        test_inputs, test_targets: The same for testing.
        classes: Names of the classes.
    """

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"Images({len(self.inputs)} for training, {len(self.test_inputs)} for testing, "
            f"{tuple(self.inputs.shape[1:])}, {len(self.classes)} classes)"
        )

    def one_hot(self, targets: Tensor | None = None) -> Tensor:
        """Classes as rows of zeros and a one, for least squares: (N,) -> (N, classes).

        Args:
            targets: Classes; by default those of the training images.
        """
        targets = self.targets if targets is None else targets
        return F.one_hot(targets, len(self.classes)).to(self.inputs)


def chosen(
    available: int, wanted: object, generator: torch.Generator, what: str
) -> tuple[Tensor, Tensor]:
    """Numbers of the images that are taken at random, and of the others.

    Args:
        available: Number of images.
        wanted: Number to take; ``None`` takes all, in their order.
        generator: Generator of the choice.
        what: Name of the argument, for messages.

    Raises:
        ArgumentError: If there are not so many.
    """
    if wanted is None:
        return torch.arange(available), torch.arange(0)
    number = check_integer(what, wanted, 0, available, f"{what}={available} at most")
    order = torch.randperm(available, generator=generator)
    return order[:number], order[number:]

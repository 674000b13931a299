"""Criteria: the loss of each sample, from the outputs of a network and its targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from manifold_sde.errors import ArgumentError, DTypeError, ShapeError
from manifold_sde.loss_checks import first_line
from manifold_sde.networks.copies import independent_copy
from manifold_sde.samples import follow

#: Criteria that compare each output with a target of its own.
_ELEMENTWISE = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.SoftMarginLoss,
)
#: Criteria whose targets are the numbers of classes.
_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)

_NONE = "the losses before their mean: reduction='none', shape (Xi,) or (Xi, K)"


class Criterion:
    """The loss of each sample.

    Args:
        criterion: A criterion of ``torch.nn``, whatever its reduction is, or a function of
            outputs and targets that returns the losses (N,) or (N, K...).

    Attributes:
        is_least_squares: Whether it is ``nn.MSELoss``.

    Raises:
        DTypeError: If it is neither.
    """

    def __init__(self, criterion: object) -> None:
        if isinstance(criterion, type) or not callable(criterion):
            raise DTypeError(
                "the criterion is not a function of outputs and targets",
                received=f"the class {criterion.__name__}"
                if isinstance(criterion, type)
                else type(criterion).__name__,
                expected="a criterion of torch.nn, or a function (outputs, targets) -> (Xi,)",
                remedy="torch.nn.CrossEntropyLoss(), with brackets",
            )
        self.is_least_squares = isinstance(criterion, nn.MSELoss)
        self.name = getattr(criterion, "__name__", type(criterion).__name__)
        self._function: Callable[..., Any] = criterion
        if isinstance(criterion, nn.Module):
            unreduced = independent_copy(criterion, "criterion")
            if isinstance(getattr(unreduced, "reduction", None), str):
                unreduced.reduction = "none"  # type: ignore[assignment]
            self._function = unreduced

    @property
    def is_classification(self) -> bool:
        """Whether it is a criterion of ``torch.nn`` for classes, smallest at infinite outputs."""
        return isinstance(self._function, (*_CLASSES, nn.BCEWithLogitsLoss, nn.SoftMarginLoss))

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the entries of each sample: (N, ...), (N, ...) -> (N,).

        Raises:
            ArgumentError: If the criterion raises.
            ShapeError: If it does not return the losses of the samples.
        """
        value = self._values(outputs, targets)
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != len(outputs):
            received = str(tuple(value.shape)) if isinstance(value, Tensor) else repr(type(value))
            raise ShapeError(
                f"the criterion {self.name} does not return the losses of the samples",
                received=f"{received} for {len(outputs)} samples",
                expected=_NONE,
                remedy="torch.nn.CrossEntropyLoss() and its kin as they are; "
                "functools.partial(torch.nn.functional.cross_entropy, reduction='none')",
            )
        return value if value.dim() == 1 else value.flatten(1).mean(1)

    def _values(self, outputs: Tensor, targets: Tensor) -> Any:
        if not isinstance(self._function, nn.Module):
            return self._function(outputs, targets)
        tensors = {n: follow(t, outputs) for n, t in self._function.state_dict().items()}
        return functional_call(self._function, tensors, (outputs, targets))

    def residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Residuals whose half squares are the losses of ``nn.MSELoss``: (N, ...) -> (N, K)."""
        differences = (outputs - targets).flatten(1) if outputs.dim() > 1 else outputs - targets
        differences = differences.reshape(len(outputs), -1)
        return (2.0 / differences.shape[1]) ** 0.5 * differences

    def convert(self, targets: Tensor) -> Tensor:
        """Targets as the criterion takes them: whole numbers of an elementwise one as floats."""
        if isinstance(self._function, _ELEMENTWISE) and not targets.is_floating_point():
            return targets.to(torch.float64)
        return targets

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse targets that do not fit the outputs.

        Raises:
            ShapeError, DTypeError, ArgumentError: With the way out.
        """
        if isinstance(self._function, _ELEMENTWISE):
            if outputs.shape != targets.shape:
                raise ShapeError(
                    f"{self.name} compares each output with a target of its own",
                    received=f"targets {tuple(targets.shape)} for outputs {tuple(outputs.shape)}",
                    expected=f"targets {tuple(outputs.shape)}: nothing is broadcast",
                    remedy="targets[:, None] for one output a sample; "
                    "torch.nn.functional.one_hot(targets, K).double() for classes",
                )
        elif isinstance(self._function, _CLASSES):
            self._check_classes(outputs, targets)
        try:
            self.sample_losses(outputs, follow(targets, outputs))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, (ArgumentError, torch.OutOfMemoryError)):
                raise
            raise ArgumentError(
                f"the criterion {self.name} does not take these outputs and targets",
                received=f"outputs {tuple(outputs.shape)} of {outputs.dtype}, targets "
                f"{tuple(targets.shape)} of {targets.dtype}: {first_line(error)}",
                expected="outputs and targets that the criterion is made for",
                remedy="call criterion(module(inputs), targets) by itself",
            ) from error

    def _check_classes(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.dim() < 2:
            raise ShapeError(
                f"{self.name} needs an output for each class",
                received=f"outputs {tuple(outputs.shape)}",
                expected="outputs (Xi, C) or (Xi, C, ...)",
                remedy="torch.nn.BCEWithLogitsLoss() for one output a sample",
            )
        if targets.is_floating_point():
            probabilities = isinstance(self._function, nn.CrossEntropyLoss)
            if probabilities and targets.shape == outputs.shape:
                return
            raise DTypeError(
                f"the targets of {self.name} are the numbers of the classes",
                received=f"targets {tuple(targets.shape)} of {targets.dtype}",
                expected=f"whole numbers {(len(outputs), *outputs.shape[2:])} of torch.int64"
                + (f", or probabilities {tuple(outputs.shape)}" if probabilities else ""),
                remedy="targets.long()",
            )
        if targets.dtype != torch.int64:
            raise DTypeError(
                f"the targets of {self.name} have the wrong dtype",
                received=str(targets.dtype),
                expected="torch.int64",
                remedy="targets.long()",
            )
        expected = (len(outputs), *outputs.shape[2:])
        if tuple(targets.shape) != expected:
            raise ShapeError(
                f"the targets of {self.name} have the wrong shape",
                received=f"targets {tuple(targets.shape)} for outputs {tuple(outputs.shape)}",
                expected=f"targets {expected}",
                remedy="targets.squeeze(1) for a column, targets.argmax(1) for one-hot rows",
            )
        n_classes = outputs.shape[1]
        counted = targets[targets != getattr(self._function, "ignore_index", -1)]
        wrong = counted[(counted < 0) | (counted >= n_classes)]
        if len(wrong):
            raise ArgumentError(
                "a target is not the number of a class",
                received=f"class {int(wrong[0])}, with {n_classes} outputs of the network",
                expected=f"whole numbers from 0 to {n_classes - 1}",
                remedy="targets - 1 where classes count from 1; a last layer with more outputs",
            )

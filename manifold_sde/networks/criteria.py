"""Criteria: the loss of each sample, from the outputs of a network and its targets."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from manifold_sde.arguments import kind_of
from manifold_sde.errors import ArgumentError, DTypeError, ManifoldSDEError, ShapeError
from manifold_sde.loss import follow
from manifold_sde.networks.copies import independent_copy
from manifold_sde.networks.randomness import Generators
from manifold_sde.remedies import first_line

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
#: Those whose mean is over the weights of the targets that are not ignored.
_WEIGHTED = (nn.CrossEntropyLoss, nn.NLLLoss)
#: Relative difference of two means that is no rounding.
_ROUNDING = 1e-9

_NONE = "the losses before their mean: reduction='none', shape (Xi,) or (Xi, K)"


class Criterion:
    """The loss of each sample.

    Args:
        criterion: A criterion of ``torch.nn`` that is a mean over samples, or a function of
            outputs and targets that returns the losses (N,) or (N, K...).

    Attributes:
        is_least_squares: Whether it is ``nn.MSELoss``.

    Raises:
        DTypeError: If it is neither.
        ArgumentError: If it is a sum over the samples.
    """

    def __init__(self, criterion: object) -> None:
        if isinstance(criterion, type) or not callable(criterion):
            raise DTypeError(
                "the criterion is not a function of outputs and targets",
                received=kind_of(criterion),
                expected="a criterion of torch.nn, or a function (outputs, targets) -> (Xi,)",
                remedy="torch.nn.CrossEntropyLoss(), with brackets",
            )
        self.name = getattr(criterion, "__name__", type(criterion).__name__)
        self.is_least_squares = (
            isinstance(criterion, nn.MSELoss) and type(criterion).forward is nn.MSELoss.forward
        )
        self._function: Callable[..., Any] = criterion
        self._reduced: nn.Module | None = None
        #: What the losses of the entries of a sample are divided by, where it is not their number.
        self._divisor: float | None = None
        if isinstance(criterion, nn.Module):
            unreduced = independent_copy(criterion, "criterion")
            reduction = getattr(unreduced, "reduction", None)
            if reduction == "sum":
                raise self._sum()
            if isinstance(reduction, str):
                self._reduced = copy.deepcopy(unreduced) if reduction != "none" else None
                unreduced.reduction = "none"  # type: ignore[assignment]
            if reduction == "batchmean":
                self._divisor = 1.0
            self._function = unreduced

    def _sum(self) -> ArgumentError:
        return ArgumentError(
            "the criterion is a sum over the samples, and L is their mean",
            received=f"{self.name}(reduction='sum')",
            expected="a mean over the samples, whose gradient does not grow with the batch",
            remedy=f"{self.name}(reduction='mean'): the sum over B samples of K targets each is "
            "B K times it, so that lr B K and weight_decay / (B K) give the same steps",
        )

    @property
    def is_classification(self) -> bool:
        """Whether it is a criterion of ``torch.nn`` for classes, smallest at infinite outputs."""
        return isinstance(self._function, (*_CLASSES, nn.BCEWithLogitsLoss, nn.SoftMarginLoss))

    @property
    def label_smoothing(self) -> float:
        """That of ``nn.CrossEntropyLoss``, 0 for others."""
        return float(getattr(self._function, "label_smoothing", 0.0))

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the entries of each sample: (N, ...), (N, ...) -> (N,).

        Raises:
            ArgumentError: If the criterion raises.
            ShapeError: If it does not return the losses of the samples.
        """
        value = self._values(self._function, outputs, targets)
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != len(outputs):
            received = str(tuple(value.shape)) if isinstance(value, Tensor) else repr(type(value))
            raise ShapeError(
                f"the criterion {self.name} does not return the losses of the samples",
                received=f"{received} for {len(outputs)} samples",
                expected=_NONE,
                remedy="torch.nn.CrossEntropyLoss() and its kin as they are; "
                "functools.partial(torch.nn.functional.cross_entropy, reduction='none')",
            )
        if self._divisor is not None:
            return value.reshape(len(value), -1).sum(1) / self._divisor
        return value if value.dim() == 1 else value.flatten(1).mean(1)

    def _values(self, function: Callable[..., Any], outputs: Tensor, targets: Tensor) -> Any:
        if not isinstance(function, nn.Module):
            return function(outputs, targets)
        named = [*function.named_parameters(), *function.named_buffers()]
        tensors = {n: follow(t, outputs) for n, t in named}
        if all(tensors[n] is t for n, t in named):
            return function(outputs, targets)
        return functional_call(function, tensors, (outputs, targets))

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

    def check_targets(self, outputs: Tensor, targets: Tensor, generators: Generators) -> None:
        """Refuse targets that do not fit the outputs, and a criterion that is random.

        Args:
            outputs: Outputs (N, ...).
            targets: Targets (N, ...).
            generators: The generators that the criterion must not move.

        Raises:
            ShapeError, DTypeError, ArgumentError: With a hint.
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
            with generators.unmoved_by(f"the criterion {self.name}"):
                self.sample_losses(outputs, follow(targets, outputs))
        except Exception as error:
            if isinstance(error, (ManifoldSDEError, torch.OutOfMemoryError)):
                raise
            raise ArgumentError(
                f"the criterion {self.name} does not take these outputs and targets",
                received=f"outputs {tuple(outputs.shape)} of {outputs.dtype}, targets "
                f"{tuple(targets.shape)} of {targets.dtype}: {first_line(error)}",
                expected="outputs and targets that the criterion is made for",
                remedy="call criterion(module(inputs), targets) by itself",
            ) from error

    def check_mean(self, outputs: Tensor, targets: Tensor, *, batches: bool) -> None:
        """Refuse a criterion whose value is not the mean of the losses of the samples.

        Args:
            outputs: Outputs (N, ...).
            targets: Targets (N, ...).
            batches: Whether it is looked at for some of the samples, too.

        Raises:
            ArgumentError: With a hint.
        """
        if self._reduced is None:
            return
        targets, count = follow(targets, outputs), len(outputs)
        for size in dict.fromkeys((count, -(-count // 2), 1) if batches else (count,)):
            some = outputs[-size:], targets[-size:]
            mean = self.sample_losses(*some).mean()
            if self.is_least_squares:
                mean = 0.5 * self.residuals(*some).square().sum(1).mean()
            with warnings.catch_warnings(action="ignore"):  # of torch, about its own mean
                value = self._values(self._reduced, *some)
            is_number = isinstance(value, Tensor) and value.dim() == 0
            if is_number and abs(float(value - mean)) <= _ROUNDING * abs(float(mean)):
                continue
            received = f"{float(value):.6g}" if is_number else "no number"
            raise ArgumentError(
                f"the criterion {self.name} is no mean over the samples",
                received=f"{received} for {size} samples, whose losses before the reduction have "
                f"the mean {float(mean):.6g}",
                expected="a criterion whose value for a batch is the mean of the losses of its "
                "samples",
                remedy=f"a function (outputs, targets) that returns {_NONE}",
            )

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
        if isinstance(self._function, _WEIGHTED) and self._reduced is not None:
            self._weigh(targets, n_classes)

    def _weigh(self, targets: Tensor, n_classes: int) -> None:
        """Find what torch divides the losses of a sample by, and refuse if samples differ."""
        number = int(getattr(self._function, "ignore_index", -100))
        ignored = torch.eq(targets, number)
        weight = getattr(self._function, "weight", None)
        each = torch.ones(n_classes) if weight is None else weight
        of_entries = each.double()[targets.masked_fill(ignored, 0)].masked_fill(ignored, 0.0)
        of_samples = of_entries.reshape(len(targets), -1).sum(1)
        first = float(of_samples[0])
        if first > 0.0 and bool((of_samples - first).abs().max() <= _ROUNDING * first):
            self._divisor = first
            return
        if bool(ignored.any()):
            alone = targets.dim() == 1
            raise ArgumentError(
                "targets are ignored: the loss is no mean over the samples",
                received=f"{int(ignored.sum())} of {ignored.numel()} targets are {number}, and "
                "torch divides by the number of the others in a batch",
                expected="samples with equally many targets that count",
                remedy=f"leave these samples out: keep = targets != {number}; inputs[keep], "
                "targets[keep]"
                if alone
                else "a function (outputs, targets) that returns the loss of each sample (Xi,), "
                "divided by what is meant; samples of one length",
            )
        raise ArgumentError(
            "with class weights the loss is no mean over the samples",
            received=f"weights of the samples from {float(of_samples.min()):.3g} to "
            f"{float(of_samples.max()):.3g}, by whose sum over the batch torch divides",
            expected="losses of the samples whose mean is that of every batch",
            remedy="lambda outputs, targets: w.to(outputs)[targets] * "
            "F.cross_entropy(outputs, targets, reduction='none'), the mean of the weighted losses",
        )

"""The learning rates of a torch scheduler, step by step, with the scheduler left as it is."""

from __future__ import annotations

import copy
import warnings

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from manifold_sde.errors import TimeScaleError


class SchedulerValues:
    """The learning rate k steps of a scheduler from where it stands, as a function of k.

    A copy is stepped, on an optimizer that has no weights; neither the scheduler nor its optimizer
    is changed.

    Args:
        scheduler: A scheduler of ``torch.optim``, whose step is one step of SGD.
        name: What it is given for.

    Raises:
        TimeScaleError: If that is not the learning rate, its rates depend on a run, or those of
            its groups of weights differ.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> values = SchedulerValues(torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "lr")
        >>> [values(k) for k in range(5)], optimizer.param_groups[0]["lr"]
        ([0.1, 0.1, 0.05, 0.05, 0.025], 0.1)
    """

    def __init__(self, scheduler: LRScheduler, name: str) -> None:
        self.__name__ = type(scheduler).__name__
        if name != "lr":
            raise TimeScaleError(
                f"a scheduler of torch changes the learning rate, not {name}",
                received=f"{name} = {self.__name__}",
                expected=f"a number, a list or a callable of the step as {name}",
                remedy=f"lr=scheduler, {name}=5e-4",
            )
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TimeScaleError(
                "the learning rates of this scheduler depend on a run",
                received=self.__name__,
                expected="a scheduler whose rates are known beforehand, as CosineAnnealingLR",
                remedy="the rates of a run that was made, as a list of one number a step",
            )
        real = scheduler.optimizer
        groups = [{**group, "params": [torch.zeros(())]} for group in real.param_groups]
        self._optimizer = SGD(groups)
        # Only the copy of the scheduler is to step it: no weight moves.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]
        self._scheduler = copy.deepcopy(scheduler, {id(real): self._optimizer})
        self._known = [self._now()]

    def __call__(self, step: int) -> float:
        """The learning rate of a step k = 0, 1, 2, ..."""
        while len(self._known) <= step:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that no optimizer was stepped
                self._scheduler.step()
            self._known.append(self._now())
        return self._known[step]

    def _now(self) -> float:
        rates = {float(group["lr"]) for group in self._optimizer.param_groups}
        if len(rates) > 1:
            raise TimeScaleError(
                "the learning rates of a scheduler's groups of weights differ",
                received=f"{self.__name__} with the rates {', '.join(map(repr, sorted(rates)))}",
                expected="one learning rate for all weights",
                remedy="a scheduler of an optimizer with one group of weights",
            )
        return rates.pop()

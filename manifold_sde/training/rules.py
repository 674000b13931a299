"""What an optimizer does to a scale-invariant group, as the clock reads it from its options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from manifold_sde.arguments import kind_of
from manifold_sde.errors import ArgumentError, DTypeError
from manifold_sde.number_arrays import Array
from manifold_sde.training.expected import ADAM, LINEAR, RELATIVE
from manifold_sde.training.recursions import LinearStep, Number, averaging_step, sgd_step
from manifold_sde.training.update_variance import (
    adam_variance,
    averaged_variance,
    lion_variance,
    signum_variance,
)

NORMS = "norms"
"""The rule of an optimizer of which only the decay is known: the clock is read off the norms."""
_AVERAGED = ("momentum", "betas")
"""What a rule with a running average calls its share; others have one of these by other names."""
_OTHER_NAMES = ("beta", "beta1", "beta_1", "mu", "momentum_decay", "nesterov_momentum")
DECLARED = (*LINEAR, *ADAM, "signsgd", "signum", "lion", "normalised_sgd", *RELATIVE, NORMS)


@dataclass(frozen=True)
class Options:
    """The options of a parameter group in one step, as plain numbers or tensors."""

    lr: Any
    weight_decay: Any = 0.0
    momentum: Any = 0.0
    dampening: Any = 0.0
    nesterov: bool = False
    betas: tuple[Any, Any] = (0.9, 0.999)
    eps: Any = 0.0

    def numbers(self) -> Options:
        """The same with floats: a tensor of the options is read, and waited for."""
        return Options(
            float(self.lr),
            float(self.weight_decay),
            float(self.momentum),
            float(self.dampening),
            bool(self.nesterov),
            (float(self.betas[0]), float(self.betas[1])),
            float(self.eps),
        )


def options_of(group: Mapping[str, Any]) -> Options:
    """The options that a parameter group has now; ``lr`` times the trust coefficient, if any."""

    def kept(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    betas = group.get("betas", (0.9, 0.999))
    return Options(
        kept(group["lr"]) * group.get("trust_coefficient", 1.0),
        kept(group.get("weight_decay", 0.0)),
        kept(group.get("momentum", 0.0)),
        kept(group.get("dampening", 0.0)),
        bool(group.get("nesterov", False)),
        (kept(betas[0]), kept(betas[1])),
        kept(group.get("eps", 0.0)),
    )


def _steps_as(optimizer: Optimizer, known: type[Optimizer]) -> bool:
    """Whether an optimizer is of a class, and has no step of its own."""
    # torch wraps the steps of a class when it is first made.
    steps = (inspect.unwrap(cls.step) for cls in (type(optimizer), known))
    return isinstance(optimizer, known) and next(steps) is next(steps)


def rule_of(optimizer: object, declared: str | None) -> str:
    """The rule by which an optimizer moves the weights.

    Raises:
        DTypeError: If it is no optimizer.
        ArgumentError: If it is none of those that are known, and none is declared.
    """
    if not isinstance(optimizer, Optimizer):
        raise DTypeError(
            "optimizer is not a torch optimizer",
            received=kind_of(optimizer),
            expected="a torch.optim.Optimizer",
            remedy="MixingClock(model, optimizer, inputs=inputs)",
        )
    if declared is not None:
        if declared not in DECLARED:
            raise ArgumentError(
                "rule is not one of those that are known",
                received=repr(declared),
                expected=", ".join(DECLARED),
                remedy=f'rule="{NORMS}" for an optimizer that multiplies the weights by '
                "1 - lr * weight_decay, whatever else it does",
            )
        for group in optimizer.param_groups:
            _require_options(declared, group)
        return declared
    if _steps_as(optimizer, torch.optim.SGD):
        return "sgd"
    if _steps_as(optimizer, torch.optim.Adam):  # AdamW is one of them
        groups = optimizer.param_groups
        plain = not any(group.get("amsgrad") for group in groups)
        decoupled = all(g.get("decoupled_weight_decay") or not g["weight_decay"] for g in groups)
        if plain and decoupled:
            return "adamw"
        raise ArgumentError(
            "this form of Adam has no clock that is free of the weight decay"
            if plain
            else "Adam with amsgrad has no clock here",
            received="weight_decay in the gradient (L2)" if plain else "amsgrad=True",
            expected="AdamW: divided by the root of v, decay turns the direction",
            remedy='torch.optim.AdamW; or rule="adam", if the gradients of all coordinates have '
            "equal variance",
        )
    if type(optimizer).__name__ == "Muon":
        return NORMS
    raise ArgumentError(
        f"the optimizer {type(optimizer).__name__} is not known",
        received=type(optimizer).__name__,
        expected="SGD, Adam, AdamW or Muon of torch.optim, or a declared rule",
        remedy=f"rule= one of {', '.join(DECLARED)}; its options are read from param_groups: lr, "
        "weight_decay, momentum or betas",
    )


def _require_options(rule: str, group: Mapping[str, Any]) -> None:
    """Check that a parameter group has what its declared rule is read from.

    Raises:
        ArgumentError: If it has not, or has it by another name.
    """
    by_betas = rule in (*ADAM, "lion", "lamb")
    needed = "betas" if by_betas else "momentum"
    other = [name for name in (*_OTHER_NAMES, *_AVERAGED) if name in group and name != needed]
    if rule == NORMS or needed in group or not (by_betas or rule == "signum" or other):
        return
    raise ArgumentError(
        f"the optimizer's parameter groups have no {needed!r}, of which {rule!r} is made",
        received=", ".join(name for name in group if name != "params"),
        expected=needed + (", a pair" if by_betas else ", a number; 0 for none"),
        remedy=f'for group in optimizer.param_groups: group["{needed}"] = ..., what the optimizer '
        f'uses; or rule="{NORMS}"',
    )


def matrix(rule: str, now: Options, count: Array, *, coupled: Number = 0.0) -> LinearStep:
    """The step's matrix, for groups that have made ``count`` steps before."""
    if rule in LINEAR:
        return sgd_step(
            now.lr,
            now.weight_decay,
            now.momentum,
            dampening=now.dampening,
            nesterov=now.nesterov,
            decoupled=rule == "sgdw",
            first=count == 0,
        )
    if rule in ADAM:
        decay = 0.0 if rule == "adam" else now.lr * now.weight_decay
        return averaging_step(now.lr, decay, now.betas[0], count + 1, coupled=coupled)
    decay = 0.0 if rule in RELATIVE else now.lr * now.weight_decay
    return averaging_step(now.lr, decay, 0.0, 1)


def variance(rule: str, now: Options) -> float:
    """U^2 of an update by the number of coordinates, or by itself where the size is fixed."""
    if rule in ADAM:
        return adam_variance(now.betas)
    if rule == "lion":
        return lion_variance(now.betas)
    if rule == "signum":
        return signum_variance(now.momentum)
    if rule == "normalised_sgd":
        return averaged_variance(now.momentum)
    return 1.0


def long_run_rate(rule: str, now: Options) -> float:
    """The learning rate that a gradient has in the long run: with momentum, η(1 - d)/(1 - β)."""
    if rule in LINEAR:
        return float(now.lr * (1.0 - now.dampening) / (1.0 - now.momentum))
    return float(now.lr)


def turn(rule: str, now: Options, square: Array) -> Number:
    """Dv of a step whose length is a part of the norm, from |x|^2."""
    if rule == "lars":
        return (now.lr / (1.0 - now.momentum)) ** 2
    average = now.betas[0] if rule == "lamb" else now.momentum
    step = now.lr**2 * averaged_variance(average)
    return step / square if rule == "hyperball" else step


def pure_alignment(rule: str, now: Options) -> float:
    """Share of the growth of the norm that is alignment where there is noise alone."""
    if rule in LINEAR:
        b = now.momentum
        if now.nesterov:
            return 1.0 - (1.0 - b) ** 2 * ((1.0 + b) ** 2 + b**4 / (1.0 - b * b))
        return 2.0 * b / (1.0 + b)
    if rule in ADAM:
        return 2.0 * now.betas[0] / (1.0 + now.betas[0])
    if rule in RELATIVE or rule == NORMS:
        return float("nan")
    return 1.0 - 1.0 / variance(rule, now)


def relaxation_rate(rule: str, now: Options, loss: float) -> float:
    """The rate a step at which the norm comes to rest, from what decay takes of |x|^2 in a step.

    |x|^4 of SGD relaxes at twice that rate, |x|^2 of steps of fixed size at the rate itself; with
    Adam's v behind by 1/(1 - beta2) steps, at the slower of two rates.
    """
    if rule in LINEAR:
        return 2.0 * loss
    if rule not in ADAM:
        return loss
    memory = 1.0 - now.betas[1]
    half = 0.5 * (2.0 * loss + memory)
    return half - math.sqrt(half * half - loss * memory)

"""A clock of groups that turn at different rates, and options that a rule does not find."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from manifold_sde.errors import ArgumentError, MixingClockWarning
from manifold_sde.training import MixingClock, Records, ScaleGroup
from tests.training.test_clock import Rows

STEPS, LR, DECAY = 400, 0.05, 0.05


class TwoRates(nn.Module):
    """Many weights under decay, and a few without, as the gains of a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.few = Rows(0, 150, 120), Rows(1, 150, 20)

    def groups(self) -> list[ScaleGroup]:
        return [
            ScaleGroup(name, (f"{name}.weight",), 0, 1, None, 150, rows.weight.numel(), 0.0)
            for name, rows in (("few", self.few), ("many", self.many))
        ]


@pytest.fixture(scope="module")
def two_rates() -> tuple[TwoRates, MixingClock, Records, Records]:
    model = TwoRates()
    optimizer = torch.optim.SGD(
        [
            {"params": [model.many.weight], "weight_decay": DECAY},
            {"params": [model.few.weight], "weight_decay": 0.0},
        ],
        LR,
    )
    clock = MixingClock(model, optimizer, model.groups(), sampling="iid")
    records = (
        Records(lambda: {"first": float(model.many.weight.detach()[0, 0])}),
        Records(lambda: {"first": float(model.few.weight.detach()[0, 0])}),
    )
    for step in range(1, STEPS + 1):
        model.many.noise()
        model.few.noise()
        optimizer.step()
        if step % 100 == 0:
            records[0].record(step, clock)
            records[1].record(step, clock, group="few")
    return model, clock, *records


def test_the_clock_is_that_of_most_weights(two_rates: Any) -> None:
    model, clock, _, _ = two_rates
    assert model.many.off(clock.time) < 4.0
    assert model.few.off(clock.slowest) < 4.0
    # The broken twin: the slowest for all.
    assert model.many.off(clock.slowest) > 20.0
    values = clock.values()
    assert values["clock/v"] == values["many/v"] == clock.time_of("many")
    assert values["clock/slowest"] == values["few/v"] == clock.time_of("few")
    assert values["clock/growth"] == pytest.approx(clock.time, rel=0.1)
    assert "in few" in str(clock)


def test_records_by_the_clock_of_a_group(two_rates: Any) -> None:
    _, clock, of_most, of_few = two_rates
    assert np.asarray(of_most.clock)[-1] == clock.time
    assert np.asarray(of_few.clock)[-1] == clock.slowest
    with pytest.raises(ArgumentError, match="many"):
        clock.time_of("rows")


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_a_state_that_is_loaded_after_the_clock_is_made(make: Any) -> None:
    """The optimizer's state alone is told of; with that of the clock nothing is."""

    def begun(saved: Any = None) -> tuple[Rows, Any, MixingClock]:
        model = Rows(0, 3, 5)
        options = {"momentum": 0.9} if make is torch.optim.SGD else {}
        optimizer = make(model.parameters(), 1e-2, **options)
        clock = MixingClock(model, optimizer, [model.group])
        if saved is not None:
            optimizer.load_state_dict(saved)
        return model, optimizer, clock

    model, optimizer, first = begun()
    for _ in range(3):
        model.noise()
        optimizer.step()
    saved = optimizer.state_dict()
    model, optimizer, _ = begun(saved)
    model.noise()
    with pytest.warns(MixingClockWarning, match="has made steps before this clock"):
        optimizer.step()
    model, optimizer, clock = begun(saved)
    clock.load_state_dict(first.state_dict())
    model.noise()
    optimizer.step()
    assert clock.steps == 4


class Declared(torch.optim.Optimizer):
    """An optimizer of somebody's own, with options by his names."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 5.0, **options})

    def step(self, closure: Any = None) -> None:
        """LARS without momentum: a step of lr times the trust coefficient times the norm."""
        for group in self.param_groups:
            for p in group["params"]:
                size = p.detach().norm(dim=1, keepdim=True) / p.grad.norm(dim=1, keepdim=True)
                p.data -= group["lr"] * group["trust_coefficient"] * size * p.grad


@pytest.mark.parametrize(
    ("rule", "options", "needed"),
    [
        ("signum", {"beta": 0.9}, "momentum"),
        ("signum", {}, "momentum"),
        ("sgdw", {"mu": 0.9}, "momentum"),
        ("normalised_sgd", {"betas": (0.9, 0.99)}, "momentum"),
        ("lion", {"momentum": 0.9}, "betas"),
        ("lamb", {}, "betas"),
        ("adamw", {"alpha": 0.99}, "betas"),
    ],
)
def test_options_by_other_names_are_not_taken_for_defaults(
    rule: str, options: Any, needed: str
) -> None:
    model = Rows(0, 2, 3)
    with pytest.raises(ArgumentError, match=f"have no '{needed}'"):
        MixingClock(model, Declared(model.parameters(), **options), [model.group], rule=rule)


def test_lars_with_its_trust_coefficient() -> None:
    model = Rows()
    optimizer = Declared(model.parameters(), trust_coefficient=0.01, momentum=0.0)
    clock = MixingClock(model, optimizer, [model.group], rule="lars")
    for _ in range(300):
        model.noise()
        optimizer.step()
    assert clock.time == pytest.approx(300 * 0.05**2, rel=1e-9)
    assert model.off(clock.time) < 4.0
    # The broken twin: the learning rate alone.
    assert math.exp(-300 * 5.0**2 / 2.0) < 1e-9
    assert model.off(300 * 5.0**2) > 20.0

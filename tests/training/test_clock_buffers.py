"""A clock that is begun in the middle of a run of SGD: it takes the optimizer's own buffer.

The truth is a clock of the whole run, and the norms themselves. The broken twin begins with an
empty buffer, and an undampened gradient.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from manifold_sde.training import MixingClock, ScaleGroup
from manifold_sde.training.watch import Watch
from tests.training.test_clock import Rows

pytestmark = pytest.mark.filterwarnings("ignore:The optimizer has made steps")

BEFORE, STEPS = 60, 6

Make = Callable[[Any], torch.optim.Optimizer]


def sgd(**options: Any) -> Make:
    keywords = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.02, **options}
    return lambda p: torch.optim.SGD(p, **keywords)


CASES: dict[str, Make] = {
    "momentum": sgd(),
    "no decay": sgd(weight_decay=0.0),
    "nesterov": sgd(nesterov=True),
    "dampening": sgd(dampening=0.5),
    "as much dampening": sgd(dampening=0.9, lr=0.2, weight_decay=2e-3),
    "maximize": sgd(maximize=True),
    "foreach": sgd(foreach=True),
    "one by one": sgd(foreach=False),
    "fused": sgd(fused=True),
}


def clocks(make: Make, change: Callable[[dict[str, Any]], None] | None = None) -> tuple[float, ...]:
    """What a clock of the end of a run counts of v and growth, over what a clock of all of it does.

    And u over v, which is 1 for noise of V = 1.
    """
    rows = Rows()
    rows.weight.data.mul_(1.4)
    optimizer = make([rows.weight])
    whole = MixingClock(rows, optimizer, [rows.group])
    for _ in range(BEFORE):
        rows.noise()
        optimizer.step()
    if change is not None:
        change(optimizer.param_groups[0])
    before = whole.each(lambda t: t.angle)["rows"], whole.each(lambda t: t.growth)["rows"]
    clock = MixingClock(rows, optimizer, [rows.group])
    for _ in range(STEPS):
        rows.noise()
        optimizer.step()
    counted = whole.each(lambda t: t.angle)["rows"] - before[0]
    grown = whole.each(lambda t: t.growth)["rows"] - before[1]
    v = clock.each(lambda t: t.angle)["rows"].mean()
    u = clock.each(lambda t: np.asarray(t.intrinsic.value))["rows"].mean()
    growth = clock.each(lambda t: t.growth)["rows"].mean()
    return float(v / counted.mean()), float(growth / grown.mean()), float(u / v)


@pytest.mark.parametrize("name", CASES)
def test_a_clock_begun_in_mid_run_counts_what_the_whole_one_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    v, growth, u = clocks(CASES[name])
    assert v == pytest.approx(1.0, abs=5e-3)
    assert growth == pytest.approx(1.0, abs=5e-3)
    assert u == pytest.approx(1.0, abs=0.03)
    monkeypatch.setattr(Watch, "buffers", lambda *_: [])
    assert abs(clocks(CASES[name])[0] - 1.0) > 0.3


def test_options_that_change_where_the_clock_begins() -> None:
    found = clocks(sgd(), lambda group: group.update(lr=0.005))
    assert found == pytest.approx((1.0, 1.0, 1.0), abs=0.03)
    found = clocks(sgd(), lambda group: group.update(momentum=0.0))
    assert found == pytest.approx((1.0, 1.0, 1.0), abs=0.03)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Rows(seed=1), Rows(seed=2)


def named(rows: Rows, name: str) -> ScaleGroup:
    n = len(rows.weight)
    return ScaleGroup(name, (f"{name}.weight",), 0, 1, None, n, rows.weight.numel(), 0.0)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_parameter_groups_with_and_without_a_buffer(dampening: float) -> None:
    """The second was frozen: its first gradient is undampened, as torch's own first one is."""
    pair = Pair()
    optimizer = torch.optim.SGD(
        [{"params": pair.first.weight}, {"params": pair.second.weight, "momentum": 0.5}],
        **{"lr": 0.02, "momentum": 0.9, "weight_decay": 0.02, "dampening": dampening},
    )
    for _ in range(BEFORE):
        pair.first.noise()
        optimizer.step()
    clock = MixingClock(pair, optimizer, [named(pair.first, "first"), named(pair.second, "second")])
    pair.first.noise()
    optimizer.step()
    assert clock.time_of("first") > 0.0
    assert clock.time_of("second") == 0.0
    start = pair.second.weight.detach().clone()
    for _ in range(STEPS):
        for rows in (pair.first, pair.second):
            rows.noise()
        optimizer.step()
    clock.values()
    track = clock._lanes[1].track
    grown = pair.second.weight.detach().square().sum(1) / start.square().sum(1)
    assert float(np.mean(track.predicted.xx)) == pytest.approx(float(grown.mean()), rel=3e-3)
    assert track.age.max() == 0.0


@pytest.mark.parametrize("sparse", [False, True])
def test_the_buffer_is_the_optimizers(sparse: bool) -> None:
    """Of all parts, in the order of the groups, whatever the gradients' layout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6, sparse=sparse), nn.LayerNorm(6), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    tokens = torch.arange(9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens % 3).backward()
        optimizer.step()

    for _ in range(5):
        step()
    clock = MixingClock(model, optimizer, ["0.weight"])
    weight = model[0].weight
    x = weight.detach().double()
    m = dense(optimizer.state[weight]["momentum_buffer"]).double()
    step()
    gradient = dense(weight.grad).double()
    clock.values()
    got = float(clock._lanes[0].track.predicted.xx[0])
    # With independent gradients: x - lr (.9 m + g).
    want = x.square().sum() - 0.18 * (x * m).sum() + 0.0081 * m.square().sum()
    want = want + 0.01 * gradient.square().sum()
    assert got == pytest.approx(float(want), rel=1e-6)


def dense(value: Any) -> Tensor:
    return value.to_dense() if value.is_sparse else value


def test_a_first_step_that_is_left_out_or_fails() -> None:
    """A fused optimizer leaves out a step with infinite gradients; the buffer is still there."""
    counted = []
    for spoilt in (False, True):
        rows = Rows()
        optimizer = sgd(fused=True)([rows.weight])
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(1))
        clock = None
        for k in range(BEFORE + STEPS):
            if k == BEFORE:
                clock = MixingClock(rows, optimizer, [rows.group])
                if spoilt:
                    with pytest.raises(KeyError):
                        optimizer.step(no_data)
                    rows.weight.grad = torch.full_like(rows.weight, torch.inf)
                    scaler.step(optimizer)
                    scaler.update(4.0)
            rows.noise()
            rows.weight.grad.mul_(4.0)
            scaler.step(optimizer)
            scaler.update(4.0)
        assert clock is not None
        counted.append(clock.time)
    assert counted[1] == pytest.approx(counted[0], rel=1e-9)


def no_data() -> float:
    raise KeyError


def test_the_state_of_a_clock_goes_on_and_takes_no_buffer() -> None:
    rows = Rows()
    optimizer = sgd()([rows.weight])
    whole = MixingClock(rows, optimizer, [rows.group])
    for _ in range(20):
        rows.noise()
        optimizer.step()
    clock = MixingClock(rows, optimizer, [rows.group])
    clock.load_state_dict(whole.state_dict())
    for _ in range(STEPS):
        rows.noise()
        optimizer.step()
    assert clock.time == pytest.approx(whole.time, rel=1e-12)

"""Records of test functions: what they hold, that they survive a file, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from manifold_sde.errors import (
    ArgumentError,
    CheckpointError,
    MixingClockWarning,
    NonFiniteError,
)
from manifold_sde.training import Records, directions_of, logits_on, loss_on, relaxation


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_records_survive_a_file(tmp_path: Path) -> None:
    records = Records()
    generator = np.random.default_rng(0)
    for k in range(40):
        records.append(10 * k, 0.1 * k, {"test loss": generator.standard_normal()}, b=k % 3)
    records.save(tmp_path / "records.npz")
    loaded = Records.load(tmp_path / "records.npz")
    assert list(loaded.values) == ["test loss", "b"]
    for name in records.values:
        np.testing.assert_array_equal(loaded.values[name], records.values[name])
    np.testing.assert_array_equal(loaded.steps, 10 * np.arange(40))
    np.testing.assert_array_equal(loaded.clock, records.clock)
    assert repr(loaded) == "<40 records of test loss, b>"
    found = relaxation(loaded)
    assert [one.name for one in found.functions] == ["test loss", "b"]
    assert found.interval == relaxation(records.values, records.clock).interval
    loaded.append(400, 4.0, {"b": 1, "test loss": 0.5})  # goes on
    assert len(loaded) == 41


def test_recorders_look_and_do_not_touch() -> None:
    module = network()
    module[2].eval()
    inputs, targets = torch.randn(5, 3), torch.randint(0, 2, (5,))
    before = {name: x.clone() for name, x in module.state_dict().items()}
    records = Records(
        loss_on(module, nn.CrossEntropyLoss(), inputs, targets),
        logits_on(module, inputs, projections=2),
        directions_of(module[0], projections=3),
    )
    records.record(0, 0.0)
    names = ["loss", "logits 0", "logits 1", "direction 0", "direction 1", "direction 2"]
    assert list(records.values) == names
    assert [module.training, module[1].training, module[2].training] == [True, True, False]
    for name, x in module.state_dict().items():
        assert torch.equal(x, before[name])
    records.record(1, 1.0)  # the same weights, the same numbers
    for values in records.values.values():
        assert values[0] == values[1]
    expected = nn.functional.cross_entropy(module.eval()(inputs), targets).detach()
    assert records.values["loss"][0] == pytest.approx(float(expected))


def test_directions_are_those_of_the_weights() -> None:
    """A projection is of size 1, linear in the direction, and free of the norm."""
    x = torch.randn(1000, dtype=torch.float64)
    whole = directions_of([x], projections=200)()
    values = np.array(list(whole.values()))
    assert abs(np.mean(values**2) - 1.0) < 0.3  # chi-squared of 200: .1
    scaled = directions_of([3.0 * x], projections=200)()
    np.testing.assert_allclose(list(scaled.values()), values, rtol=1e-12)
    basis = [directions_of([e], projections=1)()["direction 0"] for e in torch.eye(6)]
    assert {abs(round(value, 6)) for value in basis} == {1.0}
    some = torch.arange(1.0, 7.0)
    expected = float(some @ torch.tensor(basis) / some.norm())
    assert directions_of([some], projections=1)()["direction 0"] == pytest.approx(expected)
    both = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2)])
    one, two = both
    assert directions_of(one, two)() == directions_of(both)() == directions_of([one, two])()
    assert directions_of(one.weight)() == directions_of([one.weight])() != directions_of(one)()
    other = directions_of([x], projections=200, seed=1)()
    assert list(other.values()) != list(whole.values())


@dataclass
class Clock:
    """As much of a MixingClock as is read."""

    time: float = 0.0
    effective: float | None = None
    sampling: str | None = "reshuffled"


def test_a_clock_is_read_and_its_fresh_part_is_taken() -> None:
    generator = np.random.default_rng(1)
    clock = Clock()
    records = Records(lambda: {"probe": generator.standard_normal()})
    for k in range(50):
        clock.time = 0.5 * k
        records.record(k, clock)
    np.testing.assert_array_equal(records.clock, 0.5 * np.arange(50))
    whole = relaxation(records, clock)
    alone = relaxation(records)
    assert whole.length == alone.length == 24.5
    assert "explores the minimisers is unknown" in whole.reason
    assert "explores the minimisers is unknown" in alone.reason
    assert "unknown" not in relaxation(records, records.clock, modes=1).reason
    clock.effective = 0.1 * clock.time
    fresh = relaxation(records, clock)
    assert "unknown" not in fresh.reason
    assert fresh.length == pytest.approx(2.45)
    assert fresh.estimate == pytest.approx(0.1 * whole.estimate)
    clock.sampling = None
    with pytest.warns(MixingClockWarning, match="order of the data was not told"):
        relaxation(records, clock)
    with pytest.raises(ArgumentError, match="there are no clock readings"):
        relaxation(records.values, clock)
    clock.sampling = "reshuffled"
    clock.effective = 0.0
    with pytest.raises(ArgumentError, match="nothing explores the minimisers"):
        relaxation(records, clock)


def test_what_cannot_be_recorded_is_told(tmp_path: Path) -> None:
    records = Records()
    records.append(5, 1.0, loss=0.1)
    with pytest.raises(NonFiniteError, match="at step 6 is not a finite number"):
        records.append(6, 1.1, loss=float("nan"))
    with pytest.raises(NonFiniteError, match="received: loss=tensor"):
        records.append(6, 1.1, loss=torch.ones(2))
    with pytest.raises(ArgumentError, match="others than before"):
        records.append(6, 1.1, accuracy=0.1)
    with pytest.raises(ArgumentError, match="others than before"):
        Records().append(0, 0.0)
    with pytest.raises(ArgumentError, match="not later than the last"):
        records.append(5, 1.1, loss=0.1)
    with pytest.raises(ArgumentError, match="not later than the last"):
        records.append(6, 0.0, loss=0.1)
    assert len(records) == 1
    with pytest.raises(ArgumentError, match="no weights to record"):
        directions_of([])
    with pytest.raises(ArgumentError, match="received: str"):
        directions_of("weight")
    with pytest.raises(ArgumentError, match="number of projections"):
        logits_on(network(), torch.zeros(1, 3), projections=0)
    (tmp_path / "no.npz").write_bytes(b"no records")
    with pytest.raises(CheckpointError, match="holds no records"):
        Records.load(tmp_path / "no.npz")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(CheckpointError, match="holds no records"):
        Records.load(tmp_path / "other.npz")

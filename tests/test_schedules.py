"""Learning-rate and weight-decay schedules: their kinds, their laziness, and what is refused."""

import math
import pickle
import types

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from manifold_sde import errors
from manifold_sde.errors import TimeScaleError
from manifold_sde.schedules import STREAM_LIMIT, Schedule
from manifold_sde.time_scale import TimeScale

BLOCK = 128 * 128

# Kinds of schedules.


def test_sequences_arrays_tensors_and_callables_are_the_same() -> None:
    values = [0.25, 0.5, 0.125, 0.75]
    k = np.arange(5)
    want = TimeScale(values, 0.5).tau(k)
    for source in (
        tuple(values),
        np.array(values),
        np.array(values, dtype=np.float32),
        torch.tensor(values),
        torch.tensor(values, dtype=torch.bfloat16, requires_grad=True),
        lambda k: np.array(values)[k],
        lambda k: values[k],
        lambda k: torch.tensor(values)[k],
    ):
        np.testing.assert_array_equal(TimeScale(source, 0.5).tau(k), want)
        np.testing.assert_array_equal(TimeScale(source, [0.5] * 9).tau(k), want)
        np.testing.assert_array_equal(TimeScale(source, lambda k: 0.5).tau(k), want)
    got = TimeScale(0.5, values).tau(torch.arange(5))
    assert isinstance(got, torch.Tensor)
    np.testing.assert_allclose(TimeScale([1], [0]).tau(1), math.log(3) / 2)


SINGLE_STEP = {
    "branch": lambda k: 0.1 if k < 100 else 0.01,
    "math": lambda k: 0.1 * math.cos(k / 1e5),
    "max": lambda k: max(0.01, 0.1 - 1e-5 * k),
    "constant": lambda k: 0.05,
    "table": lambda k: [0.1, 0.2][k % 2],
    "integer method": lambda k: 0.1 / k.bit_length() if k else 0.3,
    "whole array": lambda k: 0.1 if np.all(np.asarray(k) < 40_000) else 0.01,
    "last of array": lambda k: 0.1 * np.ones(np.shape(k)) / (1 + np.max(k)),
    "single precision": lambda k: (
        (np.asarray(k) / np.float32(3e4)).astype(np.float32) if np.ndim(k) else k / 3e4
    ),
}


@pytest.mark.parametrize("name", SINGLE_STEP)
def test_callables_that_take_one_step_at_a_time(name: str) -> None:
    """Those that raise on an array, and those that give something else for it."""
    function = SINGLE_STEP[name]
    n = BLOCK + 300
    values = [float(function(k)) for k in range(n)]
    scale = TimeScale(function, 0.01)
    k = np.array([0, 1, 2, 99, 100, 101, 5000, n])
    np.testing.assert_array_equal(scale.tau(k), TimeScale(values, 0.01).tau(k))


def test_a_callable_is_asked_for_no_more_than_is_needed() -> None:
    asked: list[int] = []

    def one_at_a_time(k: int) -> float:
        asked.append(int(k))  # raises on an array
        return 0.1 if k < 40 else -1.0

    scale = TimeScale(one_at_a_time, 0.1)
    assert not asked
    scale.tau(10)
    assert max(asked) == 9
    scale.tau([3, 20])
    scale.tau(20)
    assert asked.count(15) == 1
    assert max(asked) == 19
    assert scale.tau(40) > 0
    for call in (lambda: scale.tau(41), lambda: scale.effective_lr(40), lambda: scale.steps(9.0)):
        with pytest.raises(errors.TimeScaleError, match="lr at step 40 is out of range"):
            call()
    assert scale.steps(float(scale.tau(30))) == 30


def test_answers_do_not_depend_on_what_was_asked_before() -> None:
    def make() -> TimeScale:
        return TimeScale(lambda k: 0.1 / np.sqrt(1.0 + k), lambda k: 0.05 + 0 * k)

    k = np.array([5, 200, 3 * BLOCK + 17, BLOCK, BLOCK - 1, 2 * BLOCK + 1, 131])
    want = make().tau(k)
    used = make()
    np.testing.assert_array_equal([used.tau(i) for i in k], want)
    np.testing.assert_array_equal([used.tau(i) for i in k[::-1]], want[::-1])
    np.testing.assert_array_equal([make().tau(i) for i in k], want)
    np.testing.assert_array_equal(used.tau(k), want)
    together = used.log_effective_lr(k)
    np.testing.assert_array_equal([make().log_effective_lr(i) for i in k], together)


def test_a_schedule_is_copied() -> None:
    values, tensor = np.array([0.1, 0.2]), torch.tensor([0.1, 0.2], dtype=torch.float64)
    first, second = TimeScale(values, 0.1), TimeScale(tensor, 0.1)
    before = float(first.tau(2))
    values[:], tensor[:] = 9.0, 9.0
    assert first.tau(2) == second.tau(2) == before
    assert pickle.loads(pickle.dumps(first)).tau(2) == before


def test_schedules_are_printed() -> None:
    def cosine(k: int) -> float:
        return 0.1 + 0 * k

    scale = TimeScale(cosine, [0.5, 0.25])
    assert (
        repr(scale) == "TimeScale(lr=<callable cosine>, weight_decay=<2 values from 0.5 to 0.25>)"
    )
    assert "<2 * callable cosine>" in repr(scale.rescaled(0.25)[0])
    assert isinstance(scale.lr, Schedule)
    assert TimeScale(scale.lr, scale.weight_decay).tau(2) == scale.tau(2)
    assert not scale.is_constant


# What is refused.


@pytest.mark.parametrize(
    ("lr", "weight_decay", "said"),
    [
        ([], 0.1, r"shape \(0,\)"),
        ([[0.1, 0.2]], 0.1, r"shape \(1, 2\)"),
        ([0.1, -0.2], 0.1, "lr at step 1 is out of range"),
        ([0.1, math.nan], 0.1, "lr = nan"),
        ([0.1, 1e-40], 0.1, "lr = 1e-40"),
        (torch.tensor([0.1, math.inf]), 0.1, "lr = inf"),
        (0.1, [0.1, -0.2], "weight_decay at step 1"),
        (["a", "b"], 0.1, "lr is not a real number"),
        ([0.1, None], 0.1, "lr is not a real number"),
        ([True, False], 0.1, "lr is not a real number"),
        ([0.1, 0.5], [1.0, 2.0], "weight_decay at step 1 is not below 1"),
        (np.full(BLOCK + 9, 0.5), np.repeat([1, 2], [BLOCK + 5, 4]), f"step {BLOCK + 5} is not"),
        (0.0, [0.1, 0.2], "lr is zero"),
        ([0.1], "0.1", "weight_decay is not a real number"),
    ],
)
def test_bad_schedules_are_refused(lr: object, weight_decay: object, said: str) -> None:
    with pytest.raises(errors.TimeScaleError, match=said) as caught:
        TimeScale(lr, weight_decay)
    assert caught.value.received
    assert caught.value.expected
    assert caught.value.remedy


def raises(k: int) -> float:
    raise KeyError("no such step")


@pytest.mark.parametrize(
    ("lr", "weight_decay", "said"),
    [
        (lambda k: -0.1, 0.1, "lr at step 0 is out of range"),
        (lambda k: 0.1 - 0.03 * k, 0.1, "lr at step 4 is out of range"),
        (lambda k: np.where(k < 3, 0.1, np.nan), 0.1, "lr at step 3"),
        (0.1, lambda k: 0.1 - 0.03 * k, "weight_decay at step 4"),
        (lambda k: 0.1 * 2.0**k, 1.0, "weight_decay at step 4 is not below 1"),
        (lambda k: 0.1 - 0.01 * k, lambda k: 0.1 - 0.05 * k, "weight_decay at step 3"),
        (lambda k: 0.1 - 0.05 * k, lambda k: 0.1 - 0.01 * k, "lr at step 3"),
        (raises, 0.1, "KeyError: 'no such step'"),
        (lambda k: [0.1, 0.2, 0.3][k], 0.1, "failed at step 3"),
        (lambda: 0.1, 0.1, "TypeError"),
        (lambda k: "0.1", 0.1, "lr at step 0 is not a real number"),
        (lambda k: None, 0.1, "lr at step 0 is not a real number"),
        (lambda k: [0.1, 0.2], 0.1, "did not give one number at step 0"),
        (lambda k: 1j * k, 0.1, "lr at step 0 is not a real number"),
    ],
)
def test_bad_callables_are_refused_where_they_are_bad(
    lr: object, weight_decay: object, said: str
) -> None:
    scale = TimeScale(lr, weight_decay)
    for call in (lambda: scale.tau(10), lambda: scale.steps(50.0), lambda: scale.effective_lr(9)):
        with pytest.raises(errors.TimeScaleError, match=said):
            call()


@pytest.mark.parametrize(
    "method", ["tau", "radius", "discrete_time", "accumulated", "log_accumulated", "shrinkage"]
)
def test_a_schedule_that_ends_names_its_length_and_the_step(method: str) -> None:
    scale = TimeScale([0.1] * 10, [0.2] * 20)
    assert np.isfinite(getattr(scale, method)(10))
    for k in (11, [3, 11], torch.tensor(11)):
        with pytest.raises(
            errors.TimeScaleError, match="schedule lr ends before step 11"
        ) as caught:
            getattr(scale, method)(k)
        assert "length 10" in caught.value.received
    shorter = TimeScale(lambda k: 0.1, [0.2] * 5)
    with pytest.raises(errors.TimeScaleError, match="schedule weight_decay ends before step 6"):
        getattr(shorter, method)(6)


def test_the_last_step_of_a_schedule() -> None:
    scale = TimeScale([0.1] * 10, 0.1)
    assert scale.effective_lr(9) > 0
    with pytest.raises(errors.TimeScaleError, match="a step of at most 9"):
        scale.effective_lr(10)


@pytest.mark.parametrize("method", ["tau", "radius", "effective_lr", "shrinkage"])
@pytest.mark.parametrize("k", [1.5, -1, math.nan, [0, 0.5], "1", None, 2.0**60])
def test_step_counts_that_are_not_are_refused(method: str, k: object) -> None:
    with pytest.raises(errors.TimeScaleError, match="k is"):
        getattr(TimeScale([0.1] * 10, 0.1), method)(k)


def test_what_needs_two_numbers_says_so() -> None:
    scale = TimeScale([0.1, 0.2], 0.1)
    for call, said in [
        (lambda: scale.tau_inverse(1.0), r"steps\(T\)"),
        (lambda: scale.equilibrium_norm(1.0), "norm"),
        (lambda: scale.reparametrised(), "rescaled"),
        (lambda: scale.within_theorem, "values of the schedules"),
    ]:
        with pytest.raises(errors.TimeScaleError, match=said):
            call()


def test_too_many_steps_are_refused_at_once() -> None:
    scale = TimeScale(lambda k: 0.1, 0.1)
    with pytest.raises(errors.TimeScaleError, match="Too many steps"):
        scale.tau(STREAM_LIMIT + 1)


def test_objects_that_can_be_called_are_schedules() -> None:
    class Warmup:
        def __call__(self, k: int) -> float:
            return 0.1 * min(1.0, (k + 1) / 5)

    scale = TimeScale(Warmup(), types.MappingProxyType({0: 0.1, 1: 0.2}).__getitem__)
    assert scale.tau(2) > 0
    assert "callable Warmup" in repr(scale)


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=20),
        lambda o: lr_scheduler.LambdaLR(o, lambda k: 1.0 / (1 + k)),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [5]
        ),
    ],
)
def test_a_scheduler_of_torch_is_read_from_where_it_stands(make):
    scheduler = make(_optimizer())
    optimizer = scheduler.optimizer
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    before = optimizer.param_groups[0]["lr"]
    read = TimeScale(scheduler, 0.01)
    values = Schedule("lr", scheduler).read(0, 12)[0]
    assert optimizer.param_groups[0]["lr"] == before == values[0]
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert values.tolist() == rates
    assert read.accumulated(12) == TimeScale(rates, 0.01).accumulated(12)


def test_schedulers_that_are_no_learning_rate_of_steps_are_named():
    scheduler = lr_scheduler.OneCycleLR(_optimizer(), 0.3, total_steps=20)
    with pytest.raises(TimeScaleError, match="not weight_decay"):
        TimeScale(0.1, scheduler)
    with pytest.raises(TimeScaleError, match="total steps is 20"):
        TimeScale(scheduler, 0.01).accumulated(30)
    with pytest.raises(TimeScaleError, match="depend on a run"):
        Schedule("lr", lr_scheduler.ReduceLROnPlateau(_optimizer()))
    groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in (0.1, 0.2)]
    with pytest.raises(TimeScaleError, match="differ"):
        Schedule("lr", lr_scheduler.StepLR(torch.optim.SGD(groups), 3))

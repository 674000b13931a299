"""The time scale's arguments: every kind of number in, the same kind out, and what is refused."""

import math
import pickle
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from manifold_sde import errors
from manifold_sde.time_scale import TimeScale

# Numbers, arrays, tensors.

METHODS: dict[str, Callable[[TimeScale, object], object]] = {
    "radius": lambda scale, v: scale.radius(v),
    "tau": lambda scale, v: scale.tau(v),
    "tau_inverse": lambda scale, v: scale.tau_inverse(v),
    "norm": lambda scale, v: scale.norm(v, 1.5, 0.81),
    "clock": lambda scale, v: scale.clock(v, 0.81, 1.5),
    "equilibrium_norm": lambda scale, v: scale.equilibrium_norm(v),
    "discrete_time": lambda scale, v: scale.discrete_time(v),
    "accumulated": lambda scale, v: scale.accumulated(v),
    "log_accumulated": lambda scale, v: scale.log_accumulated(v),
    "effective_lr": lambda scale, v: scale.effective_lr(v),
    "log_effective_lr": lambda scale, v: scale.log_effective_lr(v),
    "shrinkage": lambda scale, v: scale.shrinkage(v),
    "log_shrinkage": lambda scale, v: scale.log_shrinkage(v),
}
SCHEDULED = [name for name in METHODS if name not in ("tau_inverse", "equilibrium_norm")]


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_number_gives_the_same(name: str) -> None:
    scale, method = TimeScale(0.01, 0.05), METHODS[name]
    values = [[1, 2, 3], [40, 50, 60]]
    want = np.array([[method(scale, v) for v in row] for row in values])
    assert type(method(scale, 3)) is np.float64
    assert type(method(scale, np.float32(3))) is np.float64
    assert method(scale, Fraction(3)) == method(scale, np.array(3)) == want[0, 2]
    for given in (values, np.array(values), np.array(values, dtype=np.float32)):
        got = method(scale, given)
        assert isinstance(got, np.ndarray)
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, want)
    for dtype in (torch.float64, torch.int64, torch.int32):
        got = method(scale, torch.tensor(values, dtype=dtype))
        assert isinstance(got, torch.Tensor)
        assert got.dtype == torch.float64
        np.testing.assert_array_equal(got.numpy(), want)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        given = torch.tensor(values, dtype=dtype)
        got = method(scale, given)
        assert got.dtype == dtype
        assert got.device == given.device
        assert torch.equal(got, torch.from_numpy(want).to(dtype))
    assert method(scale, torch.tensor(3.0)).shape == ()
    assert not method(scale, torch.tensor(3.0, requires_grad=True)).requires_grad
    assert method(scale, np.zeros((0, 2))).shape == (0, 2)
    assert method(scale, torch.zeros(0)).shape == (0,)


def test_steps_keeps_the_kind_and_counts_in_integers() -> None:
    scale = TimeScale(0.01, 0.05)
    want = [0, 2086]
    assert scale.steps(1.0) == scale.steps(np.array(1.0)) == 2086
    assert type(scale.steps(1)) is int
    got = scale.steps([0.0, 1.0])
    assert got.dtype == np.int64
    assert got.tolist() == want
    for dtype in (torch.float32, torch.float64, torch.int64):
        tensor = scale.steps(torch.tensor([0, 1], dtype=dtype))
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == want


def test_norm_broadcasts_its_arguments() -> None:
    scale = TimeScale(0.01, 0.05)
    t, start = np.array([[0.0], [100.0]]), np.array([1.0, 2.0, 3.0])
    got = scale.norm(t, start, 0.81)
    assert got.shape == (2, 3)
    np.testing.assert_array_equal(got[0], start)
    assert got[1, 1] == scale.norm(100.0, 2.0, 0.81)
    assert scale.norm(t, torch.tensor(start, dtype=torch.float32), 0.81).dtype == torch.float32
    assert scale.clock(torch.tensor([1, 2]), start[:2], torch.tensor(0.5)).dtype == torch.float32


def test_default_dtype_and_error_state_do_not_matter() -> None:
    scale = TimeScale(0.01, 0.05)
    with np.errstate(all="raise"):
        for name, method in METHODS.items():
            method(scale, [0, 1, 50])
            if name not in ("accumulated", "effective_lr"):
                method(scale, 1000 if name == "tau_inverse" else 10**6)
    assert torch.get_default_dtype() == torch.float32


def test_it_can_be_pickled_and_printed() -> None:
    scale = TimeScale(torch.tensor(0.5), np.float32(0.25))
    assert repr(scale) == "TimeScale(lr=0.5, weight_decay=0.25)"
    assert repr(pickle.loads(pickle.dumps(scale))) == repr(scale)
    assert (scale.lr, scale.weight_decay, scale.is_constant) == (0.5, 0.25, True)


# What is refused.

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("lr", "weight_decay", "said"),
    [
        (0.0, 0.1, "lr is zero"),
        (-0.1, 0.1, "lr = -0.1"),
        (NAN, 0.1, "lr = nan"),
        (INF, 0.1, "lr = inf"),
        (1e-40, 0.1, "lr = 1e-40"),
        (1e40, 0.0, "lr = 1e\\+40"),
        (10**400, 0.0, "lr is not a real number"),
        (0.1, -0.1, "weight_decay = -0.1"),
        (0.1, NAN, "weight_decay = nan"),
        (0.1, INF, "weight_decay = inf"),
        (0.1, -1e-320, "weight_decay = -1e-320"),
        (0.1, 10.0, "not below 1"),
        (2.0, 0.5, "product 1"),
        ("0.1", 0.1, "lr is not a real number"),
        (0.1, None, "weight_decay is not a real number"),
        (True, 0.1, "lr is not a real number"),
        (0.1 + 0j, 0.1, "lr is not a real number"),
        (torch.tensor(0.1 + 0j), 0.1, "lr is not a real number"),
        (torch.tensor(True), 0.1, "lr is not a real number"),
        ({"lr": 0.1}, 0.1, "lr is not a real number"),
        ((0.1 for _ in range(3)), 0.1, "lr is not a real number"),
        ([[0.1, 0.2], [0.3]], 0.1, "lr is not a real number"),
    ],
)
def test_bad_constants_are_refused(lr: object, weight_decay: object, said: str) -> None:
    with pytest.raises(errors.TimeScaleError, match=said) as caught:
        TimeScale(lr, weight_decay)
    assert caught.value.received
    assert caught.value.expected
    assert caught.value.remedy


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "value", [-1.0, -1e-300, NAN, INF, "1", None, 1j, True, [1.0, -2.0], torch.tensor([NAN])]
)
def test_bad_arguments_are_refused(name: str, value: object) -> None:
    with pytest.raises(errors.TimeScaleError, match="hint"):
        METHODS[name](TimeScale(0.01, 0.05), value)


@pytest.mark.parametrize("T", [-1.0, NAN, INF, "1", None, [0.1, -0.1]])
def test_bad_times_are_refused_by_steps(T: object) -> None:
    with pytest.raises(errors.TimeScaleError, match="T "):
        TimeScale(0.01, 0.05).steps(T)


@pytest.mark.parametrize("value", [1.5, [1, 2.5], 2.0**53, 1e300])
@pytest.mark.parametrize(
    "name",
    ["discrete_time", "accumulated", "effective_lr", "log_effective_lr", "shrinkage"],
)
def test_steps_that_are_not_whole_are_refused(name: str, value: object) -> None:
    with pytest.raises(errors.TimeScaleError, match="whole number of steps"):
        METHODS[name](TimeScale(0.01, 0.05), value)


def test_what_does_not_fit_a_float_is_refused() -> None:
    scale = TimeScale(0.1, 0.5)
    for call, said in [
        (lambda: scale.accumulated(10**6), "log_accumulated"),
        (lambda: scale.effective_lr(10**6), "log_effective_lr"),
        (lambda: scale.tau(1e308), None),
        (lambda: TimeScale(1e20, 0.0).tau(1e300), "smaller t"),
        (lambda: TimeScale(0.1, 0.0).tau_inverse(400.0), "smaller T"),
        (lambda: TimeScale(1e-4, 1e-4).steps(1e9), "tau_inverse"),
        (lambda: TimeScale(0.1, 0.0).steps(30.0), "tau_inverse"),
        (lambda: scale.steps(5.0, max_steps=10), "at most 10 steps"),
        (lambda: TimeScale(1e-37, 0.0).steps(0.01, max_steps=1e300), "too many steps"),
        (lambda: scale.tau_inverse(torch.tensor(3e4, dtype=torch.float16)), "float64 in place"),
        (lambda: TimeScale(1e37, 0.0).norm(1e300, 1.0, 1.0), "smaller t"),
        (lambda: TimeScale(1e37, 1e-300).equilibrium_norm(1.0), "more weight decay"),
    ]:
        if said is None:
            assert math.isfinite(call())
            continue
        with pytest.raises(errors.TimeScaleError, match=said):
            call()
    assert scale.accumulated(100) > 0


def test_other_refusals() -> None:
    scale, free = TimeScale(0.1, 0.5), TimeScale(0.1, 0.0)
    for call, said in [
        (lambda: free.reparametrised(), "positive weight decay"),
        (lambda: free.equilibrium_norm(1.0), "grows for ever"),
        (lambda: scale.rescaled(0.0), "C = 0.0"),
        (lambda: scale.rescaled(-1.0), "C = -1.0"),
        (lambda: scale.rescaled(NAN), "C = nan"),
        (lambda: scale.rescaled([1.0, 2.0]), "C is not one number"),
        (lambda: TimeScale(1e-30, 0.1).rescaled(1e30), "lr = "),
        (lambda: scale.steps(1.0, max_steps=-1), "max_steps = -1"),
        (lambda: scale.steps(1.0, max_steps=[1, 2]), "max_steps is not one number"),
        (lambda: scale.norm(1.0, 0.0, 1.0), "initial_norm = 0.0"),
        (lambda: scale.norm(1.0, -1.0, 1.0), "initial_norm = -1.0"),
        (lambda: scale.norm(1.0, 1.0, -1.0), "noise_trace = -1.0"),
        (lambda: scale.norm(1.0, 1.0, 1e40), "noise_trace = 1e\\+40"),
        (lambda: scale.norm([1.0, 2.0], [1.0, 2.0, 3.0], 1.0), "broadcast"),
        (lambda: scale.clock(1.0, NAN, 1.0), "noise_trace = nan"),
        (lambda: scale.clock(1.0, 1.0, 0.0), "initial_norm = 0.0"),
    ]:
        with pytest.raises(errors.TimeScaleError, match=said):
            call()

"""The exact sums along schedules of learning rate and weight decay.

The truth is the product and the sum done one step after the other in mpmath, closed forms for
schedules that are constant in pieces, and paths of SGD with and without weight decay.
"""

import math
import time
import tracemalloc
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manifold_sde import errors, schedules, time_scale
from manifold_sde.time_scale import TimeScale

TOLERANCE = 5e-14
ROUNDING = 3e-16  # of results where long double is longer than double
WIDTHS = [np.float64]
if np.finfo(np.longdouble).eps < 1e-18:
    WIDTHS.append(np.longdouble)
BLOCK = 128 * 128


def rounding(k: int, width: type = np.longdouble) -> float:
    """The bound of the relative error that the module states."""
    return 4 * float(np.finfo(width).eps) * (256 + k / BLOCK)


mp = mpmath.mp.clone()
mp.dps = 50

deterministic = settings(derandomize=True, deadline=None, max_examples=60, database=None)


@st.composite
def rates(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Learning rates over twelve decades, some of them zero, and weight decays with ηλ < 0.999."""
    steps = draw(st.integers(1, 60))
    lr, weight_decay = [], []
    for _ in range(steps):
        eta = draw(st.one_of(st.just(0.0), st.floats(-8, 4).map(lambda e: 10**e)))
        decay = draw(st.one_of(st.just(0.0), st.floats(-12, -0.001).map(lambda e: 10**e)))
        lr.append(eta)
        weight_decay.append(decay / eta if eta > 0 else draw(st.floats(0, 1)))
    return lr, weight_decay


Sums = tuple[list[mpmath.mpf], list[mpmath.mpf], list[mpmath.mpf]]


def brute_force(lr: list[float], weight_decay: list[float]) -> Sums:
    """a_k and t0 after 0, 1, ..., n steps, and η_k/(a_k a_{k+1}), by their definitions."""
    a, t0, effective = [mp.mpf(1)], [mp.mpf(0)], []
    for eta, lam in zip(lr, weight_decay, strict=True):
        a.append(a[-1] * (1 - mp.mpf(eta) * mp.mpf(lam)))
        effective.append(mp.mpf(eta) / (a[-2] * a[-1]))
        t0.append(t0[-1] + effective[-1] ** 2)
    return a, t0, effective


def assert_are_the_sums(
    scale: TimeScale, sums: Sums, steps: list[int], time_of: Callable[[int], float] | None = None
) -> None:
    """The assertion that the true sums pass and the broken ones do not."""
    a, t0, effective = sums
    time_of = time_of or scale.discrete_time
    for k in steps:
        assert_close(time_of(k), mp.log1p(2 * t0[k]) / 2)
        assert_close(scale.log_shrinkage(k), mp.log(a[k]))
        if t0[k] > 0:
            assert_log_close(scale.log_accumulated(k), t0[k])
        assert_close(scale.radius(k) ** 4, a[k] ** 4 * (1 + 2 * t0[k]), 1e-12)
        if k < len(effective) and effective[k] > 0:
            assert_log_close(scale.log_effective_lr(k), effective[k])


def assert_close(got: float, want: mpmath.mpf, tolerance: float = TOLERANCE) -> None:
    assert math.isfinite(got)
    assert abs(mp.mpf(float(got)) - want) <= tolerance * abs(want), (got, want)


def assert_log_close(got: float, want: mpmath.mpf) -> None:
    """Absolute error of a logarithm, measured by what it was put together from."""
    logarithm = mp.log(want)
    assert abs(mp.mpf(float(got)) - logarithm) <= TOLERANCE * (40 + abs(logarithm))


# Against the definitions.


@pytest.mark.paper("Theorem 3.2", "Equation (12)")
@deterministic
@given(rates())
@example(([0.0, 10**-3.5], [0.0, 3155.0046233746266]))  # 1 - lr * weight_decay = 0.002
def test_sums_match_their_definitions(schedule: tuple[list[float], list[float]]) -> None:
    lr, weight_decay = schedule
    steps = list(range(len(lr) + 1))
    assert_are_the_sums(TimeScale(lr, weight_decay), brute_force(lr, weight_decay), steps)


LR, DECAY = [0.1, 0.3, 0.2, 0.4], [1.0, 0.5, 2.0, 0.1]


def broken_times() -> dict[str, Callable[[int], float]]:
    lr, keep = np.array(LR), 1 - np.array(LR) * np.array(DECAY)
    a = np.concatenate([[1.0], np.cumprod(keep)])

    def of(effective: np.ndarray) -> Callable[[int], float]:
        return lambda k: 0.5 * math.log1p(2 * float(np.sum(effective[:k] ** 2)))

    return {
        "a_k twice": of(lr / a[:-1] ** 2),
        "a_{k+1} twice": of(lr / a[1:] ** 2),
        "no shrinkage": of(lr),
        "not squared": of(np.sqrt(lr / a[:-1] / a[1:])),
        "continuous decay": of(lr * np.exp(np.cumsum(np.array(LR) * DECAY) * 2)),
        "one step late": lambda k: of(lr / a[:-1] / a[1:])(max(k - 1, 0)),
    }


@pytest.mark.parametrize("name", broken_times())
def test_broken_sums_are_rejected(name: str) -> None:
    scale, sums = TimeScale(LR, DECAY), brute_force(LR, DECAY)
    assert_are_the_sums(scale, sums, [0, 1, 2, 3, 4])
    with pytest.raises(AssertionError):
        assert_are_the_sums(scale, sums, [0, 1, 2, 3, 4], broken_times()[name])


@pytest.mark.paper("Equation (12)")
def test_sums_over_several_blocks_match_their_definitions() -> None:
    """Cosine with warm-up; weight decay that jumps by eight decades; across block boundaries."""
    n = 2 * BLOCK + 500
    k = np.arange(n)
    lr = 0.1 * np.minimum(1, (k + 1) / 3000) * (1.001 + np.cos(np.pi * k / n))
    weight_decay = np.where(k % 7000 < 3500, 1e-2, 1e-10)
    sums = brute_force(lr.tolist(), weight_decay.tolist())
    steps = [0, 1, 127, 128, 129, 5000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, n - 1, n]
    assert_are_the_sums(TimeScale(lr, weight_decay), sums, steps)


@pytest.mark.parametrize("decay", [0.999, 0.5, 0.02])
def test_strong_decay_neither_overflows_nor_forgets(decay: float) -> None:
    """t0 is about (1 - decay)^{-4n}, and the learning rate falls by thirty decades."""
    lr = np.repeat([1.0, 1e-30, 1e-3], 700)
    weight_decay = np.concatenate([np.full(1400, decay) / lr[:1400], np.zeros(700)])
    sums = brute_force(lr.tolist(), weight_decay.tolist())
    steps = [1, 699, 700, 701, 703, 720, 1400, 1401, 2100]
    assert_are_the_sums(TimeScale(lr, weight_decay), sums, steps)


@pytest.mark.parametrize(
    ("lr", "weight_decay"),
    [(1e-3, 1e-3), (0.8, 5e-4), (0.1, 0.0), (1e-2, 1e-9), (0.5, 1.0), (1e-3, 1e-13)],
)
def test_a_constant_schedule_has_the_closed_form(lr: float, weight_decay: float) -> None:
    """A conformance test: the streamed sums and the geometric ones, over 62 blocks."""
    streamed = TimeScale(lambda k: np.full(np.shape(k), lr), weight_decay)
    closed = TimeScale(lr, weight_decay)
    k = np.array([1, 2, 100, BLOCK - 1, BLOCK, BLOCK + 1, 10**5, 10**6])
    bound = 1e-15 + rounding(10**6)
    for name in ("discrete_time", "log_shrinkage", "log_accumulated", "log_effective_lr"):
        got, want = getattr(streamed, name)(k), getattr(closed, name)(k)
        np.testing.assert_allclose(got, want, rtol=bound, atol=10 * bound, err_msg=name)
    q = 1 - mp.mpf(lr) * mp.mpf(weight_decay)
    for i in k.tolist():
        t0 = mp.mpf(lr) ** 2 * (i if q == 1 else (q ** (-4 * i) - 1) / (q**-2 - q**2))
        assert_close(streamed.discrete_time(i), mp.log1p(2 * t0) / 2, bound)
        assert_close(streamed.radius(i), q**i * (1 + 2 * t0) ** 0.25, bound)


N = BLOCK + 700
STEPS = [1, 127, 128, 129, 1000, 9000, BLOCK - 1, BLOCK, BLOCK + 1, N]


def schedules_to_round() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    k, rng = np.arange(N), np.random.default_rng(0)
    return {
        "constant": (np.full(N, 1e-2), np.full(N, 0.05)),
        "steps": (0.1 ** np.floor(1 + 3 * k / N), np.full(N, 5e-4)),
        "warm-up and cosine": (np.minimum(k / 500, 1) * (1 + np.cos(np.pi * k / N)), k / N / 10),
        "some zero": (10 ** rng.uniform(-6, 0, N) * (rng.random(N) < 0.6), rng.uniform(0, 0.5, N)),
        "tiny decay": (np.full(N, 1e-3), np.full(N, 1e-13)),
    }


@pytest.fixture(scope="module")
def truth() -> dict[str, list[tuple[mpmath.mpf, mpmath.mpf]]]:
    """T and R of the schedules at the steps, by the recursion in 40 digits."""
    found = {}
    for name, (lr, weight_decay) in schedules_to_round().items():
        fourth, gained, states = mp.mpf(1), mp.mpf(0), []
        with mp.workdps(40):
            for i, (eta, lam) in enumerate(zip(lr.tolist(), weight_decay.tolist(), strict=True), 1):
                square = (1 - mp.mpf(eta) * lam) ** 2
                fourth *= square**2
                gained = square * (square * gained + 2 * mp.mpf(eta) ** 2)
                if i in STEPS:
                    state = mp.log1p(gained / fourth) / 2, (fourth + gained) ** mp.mpf("0.25")
                    states.append(state)
        found[name] = states
    return found


@pytest.mark.parametrize("name", schedules_to_round())
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_are_exact_up_to_rounding(
    name: str, width: type, truth: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound that the module states, with long double and where there is none."""
    for module in (schedules, time_scale):
        monkeypatch.setattr(module, "WIDE", width)
    lr, weight_decay = schedules_to_round()[name]
    scale = TimeScale(lr, weight_decay)
    for k, (time_there, radius) in zip(STEPS, truth[name], strict=True):
        bound = ROUNDING + rounding(k, width)
        assert_close(scale.tau(k), time_there, bound)
        assert_close(scale.radius(k), radius, bound)
        assert_close(scale.tau(scale.steps(scale.tau(k))), time_there, bound)
    # What the longer sums are for: the recursion step by step in double does not meet the bound.
    if name == "constant":
        gained, kept = 0.0, (1 - lr[0] * weight_decay[0]) ** 2
        for _ in range(N):
            gained = kept * (kept * gained + 2 * lr[0] ** 2)
        broken = 0.25 * math.log(kept ** (2 * N) + gained)
        with pytest.raises(AssertionError):
            assert_close(math.exp(broken), truth[name][-1][1], ROUNDING)


def test_a_schedule_in_pieces_has_the_closed_form_of_its_pieces() -> None:
    """Step decay: from piece to piece a multiplies and t0 adds, divided by a^4."""
    pieces = [(0.1, 0.01, 150_000), (0.01, 0.01, 300_000), (0.001, 0.5, 50_000)]
    edges = np.cumsum([steps for _, _, steps in pieces])

    def pick(column: int) -> Callable[[np.ndarray], np.ndarray]:
        values = np.array([piece[column] for piece in pieces])
        return lambda k: values[np.searchsorted(edges, k, side="right")]

    a, t0 = mp.mpf(1), mp.mpf(0)
    for lr, weight_decay, steps in pieces:
        q = 1 - mp.mpf(lr) * mp.mpf(weight_decay)
        t0 += mp.mpf(lr) ** 2 * (q ** (-4 * steps) - 1) / (q**-2 - q**2) / a**4
        a *= q**steps
    scale = TimeScale(pick(0), pick(1))
    total = int(edges[-1])
    assert_close(scale.tau(total), mp.log1p(2 * t0) / 2)
    assert_close(scale.log_shrinkage(total), mp.log(a))
    assert scale.steps(scale.tau(total)) == total


# What the sums are for.


def sgd(x: np.ndarray, lr: np.ndarray, weight_decay: np.ndarray, seed: int) -> np.ndarray:
    """SGD on ½(x₃/‖x‖)² with tangential noise of degree -1; the path, shape (steps + 1, 3)."""
    rng = np.random.default_rng(seed)
    path = [x]
    for eta, lam in zip(lr, weight_decay, strict=True):
        square = x @ x
        noise = rng.normal(size=3)
        noise = (noise - (noise @ x) / square * x) / math.sqrt(square)
        gradient = x[2] / square * (np.array([0.0, 0.0, 1.0]) - x[2] / square * x)
        x = (1 - eta * lam) * x - eta * (gradient + noise)
        path.append(x)
    return np.array(path)


@pytest.mark.paper("Theorem 3.2")
@settings(deterministic, max_examples=25)
@given(st.integers(0, 10**6))
def test_sgd_with_weight_decay_is_sgd_without_it_at_the_effective_rates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lr = 10 ** rng.uniform(-3, -0.5, size=80)
    weight_decay = 10 ** rng.uniform(-3, 0, size=80)
    scale = TimeScale(lr, weight_decay)
    start = rng.normal(size=3)
    path = sgd(start, lr, weight_decay, seed)
    free = sgd(start, scale.effective_lr(np.arange(80)), np.zeros(80), seed)
    shrinkage = scale.shrinkage(np.arange(81))[:, None]
    np.testing.assert_allclose(path, shrinkage * free, rtol=1e-9, atol=1e-10)
    twin = sgd(start, lr, np.zeros(80), seed)
    assert np.abs(path - shrinkage * twin).max() > 1e-4


@pytest.mark.paper("Equation (10)")
def test_norm_along_a_schedule() -> None:
    """A step with gradient noise of length √V/‖x‖ has ‖x‖² → q²‖x‖² + η²V/‖x‖²: error O(η)."""
    trace, differences = 2.0, []
    for n in [2000, 8000, 32000, 128000]:
        k = np.arange(n)
        lr = (1 + np.cos(np.pi * k / n)) / math.sqrt(n)
        weight_decay = (1 + k / n) / math.sqrt(n)
        square = 2.25
        for eta, lam in zip(lr.tolist(), weight_decay.tolist(), strict=True):
            square = (1 - eta * lam) ** 2 * square + eta**2 * trace / square
        scale = TimeScale(lr, weight_decay)
        differences.append(abs(math.sqrt(square) - scale.norm(n, 1.5, trace)))
        fourth = scale.shrinkage(n) ** 4 * (1.5**4 + 2 * trace * scale.accumulated(n))
        assert scale.norm(n, 1.5, trace) ** 4 == pytest.approx(fourth, rel=1e-12)
        grown = math.expm1(2 * scale.tau(n))
        want = math.log1p(trace * grown / 1.5**4) / (2 * trace)
        assert scale.clock(n, trace, 1.5) == pytest.approx(want, rel=1e-12)
    # η² is quartered each time.
    np.testing.assert_allclose(np.diff(np.log2(differences)), -2.0, atol=0.1)


@pytest.mark.paper("Equation (11)", "Equation (12)")
def test_a_slow_schedule_tends_to_the_integrals() -> None:
    """η_k = η(kh) h^{1/2} and the same for λ: T and R tend to (12) and (11) with η(t), λ(t)."""
    s = np.linspace(0, 1, 2_000_001)
    exponent = np.concatenate([[0], np.cumsum(np.diff(s) * (s[1:] + s[:-1]) / 2)])  # ∫ ηλ = s²/2
    integrand = np.exp(4 * exponent)
    limit = 0.5 * math.log1p(2 * float(np.sum((integrand[1:] + integrand[:-1]) / 2 * np.diff(s))))
    differences = []
    for n in [100, 200, 400, 800]:
        h = 1 / n
        scale = TimeScale(np.full(n, math.sqrt(h)), lambda k, h=h: (k + 0.5) * h * math.sqrt(h))
        differences.append(abs(scale.tau(n) - limit))
        assert scale.radius(n) == pytest.approx(scale.shrinkage(n) * math.exp(scale.tau(n) / 2))
    np.testing.assert_allclose(np.diff(np.log2(differences)), -1.0, atol=0.05)


@pytest.mark.paper("Remark 4.2")
def test_schedules_can_be_rescaled() -> None:
    lr = np.array([0.1, 0.2, 0.05, 0.4])
    for source in (lr, lr.tolist(), lambda k: lr[k]):
        scale = TimeScale(source, 0.3)
        other, factor = scale.rescaled(5.0)
        again, _ = other.rescaled(5.0)
        assert factor == pytest.approx(5**-0.25, rel=1e-15)
        k = np.arange(5)
        np.testing.assert_allclose(other.shrinkage(k), scale.shrinkage(k), rtol=1e-14)
        np.testing.assert_allclose(other.accumulated(k), scale.accumulated(k) / 5, rtol=1e-14)
        np.testing.assert_allclose(again.accumulated(k), scale.accumulated(k) / 25, rtol=1e-14)


# The step counts of given times.


@pytest.mark.paper("Theorem 4.4")
@deterministic
@given(rates(), st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_steps_is_the_last_that_does_not_exceed(
    schedule: tuple[list[float], list[float]], fractions: list[float]
) -> None:
    scale = TimeScale(*schedule)
    reached = scale.tau(np.arange(len(schedule[0]) + 1))
    wanted = np.array(fractions) * reached[-1]
    found = scale.steps(wanted)
    np.testing.assert_array_equal([scale.steps(T) for T in wanted], found)
    # Up to rounding, which can be more than what one step adds.
    slack = 1e-15 * reached[-1]
    assert (reached[found] <= wanted + slack).all()
    assert (np.append(reached, np.inf)[found + 1] > wanted - slack).all()


@pytest.mark.paper("Theorem 4.4")
def test_steps_across_blocks_and_kinds() -> None:
    scale = TimeScale(lambda k: 0.02 / np.sqrt(1 + k / 1000), 0.1)
    k = np.array([[0, 1, 128, BLOCK - 1, BLOCK], [BLOCK + 1, 2 * BLOCK, 50_000, 3 * BLOCK, 7]])
    T = scale.tau(k)
    np.testing.assert_array_equal(scale.steps(T), k)
    np.testing.assert_array_equal(scale.steps(np.nextafter(T, np.inf)), k)
    np.testing.assert_array_equal(
        scale.steps(np.maximum(np.nextafter(T, 0), 0)), np.maximum(k - 1, 0)
    )
    tensor = scale.steps(torch.from_numpy(T))
    assert tensor.dtype == torch.int64
    np.testing.assert_array_equal(tensor.numpy(), k)
    assert scale.steps(float(T[1, 2])) == 50_000
    assert scale.steps(np.zeros((0, 3))).shape == (0, 3)


def test_steps_that_do_nothing_count() -> None:
    lr = np.tile([0.0, 0.1, 1e-3, 0.0, 0.0, 0.1, 1e-3], 7)
    scale = TimeScale(lr, 0.1)
    reached = scale.tau(np.arange(50))
    np.testing.assert_array_equal(reached[1:] == reached[:-1], lr == 0)
    for T in reached:
        assert scale.steps(T) == np.flatnonzero(reached <= T).max()
    assert scale.log_effective_lr(0) == -math.inf
    assert scale.effective_lr([0, 1]).tolist()[0] == 0


def test_learning_rate_zero_changes_nothing_wherever_the_sums_are_cut() -> None:
    n = BLOCK + 1000
    lr = np.where(np.random.default_rng(3).random(n) < 0.5, 0.0, 0.1)
    for cut in (128, 1280, BLOCK - 128, BLOCK, BLOCK + 128):
        lr[cut - 3 : cut + 3] = 0.0
    scale, k = TimeScale(lr, 0.01), np.arange(n + 1)
    for name in ("tau", "log_accumulated", "log_shrinkage"):
        values = getattr(scale, name)(k)
        np.testing.assert_array_equal(values[1:] == values[:-1], lr == 0, err_msg=name)


def test_a_time_that_is_never_reached() -> None:
    bounded = TimeScale(lambda k: 1.0 / (1 + k), 0.0)  # Σ η² = π²/6
    with pytest.raises(errors.TimeScaleError, match=r"within 100000 steps") as caught:
        bounded.steps(1.0, max_steps=10**5)
    assert "T at most 0.7281" in caught.value.expected  # ln(1 + π²/3)/2 = 0.72813
    finite = TimeScale([0.1] * 50, 0.1)
    end = float(finite.tau(50))
    assert finite.steps(end) == 50
    with pytest.raises(errors.TimeScaleError, match="a schedule of 50 steps"):
        finite.steps([0.0, end * (1 + 1e-12)])
    # What was asked before does not matter.
    T = float(bounded.tau(10 * BLOCK))
    with pytest.raises(errors.TimeScaleError, match=r"within 20000 steps"):
        bounded.steps(T, max_steps=20_000)
    assert bounded.steps(float(bounded.tau(BLOCK)), max_steps=BLOCK) == BLOCK


# Size.


def test_memory_does_not_grow_with_the_steps() -> None:
    scale = TimeScale(lambda k: 1e-3 + 0.0 * k, 0.01)
    scale.tau(10)
    tracemalloc.start()
    scale.tau(2_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6  # one array of all steps has 16e6 bytes


@pytest.mark.slow
def test_forty_million_steps() -> None:
    lr, weight_decay, n = 1e-4, 1e-3, 4 * 10**7
    start = time.perf_counter()
    scale = TimeScale(lambda k: np.full(np.shape(k), lr), weight_decay)
    got = scale.tau(n)
    assert time.perf_counter() - start < 120
    assert got == pytest.approx(
        TimeScale(lr, weight_decay).discrete_time(n), rel=1e-15 + rounding(n)
    )
    assert scale.steps(got) == n

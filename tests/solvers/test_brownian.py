"""Brownian paths: one function of time however it is asked, its law, and what it depends on.

Statistical tests have fixed seeds. Each states its false-alarm rate, at most 1e-4, and the fault
that it has to find, which a broken twin has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchsde
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from manifold_sde import errors, rng
from manifold_sde.compile import compiler_available
from manifold_sde.solvers import brownian, brownian_nodes
from manifold_sde.solvers.brownian import BrownianPath

ALARM = 1e-4
Breaking = Callable[[pytest.MonkeyPatch], None]


def make(paths: Any = 7, *, seed: int = 3, m: int = 5, **options: Any) -> BrownianPath:
    return BrownianPath(seed, m, paths, **options)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding: sums of some hundred numbers of order one."""
    return torch.allclose(a, b, rtol=0.0, atol=1e-13)


# The numbers, against a tree in plain Python.


def plain_philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def plain_normal(
    seed: int, path: int, level: int, position: int, component: int, stream: int = 3
) -> float:
    counter = [component // 4 + (level << 24), path, position % 2**32, position >> 32]
    counter[3] += stream << 16
    words = plain_philox(counter, (seed % 2**32, seed >> 32))
    pair, which = divmod(component % 4, 2)
    radius, angle = ((words[2 * pair + i] + 0.5) / 2**32 for i in (0, 1))
    turned = (math.cos, math.sin)[which](2 * math.pi * angle)
    return math.sqrt(-2 * math.log(radius)) * turned


def plain_increment(seed: int, path: int, component: int, level: int, position: int) -> float:
    """Over a dyadic interval of a cell of length 1."""
    value = plain_normal(seed, path, 0, position >> level, component)
    for j in range(level):
        node = plain_normal(seed, path, 1 + j, position >> (level - j), component)
        left = value / 2 + math.sqrt(2.0**-j) / 2 * node
        value = value - left if (position >> (level - j - 1)) & 1 else left
    return value


def test_the_same_as_a_tree_in_plain_python() -> None:
    seed, paths = 2**40 + 17, [0, 5, 2**32 - 1]
    path = BrownianPath(seed, 6, torch.tensor(paths))
    for level, position in [(0, 0), (0, 2**47 + 9), (1, 0), (1, 1), (5, 77), (40, 2**47 + 12345)]:
        got = path.increments(level, position, 1)[0]
        for (i, p), c in itertools.product(enumerate(paths), range(6)):
            assert float(got[c, i]) == pytest.approx(
                plain_increment(seed, p, c, level, position), abs=1e-14
            )
    normals = path.auxiliary(7, 11, 5)
    for (i, p), c in itertools.product(enumerate(paths), range(5)):
        expected = plain_normal(seed, p, 7, 11, c, stream=4)
        assert float(normals[c, i]) == pytest.approx(expected, abs=1e-13)


# One function of time.


@pytest.mark.parametrize("cell", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("start", [0.0, -1.7])
def test_the_grid_does_not_matter(cell: float, start: float) -> None:
    options = {"cell": cell, "start": start}
    whole = make(**options)(start + 0.5)
    for steps in (1, 2, 3, 4, 8, 16, 17, 64):
        path = make(**options)
        times = [start + 0.5 * k / steps for k in range(steps + 1)]
        total = sum(path(a, b) for a, b in itertools.pairwise(times))
        assert close(total, whole), steps  # type: ignore[arg-type]
    assert close(make(**options)(start + 0.31) + make(**options)(start + 0.31, start + 0.5), whole)


def test_times_that_were_added_up_are_read_as_meant() -> None:
    path, exact = make(cell=0.1), make(cell=0.1).increments(2, 0, 4000)
    time = 0.0
    for k in range(4000):
        after = time + 0.025
        assert torch.equal(path(time, after).T, exact[k])
        time = after
    assert time != 100.0


@settings(max_examples=50)
@given(times=st.lists(st.floats(0.0, 40.0), min_size=3, max_size=3))
def test_increments_add_up(times: list[float]) -> None:
    a, b, c = sorted(times)
    path = make(2, m=2)
    assert close(path(a, b) + path(b, c), path(a, c))
    assert close(path(b) - path(a), path(a, b))


def assert_nested(path: BrownianPath) -> None:
    """Increments of each level are the sums of those of the next, and of what a call returns."""
    for level in range(6):
        coarse, fine = path.increments(level, 3, 9), path.increments(level + 1, 6, 18)
        assert close(coarse, fine[0::2] + fine[1::2])
        width = path.cell * 2.0**-level
        assert close(coarse.sum(0).T, path(3 * width, 12 * width))


def test_levels_are_nested() -> None:
    assert_nested(make())
    assert_nested(make(cell=0.7))
    assert_nested(make(antithetic=True))


@pytest.mark.parametrize("deep", [8, 21, 40])
def test_each_path_at_its_own_interval(deep: int) -> None:
    n = 40
    generator = torch.Generator().manual_seed(1)
    level = torch.randint(0, deep + 1, (n,), generator=generator)
    share = torch.rand(n, generator=generator, dtype=torch.float64)
    position = (5 * share * 2.0**level).long()
    path = make(n)
    got = path.dyadic(level, position, max_level=deep)
    assert got.shape == (5, n)
    for i in range(n):
        single = make(n).increments(int(level[i]), int(position[i]), 1)[0]
        assert torch.equal(single[:, i], got[:, i])
    assert torch.equal(got, path.dyadic(level, position, max_level=40))
    one = path.dyadic(3, torch.full((n,), 11))
    assert torch.equal(one, path.increments(3, 11, 1)[0])
    if deep < 40:
        left, right = path.halve(got, level, position)
        assert torch.equal(left, path.dyadic(level + 1, 2 * position, max_level=40))
        assert torch.equal(right, path.dyadic(level + 1, 2 * position + 1, max_level=40))


@pytest.mark.parametrize("options", [{}, {"cell": 0.3, "start": -2.0}])
def test_each_path_between_its_own_times(options: dict[str, float]) -> None:
    n = 30
    path = make(n, **options)
    generator = torch.Generator().manual_seed(2)
    times = 6 * torch.rand(2, n, dtype=torch.float64, generator=generator)
    # Neighbouring floats, the same time twice, dyadic times, a cell's ends; and far out.
    times[:, :5] = torch.tensor([[0.1, 0.7, 0.25, 1.0, 1e9], [0.1 + 1e-16, 0.7, 0.5, 4.0, 1e9 + 9]])
    ta, tb = times.sort(0).values + path.start
    got = path.between(ta, tb)
    for i in range(n):
        single = make(n, **options)(ta[i], tb[i])[i]
        assert close(got[:, i], single), i
    assert torch.equal(path.between(ta, tb, cells=100), got)
    assert bool((got[:, :2] == 0).all())


@pytest.mark.parametrize("options", [{}, {"cell": 0.3, "start": -2.0}])
def test_each_path_from_the_beginning_of_an_interval(options: dict[str, float]) -> None:
    n = 40
    path = make(n, **options)
    generator = torch.Generator().manual_seed(3)
    level = torch.arange(n) % 8
    position = torch.randint(0, 300, (n,), generator=generator)
    length = path.cell * 2.0 ** -level.double()
    # Exact in ticks, however far out the time is.
    part = torch.randint(0, 2**20, (n,), generator=generator).double() / 2**20
    part[:9], part[9:12], part[12:15] = 1.0, 0.0, 0.5
    ta = path.start + position * length
    got = path.beginning(level, position, part)
    assert close(got, path.between(ta, ta + part * length))
    whole = path.dyadic(level, position, max_level=8)
    assert torch.equal(got[:, :9], whole[:, :9])
    assert bool((got[:, 9:12] == 0).all())


def test_the_order_of_queries_does_not_matter() -> None:
    """What is kept between calls saves work alone: to the bit."""
    grid = [(level, p) for level in (0, 1, 2, 5, 9, 33) for p in range(2 * 2 ** min(level, 5))]
    fresh = {key: make().increments(*key, 1) for key in grid}
    generator = np.random.default_rng(0)
    path = make()
    for k in generator.permutation(len(grid)):
        level, p = grid[k]
        width = 2.0**-level
        assert torch.equal(path(p * width, (p + 1) * width).T, fresh[level, p][0])
        assert torch.equal(path.increments(level, p, 1), fresh[level, p])
    for level, p in grid:  # in blocks
        assert torch.equal(path(p * 2.0**-level, (p + 1) * 2.0**-level).T, fresh[level, p][0])


def test_results_may_be_changed_in_place() -> None:
    path, other = make(), make()
    for k in range(8):
        path(k / 4, (k + 1) / 4).mul_(0.0)
        path.increments(2, k, 1).mul_(0.0)
    for k in range(8):
        assert torch.equal(path(k / 4, (k + 1) / 4), other(k / 4, (k + 1) / 4))


def test_memory_does_not_grow() -> None:
    path = make()
    for k in range(300):
        path(0.25 * k, 0.25 * (k + 1))
        path(0.1 * k, 0.1 * k + 0.05)
    kept = [values for _, values in (*path._pairs.values(), *path._blocks.values())]
    assert len(kept) <= 41 + 4
    assert sum(v.untyped_storage().nbytes() for v in kept) < 8 * 5 * 2**17


# What a path depends on.


def test_a_path_alone_is_the_path_among_4096() -> None:
    many, few = make(4096), make(torch.tensor([4095, 17]))
    assert torch.equal(many(0.3, 1.7)[[4095, 17]], few(0.3, 1.7))
    assert torch.equal(many.increments(3, 5, 4)[..., [4095, 17]], few.increments(3, 5, 4))
    assert torch.equal(many.auxiliary(3, 5, 4)[:, [4095, 17]], few.auxiliary(3, 5, 4))
    assert torch.equal(make(4096, m=2)(0.0, 0.25), many(0.0, 0.25)[:, :2])


def test_seeds_paths_and_components_differ() -> None:
    values = [
        path.increments(2, 0, 8).flatten()
        for path in (make(), make(seed=4), make(torch.arange(7, 14)), make(seed=3 + 2**32))
    ]
    assert len(torch.cat(values).unique()) == 4 * 8 * 5 * 7
    assert torch.equal(make()(0.3, 9.1), make()(0.3, 9.1))


def test_antithetic_paths_are_opposite() -> None:
    path, plain = make(6, antithetic=True), make(3)
    ta = torch.full((6,), 0.3, dtype=torch.float64)
    for value, single in (
        (path(0.3, 2.2).T, plain(0.3, 2.2).T),
        (path.increments(4, 7, 3), plain.increments(4, 7, 3)),
        (path.between(ta, ta + 1.0), plain.between(ta[:3], ta[:3] + 1.0)),
        (path.auxiliary(4, 7, 3), plain.auxiliary(4, 7, 3)),
    ):
        assert torch.equal(value[..., 0::2], single)
        assert torch.equal(value[..., 1::2], -single)


def test_single_precision_is_the_same_path_rounded() -> None:
    single, double = make(dtype=torch.float32), make()
    level, position = torch.arange(7), torch.arange(7)
    time = torch.linspace(0.0, 3.0, 7, dtype=torch.float64)
    for get in (
        lambda p: p(0.3, 7.1),
        lambda p: p.increments(4, 5, 3),
        lambda p: p.dyadic(level, position, max_level=6),
        lambda p: p.between(time, time + 0.4),
        lambda p: p.auxiliary(4, 5, 3),
        lambda p: p.halve(p.increments(0, 0, 1)[0], 0, torch.zeros(7, dtype=torch.int64))[0],
    ):
        assert get(single).dtype == torch.float32
        assert torch.allclose(get(single), get(double).float(), rtol=3e-7, atol=1e-7)
    assert torch.equal(single(0.3, 7.1), double(0.3, 7.1).float())


# The law. 4096 paths of 4 components: 16384 independent copies.


def sample(seed: int = 1, **options: Any) -> BrownianPath:
    return make(4096, seed=seed, m=4, **options)


def variance_test(values: Tensor, variance: float) -> float:
    """Two-sided p-value of the chi-squared test, values independent of each other."""
    flat = values.flatten()
    statistic = float((flat**2).sum()) / variance
    return 2 * min(stats.chi2.cdf(statistic, len(flat)), stats.chi2.sf(statistic, len(flat)))


def assert_right_variances(path: BrownianPath) -> None:
    """14 tests, 1e-4 together; a variance off by 10 % is found with probability above 0.9999.

    That is 9 standard errors, of which the tests allow 4.5.
    """
    n = path.shape[0]
    found = [
        (path.increments(level, p, 1), path.cell * 2.0**-level)
        for level, p in ((0, 0), (0, 3), (1, 0), (2, 2), (5, 40), (12, 5000), (30, 12345))
    ]
    ends = [(0.1, 0.37), (0.3, 0.3001), (0.6, 3.9), (0.0, 100.0), (1 / 3, 2 / 3)]
    found += [(path(a, b), b - a) for a, b in ends]
    ta = torch.linspace(0.0, 3.0, n, dtype=torch.float64)
    found.append((path.between(ta, ta + 0.37), 0.37))
    found.append((path.auxiliary(3, 1, 4), 1.0))
    assert len(found) == 14
    for k, (values, variance) in enumerate(found):
        assert variance_test(values, variance) > ALARM / len(found), k


def assert_disjoint_independent(path: BrownianPath) -> None:
    """The 120 correlations of 16 intervals: N sum r^2 is chi-squared.

    One correlation of 0.15, or all of 0.02, add 369 or 786 to a statistic of 120 +- 15.
    """
    assert_uncorrelated(path.increments(3, 4, 16).flatten(1))


def assert_uncorrelated(rows: Tensor, alarm: float = ALARM) -> None:
    matrix = torch.corrcoef(rows)
    squares = float(torch.triu(matrix**2, 1).sum()) * rows.shape[1]
    k = len(rows)
    assert stats.chi2.sf(squares, k * (k - 1) // 2) > alarm


def assert_normal(path: BrownianPath) -> None:
    """Kolmogorov and Smirnov, 4 tests, 1e-4 together: a distance of 0.03 is found for sure."""
    for a, b in ((0.0, 1.0), (0.25, 0.375), (0.1, 0.37), (0.9, 2.3)):
        values = path(a, b).flatten().numpy() / math.sqrt(b - a)
        assert stats.kstest(values, stats.norm.cdf).pvalue > ALARM / 4


def assert_auxiliary_independent(path: BrownianPath) -> None:
    """Increments, and auxiliary normals of intervals around, at and below them, as above."""
    rows = [path.increments(2, 0, 4)]
    rows += [path.auxiliary(level, p, 4)[None] for level in range(4) for p in range(2)]
    assert_uncorrelated(torch.cat(rows).flatten(1))


def assert_not_the_numbers_of_sgd(path: BrownianPath) -> None:
    """Increments of cells and of their eighths, and the normals of SGD's first steps."""
    key, paths = rng.seed_key(path.seed), torch.arange(4096)
    sgd = rng.normals(
        key, rng.STREAM_SGD_NORMAL, paths, torch.arange(4), 4, torch.float64
    ).transpose(0, 1)
    for level in (0, 3):
        assert_uncorrelated(torch.cat([path.increments(level, 0, 4), sgd]).flatten(1), ALARM / 2)


def test_increments_have_the_right_variances() -> None:
    assert_right_variances(sample())
    assert_right_variances(sample(seed=2, cell=0.7))


def test_increments_over_disjoint_intervals_are_independent() -> None:
    assert_disjoint_independent(sample())


def test_increments_are_normal() -> None:
    assert_normal(sample())


def test_auxiliary_numbers_are_independent() -> None:
    assert_auxiliary_independent(sample())


def test_the_numbers_are_not_those_of_sgd() -> None:
    assert_not_the_numbers_of_sgd(sample())


# Broken twins.


def wrong_variance(patch: pytest.MonkeyPatch) -> None:
    """A bridge whose half deviates by sqrt(h/2), not by sqrt(h)/2."""
    original = brownian_nodes.Nodes.draw

    def draw(self: Any, stream: int, count: int, levels: Tensor, positions: Tensor) -> Tensor:
        drawn = original(self, stream, count, levels, positions)
        return torch.where((levels > 0).unsqueeze(1), math.sqrt(2.0) * drawn, drawn)

    patch.setattr(brownian_nodes.Nodes, "draw", draw)


def independent_halves(patch: pytest.MonkeyPatch) -> None:
    """A right half with a bridge of its own: the two do not add up."""

    def halves(values: Tensor, bridge: Tensor) -> Tensor:
        other = bridge.flip(-1)
        return torch.stack((0.5 * values + bridge, 0.5 * values + other), 1).flatten(0, 1)

    patch.setattr(brownian, "halves", halves)


def one_number_at_two_levels(patch: pytest.MonkeyPatch) -> None:
    """Nodes that are told apart by their position alone."""
    original = rng.node_normals

    def node_normals(key: Any, stream: int, paths: Any, level: Any, *rest: Any) -> Tensor:
        return original(key, stream, paths, torch.zeros_like(level), *rest)

    patch.setattr(rng, "node_normals", node_normals)


def uniform_numbers(patch: pytest.MonkeyPatch) -> None:
    """The right mean and variance, and a wrong law."""

    def box_muller(words: Any, dtype: torch.dtype) -> list[Tensor]:
        return [math.sqrt(12.0) * (rng._unit_interval(w, dtype) - 0.5) for w in words]

    patch.setattr(rng, "_box_muller", box_muller)


def one_stream(patch: pytest.MonkeyPatch) -> None:
    """Auxiliary numbers from the stream of W."""
    patch.setattr(rng, "STREAM_SDE_AUXILIARY", rng.STREAM_SDE)


def stream_of_sgd(patch: pytest.MonkeyPatch) -> None:
    """W from the stream of SGD."""
    patch.setattr(rng, "STREAM_SDE", rng.STREAM_SGD_NORMAL)


@pytest.mark.parametrize(
    ("breaking", "check"),
    [
        (wrong_variance, assert_right_variances),
        (wrong_variance, assert_disjoint_independent),
        (independent_halves, assert_nested),
        (independent_halves, assert_disjoint_independent),
        (one_number_at_two_levels, assert_right_variances),
        (one_number_at_two_levels, assert_disjoint_independent),
        (uniform_numbers, assert_normal),
        (one_stream, assert_auxiliary_independent),
        (stream_of_sgd, assert_not_the_numbers_of_sgd),
    ],
)
def test_broken_twins_are_rejected(
    breaking: Breaking, check: Callable[[BrownianPath], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch)
    with pytest.raises(AssertionError):
        check(sample())


# In torchsde.


class Linear(torch.nn.Module):
    """dX = -0.5 X dt + sum over j of B_j X dW_j, whose B commute: an exact solution is known."""

    noise_type = "general"

    def __init__(self, sde_type: str) -> None:
        super().__init__()
        self.sde_type = sde_type
        self.rates = torch.tensor([[0.3, 0.1], [-0.2, 0.25]], dtype=torch.float64)  # (m, D)

    def f(self, t: Tensor, x: Tensor) -> Tensor:
        return -0.5 * x

    def g(self, t: Tensor, x: Tensor) -> Tensor:
        return x.unsqueeze(-1) * self.rates.T

    def exact(self, x: Tensor, t: float, w: Tensor) -> Tensor:
        correction = 0.5 * (self.rates**2).sum(0) if self.sde_type == "ito" else 0.0
        return x * torch.exp((-0.5 - correction) * t + w @ self.rates)


@pytest.mark.parametrize(
    ("method", "sde_type", "order"),
    [("euler", "ito", 0.5), ("midpoint", "stratonovich", 1.0), ("heun", "stratonovich", 1.0)],
)
def test_torchsde_accepts_it(method: str, sde_type: str, order: float) -> None:
    """Strong convergence to the exact solution on the same path, and the same end from any grid."""
    sde = Linear(sde_type)
    x = torch.ones(256, 2, dtype=torch.float64)
    ts = torch.tensor([0.0, 1.0], dtype=torch.float64)
    gaps = []
    for dt in (1 / 8, 1 / 32, 1 / 128):
        path = make(256, m=2, cell=1 / 8)
        end = torchsde.sdeint(sde, x, ts, bm=path, method=method, dt=dt)[-1]
        gaps.append(float((end - sde.exact(x, 1.0, make(256, m=2, cell=1 / 8)(1.0))).norm()))
    measured = [math.log(a / b, 4) for a, b in itertools.pairwise(gaps)]
    assert measured == pytest.approx([order, order], abs=0.2)


def test_torchsde_takes_its_steps_from_the_path() -> None:
    sde, x = Linear("ito"), torch.ones(3, 2, dtype=torch.float64)
    ts = torch.tensor([0.0, 0.75], dtype=torch.float64)
    got = torchsde.sdeint(sde, x, ts, bm=make(3, m=2), method="euler", dt=0.25)[-1]
    for dw in make(3, m=2).increments(2, 0, 3):
        x = x + 0.25 * sde.f(ts[0], x) + (sde.g(ts[0], x) @ dw.T.unsqueeze(-1)).squeeze(-1)
    assert close(got, x)


def test_torchsde_adaptive() -> None:
    """Steps of any size, tried and thrown away: the end is still that of this path."""
    sde, x = Linear("stratonovich"), torch.ones(16, 2, dtype=torch.float64)
    ts = torch.tensor([0.0, 1.0], dtype=torch.float64)
    options = {"adaptive": True, "rtol": 1e-3, "atol": 1e-3, "dt": 0.1}
    end = torchsde.sdeint(sde, x, ts, bm=make(16, m=2), method="midpoint", **options)[-1]
    exact = sde.exact(x, 1.0, make(16, m=2)(1.0))
    assert torch.allclose(end, exact, rtol=0.02)


# Devices.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fake", [False, True])
def test_nothing_leaves_its_device(dtype: torch.dtype, fake: bool) -> None:
    """On devices without data: nothing is read off, and nothing meets a tensor of the CPU."""
    device = "cpu" if fake else "meta"
    with FakeTensorMode(allow_non_fake_inputs=False) if fake else torch.device("cpu"):
        path = make(dtype=dtype, device=device, antithetic=True)
        position = torch.zeros(7, dtype=torch.int64, device=device)
        time = torch.zeros(7, dtype=torch.float64, device=device)
        results = [
            (path(0.3, 4.1), (7, 5)),
            (path.increments(4, 3, 9), (9, 5, 7)),
            (path.dyadic(position, position, max_level=4), (5, 7)),
            (path.halve(path.increments(0, 0, 1)[0], position, position)[1], (5, 7)),
            (path.between(time, time, cells=3), (5, 7)),
            (path.auxiliary(3, 1, 2), (2, 7)),
            (path.auxiliary(position, position, 2), (2, 7)),
        ]
    for tensor, shape in results:
        assert tensor.device.type == device
        assert tensor.dtype == dtype
        assert tensor.shape == shape


@pytest.mark.cuda
def test_a_real_device() -> None:
    here, there = make(), make(device="cuda")
    assert close(there(0.3, 7.1).cpu(), here(0.3, 7.1))
    assert close(there.increments(5, 3, 40).cpu(), here.increments(5, 3, 40))


# Compiled.


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("as_c", [True, False])
def test_compiled_is_the_same(as_c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_available()
    if not as_c:
        monkeypatch.setattr(brownian_nodes, "fills", lambda *_: False)
    monkeypatch.setattr(brownian_nodes, "KERNEL_NODES", (8, 1))
    eager, compiled = make(16), make(16, compiled=True)
    before = set(brownian_nodes._kernels)
    level = torch.arange(16) % 8
    for get in (
        lambda p: p.increments(3, 5, 13),
        lambda p: p.increments(7, 5, 2),
        lambda p: torch.stack([p(k / 8, (k + 1) / 8) for k in range(20)]),
        lambda p: p(0.3, 1.9),
        lambda p: p.dyadic(level, level, max_level=7),
        lambda p: p.dyadic(7, level.flip(0)),
        lambda p: p.halve(p.increments(0, 0, 1)[0], 0, torch.zeros_like(level))[1],
        lambda p: p.halve(p.increments(0, 0, 1)[0], level, level.expand(2, 16).T[:, 0])[1],
        lambda p: p.auxiliary(3, 1, 3),
    ):
        assert close(get(compiled), get(eager))
    made = set(brownian_nodes._kernels) - before
    assert bool(made) != as_c
    assert all(brownian_nodes._kernels[key].__name__ != "draw" for key in made)
    # Another seed and other paths are served by the same kernels.
    paths = torch.arange(100, 132)[::2]
    other = [
        make(paths, seed=9, compiled=flag, cell=0.3, antithetic=True) for flag in (True, False)
    ]
    assert close(*(p.increments(3, 5, 13) for p in other))
    assert set(brownian_nodes._kernels) - before == made


# What is refused.


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"seed": -1}, errors.ArgumentError),
        ({"m": 0}, errors.ArgumentError),
        ({"m": 2.0}, errors.ArgumentError),
        ({"m": True}, errors.ArgumentError),
        ({"paths": 0}, errors.ArgumentError),
        ({"paths": 1.5}, errors.ArgumentError),
        ({"paths": torch.tensor([0.0])}, errors.DTypeError),
        ({"paths": torch.tensor([0], dtype=torch.int32)}, errors.DTypeError),
        ({"paths": torch.tensor(3)}, errors.ShapeError),
        ({"paths": torch.tensor([0, 2**32])}, errors.ArgumentError),
        ({"paths": torch.tensor([-1])}, errors.ArgumentError),
        ({"cell": 0.0}, errors.ArgumentError),
        ({"cell": -1.0}, errors.ArgumentError),
        ({"cell": math.inf}, errors.ArgumentError),
        ({"cell": "1"}, errors.ArgumentError),
        ({"start": math.nan}, errors.ArgumentError),
        ({"start": None}, errors.ArgumentError),
        ({"dtype": torch.float16}, errors.DTypeError),
        ({"dtype": torch.int64}, errors.DTypeError),
    ],
)
def test_what_cannot_be_made(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="received") as caught:
        make(**change)
    assert caught.value.remedy  # type: ignore[attr-defined]


ZEROS = torch.zeros(7, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda p: p(0.0, 1.0, return_U=True), errors.ArgumentError),
        (lambda p: p(0.0, 1.0, return_A=True), errors.ArgumentError),
        (lambda p: p(-0.1, 1.0), errors.ArgumentError),
        (lambda p: p(-2.0), errors.ArgumentError),
        (lambda p: p(0.5, 0.25), errors.ArgumentError),
        (lambda p: p(0.0, math.nan), errors.ArgumentError),
        (lambda p: p(0.0, math.inf), errors.ArgumentError),
        (lambda p: p(0.0, 2.0**41), errors.ArgumentError),
        (lambda p: p("now"), errors.ArgumentError),
        (lambda p: p(torch.zeros(2)), errors.ArgumentError),
        (lambda p: p.increments(-1, 0, 1), errors.ArgumentError),
        (lambda p: p.increments(41, 0, 1), errors.ArgumentError),
        (lambda p: p.increments(0, -1, 1), errors.ArgumentError),
        (lambda p: p.increments(0, 0, 0), errors.ArgumentError),
        (lambda p: p.increments(0, 2**48 - 1, 2), errors.ArgumentError),
        (lambda p: p.increments(0, torch.tensor(1), 2), errors.ArgumentError),
        (lambda p: p.dyadic(ZEROS, ZEROS), errors.ArgumentError),
        (lambda p: p.dyadic(ZEROS, ZEROS, max_level=41), errors.ArgumentError),
        (lambda p: p.dyadic(5, ZEROS, max_level=4), errors.ArgumentError),
        (lambda p: p.dyadic(0, ZEROS.double()), errors.DTypeError),
        (lambda p: p.dyadic(0, 0), errors.DTypeError),
        (lambda p: p.dyadic(0, ZEROS[:3]), errors.ShapeError),
        (lambda p: p.halve(p.increments(0, 0, 1)[0], 40, ZEROS), errors.ArgumentError),
        (lambda p: p.halve(p.increments(0, 0, 1), 0, ZEROS), errors.ShapeError),
        (lambda p: p.between(ZEROS, ZEROS), errors.DTypeError),
        (lambda p: p.between(ZEROS.double()[:1], ZEROS.double()), errors.ShapeError),
        (lambda p: p.between(ZEROS.double(), ZEROS.double(), cells=-1), errors.ArgumentError),
        (lambda p: p.auxiliary(0, 0, 0), errors.ArgumentError),
        (lambda p: p.auxiliary(41, 0, 1), errors.ArgumentError),
        (lambda p: p.auxiliary(0, -1, 1), errors.ArgumentError),
    ],
)
def test_what_cannot_be_asked(
    call: Callable[[BrownianPath], object], error: type[Exception]
) -> None:
    with pytest.raises(error, match="received") as caught:
        call(make())
    assert caught.value.remedy  # type: ignore[attr-defined]


def test_paths_that_cannot_be_served_are_nan() -> None:
    """Without waiting for the device there is no error: the paths themselves say it."""
    path = make(4)
    level = torch.tensor([2, 5, -1, 3])
    position = torch.tensor([3, 0, 0, -1])
    bad = torch.tensor([False, True, True, True])
    for values in (
        path.dyadic(level, position, max_level=4),
        path.auxiliary(torch.where(level == 5, 41, level), position, 3),
        path.halve(path.increments(0, 0, 1)[0], torch.where(level == 5, 40, level), position)[1],
    ):
        assert torch.equal(values.isnan(), bad.expand_as(values))
    ta = torch.tensor([0.0, -1.0, 1.0, math.inf], dtype=torch.float64)
    tb = torch.tensor([1.5, 1.0, 0.5, math.inf], dtype=torch.float64)
    values = path.between(ta, tb, cells=2)
    assert torch.equal(values.isnan(), bad.expand_as(values))
    assert bool(path.between(ta, tb + 8.0, cells=2).isnan().all())
    level, position = torch.tensor([2, 2, 41, 2]), torch.tensor([1, 1, 1, -1])
    part = torch.tensor([1.0, 1.1, 0.5, 0.5], dtype=torch.float64)
    values = path.beginning(level, position, part)
    assert torch.equal(values.isnan(), bad.expand_as(values))


@pytest.mark.parametrize(
    ("ta", "tb", "words"),
    [
        (1.0, 0.5, "wrong order.*ta=1.0, tb=0.5"),
        (1.0, 1.0 - 1e-9, "wrong order"),
        (-1.0, 1.0, "not defined.*-1.0"),
        (-2.0, -1.0, "not defined.*-2.0"),
        (0.5, math.inf, "not defined.*inf"),
        (math.nan, 1.0, "not defined.*nan"),
        (0.5, math.nan, "not defined.*nan"),
    ],
)
def test_times_of_each_path_that_cannot_be_served_are_refused(
    ta: float, tb: float, words: str
) -> None:
    path = make(3)
    first, last = torch.tensor([[0.0, ta, 0.5], [1.0, tb, 0.5]], dtype=torch.float64)
    with pytest.raises(errors.ArgumentError, match=f"(?s){words}"):
        path.between(first, last)


def test_what_it_says_of_itself() -> None:
    path = make(cell=0.5, dtype=torch.float32)
    assert path.shape == path.size() == (7, 5)
    assert path.levy_area_approximation == "none"
    assert path.dtype == torch.float32
    assert path.device == torch.device("cpu")
    assert repr(path) == (
        "BrownianPath(seed=3, n_components=5, paths=7, cell=0.5, start=0.0, "
        "dtype=torch.float32, device=cpu, antithetic=False)"
    )
    assert bool((path(0.5, 0.5) == 0).all())
    assert path(torch.tensor(0.25), torch.tensor(0.5)).shape == (7, 5)

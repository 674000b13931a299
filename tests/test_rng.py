"""The counter-based generator: known answers, what a number depends on, and its law.

Statistical tests have fixed seeds. Each states its false-alarm rate, at most 1e-4, and the fault
that it has to find, which a broken twin has.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from manifold_sde import errors, rng
from manifold_sde.compile import compile_function

ALARM = 1e-4


def words(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    return [int(w) for w in rng.philox(tuple(torch.tensor(c) for c in counter), key)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], answer: str
) -> None:
    assert [f"{w:08x}" for w in words(counter, key)] == answer.split()


def test_the_same_as_integers_of_any_size() -> None:
    """Python's integers do not wrap: the products of two 32-bit words are exact there."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        *counter, k0, k1 = (int(w) for w in generator.integers(0, 2**32, 6))
        c0, c1, c2, c3 = counter
        a0, a1 = k0, k1
        for _ in range(10):
            p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
            c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ a0, p1 % 2**32, (p0 >> 32) ^ c3 ^ a1, p0 % 2**32
            a0, a1 = (a0 + 0x9E3779B9) % 2**32, (a1 + 0xBB67AE85) % 2**32
        assert words(tuple(counter), (k0, k1)) == [c0, c1, c2, c3]


# What a number depends on.

Draw = Callable[..., Tensor]


def draw(
    law: Draw = rng.normals,
    *,
    seed: int = 3,
    stream: int = 1,
    paths: Any = range(20),
    step: Any = 5,
    count: int = 9,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    key = rng.seed_key(seed)
    return law(key, stream, torch.tensor(list(paths)), torch.tensor(step), count, dtype)


@pytest.mark.parametrize("law", [rng.normals, rng.uniforms])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_number_depends_on_its_own_indices_alone(law: Draw, dtype: torch.dtype) -> None:
    whole = draw(law, dtype=dtype)
    assert whole.shape == (9, 20)
    assert whole.dtype == dtype
    for paths in ([7], [3, 7], [19, 7, 0], range(7, 2000)):
        some = draw(law, paths=paths, dtype=dtype)
        assert torch.equal(some[:, list(paths).index(7)], whole[:, 7])
    for count in (1, 2, 3, 4, 5, 8, 100):
        assert torch.equal(draw(law, count=count, dtype=dtype)[:9], whole[:count])
    steps = draw(law, step=[[4, 5], [6, 2**40]], dtype=dtype)
    assert steps.shape == (9, 2, 2, 20)
    assert torch.equal(steps[:, 0, 1], whole)
    assert torch.equal(steps[:, 1, 1], draw(law, step=2**40, dtype=dtype))
    assert draw(law, count=0, dtype=dtype).shape == (0, 20)


def test_every_index_matters() -> None:
    """No two of 3000 numbers are equal (32 bits: false alarm 1e-3 before the seed was fixed)."""
    distinct = [
        draw(rng.uniforms, **change)
        for change in (
            {},
            {"seed": 4},
            {"seed": 3 + 2**32},
            {"seed": 2**64 - 1},
            {"stream": 2},
            {"stream": 2**15},
            {"step": 6},
            {"step": 5 + 2**32},
            {"step": 2**48 - 1},
            {"paths": range(20, 40)},
            {"paths": range(2**32 - 20, 2**32)},
        )
    ]
    values = torch.cat([d.flatten() for d in distinct])
    assert len(values.unique()) == len(values) == 11 * 180


def test_seeds() -> None:
    assert rng.seed_key(0) == (0, 0)
    assert rng.seed_key(2**64 - 1) == (2**32 - 1, 2**32 - 1)
    assert rng.seed_key(np.int64(5)) == (5, 0)
    assert all(type(word) is int for word in rng.seed_key(np.uint64(2**63)))
    for seed in (-1, 2**64, 1.0, "1", None, True, torch.tensor(1)):
        with pytest.raises(errors.ArgumentError, match="seed is not an integer") as caught:
            rng.seed_key(seed)  # type: ignore[arg-type]
        assert caught.value.received == repr(seed)


def test_the_key_may_be_a_tensor() -> None:
    key = tuple(torch.tensor(word) for word in rng.seed_key(2**64 - 2))
    got = rng.normals(key, 1, torch.arange(3), torch.tensor(0), 4, torch.float64)  # type: ignore[arg-type]
    assert torch.equal(got, draw(seed=2**64 - 2, paths=range(3), step=0, count=4))


# Uniforms never reach 0 or 1, normals are finite.


@pytest.mark.parametrize(
    ("dtype", "smallest", "largest_normal"),
    [(torch.float64, 2.0**-33, 6.77), (torch.float32, 2.0**-24, 5.77)],
)
def test_the_ends_of_the_unit_interval(
    dtype: torch.dtype, smallest: float, largest_normal: float
) -> None:
    extreme = torch.tensor([0, 1, 2**31, 2**32 - 512, 2**32 - 2, 2**32 - 1])
    u = rng._unit_interval(extreme, dtype)
    assert float(u.min()) == smallest
    assert float(u.max()) == 1.0 - smallest
    assert bool((u[1:] >= u[:-1]).all())
    assert math.sqrt(-2 * math.log(smallest)) == pytest.approx(largest_normal, abs=0.01)


def test_broken_twin_of_24_bits_reaches_one() -> None:
    """The half that keeps away from 0 does not fit beside 24 bits in single precision."""
    words = torch.tensor([2**32 - 1])
    assert float(((words >> 8).float() + 0.5) * 2.0**-24) == 1.0


# The law. 200,000 numbers: 2000 paths, 25 steps, 4 components.

N = 200_000


def sample(law: Draw, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return draw(law, seed=seed, paths=range(2000), step=list(range(25)), count=4, dtype=dtype)


def assert_has_law(values: Tensor, law: Any, alarm: float = ALARM) -> None:
    """Kolmogorov and Smirnov, half of the alarm rate, and moments 1 to 4, an eighth each.

    A shift by 0.02 standard deviations or a scale off by 1 % is found with probability above
    0.9999: they are 9 and 6 standard errors of the mean and of the second moment.
    """
    flat = values.double().flatten().numpy()
    assert stats.kstest(flat, law.cdf).pvalue > alarm / 2
    for order in (1, 2, 3, 4):
        spread = math.sqrt((law.moment(2 * order) - law.moment(order) ** 2) / len(flat))
        score = (np.mean(flat**order) - law.moment(order)) / spread
        assert 2 * stats.norm.sf(abs(score)) > alarm / 8, order


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("law", "distribution"),
    [(rng.normals, stats.norm()), (rng.uniforms, stats.uniform())],
)
def test_moments_and_distribution(law: Draw, distribution: Any, dtype: torch.dtype) -> None:
    assert_has_law(sample(law, dtype), distribution)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tail_of_the_normals(dtype: torch.dtype) -> None:
    """Beyond 3: 540 of 200,000 expected; a tail cut at 3 or doubled is found for sure."""
    beyond = int((sample(rng.normals, dtype).abs() > 3).sum())
    p = 2 * stats.norm.sf(3.0)
    assert stats.binomtest(beyond, N, p).pvalue > ALARM


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda v: v[0], lambda v: v[1]),  # cosine and sine of one pair
        (lambda v: v[1], lambda v: v[2]),
        (lambda v: v[:, :-1], lambda v: v[:, 1:]),  # neighbouring steps
        (lambda v: v[..., :-1], lambda v: v[..., 1:]),  # neighbouring paths
        (lambda v: v[0] ** 2, lambda v: v[1] ** 2),
        (lambda v: v[..., :-1].abs(), lambda v: v[..., 1:].abs()),
    ],
)
def test_numbers_are_uncorrelated(
    one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]
) -> None:
    """A correlation of 0.03 is found with probability above 0.9999 in 50,000 pairs."""
    assert_uncorrelated(
        one(sample(rng.normals, torch.float64)), other(sample(rng.normals, torch.float64))
    )


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    pair = torch.stack([a.flatten(), b.flatten()])
    correlation = float(torch.corrcoef(pair)[0, 1])
    assert 2 * stats.norm.sf(abs(correlation) * math.sqrt(pair.shape[1])) > ALARM


def test_seeds_and_streams_are_uncorrelated() -> None:
    first = sample(rng.normals, torch.float64)
    assert_uncorrelated(first, sample(rng.normals, torch.float64, seed=2))
    other = draw(stream=2, seed=1, paths=range(2000), step=list(range(25)), count=4)
    assert_uncorrelated(first, other)


@pytest.mark.parametrize(
    ("twin", "assertion"),
    [
        (lambda v: v + 0.02, "law"),
        (lambda v: 1.01 * v, "law"),
        (lambda v: v.clamp(-3, 3), "tail"),
        (lambda v: v + 0.03 * v.roll(1, dims=-1), "neighbours"),
    ],
)
def test_broken_twins_are_rejected(twin: Callable[[Tensor], Tensor], assertion: str) -> None:
    values = twin(sample(rng.normals, torch.float64))
    if assertion == "law":
        with pytest.raises(AssertionError):
            assert_has_law(values, stats.norm())
    elif assertion == "tail":
        assert stats.binomtest(int((values.abs() > 3).sum()), N, 0.0027).pvalue < ALARM
    else:
        with pytest.raises(AssertionError):
            assert_uncorrelated(values[..., :-1], values[..., 1:])


@pytest.mark.slow
@pytest.mark.compile
def test_compiled_numbers_are_the_same() -> None:
    """To the bit, in vector loops and in their remainder, where products wrap."""

    def function(paths: Tensor, step: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        return rng.uniforms((k0, k1), 3, paths, step, 4, torch.float64)

    key = [torch.tensor(word) for word in rng.seed_key(2**64 - 12345)]
    paths, step = 2**32 - 1 - torch.arange(33), torch.tensor(2**48 - 2)
    compiled = compile_function(function, (paths, step, *key))
    assert compiled is not function
    for k in range(3):
        inputs = (paths - k, step - 2**33 * k, *(word - k for word in key))
        assert torch.equal(compiled(*inputs), function(*inputs))

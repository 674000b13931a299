"""Means and standard errors from parts: NumPy on the whole is the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from manifold_sde.errors import ArgumentError, DTypeError, ShapeError
from manifold_sde.solvers.moments import Moments, evaluate, moments_of

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)


@st.composite
def samples(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Values (n, ...) of any shape, which of them count, and where they are cut into parts."""
    n = draw(st.integers(1, 40))
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    values = draw(arrays.arrays(np.float64, (n, *shape), elements=NUMBERS))
    valid = draw(arrays.arrays(np.bool_, n))
    cuts = draw(st.lists(st.integers(0, n), max_size=5))
    return values, valid, sorted(cuts)


def parts_of(values: np.ndarray, valid: np.ndarray, cuts: list[int]) -> list[Moments]:
    pieces = zip(np.split(values, cuts), np.split(valid, cuts), strict=True)
    return [Moments.of(torch.from_numpy(v), torch.from_numpy(k)) for v, k in pieces]


def check(moments: Moments, kept: np.ndarray) -> None:
    """Against NumPy, to rounding of numbers as large as the largest."""
    size = float(np.abs(kept).max(initial=0.0))
    assert moments.count.tolist() == [len(kept)]
    mean, error = moments.result()
    if len(kept) == 0:
        assert torch.isnan(mean).all()
    else:
        np.testing.assert_allclose(mean[0], kept.mean(0), rtol=0, atol=1e-13 * size)
    if len(kept) < 2:
        assert torch.isnan(error).all()
    else:
        expected = kept.std(0, ddof=1) / np.sqrt(len(kept))
        np.testing.assert_allclose(error[0], expected, rtol=1e-9, atol=1e-12 * size)


@given(samples())
def test_merging_parts_is_numpy_on_the_whole(
    sample: tuple[np.ndarray, np.ndarray, list[int]],
) -> None:
    values, valid, cuts = sample
    first, *others = parts_of(values, valid, cuts)
    for part in others:
        first = first.merge(part)
    check(first, values[valid])


@given(samples())
def test_merging_does_not_depend_on_the_order(
    sample: tuple[np.ndarray, np.ndarray, list[int]],
) -> None:
    values, valid, cuts = sample
    last, *others = reversed(parts_of(values, valid, cuts))
    for part in others:
        last = last.merge(part)
    check(last, values[valid])


def test_numbers_far_from_zero_keep_their_digits() -> None:
    """A sum of squares minus the square of the sum would have none left: 1e9 with spread 1."""
    values = 1e9 + np.random.default_rng(0).standard_normal(1000)
    first, *others = parts_of(values, np.ones(1000, bool), [100, 101, 700])
    for part in others:
        first = first.merge(part)
    assert float(first.variance) == pytest.approx(values.var(ddof=1), rel=1e-6)
    naive = (np.square(values).sum() - values.sum() ** 2 / 1000) / 999
    assert abs(naive / values.var(ddof=1) - 1) > 1e-3


def test_broken_twin_merging_without_the_distance_of_the_means() -> None:
    """Adding up the parts' squared deviations alone is wrong where the parts differ."""
    values = np.array([0.0, 1.0, 10.0, 11.0])
    one, other = parts_of(values, np.ones(4, bool), [2])
    merged = one.merge(other)
    assert float(merged.variance) == pytest.approx(values.var(ddof=1), rel=1e-14)
    twin = (one.squares + other.squares) / 3
    assert float(twin) < 0.02 * float(merged.variance)


def test_single_precision_is_added_up_in_double() -> None:
    values = torch.full((2_000_000,), 0.1, dtype=torch.float32)
    mean, _ = Moments.of(values, torch.ones(len(values), dtype=torch.bool)).result()
    assert float(mean) == pytest.approx(float(values[0]), rel=1e-12)


def test_lost_paths_are_left_out_at_each_time() -> None:
    states = torch.tensor([[[1.0], [2.0], [6.0]], [[1.0], [torch.nan], [3.0]]])
    moments = moments_of("f", lambda y: y[:, 0], states)
    assert moments.count.tolist() == [3.0, 2.0]
    mean, error = moments.result()
    assert mean.tolist() == [3.0, 2.0]
    np.testing.assert_allclose(error, [np.std([1, 2, 6], ddof=1) / 3**0.5, 1.0], rtol=1e-14)


def test_functions_never_see_a_lost_path_beside_others() -> None:
    seen = []

    def watch(y: torch.Tensor) -> torch.Tensor:
        seen.append(bool(torch.isnan(y).any()))
        return y[:, 0]

    moments_of("f", watch, torch.tensor([[[1.0], [torch.nan]]]))
    assert seen == [False]


def test_pairs_count_once_and_a_broken_pair_not_at_all() -> None:
    states = torch.tensor([[[1.0], [3.0], [torch.nan], [100.0], [4.0], [8.0]]])
    moments = moments_of("f", lambda y: y[:, 0], states, antithetic=True)
    assert moments.count.tolist() == [2.0]
    mean, error = moments.result()
    assert mean.tolist() == [4.0]
    assert error.tolist() == [2.0]


def test_whole_numbers_and_truth_values_are_numbers() -> None:
    states = torch.tensor([[1.0], [-1.0]])
    for function in (lambda y: y[:, 0] > 0, lambda y: (y[:, 0] > 0).long()):
        values, _ = evaluate("f", function, states)
        assert values.dtype == torch.float32
        assert values.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (3.0, ArgumentError, "float"),
        (lambda y: 3.0, ShapeError, "float for states"),
        (lambda y: y.sum(), ShapeError, r"shape \(\)"),
        (lambda y: y[0], ShapeError, r"shape \(3,\)"),
        (lambda y: y[:, 0].numpy(), ShapeError, "ndarray"),
        (lambda y: torch.exp(1j * y[:, 0]), DTypeError, "view_as_real"),
    ],
)
def test_functions_that_cannot_be_used_are_named(function, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        evaluate("the observable 'a'", function, torch.ones(2, 3))
    assert "the observable 'a'" in str(caught.value)

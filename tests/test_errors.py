"""The family of errors: its parts, its text, and the way through a pickle."""

import inspect
import pickle

import pytest
import torch

from manifold_sde import errors

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, errors.ManifoldSDEError)
]


@pytest.mark.parametrize("cls", CLASSES)
def test_each_error_keeps_its_parts_through_a_pickle(cls: type[errors.ManifoldSDEError]) -> None:
    error = cls("it is wrong", received="a", expected="b", remedy="c")
    assert str(error) == "it is wrong\n  received: a\n  expected: b\n  hint:     c"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error)
    assert (again.problem, again.received, again.expected, again.remedy) == (
        "it is wrong",
        "a",
        "b",
        "c",
    )
    assert cls.__doc__


def test_parts_that_are_not_given_are_left_out() -> None:
    assert str(errors.ManifoldSDEError("it is wrong")) == "it is wrong"
    assert str(errors.ManifoldSDEError("no", remedy="yes")) == "no\n  hint:     yes"


def test_attributes_survive_a_pickle() -> None:
    violation = errors.ScaleInvarianceError("no", violation=0.5, coordinates=(1, 2), received="x")
    again = pickle.loads(pickle.dumps(violation))
    assert (again.violation, again.coordinates, again.received) == (0.5, (1, 2), "x")
    failed = torch.tensor([True, False])
    partial = torch.tensor([[torch.nan], [1.0]])
    again = pickle.loads(
        pickle.dumps(errors.LimitMapError("no", failed=failed, partial=partial, remedy="y"))
    )
    assert torch.equal(again.failed, failed)
    assert torch.equal(again.partial, partial) is False  # NaN differs from itself
    assert float(again.partial[1, 0]) == 1.0


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (errors.ArgumentError, ValueError),
        (errors.ShapeError, ValueError),
        (errors.NonFiniteError, ValueError),
        (errors.ZeroVectorError, ValueError),
        (errors.ScaleInvarianceError, ValueError),
        (errors.NoiseError, ValueError),
        (errors.RankError, ValueError),
        (errors.PropertyError, AssertionError),
        (errors.DTypeError, TypeError),
        (errors.LimitMapError, RuntimeError),
        (errors.DifferentiationError, RuntimeError),
        (errors.MissingDependencyError, ImportError),
    ],
)
def test_errors_are_also_what_python_calls_them(
    cls: type[Exception], base: type[Exception]
) -> None:
    assert issubclass(cls, base)


def test_a_subclass_of_another_module_pickles_too() -> None:
    again = pickle.loads(pickle.dumps(OtherError("no", received="1")))
    assert type(again) is OtherError
    assert again.received == "1"


class OtherError(errors.ArgumentError):
    """As another part of the toolkit may define one."""

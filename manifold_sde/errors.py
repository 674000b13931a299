"""The errors and warnings of the toolkit: one family, each with a hint.

Every error says what was received, what was expected and what to do about it.
The three parts are kept as attributes, so that a program can read them too.
"""

from __future__ import annotations

from typing import Any, Self


def printable(text: str) -> str:
    r"""A text without what a terminal would obey: control characters are spelled out.

    >>> print(printable("a name" + chr(27) + "[2J"))
    a name\x1b[2J
    """
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class ManifoldSDEError(Exception):
    """Base class of every error that the toolkit raises on purpose.

    Args:
        problem: One sentence that says what is wrong.
        received: What was received, or what was measured.
        expected: What was expected in its place.
        remedy: What the user can do about it.

    Attributes:
        problem, received, expected, remedy: The four parts, as given.
    """

    def __init__(
        self, problem: str, *, received: str = "", expected: str = "", remedy: str = ""
    ) -> None:
        self.problem = problem
        self.received = received
        self.expected = expected
        self.remedy = remedy
        lines = [problem]
        if received:
            lines.append(f"  received: {received}")
        if expected:
            lines.append(f"  expected: {expected}")
        if remedy:
            lines.append(f"  hint:     {remedy}")
        super().__init__(printable("\n".join(lines)))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by their positional arguments; ours has keywords, and
        # must survive the trip back from a worker process.
        return (_rebuild, (type(self), dict(self.__dict__)))

    def __copy__(self) -> Self:
        # Without the frames, which hold what was under way: where packages that send errors between
        # processes are imported, other copies keep them.
        rebuild, given = ManifoldSDEError.__reduce__(self)
        copied: Self = rebuild(*given)
        return copied


def _rebuild(cls: type[ManifoldSDEError], state: dict[str, Any]) -> ManifoldSDEError:
    error = cls.__new__(cls)
    ManifoldSDEError.__init__(
        error,
        state["problem"],
        received=state["received"],
        expected=state["expected"],
        remedy=state["remedy"],
    )
    error.__dict__.update(state)
    return error


class ArgumentError(ManifoldSDEError, ValueError):
    """An argument has a value that the function cannot use."""


class ShapeError(ArgumentError):
    """A tensor or array has the wrong shape."""


class DTypeError(ManifoldSDEError, TypeError):
    """A tensor has the wrong dtype, or something is not a tensor at all."""


class NonFiniteError(ArgumentError):
    """A tensor holds NaN or infinity."""


class ZeroVectorError(ArgumentError):
    """A point is the origin, where a scale-invariant loss is not defined."""


class ScaleInvarianceError(ManifoldSDEError, ValueError):
    """A loss is not scale-invariant (Definition 2.2) where it has to be.

    Attributes:
        violation: Largest measured ``|<x, grad L(x)>| / (|x| |grad L(x)|)``, or
            ``None`` where a symbolic proof failed instead.
        coordinates: Indices of the coordinates that cause most of it.
    """

    def __init__(
        self,
        problem: str,
        *,
        violation: float | None = None,
        coordinates: tuple[int, ...] = (),
        **parts: str,
    ) -> None:
        super().__init__(problem, **parts)
        self.violation = violation
        self.coordinates = coordinates


class NoiseError(ManifoldSDEError, ValueError):
    """A noise model does not fit its problem, or lacks a property that is needed."""


class PartialError(ManifoldSDEError):
    """Some points of a batch failed, and the others did not.

    Attributes:
        failed: Boolean tensor of the batch's shape, true at the points that failed, or ``None``
            where it is not known.
        partial: The result with NaN at the points that failed, or ``None``.
    """

    def __init__(
        self, problem: str, *, failed: Any = None, partial: Any = None, **parts: str
    ) -> None:
        super().__init__(problem, **parts)
        self.failed = failed
        self.partial = partial


class RankError(PartialError, ValueError):
    """The rank of the Hessian is ambiguous, or is not the one that was declared."""


class NotOnManifoldError(PartialError, ValueError):
    """A point that should lie on the manifold of minimisers does not."""


class LimitMapError(PartialError, RuntimeError):
    """Gradient flow from a point did not reach the manifold of minimisers."""


class LostPathsError(PartialError, RuntimeError):
    """An average would leave out more than one path in a hundred, because they were lost.

    Attributes:
        lost: Number of paths that were lost at the worst of the save times.
        paths: Number of all paths.
        partial: The result over those that are left, or ``None``.
    """

    def __init__(self, problem: str, *, lost: int = 0, paths: int = 0, **parts: Any) -> None:
        super().__init__(problem, **parts)
        self.lost = lost
        self.paths = paths


class DifferentiationError(ManifoldSDEError, RuntimeError):
    """A loss cannot be differentiated as often as is needed."""


class SymbolicError(ManifoldSDEError, ValueError):
    """A symbolic problem is malformed, or a closed form is not what it claims."""


class TimeScaleError(ArgumentError):
    """A learning rate, weight decay, time or step count is out of range."""


class ClockRangeError(ManifoldSDEError):
    """The moment lies beyond what was simulated.

    Attributes:
        needed: Clock u up to which to simulate, with a tenth to spare, or ``None``.
    """

    def __init__(self, problem: str, *, needed: float | None = None, **parts: str) -> None:
        super().__init__(problem, **parts)
        self.needed = needed


class MixingClockError(ManifoldSDEError, RuntimeError):
    """A training clock was not stepped, or belongs to another run."""


class CheckpointError(ManifoldSDEError, RuntimeError):
    """A checkpoint or solution file is corrupted or belongs to another run."""


class WriteError(CheckpointError, OSError):
    """A file or its folder cannot be written. What stood there before is as it was.

    Attributes:
        errno: Number of the system's error, or ``None``.
    """

    def __new__(cls, *_: Any, **__: Any) -> WriteError:
        """The object alone: what OSError makes of its arguments is not meant."""
        return OSError.__new__(cls)


class Terminated(SystemExit):
    """A run was stopped by SIGTERM: uncaught, the process ends with status 143."""

    def __init__(self, code: int = 143) -> None:
        super().__init__(code)


class DataFileError(ManifoldSDEError, ValueError):
    """A file of a data set is missing, or is not the published one.

    Attributes:
        path: The file or folder.
    """

    def __init__(self, problem: str, *, path: str = "", **parts: str) -> None:
        super().__init__(problem, **parts)
        self.path = path


class PropertyError(ManifoldSDEError, AssertionError):
    """A property that the theory says of a problem does not hold, or could not be decided."""


class WorkerError(ManifoldSDEError, RuntimeError):
    """A worker process died, or could not be given its work."""


class MissingDependencyError(ManifoldSDEError, ImportError):
    """An optional dependency is not installed."""


class ManifoldSDEWarning(UserWarning):
    """Base class of the toolkit's warnings."""


class CompilationWarning(ManifoldSDEWarning):
    """Compiling is not possible here; the same computation runs uncompiled."""


class LostPathsWarning(ManifoldSDEWarning):
    """Some paths of a simulation could not be continued and are NaN from there on."""


class RankWarning(ManifoldSDEWarning):
    """Some paths come near points where the rank of the Hessian falls."""


class NoDiffusionWarning(ManifoldSDEWarning):
    """The noise has no part along the manifold: what is solved is no diffusion."""


class LongRunWarning(ManifoldSDEWarning):
    """A run will take very many steps."""


class StepSizeWarning(ManifoldSDEWarning):
    """A learning rate is so large that SGD does not stay near the manifold of minimisers."""


class NotMixedWarning(ManifoldSDEWarning):
    """An average over a run whose paths still remember their start."""


class MixingClockWarning(ManifoldSDEWarning):
    """A training clock does not see the run that it is meant for."""

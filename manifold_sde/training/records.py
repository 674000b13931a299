"""Test functions of the weights, recorded along a run."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from manifold_sde.arguments import check_count, check_path, kind_of, real
from manifold_sde.errors import ArgumentError, CheckpointError, NonFiniteError
from manifold_sde.number_arrays import Array
from manifold_sde.writing import replacing

Recorded = Mapping[str, Any]
Recorder = Callable[[], Recorded]
"""A function without arguments that looks at the weights: names and numbers."""

_STEPS, _CLOCK = "steps", "clock"


class Clock(Protocol):
    """What is read of a clock, such as ``MixingClock``."""

    @property
    def time(self) -> float:
        """The angular clock v."""

    @property
    def effective(self) -> float | None:
        """The part of it by which minimisers are explored; ``None`` where it is not known."""


class Records:
    """Named numbers that were recorded at some steps of a run, with the clock there.

    Args:
        *recorders: Functions that :meth:`record` asks, such as those of :func:`loss_on`,
            :func:`logits_on` and :func:`directions_of`.

    Example:
        >>> records = Records()
        >>> records.append(0, 0.0, loss=2.3)
        >>> records.append(100, 0.5, loss=2.1)
        >>> records.clock, records.values["loss"]
        (array([0. , 0.5]), array([2.3, 2.1]))
    """

    def __init__(self, *recorders: Recorder) -> None:
        self.recorders = recorders
        #: Whether the clock that was read last does not know how far minimisers are explored.
        self.unknown = False
        self._rows: list[tuple[int, float, dict[str, float]]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        names = ", ".join(self.values)
        return f"<{len(self)} records of {names or 'nothing'}>"

    @property
    def steps(self) -> Array:
        """The steps (K,)."""
        return np.array([row[0] for row in self._rows], dtype=np.float64)

    @property
    def clock(self) -> Array:
        """The clock readings (K,)."""
        return np.array([row[1] for row in self._rows], dtype=np.float64)

    @property
    def values(self) -> dict[str, Array]:
        """The functions' values, (K,) for each name."""
        names = self._rows[0][2] if self._rows else {}
        return {name: np.array([row[2][name] for row in self._rows]) for name in names}

    def append(self, step: int, clock: float, values: Recorded | None = None, **more: Any) -> None:
        """Add a record.

        Args:
            step: The step.
            clock: The clock there.
            values: Names and numbers.
            **more: The same as keywords.

        Raises:
            NonFiniteError: If a number is not finite.
            ArgumentError: If the names are not those of the first record, or the step or the clock
                is smaller than the last one.
        """
        given = {**(values or {}), **more}
        row = {str(name): real(value) for name, value in given.items()}
        step, clock = int(step), real(clock)
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad or not math.isfinite(clock):
            raise NonFiniteError(
                f"what was recorded at step {step} is not a finite number",
                received=", ".join(f"{name}={given[name]!r}" for name in bad) or f"clock={clock}",
                expected="finite real numbers",
                remedy="stop recording where a run has blown up; one number a name",
            )
        if not row or (self._rows and row.keys() != self._rows[0][2].keys()):
            raise ArgumentError(
                f"the names recorded at step {step} are others than before",
                received=", ".join(row) or "none",
                expected=", ".join(self._rows[0][2]) if self._rows else "one name at least",
                remedy="record the same functions each time, or keep two Records",
            )
        if self._rows and (step <= self._rows[-1][0] or clock < self._rows[-1][1]):
            last = self._rows[-1]
            raise ArgumentError(
                "the record is not later than the last one",
                received=f"step {step} at clock {clock:g}, after step {last[0]} at {last[1]:g}",
                expected="steps that increase, and a clock that does not fall",
                remedy="restore the clock's state with the run's, or begin new Records",
            )
        self._rows.append((step, clock, row))

    def record(self, step: int, clock: float | Clock, group: str | None = None) -> None:
        """Ask the recorders, and append what they say.

        Args:
            step: The step.
            clock: The clock there: a number, or a ``MixingClock``, whose ``time`` is read.
            group: The group whose clock is read instead, where what is recorded is of a group with
                rates of its own.

        Raises:
            NonFiniteError, ArgumentError: As :meth:`append`.
        """
        values: dict[str, Any] = {}
        for recorder in self.recorders:
            values.update(recorder())
        reading = real(clock)
        if math.isnan(reading):
            reading = clock.time if group is None else clock.time_of(group)  # type: ignore[union-attr]
        self.append(step, reading, values)
        self.unknown = getattr(clock, "effective", 0.0) is None

    def save(self, path: str | Path) -> None:
        """Write an .npz file.

        Raises:
            WriteError: If it cannot be written.
        """
        values = self.values
        arrays: dict[str, Any] = {f"value {i}": values[name] for i, name in enumerate(values)}
        names = np.array(json.dumps(list(values)))
        with replacing(path) as file:
            np.savez(file, **{_STEPS: self.steps, _CLOCK: self.clock, "names": names, **arrays})

    @classmethod
    def load(cls, path: str | Path) -> Records:
        """Read a file that :meth:`save` wrote.

        Raises:
            CheckpointError: If it cannot be read, or is none.
        """
        path = check_path("path", path)
        records = cls()
        try:
            with np.load(path, allow_pickle=False) as file:
                names = json.loads(str(file["names"]))
                columns = [file[f"value {i}"] for i in range(len(names))]
                for step, clock, *row in zip(file[_STEPS], file[_CLOCK], *columns, strict=True):
                    records.append(int(step), clock, dict(zip(names, row, strict=True)))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                "the file holds no records",
                received=f"{path}: {type(error).__name__}: {error}",
                expected="an .npz file written by Records.save",
                remedy="record again; a file that was cut short cannot be mended",
            ) from error
        return records


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluate a module, and leave each of its parts as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def loss_on(module: nn.Module, criterion: Any, inputs: Any, targets: Any) -> Recorder:
    """Record the loss of a module on a fixed batch, as ``loss``.

    Args:
        module: The module; it is evaluated in ``eval`` mode, without gradients.
        criterion: Function of outputs and targets that returns one number.
        inputs: What the module is called with.
        targets: What the criterion compares with.
    """

    def recorder() -> Recorded:
        with _evaluating(module):
            return {"loss": float(criterion(module(inputs), targets))}

    return recorder


def logits_on(module: nn.Module, inputs: Any, *, projections: int = 4, seed: int = 0) -> Recorder:
    """Record fixed random combinations of a module's outputs on a fixed batch.

    Args:
        module: The module; it is evaluated in ``eval`` mode, without gradients.
        inputs: What the module is called with; a tensor comes out.
        projections: Number of combinations, ``logits 0``, ``logits 1``, ...
        seed: Seed of the combinations.
    """
    count = _projections(projections)

    def recorder() -> Recorded:
        with _evaluating(module):
            outputs = module(inputs).reshape(-1).double()
        return _projected("logits", [outputs], count, seed)

    return recorder


def directions_of(
    *weights: nn.Module | Tensor | Iterable[Any], projections: int = 4, seed: int = 0
) -> Recorder:
    """Record the direction of weights along a few fixed random ones.

    With D weights x and a vector v of independent signs it is <v, x>/|x|, which is of size 1. The
    signs are drawn again each time, so that no memory is needed for them.

    Args:
        *weights: Modules, whose trainable parameters are meant, or the tensors of one group: what
            is given is one direction, of all together.
        projections: Number of directions, ``direction 0``, ``direction 1``, ...
        seed: Seed of the directions.
    """
    count = _projections(projections)
    tensors = list(_tensors(weights))
    if not tensors or not all(isinstance(x, Tensor) and x.numel() for x in tensors):
        raise ArgumentError(
            "there are no weights to record",
            received=", ".join(map(kind_of, tensors)) or "nothing",
            expected="modules with trainable parameters, or tensors",
            remedy="directions_of(module), or directions_of(module.layer.weight)",
        )

    def recorder() -> Recorded:
        with torch.no_grad():
            size = torch.stack([x.double().square().sum() for x in tensors]).sum().sqrt()
            parts = [x.reshape(-1).double() / size for x in tensors]
        return _projected("direction", parts, count, seed)

    return recorder


def _tensors(weights: Any) -> Iterator[Any]:
    """The tensors in modules, tensors and nested sequences; what is none of them as it is."""
    if isinstance(weights, nn.Module):
        yield from (p for p in weights.parameters() if p.requires_grad)
    elif isinstance(weights, Iterable) and not isinstance(weights, (Tensor, str)):
        for each in weights:
            yield from _tensors(each)
    else:
        yield weights


def _projections(count: object) -> int:
    return check_count("projections", count, "projections", "projections=4")


def _projected(name: str, parts: list[Tensor], count: int, seed: int) -> Recorded:
    """Sums of the parts with random signs."""
    device = parts[0].device
    generator = torch.Generator(device).manual_seed(seed)
    sums = []
    for _ in range(count):
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part in parts:
            bits = torch.randint(0, 2, part.shape, generator=generator, device=device)
            total += (part * (2 * bits - 1)).sum()
        sums.append(total)
    found = torch.stack(sums).cpu()
    return {f"{name} {i}": float(value) for i, value in enumerate(found)}

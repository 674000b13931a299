"""The audit of runs that are over: of a log, or of a folder of checkpoints."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.arguments import check_choice, check_path
from manifold_sde.errors import ArgumentError, DataFileError
from manifold_sde.number_arrays import Array
from manifold_sde.schedules import Schedule, ScheduleLike
from manifold_sde.training.expected import ADAM, LINEAR
from manifold_sde.training.group_audit import (
    AS_PREDICTED,
    NONE,
    NOT_YET,
    OFF,
    STOPPED,
    GroupAudit,
)
from manifold_sde.training.recursions import RunningClock
from manifold_sde.training.report import AuditReport
from manifold_sde.training.rules import Options, matrix, relaxation_rate, variance

_INSIDE = ("model", "state_dict", "model_state_dict", "module", "net", "params")
_NUMBER = re.compile(r"\d+")
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_AT_REST, _FITS, _JUMP = 0.05, 0.1, 2.0


def audit_log(
    path: str | Path,
    *,
    norms: Sequence[str] | None = None,
    step: str = "step",
    lr: str | ScheduleLike = "lr",
    weight_decay: str | ScheduleLike = 0.0,
    optimizer: str = "adamw",
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    sizes: Mapping[str, int] | None = None,
) -> AuditReport:
    """Audit norms that were written down, by the rates of the run.

    The norms are predicted from the first of them on. What is not known of the gradients is one
    number a group, fitted: the trace V of the noise at norm 1 (SGD), or the variance U^2 of an
    update (others), which for Adam and AdamW is the number of weights, and no fit, where it is
    known. A group whose norms do not follow is not scale-invariant, or its noise has changed.

    Args:
        path: A CSV file, a file of JSON lines, or a folder of checkpoints (``state_dict`` files of
            ``torch.save``, or safetensors), whose names end in the step.
        norms: Columns that hold norms; of a folder, names of tensors. By default all columns with
            "norm" in their name, and all tensors of two dimensions or more: whether they are
            scale-invariant is then for you to know.
        step: Column of the step.
        lr: Column of the learning rate, or a number, a sequence or a callable of the step.
        weight_decay: The same of the weight decay.
        optimizer: ``"sgd"``, ``"sgdw"``, ``"adam"``, ``"adamw"``, or one of fixed step size.
        momentum: Of SGD.
        dampening: Of SGD.
        nesterov: Of SGD.
        betas: Of Adam and AdamW.
        sizes: Numbers of weights of the columns, for Adam and AdamW.

    Returns:
        The report, in which what a log does not tell is NaN.

    Raises:
        DataFileError: If a file cannot be read, or lacks a column.
        ArgumentError: If there are fewer than three rows.
    """
    check_choice("optimizer", optimizer, (*LINEAR, *ADAM, "signsgd", "lion"), 'optimizer="sgd"')
    path = check_path("path", path)
    known = dict(sizes or {})
    if path.is_dir():
        steps, columns, counts = _checkpoints(path, norms)
        known = {**counts, **known}
    else:
        table = _table(path)
        chosen = [n for n in table if "norm" in n.lower()] if norms is None else norms
        steps = _column(path, table, step)
        columns = {name: _column(path, table, name) for name in chosen}
        lr, weight_decay = (
            _column(path, table, z) if isinstance(z, str) else z for z in (lr, weight_decay)
        )
    if isinstance(lr, str) or isinstance(weight_decay, str):
        raise ArgumentError(
            "a folder of checkpoints does not say the learning rate",
            received=f"lr = {lr!r}, weight_decay = {weight_decay!r}",
            expected="numbers, sequences of one value a step, or callables of the step",
            remedy="audit(folder, lr=1e-3, weight_decay=0.1)",
        )
    order = np.argsort(steps, kind="stable")
    steps = steps[order].astype(np.int64)
    columns = {name: column[order] for name, column in columns.items()}
    if len(steps) < 3 or not columns or (np.diff(steps) <= 0).any():
        raise ArgumentError(
            "there are too few norms to compare",
            received=f"{len(columns)} columns of norms at {len(set(steps.tolist()))} steps of "
            f"{len(steps)} rows in {path}",
            expected="one column or more, at three different steps or more",
            remedy="norms=[...] names the columns, or the tensors of checkpoints",
        )
    rates = _by_step("lr", lr, steps, order)
    decays = _by_step("weight_decay", weight_decay, steps, order)
    options = [
        Options(eta, lam, momentum, dampening, nesterov, betas)
        for eta, lam in zip(rates.tolist(), decays.tolist(), strict=True)
    ]
    run = _Run(optimizer, options, steps)
    judged = {n: run.judge(n, column, known.get(n)) for n, column in columns.items()}
    return AuditReport(
        f"{path.name}: steps {steps[0]} to {steps[-1]}, {optimizer}",
        tuple(row for row, _ in judged.values()),
        (
            "Which of these are scale-invariant was not measured: scale_invariant_groups(model, "
            "inputs) does. Norms say nothing of mixing; the order of the data decides it.",
        ),
        math.nan,
        steps,
        dict(columns),
        {name: prediction for name, (_, prediction) in judged.items()},
        {name: run.clock(column) for name, column in columns.items()},
    )


class _Run:
    """The decay of a run, and what noise of size 1 adds, between the steps that were logged.

    For P = |x|^p, p = 4 for SGD and 2 for steps of fixed size, an interval gives
    P' = A P + c B, with c = V or U^2.
    """

    def __init__(self, rule: str, options: list[Options], steps: Array) -> None:
        self.rule, self.last = rule, options[-1]
        self.power = 4.0 if rule in LINEAR else 2.0
        clock = RunningClock()
        log_a = np.zeros(len(options) + 1)
        for k, now in enumerate(options):
            clock.advance(matrix(rule, now, np.full(1, min(k, 1))), 0.0)
            log_a[k + 1] = float(np.reshape(clock.log_factor, -1)[0])
        rates = np.array([z.lr for z in options])
        if rule in LINEAR:
            momenta = np.array([(1.0 - z.dampening) / (1.0 - z.momentum) for z in options])
            added = 2.0 * (rates * momenta) ** 2
        else:
            added = rates**2
        starts = steps - steps[0]
        self.factor = np.exp(self.power * np.diff(log_a[starts]))
        # (η/a)^2 in units of the interval's end; SGD's twin has the rate η/(a a').
        middle = log_a[1:] if rule not in LINEAR else 0.5 * (log_a[1:] + log_a[:-1])
        self.noise = np.array(
            [
                float((added[i:j] * np.exp(self.power * (log_a[j] - middle[i:j]))).sum())
                for i, j in pairwise(starts.tolist())
            ]
        )
        self.growth = log_a[starts] - log_a[0]
        self.loss = -float(np.expm1(2.0 * np.diff(log_a)[-1]))

    def clock(self, norms: Array) -> Array:
        """The angular clock v since the first of the norms: their growth without decay."""
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Array = 2.0 * (np.log(norms / norms[0]) - self.growth)
        return found

    def judge(self, name: str, norms: Array, size: int | None) -> tuple[GroupAudit, Array]:
        """The audit of a column, and its predicted norms."""
        if not (np.isfinite(norms).all() and (norms > 0.0).all()):
            row = GroupAudit(
                name,
                1,
                float(norms[-1]),
                math.nan,
                verdict=OFF,
                reason="norms that are not positive",
            )
            return row, np.full(len(norms), np.nan)
        powers = norms**self.power
        fitted = size is None or self.rule not in ADAM
        # One number for the whole run: the least squares of relative differences.
        ahead = self.noise / powers[1:]
        missing = 1.0 - self.factor * powers[:-1] / powers[1:]
        level = float((ahead * missing).sum() / max((ahead**2).sum(), 1e-300))
        if not fitted and size is not None:
            level = size * variance(self.rule, self.last)
        predicted = [powers[0]]
        for factor, noise in zip(self.factor, self.noise, strict=True):
            predicted.append(factor * predicted[-1] + max(level, 0.0) * noise)
        curve = np.array(predicted) ** (1.0 / self.power)
        off = float(np.abs(norms / curve - 1.0).max())
        clock = float(self.clock(norms)[-1])
        return self._row(name, norms, curve, level, off, clock, fitted), curve

    def _row(
        self,
        name: str,
        norms: Array,
        curve: Array,
        level: float,
        off: float,
        clock: float,
        fitted: bool,
    ) -> GroupAudit:
        now, norm = self.last, float(norms[-1])
        rate = now.lr * (1.0 - now.dampening) / (1.0 - now.momentum)
        linear = self.rule in LINEAR
        scale = (rate if linear else now.lr) ** 2 * max(level, 0.0)
        rest, to_go = math.nan, math.inf
        if self.loss > 0.0:
            rest = (scale / self.loss) ** (1.0 / self.power)
            ratio = abs((norm / rest) ** self.power - 1.0) if rest > 0.0 else math.inf
            ratio /= (1.0 + _AT_REST) ** self.power - 1.0
            speed = relaxation_rate(self.rule, now, self.loss)
            to_go = max(0.0, math.log(max(ratio, 1e-300))) / speed
        verdict, reason = AS_PREDICTED, ""
        if level <= 0.0:
            verdict, reason = OFF, "it falls faster than decay: it is not scale-invariant"
        elif off > _FITS:
            what = "one noise level for the whole run" if fitted else "its number of weights"
            verdict = OFF
            reason = (
                f"up to {100 * off:.0f} % from {what}: it is not scale-invariant, its gradients "
                "have signal, or their noise has changed"
            )
        elif self.loss <= 0.0:
            verdict = NONE
            reason = STOPPED if now.lr == 0.0 else "without decay the norm grows for ever"
        elif to_go > 0.0:
            verdict = NOT_YET
        return GroupAudit(
            name,
            1,
            norm,
            float(curve[-1]),
            equilibrium=rest,
            effective_rate=rate / norm**2 if linear else now.lr / norm,
            decay=-self.loss,
            growth=scale / norm**self.power,
            clock=clock,
            steps_to_go=to_go,
            verdict=verdict,
            reason=reason,
        )


def _by_step(name: str, source: Any, steps: Array, order: Any) -> Array:
    """The value of each step between the first and the last that were logged."""
    count = int(steps[-1] - steps[0])
    if isinstance(source, np.ndarray) and source.shape == steps.shape:
        # Between two rows along a line; where it jumps, the earlier one until the later.
        rows, at = source[order], np.arange(count) + steps[0]
        earlier = np.searchsorted(steps, at, side="right") - 1
        low, high = rows[earlier], rows[earlier + 1]
        smooth = (high <= _JUMP * low) & (low <= _JUMP * high)
        return np.where(smooth, np.interp(at, steps, rows), low)
    remedy = f"a callable of the step, or a column: {name}='column'"
    first, last = int(steps[0]), int(steps[-1])
    return Schedule.of(name, source).every(first, last, of="the log", remedy=remedy)


def _table(path: Path) -> dict[str, list[Any]]:
    """The columns of a CSV file or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError) as error:
        raise DataFileError(
            "the log cannot be read",
            path=str(path),
            received=f"{type(error).__name__}: {error}",
            expected="a CSV file with a line of names, or a JSON object a line",
            remedy="check the path and its format",
        ) from error
    names = dict.fromkeys(name for row in rows for name in row if name is not None)
    return {name: [row.get(name) for row in rows] for name in names}


def _column(path: Path, table: Mapping[str, list[Any]], name: str) -> Array:
    if name not in table:
        raise DataFileError(
            f"the log has no column {name!r}",
            path=str(path),
            received=", ".join(list(table)[:8]) or "an empty file",
            expected=f"a column {name!r}",
            remedy="name the columns: step=, lr=, weight_decay=, norms=[...]",
        )
    try:
        return np.array([float(value) for value in table[name]])
    except (TypeError, ValueError) as error:
        raise DataFileError(
            f"the column {name!r} has values that are no numbers",
            path=str(path),
            received=str(error),
            expected="a number in each row",
            remedy="a log with the rows alone in which it is written",
        ) from error


def _checkpoints(
    folder: Path, names: Sequence[str] | None
) -> tuple[Array, dict[str, Array], dict[str, int]]:
    """Steps, norms and numbers of weights of the tensors in a folder of checkpoints."""
    files = sorted(f for f in folder.iterdir() if f.suffix in _SUFFIXES)
    steps, norms = [], []
    counts: dict[str, int] = {}
    for file in files:
        numbers = _NUMBER.findall(file.stem)
        if not numbers:
            continue
        tensors = _weights(file)
        chosen = [n for n, t in tensors.items() if t.dim() > 1] if names is None else names
        missing = [n for n in chosen if n not in tensors]
        if missing:
            raise DataFileError(
                f"the checkpoint has no tensor {missing[0]!r}",
                path=str(file),
                received=", ".join(list(tensors)[:6]),
                expected="the tensors that norms= names",
                remedy="norms=[...] with names of its state_dict",
            )
        steps.append(int(numbers[-1]))
        norms.append({n: float(tensors[n].double().norm()) for n in chosen})
        counts |= {n: tensors[n].numel() for n in chosen}
    if not steps:
        raise DataFileError(
            "the folder has no checkpoints",
            path=str(folder),
            received=f"{len(files)} files ending in {', '.join(_SUFFIXES)}",
            expected="files whose names end in the step, such as step_1000.pt",
            remedy="rename them, or write the norms into a CSV file",
        )
    shared = [n for n in norms[0] if all(n in row for row in norms)]
    columns = {n: np.array([row[n] for row in norms]) for n in shared}
    return np.array(steps, dtype=np.float64), columns, counts


def _weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, which is read without running anything in it."""
    try:
        if file.suffix == ".safetensors":
            return _safetensors(file)
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or unsafe file makes torch raise
        raise DataFileError(
            "the checkpoint cannot be read as weights alone",
            path=str(file),
            received=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}",
            expected="a state_dict written by torch.save, or safetensors",
            remedy="torch.save(model.state_dict(), file)",
        ) from error
    for key in _INSIDE:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        state = {}
    return {n: t for n, t in state.items() if isinstance(t, Tensor) and t.is_floating_point()}


def _safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: the length of a header, the header in JSON, the data."""
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _DTYPES or 0 in entry["shape"]:
            continue
        dtype = _DTYPES[entry["dtype"]]
        start, stop = entry["data_offsets"]
        data = torch.frombuffer(
            content, dtype=dtype, count=(stop - start) // dtype.itemsize, offset=8 + length + start
        )
        found[name] = data.reshape(entry["shape"])
    return found

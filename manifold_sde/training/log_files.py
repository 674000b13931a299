"""What runs leave on disk: logs as columns of numbers, and the norms in folders of checkpoints."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_sde.errors import DataFileError
from manifold_sde.number_arrays import Array

_INSIDE = ("model", "state_dict", "model_state_dict", "module", "net", "params")
_NUMBER = re.compile(r"\d+")
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_EMPTY = ("", "nan", "null", "none", "na", "n/a", "-")
_SEPARATORS = (",", ";", "\t")


class Column(NamedTuple):
    """What was logged of a quantity: its steps, increasing, and its values there."""

    steps: Array
    values: Array


class LogTable:
    """The columns of a CSV file, of JSON lines, or of a JSON array of objects.

    Rows need not have all columns: a column is what the rows say in which it is a number, the last
    of them where a step comes twice.

    Args:
        path: The file.
        step: Column of the step.

    Raises:
        DataFileError: If it cannot be read, or has no such column.
    """

    def __init__(self, path: Path, step: str) -> None:
        self.path = path
        try:
            rows = _rows(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise DataFileError(
                "the log cannot be read",
                path=str(path),
                received=f"{type(error).__name__}: {error}",
                expected="a CSV file (with commas, semicolons or tabs) with a line of names, a "
                "JSON object a line, or a JSON array of objects",
                remedy="check the path and its format",
            ) from error
        names = dict.fromkeys(name for row in rows for name in row if name is not None)
        self._cells = {name: [row.get(name) for row in rows] for name in names}
        self._steps = self._numbers(step)

    @property
    def norms(self) -> list[str]:
        """The columns that hold norms of weights, by their names: a clock's own, or "norm"."""
        named = [n for n in self._cells if "norm" in n.lower() and "grad" not in n.lower()]
        named = [n for n in named if any(_number(cell) is not None for cell in self._cells[n])]
        return [name for name in named if name.endswith("/norm")] or named

    def column(self, name: str, *, of_weights: bool = False) -> Column:
        """A column, in the order of its steps; a norm of weights keeps the NaN that it ends in.

        Raises:
            DataFileError: If there is none, or it holds words.
        """
        values = self._numbers(name)
        kept = np.isfinite(self._steps) & ~np.isnan(values)
        if of_weights:
            kept |= self._lost(name, values)
        steps, last = np.unique(self._steps[kept][::-1], return_index=True)
        return Column(steps.astype(np.int64), values[kept][::-1][last])

    def _lost(self, name: str, values: Array) -> NDArray[np.bool_]:
        """Which rows at the end have NaN for a number that is none, and not for no number: (rows,).

        It is a longer run of written NaN than there is before any number.
        """
        order = np.argsort(self._steps, kind="stable")  # rows without a step come last
        order = order[: int(np.isfinite(self._steps).sum())]
        written = np.array([_is_nan(self._cells[name][i]) for i in order], dtype=bool)
        found = np.flatnonzero(~np.isnan(values[order]))
        end = int(found[-1]) + 1 if len(found) else 0
        gaps = [int(piece.sum()) for piece in np.split(written[:end], found)]
        lost = np.zeros(len(values), dtype=bool)
        if written[end:].sum() > max(gaps):
            lost[order[end:]] = written[end:]
        return lost

    def _numbers(self, name: str) -> Array:
        """A number a row, NaN where there is none."""
        if name not in self._cells:
            raise DataFileError(
                f"the log has no column {name!r}",
                path=str(self.path),
                received=", ".join(list(self._cells)[:8]) or "an empty file",
                expected=f"a column {name!r}",
                remedy="name the columns: step=, lr=, weight_decay=, norms=[...]",
            )
        cells = [_number(cell) for cell in self._cells[name]]
        words = [c for c, z in zip(self._cells[name], cells, strict=True) if z is None]
        if words:
            raise DataFileError(
                f"the column {name!r} has values that are no numbers",
                path=str(self.path),
                received=f"{str(words[0])[:60]!r}",
                expected="a number, or nothing, in each row",
                remedy="norms=[...] with the columns that hold norms",
            )
        return np.array(cells, dtype=np.float64)


def _rows(text: str) -> list[dict[str, Any]]:
    start = text.lstrip()[:1]
    if start not in ("{", "["):
        lines = text.splitlines()
        first = lines[0] if lines else ""
        return list(csv.DictReader(lines, delimiter=max(_SEPARATORS, key=first.count)))
    try:
        rows = json.loads(text)
    except ValueError:
        if start == "[":
            raise
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(rows, dict):  # a Trainer's state, or one line
        rows = rows.get("log_history", [rows])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("the JSON is no array of objects")
    return rows


def _number(cell: Any) -> float | None:
    """A cell as a number; NaN if it is empty, ``None`` if it is something else."""
    if cell is None or (isinstance(cell, str) and cell.strip().lower() in _EMPTY):
        return math.nan
    try:
        # A comma in a cell is a decimal one: files that have it separate by semicolons or tabs.
        return float(cell.replace(",", ".") if isinstance(cell, str) else cell)
    except (TypeError, ValueError):
        return None


def _is_nan(cell: Any) -> bool:
    """Whether a cell has NaN written in it, and is not empty."""
    return cell is not None and str(cell).strip().lower().endswith("nan")


def checkpoints(
    folder: Path, names: Sequence[str] | None
) -> tuple[dict[str, Column], dict[str, int]]:
    """Norms and numbers of weights of the tensors in a folder of checkpoints.

    Raises:
        DataFileError: If one cannot be read as weights alone, or there is none.
    """
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
    at, last = np.unique(np.array(steps), return_index=True)
    columns = {n: Column(at, np.array([row[n] for row in norms])[last]) for n in shared}
    return columns, counts


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

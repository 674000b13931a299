"""A solution in words, as a table of a notebook, and as data of xarray and ArviZ."""

from __future__ import annotations

import html
import importlib
import textwrap
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from manifold_sde.arguments import real
from manifold_sde.errors import ArgumentError, MissingDependencyError, printable
from manifold_sde.solvers.equilibrium import Kept
from manifold_sde.solvers.moments import Observable, evaluate

if TYPE_CHECKING:
    import xarray

#: What is said of how a solution was made, by its names in the configuration.
_MADE = ("method", "lr", "weight_decay", "ratio", "dt", "rtol", "seed")
_WIDTH = 80


class Shown(Kept, Protocol):
    """What is shown of a solution: clock, statistics, and observables, besides its states."""

    @property
    def clock(self) -> Tensor: ...  # noqa: D102
    @property
    def stats(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def observed(self) -> Mapping[str, tuple[Tensor, Tensor]]: ...  # noqa: D102


def headline(solution: Shown) -> str:
    """A solution in one line."""
    ts, ys = solution.ts, solution.ys
    paths = "one path" if ys.dim() == 2 else f"{ys.shape[1]} paths"
    if solution.observed:
        names = ", ".join(repr(name) for name in solution.observed)
        paths = f"observed {names} over {solution.stats.get('paths', '?')} paths"
    times = f"{len(ts)} times from {ts[0].item():g} to {ts[-1].item():g}"
    if len(ts) == 1:
        times = f"at {ts[0].item():g}"
    return f"{type(solution).__name__}({paths}, {times}, dim={ys.shape[-1]})"


def rows_of(solution: Shown) -> list[tuple[str, str]]:
    """What a solution holds and how it was made: pairs of a name and a text."""
    rows = [(name, _measured(*values)) for name, values in solution.observed.items()]
    if solution.ys.numel():
        first, last = (solution.ys[k].reshape(-1, solution.ys.shape[-1]) for k in (0, -1))
        start, end = _norm(first), _norm(last)
        rows.append(("norm", start if len(solution.ts) == 1 else f"{start} to {end}"))
    if solution.clock.numel():
        clock = f"up to {float(solution.clock[-1].nanmean()):.4g}"
        if radial := solution.stats.get("radial_gradient"):
            clock = (
                f"none, as the loss is not scale-invariant: {radial:.2g} of its gradient is radial"
            )
        rows.append((f"clock {solution.config.get('clock', 'u')}", clock))
    what = solution.config.get("sde") or solution.config.get("problem")
    if what:
        rows.append(("of", str(what)))
    if moved := solution.stats.get("start_moved"):
        rows.append(("start", start_statement(moved)))
    made = [f"{k} {_short(solution.config[k])}" for k in _MADE if k in solution.config]
    if made:
        rows.append(("made by", ", ".join(made)))
    lost, paths = solution.stats.get("lost_paths", 0), solution.stats.get("paths")
    if lost:
        rows.append(("lost", f"{lost} of {paths} paths are NaN"))
    return rows


def start_statement(moved: float) -> str:
    """What is said of a start off the manifold, from its distance to the limit at norm 1."""
    return (
        "not on the manifold of minimisers: the law starts where gradient flow leads from it, "
        f"{moved:.3g} away at norm 1 (SGD goes there first)"
    )


def _norm(states: Tensor) -> str:
    norms = states.norm(dim=-1)
    norms = norms[torch.isfinite(norms)].to(torch.float64)
    if not len(norms):
        return "lost"
    error = norms.std() / len(norms) ** 0.5 if len(norms) > 1 else norms.new_zeros(())
    return _pair(float(norms.mean()), float(error))


def _measured(mean: Tensor, error: Tensor) -> str:
    if mean[-1].dim():
        return f"{tuple(mean.shape[1:])} numbers at each time"
    return f"{_pair(float(mean[-1]), float(error[-1]))} at the end"


def _pair(mean: float, error: float) -> str:
    return f"{mean:.4g} ± {error:.2g}" if error > 1e-9 * abs(mean) else f"{mean:.4g}"


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def text_of(solution: Shown) -> str:
    """A solution in a few lines of 80 columns."""
    lines = [headline(solution)]
    for name, text in rows_of(solution):
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent=f"  {name:<8} ", subsequent_indent=" " * 11, max_lines=2
        )
    return printable("\n".join(lines))


def table_html(heading: str, rows: list[tuple[str, str]]) -> str:
    """Pairs of a name and a text as a table of a notebook."""
    cells = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(text)}</td></tr>'
        for name, text in rows
    )
    return f"<div><strong>{html.escape(heading)}</strong><table>{cells}</table></div>"


# Data of other packages.


def xarray_for(what: str) -> ModuleType:
    """The package xarray.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        return importlib.import_module("xarray")
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs xarray",
            received="no module xarray",
            expected="xarray, an optional dependency",
            remedy='pip install "manifold_sde[io]"',
        ) from error


def dataset(solution: Shown, variables: Mapping[str, Any]) -> xarray.Dataset:
    """The tensors of a solution, given with the names of their dimensions, and its observables."""
    found = {
        name: (dims, value.detach().cpu().numpy())
        for name, (dims, value) in variables.items()
        if value.numel()
    }
    for name, values in solution.observed.items():
        own = tuple(f"{name}_{axis}" for axis in range(1, values[0].dim()))
        for label, value in zip(("mean", "standard_error"), values, strict=True):
            found[f"{label}_{name}"] = (("time", *own), value.detach().cpu().numpy())
    made: xarray.Dataset = xarray_for("to_xarray").Dataset(
        found, coords={"time": solution.ts.detach().cpu().numpy()}, attrs=_attributes(solution)
    )
    return made


def _attributes(solution: Shown) -> dict[str, Any]:
    made_with = {f"version_{k}": v for k, v in solution.config.get("versions", {}).items()}
    known = {**solution.config, **solution.stats, **made_with}
    return {name: value for name, value in known.items() if _is_attribute(value)}


def _is_attribute(value: object) -> bool:
    return isinstance(value, (str, int, float, np.number)) and not isinstance(value, bool)


def inference_data(
    solution: Shown, functions: Mapping[str, Observable] | None, burn_in: float | None
) -> xarray.DataTree:
    """The paths as chains and the times as draws, in a group ``posterior``."""
    package = xarray_for("to_inference_data")
    after = -np.inf if burn_in is None else real(burn_in)
    times = solution.ts >= after
    if not bool(times.any()):
        raise ArgumentError(
            "no time of the solution is after the burn-in",
            received=f"burn_in={burn_in!r}",
            expected=f"a number up to {solution.ts[-1]:g}",
            remedy="leave it out for all times",
        )
    states = solution.ys[times]
    states = states.reshape(len(states), -1, states.shape[-1])
    kept = torch.isfinite(states).all(-1).all(0)
    norms = states[:, kept].norm(dim=-1)
    chosen: dict[str, Observable] = dict(functions or {"direction": _direction})
    if not functions and float(norms.max() - norms.min()) > 1e-9 * float(norms.max()):
        chosen["norm"] = _length
    variables = {}
    for name, function in chosen.items():
        values = [evaluate(f"the function {name!r}", function, x[kept])[0] for x in states]
        stacked = torch.stack(values, 1).detach().cpu().numpy()
        own = [f"{name}_dim_{axis}" for axis in range(stacked.ndim - 2)]
        variables[name] = (("chain", "draw", *own), stacked)
    group = package.Dataset(
        variables,
        coords={
            "chain": np.arange(int(kept.sum())),
            "draw": np.arange(int(times.sum())),
            "time": ("draw", solution.ts[times].detach().cpu().numpy()),
        },
        attrs=_attributes(solution),
    )
    tree: xarray.DataTree = package.DataTree.from_dict({"/posterior": group})
    return tree


def _direction(states: Tensor) -> Tensor:
    return states / states.norm(dim=-1, keepdim=True)


def _length(states: Tensor) -> Tensor:
    return states.norm(dim=-1)

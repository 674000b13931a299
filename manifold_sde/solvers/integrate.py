"""One chunk of paths from beginning to end, with checkpoints on the way.

All chunks of a simulation but the last are of one size, and each is run on one thread, so that no
number depends on who runs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from manifold_sde.geometry.kernels import uncompiled
from manifold_sde.solvers.archive import complete, read_archive, write_archive
from manifold_sde.solvers.chunk import Chunk, ChunkResult
from manifold_sde.solvers.fixed import FixedSteps, State
from manifold_sde.solvers.flat_points import flatness
from manifold_sde.solvers.moments import Moments, moments_of
from manifold_sde.solvers.simulation import Simulation
from manifold_sde.solvers.stopping import Autosave
from manifold_sde.solvers.torchsde_schemes import scheme_named
from manifold_sde.threads import one_thread

_KIND = "chunk of a run of solve"


#: Receives how many steps were just taken, by how many paths, and what gives the steps that are
#: left and the sum of them over the paths; nothing gives it where an earlier run took the steps.
Report = Callable[[int, int, Callable[[], tuple[float, float]] | None], object]


def integrate(
    simulation: Simulation, chunk: Chunk, report: Report = lambda *_: None
) -> ChunkResult:
    """Integrate a chunk, from its checkpoint on if there is one.

    Args:
        simulation: What all chunks share.
        chunk: Which paths.
        report: Called after each block of steps.

    Returns:
        States of the given equation; the moments alone if only these are kept.
    """
    with torch.no_grad(), one_thread():
        steps, start = simulation.steps(chunk), simulation.begin(chunk)
        sde, scheme = steps.sde, scheme_named(simulation.scheme)
        state = steps.begin(start, chunk.restart)
        times = len(steps.saved.times)
        restarts = times if simulation.keeps_restarts and chunk.restart is None else 0
        result = ChunkResult.empty(start, state.sums, times, restarts)
        file = None if chunk.checkpoint is None else _Checkpoint(simulation, chunk)
        if file is not None and file.path.exists():
            result, finished = file.load(steps, state, result)
            report(state.position, 0, None)
            if finished:
                return result
        watch = simulation.watch(state.position)
        save = None if file is None else functools.partial(file.save, result, finished=False)
        with Autosave(save, replace(state)) as autosave:
            while not steps.finished(state):
                position, moving = state.position, steps.moving(state)
                for step in steps.block(state, result.save):
                    x, basis = step.x, step.basis
                    basis = sde.reference_basis(x) if basis is None else basis
                    step.end, step.end_basis = scheme.step(sde, x, basis, step.h, step.noise)
                    if step.rated:
                        step.rate = steps.rate(step.end)
                report(state.position - position, moving, functools.partial(steps.left, state))
                if chunk.restart is None:
                    watch.look(state.position, lambda: steps.time_left(state))
                autosave.keep(replace(state))
        if chunk.restart is None:  # or they were looked at before
            result.flatness = flatness(sde, state)
        result = _finished(simulation, chunk, state, result)
        if file is not None:
            file.save(result, state, finished=True)
        return result


def _finished(
    simulation: Simulation, chunk: Chunk, state: State, result: ChunkResult
) -> ChunkResult:
    """The states of the given equation; the moments alone if only these are kept."""
    result.steps, result.rejected = state.counts()
    result.uncompiled = uncompiled(simulation.sde.problem, simulation.compiled)
    read_off = simulation.read_off(chunk)
    if read_off is not None:
        gauge = simulation.equation.gauge(result.x.movedim(1, -1))
        result.x = result.x * (read_off.norms(result.sums[:, 0]) / gauge)[:, None]
    result.lost = (~torch.isfinite(result.x).all(1)).sum(-1)
    if simulation.observables is None:
        return result
    states, antithetic = result.x.movedim(1, -1), simulation.antithetic
    result.moments = {
        name: moments_of(f"the observable {name!r}", f, states, antithetic=antithetic)
        for name, f in simulation.observables.items()
    }
    return result.without_paths()


class _Checkpoint:
    """The file of a chunk.

    Args:
        simulation: What all chunks share.
        chunk: The chunk.
    """

    def __init__(self, simulation: Simulation, chunk: Chunk) -> None:
        assert chunk.checkpoint is not None
        assert chunk.fingerprint is not None
        self.simulation = simulation
        self.path = chunk.checkpoint
        self.fingerprint = chunk.fingerprint

    def save(self, result: ChunkResult, state: State, *, finished: bool) -> None:
        """Write what is done.

        Raises:
            WriteError: If it cannot be written.
        """
        arrays = {f"kept_{name}": value for name, value in result.arrays().items()}
        if finished:
            arrays["lost"] = result.lost
            for number, moments in enumerate(result.moments.values()):
                arrays |= {f"{k}_{number}": getattr(moments, k) for k in Moments.names()}
        else:
            arrays |= {_name(k): v for k, v in _tensors(state).items()}
        run, seen = self.fingerprint.stored()
        header = {
            **run,
            "position": state.position,
            "steps": [result.steps, result.rejected],
            "finished": finished,
            "flatness": result.flatness,
            "observables": list(result.moments),
        }
        numbers = {name: value.cpu().numpy() for name, value in arrays.items()}
        write_archive(self.path, _KIND, header, numbers | seen)

    def load(self, steps: FixedSteps, state: State, empty: ChunkResult) -> tuple[ChunkResult, bool]:
        """Take up what was saved, changing the state; and whether it was finished.

        Raises:
            CheckpointError: If the file is corrupted, or belongs to another run.
        """
        header, arrays = read_archive(self.path, _KIND)
        self.fingerprint.require(self.path, header, arrays)
        what = "a chunk as this version of the toolkit writes it"
        with complete(self.path, what, "delete the folder to start anew"):
            found = {k: torch.from_numpy(v).to(state.x.device) for k, v in arrays.items()}
            state.position = _count(header["position"])
            finished = header["finished"] is True
            alone = self.simulation.observables is not None and finished
            like = (empty.without_paths() if alone else empty).arrays()
            result = empty.with_arrays(
                {name: _fitting(f"kept_{name}", found, value) for name, value in like.items()}
            )
            if finished:
                result.steps, result.rejected = map(_count, header["steps"])
                result.flatness = float(header.get("flatness", 0.0))
                result.lost = found["lost"]
                if len(result.lost) != len(self.simulation.times):
                    raise ValueError(f"{len(result.lost)} counts of lost paths")
                result.moments = {
                    name: Moments(*(found[f"{k}_{number}"] for k in Moments.names()))
                    for number, name in enumerate(header["observables"])
                }
                return result, True
            for name, value in _tensors(state).items():
                setattr(state, name, _fitting(_name(name), found, value))
            alive = torch.isfinite(state.x).all(0)
            if steps.finished(state) and bool(torch.isnan(result.time[:, alive]).any()):
                raise ValueError(f"position {state.position}, which it has not reached")
        return result, False


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a number of steps")
    return value


def _fitting(name: str, found: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """A tensor of a file, of the shape and dtype of another."""
    value = found[name]
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(f"{name} of shape {tuple(value.shape)}, {value.dtype}")
    return value


def _tensors(state: State) -> dict[str, Tensor]:
    """The tensors of a state, by name."""
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _name(name: str) -> str:
    """The name that a file gives to a tensor of the state."""
    return "state_anchor" if name == "basis" else f"state_{name}"

"""What ``manifold-sde simulate`` is given, checked."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from torch import Tensor

from manifold_sde.arguments import check_point
from manifold_sde.errors import ArgumentError
from manifold_sde.experiments.files import read_array
from manifold_sde.geometry import Geometry
from manifold_sde.noise import LabelNoise, SamplingNoise, SphericalNoise
from manifold_sde.problem import Problem
from manifold_sde.verification import Subject


def numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """Numbers with commas between them, increasing.

    Args:
        option: Name of the option, for messages.
        text: What was given, such as "1000,5000".
        kind: ``int`` or ``float``.

    Raises:
        ArgumentError: If they are none, do not increase, or are below 0.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    increasing = all(a < b for a, b in itertools.pairwise(found))
    if not found or not increasing or not 0 <= found[0] < float("inf") or found[-1] == 0:
        whole = "whole numbers" if kind is int else "numbers"
        raise ArgumentError(
            f"{option} is not a list that can be used",
            received=repr(text),
            expected=f"increasing {whole}, 0 or more, with commas between them",
            remedy=f"{option} " + ("1000,5000" if kind is int else "0.1,0.5"),
        )
    return found


def load_start(problem: Problem, file: Path | None, norm: float | None) -> Tensor:
    """The weights at step 0, in double precision: (D,), or (B, D) for B starts.

    Args:
        problem: The problem.
        file: A file .npy or .pt, or ``None`` for the minimiser that the problem knows, or else
            that gradient flow finds: that of ``info`` and ``verify``.
        norm: Norm to which they are scaled, or ``None``.

    Raises:
        ArgumentError: If there is no start, or it cannot be used.
    """
    if file is None:
        try:
            x = Subject(problem, Geometry(problem)).find_minimizer().clone()
        except ArgumentError as error:
            raise ArgumentError(
                error.problem,
                received=error.received,
                expected=f"the weights at step 0, a file with a vector of {problem.dim} numbers",
                remedy="--x0 x0.npy, written by numpy.save, or --x0 x0.pt, by torch.save; they "
                "need not be a minimiser: gradient flow leads from them to one",
            ) from error
    else:
        x = check_point(read_array(file), problem.dim, name="--x0")
        if x.dim() > 2:
            raise ArgumentError(
                "--x0 holds too many dimensions",
                received=f"shape {tuple(x.shape)}",
                expected=f"({problem.dim},), or (B, {problem.dim}) for B starts",
                remedy=f"x0.reshape(-1, {problem.dim})",
            )
    if norm is None:
        return x
    if not 0 < norm < float("inf"):
        raise ArgumentError(
            "--norm is not the norm of weights",
            received=f"{norm:g}",
            expected="a positive number",
            remedy="leave it out for the norm of the start",
        )
    return norm * x / x.norm(dim=-1, keepdim=True)


def at_batch_size(problem: Problem, batch_size: int | None) -> Problem:
    """The problem with the noise of another batch size; that of (18) counts as one sample's.

    Raises:
        ArgumentError, NoiseError: If its noise has no batches, or not of this size.
    """
    if batch_size is None:
        return problem
    noise = problem.noise
    if isinstance(noise, SamplingNoise):
        return problem.with_noise(SamplingNoise(batch_size, replacement=noise.replacement))
    if isinstance(noise, LabelNoise):
        return problem.with_noise(LabelNoise(noise.scale, batch_size))
    if isinstance(noise, SphericalNoise):
        return problem.with_noise(SphericalNoise(noise.scale / batch_size**0.5))
    raise ArgumentError(
        "the noise of the problem has no batch size",
        received=f"--batch-size {batch_size} with {noise!r}",
        expected="SamplingNoise, LabelNoise or SphericalNoise",
        remedy="divide the factor of the noise by the root of the batch size, in the file",
    )

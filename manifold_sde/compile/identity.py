"""What tells a function from all others without tracing its derivatives.

A kernel that was compiled in another process is found by it: by the graph of the functions that all
the kernels of a problem are made of, the name of the kernel, and the state of this package.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_sde.compile.recording import record
from manifold_sde.compile.scalar_trace import MOST_INPUTS


@dataclass(frozen=True)
class Identity:
    """A function, as the graphs it is made of and a name.

    Attributes:
        digest: Hash of the graphs and of this package.
        given: Tensors of floating dtype that the graphs hold; their numbers are not in the hash.
        name: What is made of the graphs.
    """

    digest: str
    given: tuple[Tensor, ...]
    name: str = ""

    @classmethod
    def of(
        cls, functions: Sequence[tuple[Callable[..., Any], tuple[Tensor, ...]]]
    ) -> Identity | None:
        """Identity of functions at example points; ``None`` if no kernel is made of them."""
        said, given = [_package(), torch.__version__], []
        try:
            for function, point in functions:
                if sum(a.numel() for a in point) > MOST_INPUTS:
                    return None  # what it makes on the way would be held, and no kernel found
                found = record(function, point)
                said += [repr(found.operations), repr(found.results)]
                for number, value in found.held.items():
                    said.append(f"{number} {tuple(value.shape)} {value.dtype}")
                    if value.is_floating_point():
                        given.append(value.detach())
                    else:
                        said.append(repr(value.tolist()))
        except Exception:
            return None  # the function says what is wrong when it is called
        return cls(hashlib.sha256("\n".join(said).encode()).hexdigest(), tuple(given))

    def of_kernel(self, name: str) -> Identity:
        """The identity of a function made of these."""
        return replace(self, name=name)

    def key(self, arguments: Sequence[Tensor]) -> str:
        """The name of a file, for arguments with the points last."""
        shapes = [tuple(a.shape[:-1]) for a in arguments]
        said = f"{self.digest} {self.name} {arguments[0].dtype} {shapes}"
        return hashlib.sha256(said.encode()).hexdigest()[:40]


@functools.cache
def _package() -> str:
    """The state of this package's files."""
    root = Path(__file__).parents[1]
    files = sorted(root.rglob("*.py"))
    stats = [(str(f.relative_to(root)), f.stat()) for f in files]
    return repr([(name, s.st_size, s.st_mtime_ns) for name, s in stats])

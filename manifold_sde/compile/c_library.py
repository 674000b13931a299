"""C code compiled once by the machine's C compiler, kept on disk, and called on tensors.

The folder is that of the environment variable ``MANIFOLD_SDE_CACHE``, else ``manifold_sde`` in the
user's cache. A library's name is the hash of its code, its compiler and the machine; what is known
of it stands in a small file beside it, with its checksum, written after the library. A file that
does not fit is made anew.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_sde.compile.c_source import VECTOR, c_source
from manifold_sde.compile.scalar_trace import Traced, is_same
from manifold_sde.errors import WriteError
from manifold_sde.progress import compiling
from manifold_sde.writing import replacing, write_text

#: Points whose results are turned over together.
_PIECE = 256
_FLAGS = ("-O1", "-fno-math-errno", "-fno-trapping-math", "-march=native", "-fPIC", "-shared", "-w")
#: Seconds after which a compiler counts as stuck.
_PATIENCE = 300.0


class CompilerFailed(Exception):
    """The C compiler is missing, or failed."""


@functools.cache
def c_compiler() -> str | None:
    """The C compiler: that of the environment variable CC, else the first one found."""
    named = os.environ.get("CC")
    names = ("gcc", "clang", "cc") if named is None else (named,)
    return next((path for name in names if (path := shutil.which(name))), None)


@functools.cache
def _machine() -> str:
    """What code for this machine depends on."""
    said = [platform.machine(), platform.system(), c_compiler() or ""]
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        said += sorted({x for x in text.splitlines() if x.startswith(("model name", "flags"))})
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            [said[2], "--version"], capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
        said += found.stdout.splitlines()[:1]
    return "\n".join(said)


@functools.cache
def _vectors() -> bool:
    """Whether the C library has functions of vectors that the compiler calls."""
    code = '__attribute__((simd("notinbranch"))) double exp(double);\n'
    code += '__attribute__((optimize("O3"))) void f(double *x) '
    code += "{ for (int i = 0; i < 8; i++) x[i] = exp(x[i]); }\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            _run_compiler(code, Path(folder) / "try.so", ("-lmvec", "-lm", "-Wl,--no-undefined"))
        except CompilerFailed:
            return False
    return True


@functools.cache
def cache_folder() -> Path:
    """The folder in which libraries are kept, of this user alone; a new one if that fails."""
    named = os.environ.get("MANIFOLD_SDE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(OSError, RuntimeError):  # no home, or none that can be written
        folder = Path(named or Path(base or Path.home() / ".cache") / "manifold_sde")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
        if os.access(folder, os.W_OK) and (not hasattr(os, "getuid") or owner == os.getuid()):
            return folder
    return Path(tempfile.mkdtemp(prefix="manifold_sde-"))


def _run_compiler(code: str, target: Path, after: Sequence[str]) -> None:
    compiler = c_compiler()
    if compiler is None:
        raise CompilerFailed("no C compiler was found")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
        source.write_text(code)
        command = [compiler, *_FLAGS, "-o", str(library), str(source), *after]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
        except (OSError, subprocess.SubprocessError) as error:
            raise CompilerFailed(str(error)) from error
        if found.returncode:
            said = [x for x in found.stderr.splitlines() if "error" in x] or [f"{compiler} failed"]
            raise CompilerFailed(said[0])
        try:
            with replacing(target) as file:
                file.write(library.read_bytes())
        except WriteError as error:
            raise CompilerFailed(str(error)) from error


def library(code: str) -> tuple[ctypes.CDLL, str]:
    """Compile code, or load what was compiled of it before.

    Returns:
        The library and its name.

    Raises:
        CompilerFailed: If there is no compiler, or it fails.
    """
    name = hashlib.sha256("\n".join((code, *_FLAGS, _machine())).encode()).hexdigest()[:40]
    return _load(name, code), name


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _load(name: str, code: str | None) -> ctypes.CDLL:
    """The library of a name, made of its code where it is not there whole."""
    path = cache_folder() / f"{name}.so"
    known = path.with_suffix(".sum")
    try:
        if not known.exists() or _checksum(path) != known.read_text():
            if code is None:
                raise CompilerFailed("the library is not there")
            vectors = ("-DVECTORS", "-lmvec") if _vectors() else ()
            with compiling():
                _run_compiler(code, path, (*vectors, "-lm"))
            write_text(known, _checksum(path))
        return _loaded(path)
    except (OSError, WriteError) as error:
        raise CompilerFailed(str(error)) from error


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


class CKernel:
    """A function of single points on tensors with the points last, as compiled C.

    Args:
        name: Name of its library on disk.
        code: The library, with a function ``kernel``.
        shapes: Shapes of the results for one point.
        single: Whether one tensor is returned and no tuple.
        workspace: Number of vectors that a call needs beside.
        given: Tensors that the function holds; they are read when it is called.
        dtype: Of all numbers.
    """

    def __init__(
        self,
        name: str,
        code: ctypes.CDLL,
        shapes: Sequence[tuple[int, ...]],
        single: bool,
        workspace: int,
        given: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> None:
        self._call = code.kernel
        self._call.restype = None
        self.shapes, self.single = list(shapes), single
        #: What is noted of it on disk, beside the tensors.
        self.said = {"name": name, "shapes": shapes, "single": single, "workspace": workspace}
        self._bytes, self._dtype = (workspace + 1) * VECTOR, dtype
        self._hold(given)

    def _hold(self, given: Sequence[Tensor]) -> None:
        self.given = list(given)
        # A copy where the numbers are not in a row.
        self._rows = [t.contiguous() for t in given]
        self._given = _pointers(self._rows)

    def holding(self, old: Tensor, new: Tensor) -> CKernel:
        """The same function, holding another tensor of the same shape in place of one.

        Raises:
            LookupError: If it does not hold that one.
        """
        if not any(is_same(old, t) for t in self.given):
            raise LookupError("the kernel does not hold this tensor")
        other = copy.copy(self)
        other._hold([new if is_same(old, t) else t for t in self.given])
        return other

    def __call__(self, *arguments: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Evaluate: each argument (..., n), contiguous -> (..., n)."""
        n = arguments[0].shape[-1]
        results = [torch.empty((*s, n), dtype=self._dtype) for s in self.shapes]
        space = torch.empty(self._bytes, dtype=torch.uint8)
        start = space.data_ptr()
        self._call(
            ctypes.c_long(n),
            _pointers(arguments),
            _pointers(results),
            self._given,
            ctypes.c_void_p(start + (-start) % VECTOR),
        )
        return results[0] if self.single else tuple(results)

    def points_first(self, *arguments: Tensor) -> Tensor:
        """Evaluate a function that returns one tensor: each argument (..., n) -> (n, ...).

        Some points at a time, so that what is turned over is still in the cache.
        """
        n = arguments[0].shape[-1]
        found = torch.empty((n, *self.shapes[0]), dtype=self._dtype)
        for start in range(0, n, _PIECE):
            piece = self(*(a[..., start : start + _PIECE].contiguous() for a in arguments))
            assert isinstance(piece, Tensor)
            found[start : start + _PIECE] = piece.movedim(-1, 0)
        return found


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * (len(tensors) + 1))(*[t.data_ptr() for t in tensors])


def compile_traced(traced: Traced, dtype: torch.dtype) -> CKernel:
    """Compile a traced function.

    Raises:
        CompilerFailed: If there is no compiler, or it fails.
    """
    code, workspace = c_source(traced.program, dtype)
    loaded, name = library(code)
    return CKernel(name, loaded, traced.shapes, traced.single, workspace, traced.given, dtype)


# What is known of a function before it is traced.


def recall(key: str, given: Sequence[Tensor], dtype: torch.dtype) -> CKernel | None:
    """The kernel that was noted under a key, if it is there.

    Args:
        key: What the function is made of.
        given: Tensors that it holds, in the order that was noted.
        dtype: Of all numbers.
    """
    try:
        known = json.loads((cache_folder() / f"{key}.json").read_text())
        tensors = [given[k] for k in known.pop("given")]
        shapes = [tuple(s) for s in known.pop("shapes")]
        code = _load(known["name"], None)
        return CKernel(code=code, shapes=shapes, given=tensors, dtype=dtype, **known)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, CompilerFailed):
        return None


def note(key: str, kernel: CKernel, given: Sequence[Tensor]) -> None:
    """Note a kernel under a key, if it holds none but the given tensors."""
    places = []
    for tensor in kernel.given:
        place = next((k for k, other in enumerate(given) if is_same(other, tensor)), None)
        if place is None:
            return
        places.append(place)
    with contextlib.suppress(WriteError):
        write_text(cache_folder() / f"{key}.json", json.dumps({**kernel.said, "given": places}))

"""Tracing and compiling batched functions, with a plain fallback.

A function written for one path and batched by ``vmap`` costs hundreds of small kernels a call.
Traced to a graph and compiled it is one or two loops: on the model of section 6.1 a gradient
costs a hundredth of the eager time. Compiling takes seconds, needs a C++ compiler, and is kept on
disk by torch, so a second process is quicker.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from manifold_sde.errors import ArgumentError, CompilationWarning

#: Largest inner dimension of a matrix product that is written out as multiply and add, so that
#: it fuses with its neighbours instead of calling a library for a few numbers.
_SMALL_PRODUCT = 32
_UNROLL_REDUCTIONS = 16

Kernel = Callable[..., Any]


@functools.cache
def compiler_available() -> bool:
    """Whether a C++ compiler is at hand, which ``torch.compile`` needs on a CPU."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn of a fallback, once a process and message."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, CompilationWarning, stacklevel=3)


def check_mode(compiled: object) -> bool | str:
    """Check the user's choice of compiling: True, False or "auto"."""
    if compiled is True or compiled is False or compiled == "auto":
        return compiled
    raise ArgumentError(
        "compile is not a mode of compiling",
        received=repr(compiled),
        expected='True, False or "auto"',
        remedy='leave it at "auto": long runs are compiled where a C++ compiler exists',
    )


def _matrix_matrix(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[1] > _SMALL_PRODUCT:
        return NotImplemented
    return (a.unsqueeze(-1) * b.unsqueeze(0)).sum(1)


def _matrix_vector(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[1] > _SMALL_PRODUCT:
        return NotImplemented
    return (a * b).sum(1)


def _batched_matrix(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[2] > _SMALL_PRODUCT:
        return NotImplemented
    return (a.unsqueeze(-1) * b.unsqueeze(1)).sum(2)


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.default: _matrix_matrix,
    torch.ops.aten.mv.default: _matrix_vector,
    torch.ops.aten.bmm.default: _batched_matrix,
}


def trace(function: Kernel, arguments: tuple[Any, ...]) -> torch.fx.GraphModule:
    """Graph of a function for tensors of these shapes, dtypes and device.

    Args:
        function: Function of tensors; may use ``torch.func`` freely.
        arguments: Example tensors.

    Returns:
        The graph as a module.
    """
    # Tracing tells tensors apart by identity: one tensor given twice would become one input.
    distinct = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    return make_fx(function, decomposition_table=_DECOMPOSITIONS)(*distinct)


@contextlib.contextmanager
def _inductor_options() -> Iterator[None]:
    config = importlib.import_module("torch._inductor.config")
    with config.patch(unroll_reductions_threshold=_UNROLL_REDUCTIONS):
        yield


def compile_function(function: Kernel, arguments: tuple[Any, ...]) -> Kernel:
    """Compile a function for tensors of these shapes; the function itself where that fails.

    The compiled function has the calling convention of the original one and must be called with
    tensors of the same shapes, dtypes and device. Gradients do not flow through it.

    Args:
        function: Function of tensors that returns one tensor or a tuple of tensors.
        arguments: Example tensors.

    Returns:
        The compiled function, or ``function`` with a :class:`CompilationWarning` said once.
    """
    if not compiler_available() and all(
        a.device.type == "cpu" for a in arguments if isinstance(a, Tensor)
    ):
        say_once(
            "no C++ compiler was found: everything runs uncompiled, 20 to 60 times slower; "
            "install g++ or clang++ to change that"
        )
        return function
    inductor = importlib.import_module("torch._inductor")
    try:
        with torch.no_grad(), _inductor_options():
            graph = trace(function, arguments)
            single = not isinstance(_output_of(graph), (tuple, list))
            compiled = inductor.compile(graph, list(arguments))
            compiled(*arguments)
    except Exception as error:
        reason = str(error).strip().splitlines()
        say_once(
            "compiling failed and the computation runs uncompiled: "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        )
        return function

    def call(*inputs: Any) -> Any:
        outputs = compiled(*inputs)
        return outputs[0] if single and isinstance(outputs, (tuple, list)) else outputs

    return call


def _output_of(graph: torch.fx.GraphModule) -> Any:
    return next(node for node in graph.graph.nodes if node.op == "output").args[0]

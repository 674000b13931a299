"""Tracing and compiling functions of tensors, for points in the last dimension."""

from manifold_sde.compile.compiler import (
    check_mode,
    compile_batched,
    compile_function,
    compiler_available,
    say_once,
)

__all__ = [
    "check_mode",
    "compile_batched",
    "compile_function",
    "compiler_available",
    "say_once",
]

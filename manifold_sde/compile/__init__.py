"""Tracing and compiling functions of tensors, for points in the last dimension."""

from manifold_sde.compile.c_library import CKernel, c_compiler
from manifold_sde.compile.compiler import (
    QUICK_DIM,
    check_mode,
    choose_mode,
    compile_batched,
    compile_function,
    compile_points,
    compiler_available,
    say_once,
)
from manifold_sde.compile.eigen import eigen_kernel
from manifold_sde.compile.identity import Identity
from manifold_sde.compile.recording import Unsupported

__all__ = [
    "QUICK_DIM",
    "CKernel",
    "Identity",
    "Unsupported",
    "c_compiler",
    "check_mode",
    "choose_mode",
    "compile_batched",
    "compile_function",
    "compile_points",
    "compiler_available",
    "eigen_kernel",
    "say_once",
]

"""Tracing and compiling batched functions, with a plain fallback.

A function written for one path and batched by ``vmap`` costs hundreds of small kernels a call.
Traced to a graph and compiled it is one or two loops: on the model of section 6.1 a gradient
costs a hundredth of the eager time. Compiling takes seconds and needs a C++ compiler. torch keeps
the code on disk, so that a second process, or a problem with other data, only loads it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from manifold_sde.arguments import check_choice
from manifold_sde.compile.batch_last import PRODUCTS, batch_last, product
from manifold_sde.compile.c_library import CKernel, c_compiler, compile_traced, note, recall
from manifold_sde.compile.identity import Identity
from manifold_sde.compile.scalar_trace import scalar_program
from manifold_sde.errors import CompilationWarning
from manifold_sde.progress import compiling
from manifold_sde.remedies import first_line

_UNROLL_REDUCTIONS = 16
#: Largest dimension in which "auto" compiles in C whatever the length of the run.
QUICK_DIM = 32
#: Points on which compiled code is compared with the function it was made of, and how far from the
#: arguments, relative to their size, some of them are.
_COMPARED = 3
_SPREAD = 0.1
#: Where the search for the code inside torch's wrappers ends without success.
_MOST_WRAPPERS = 100

Kernel = Callable[..., Any]


@functools.cache
def _compiler() -> str | None:
    """The C++ compiler: that of the environment variable CXX, else the first one found."""
    named = os.environ.get("CXX")
    names = ("g++", "clang++", "c++") if named is None else (named,)
    return next((name for name in names if shutil.which(name)), None)


def compiler_available() -> bool:
    """Whether a compiler of C or C++ is at hand."""
    return c_compiler() is not None or _compiler() is not None


_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn of a fallback, once a process and message."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, CompilationWarning, stacklevel=3)


def check_mode(compiled: object) -> bool | str:
    """Check the user's choice of compiling: True, False or "auto"."""
    remedy = 'leave it at "auto": long runs are compiled if there is a compiler'
    mode: bool | str = check_choice("compile", compiled, (True, False, "auto"), remedy)
    return mode


def choose_mode(compiled: object, dim: int, *, worth: bool) -> bool | str:
    """What the user's choice of compiling comes to.

    Args:
        compiled: True, False or "auto".
        dim: Number of coordinates of a point.
        worth: Whether the run is so long that "auto" waits for torch's compiler.

    Returns:
        True, False, or "c" for what the C compiler can do in seconds.

    Raises:
        ArgumentError: If it is none of the three.
    """
    mode = check_mode(compiled)
    if mode != "auto":
        return mode
    if worth and compiler_available():
        return True
    return "c" if dim <= QUICK_DIM and c_compiler() is not None else False


def _stored(operation: Any) -> Callable[..., Any]:
    """An operation that writes into a copy of its first argument, which has to be stored whole.

    torch 2.13 compiles it wrongly where that is an expanded tensor: all that is written goes into
    the one row that is stored, or beyond its end.
    """

    def rule(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if all(stride or size == 1 for stride, size in zip(self.stride(), self.shape, strict=True)):
            return NotImplemented
        return operation(self + self.new_zeros(self.shape), *args, **kwargs)

    return rule


_WRITING = (
    torch.ops.aten.index_add.default,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_copy.default,
    torch.ops.aten.scatter.src,
    torch.ops.aten.scatter_add.default,
    torch.ops.aten.scatter_reduce.two,
)
_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **{packet.default: functools.partial(product, packet) for packet in PRODUCTS},
    **{operation: _stored(operation) for operation in _WRITING},
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

    def plain(*inputs):  # type: ignore[no-untyped-def]
        # Arguments of bound methods would be miscounted; annotations would go into the graph,
        # where they keep torch from finding it in its cache.
        return function(*inputs)

    return make_fx(plain, decomposition_table=_DECOMPOSITIONS)(*distinct)


@contextlib.contextmanager
def _inductor_options() -> Iterator[None]:
    config = importlib.import_module("torch._inductor.config")
    options: dict[str, Any] = {
        "unroll_reductions_threshold": _UNROLL_REDUCTIONS,
        # What is put together goes to memory. Fused with what follows, every part would be
        # computed again for every other one: Philox four times.
        "max_pointwise_cat_inputs": 1,
    }
    compiler = _compiler()
    if compiler is not None:
        options["cpp.cxx"] = (None, compiler)  # torch itself looks for one name alone
    with config.patch(options):
        yield


def compile_function(
    function: Kernel,
    arguments: tuple[Any, ...],
    *,
    trials: _Trials | None = None,
) -> Kernel:
    """Compile a function for tensors of these shapes; the function itself where that fails.

    The compiled function has the calling convention of the original one and must be called with
    tensors of the same shapes, dtypes and device. Gradients do not flow through it. It is compared
    with the original one near the arguments, because compilers make mistakes, too.

    Args:
        function: Function of tensors that returns one tensor or a tuple of tensors.
        arguments: Example tensors.
        trials: What it is compared with and replaced by, where that is another function than
            ``function``.

    Returns:
        The compiled function, or the original one with a :class:`CompilationWarning` said once.
    """
    trials = trials or _Trials(function, arguments)
    if _compiler() is None and all(
        a.device.type == "cpu" for a in arguments if isinstance(a, Tensor)
    ):
        say_once(
            "no C++ compiler was found: everything runs uncompiled, 20 to 60 times slower; "
            "install g++ or clang++ to change that"
        )
        return trials.reference
    try:
        with torch.no_grad(), compiling():
            graph = trace(function, arguments)
            single = not isinstance(_output_of(graph).args[0], (tuple, list))
            if single:
                # What torch gives back for one tensor that is no tuple is not always a list.
                _output_of(graph).args = ((_output_of(graph).args[0],),)
                graph.recompile()
            constants = _lift_constants(graph)
            with _inductor_options(), warnings.catch_warnings():
                # torch warns of how it uses itself.
                warnings.simplefilter("ignore")
                code = _compile_graph(graph, [*constants, *arguments])

            def kernel(*inputs: Any) -> Any:
                outputs = code([*constants, *inputs])
                return outputs[0] if single else outputs

            same = trials.agree_with(kernel)
    except Exception as error:
        reason = str(error).strip().splitlines()
        say_once(
            "compiling failed and the computation runs uncompiled: "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        )
        return trials.reference
    if not same:
        say_once(
            "the compiler makes other numbers than torch of an operation in the loss or the noise; "
            "what it got wrong runs uncompiled. A slow run is worth a loss without that operation"
        )
        return trials.reference
    return kernel


def compile_batched(
    function: Kernel, arguments: tuple[Tensor, ...], reasons: list[str] | None = None
) -> Kernel:
    """Compile a function of single points for points in the last dimension.

    Args:
        function: Function of unbatched tensors; may use ``torch.func`` freely.
        arguments: Example tensors, the points last: (..., n).
        reasons: Receives why it is not compiled, where it is not.

    Returns:
        Function of tensors (..., n) that returns a tensor (..., n), or a tuple of them: compiled,
        or, with a :class:`CompilationWarning` said once, ``vmap`` of the function.
    """
    trials = _Trials(vmap(function, in_dims=-1, out_dims=-1), arguments, _COMPARED)
    batched = _batch_last(function, arguments, trials) or trials.reference
    kernel = compile_function(batched, arguments, trials=trials)
    if kernel is trials.reference and reasons is not None:
        reasons.append("what a CompilationWarning has said")
    return kernel


def compile_points(
    function: Kernel,
    arguments: tuple[Tensor, ...],
    identity: Identity | None = None,
    reasons: list[str] | None = None,
) -> CKernel | None:
    """Compile a function of single points as C code, for any number of points.

    Args:
        function: Function of unbatched tensors; may use ``torch.func`` freely.
        arguments: Example tensors, the points last: (..., n).
        identity: What tells the function from all others, where that is known before it is traced.
        reasons: Receives why it cannot be had, where it cannot.

    Returns:
        Function of tensors (..., n), or ``None`` where it cannot be had: no processor of this
        machine, no C compiler, an operation without a rule, or too many.
    """
    reasons = [] if reasons is None else reasons
    dtype = arguments[0].dtype
    if dtype not in (torch.float64, torch.float32) or c_compiler() is None:
        reasons.append("no C compiler" if c_compiler() is None else str(dtype))
        return None
    if any(a.device.type != "cpu" or a.dtype != dtype for a in arguments):
        reasons.append("another device, or several dtypes")
        return None
    if identity is not None:
        found = recall(identity.key(arguments), identity.given, dtype)
        if found is not None:
            return found
    try:
        traced = scalar_program(function, tuple(a[..., 0].clone() for a in arguments))
        kernel = compile_traced(traced, dtype)
        reference = vmap(function, in_dims=-1, out_dims=-1)
        if not _Trials(reference, arguments, _COMPARED).agree_with(kernel):
            reasons.append("C code that gives other numbers than torch")
            return None
    except Exception as error:
        # Whatever is wrong here, the other compiler says it, or does it.
        reasons.append(first_line(error).removeprefix("Unsupported: "))
        return None
    if identity is not None:
        note(identity.key(arguments), kernel, identity.given)
    return kernel


def _batch_last(function: Kernel, arguments: tuple[Tensor, ...], trials: _Trials) -> Kernel | None:
    """The function with the points last, if that gives what ``vmap`` gives."""
    try:
        decompositions = importlib.import_module("torch._inductor.decomposition")
        with torch.no_grad():
            last = batch_last(function, arguments, decompositions.select_decomp_table())
            return last if trials.agree_with(last) else None
    except Exception:
        # Whatever is wrong here, vmap says it, or does it.
        return None


class _Trials:
    """Inputs at and near some arguments, with what a function gives there, computed once.

    Near them, because at a start on an axis most derivatives vanish.

    Args:
        reference: The function.
        arguments: Tensors, and what is no tensor.
        points: Number of points of the last dimension that are compared, or 0 for all values.
    """

    def __init__(self, reference: Kernel, arguments: tuple[Any, ...], points: int = 0) -> None:
        self.reference = reference
        self.points = points
        generator = torch.Generator().manual_seed(0)
        self._inputs = (arguments, tuple(_near(a, generator) for a in arguments))

    @functools.cached_property
    def _expected(self) -> list[tuple[Tensor, ...]]:
        return [_as_tuple(self.reference(*map(self._few, inputs))) for inputs in self._inputs]

    def _few(self, value: Any) -> Any:
        return value[..., : self.points].contiguous() if self.points else value

    def agree_with(self, function: Kernel) -> bool:
        """Whether another function of such tensors gives the same to half the digits.

        Digits of the largest number of a result at all the arguments: some may be all rounding at
        some of them, as the length of a Newton step is that has nowhere to go.
        """
        sizes = [max(map(_size, values)) for values in zip(*self._expected, strict=True)]
        for inputs, expected in zip(self._inputs, self._expected, strict=True):
            found = tuple(map(self._few, _as_tuple(function(*inputs))))
            if len(found) != len(expected) or not all(map(_nearly_equal, found, expected, sizes)):
                return False
        return True


def _as_tuple(values: Any) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else tuple(values)


def _near(value: Any, generator: torch.Generator) -> Any:
    """A tensor a little off another one, in a tenth of its size."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    spread = torch.rand(value.shape, dtype=value.dtype, generator=generator) - 0.5
    size = value.square().mean().sqrt()
    size = _SPREAD * torch.where(size > 0, size, 1.0)
    return (value + size * spread.to(value.device)).contiguous()


def _size(value: Tensor) -> float:
    """The largest finite number in a tensor, up to sign; 0 where it holds none."""
    if not value.is_floating_point() or not value.numel():
        return 0.0
    return float(value.nan_to_num(posinf=0.0, neginf=0.0).abs().max())


def _nearly_equal(found: Tensor, expected: Tensor, size: float) -> bool:
    """Whether two tensors agree to half the digits of their dtype."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    tolerance = 10.0 * torch.finfo(expected.dtype).eps ** 0.5
    return torch.allclose(found, expected, tolerance, tolerance * size, True)


def _lift_constants(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Make the tensors that a graph holds its first inputs, and return them.

    Problems that differ in their data alone then share a kernel on disk.
    """
    constants: dict[str, Tensor] = {}
    inputs: dict[str, torch.fx.Node] = {}
    first = next(iter(graph.graph.nodes))
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        name = str(node.target)
        value = getattr(graph, name, None)
        if not isinstance(value, Tensor):
            continue
        if name not in inputs:
            constants[name] = value.detach()
            with graph.graph.inserting_before(first):
                inputs[name] = graph.graph.placeholder(f"constant_{len(inputs)}")
        node.replace_all_uses_with(inputs[name])
        graph.graph.erase_node(node)
    for name in constants:
        delattr(graph, name)
    graph.recompile()
    return list(constants.values())


def _compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[[list[Any]], Any]:
    """Compile a graph: a function of the list of inputs, which it empties.

    torch wraps what it compiled for all the uses of ``torch.compile``, at the cost of a small
    kernel a call. The code inside is taken out where it gives the same.
    """
    inductor = importlib.import_module("torch._inductor")
    with _static_shapes() as static:
        whole = inductor.compile(graph, [static(a) for a in inputs])
    expected = whole(*inputs)
    inside = _code_inside(whole)
    if inside is not None and _gives(inside, inputs, expected):
        return inside
    return lambda args: whole(*args)


def _code_inside(whole: Callable[..., Any]) -> Callable[[list[Any]], Any] | None:
    """The compiled code that one of torch's wrappers calls in the end, if it can be found.

    It is somewhere among what the wrappers, functions and objects, hold.
    """
    try:
        code = importlib.import_module("torch._inductor.output_code").OutputCode
    except (ImportError, AttributeError):
        return None
    queue: list[Any] = [whole]
    seen: set[int] = set()
    while queue and len(seen) < _MOST_WRAPPERS:
        candidate = queue.pop(0)
        if isinstance(candidate, code):
            return candidate
        if id(candidate) in seen or not callable(candidate) or isinstance(candidate, type):
            continue
        seen.add(id(candidate))
        for cell in getattr(candidate, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                queue.append(cell.cell_contents)
        queue.extend(getattr(candidate, "__dict__", {}).values())
    return None


@contextlib.contextmanager
def _static_shapes() -> Iterator[Callable[[Tensor], Tensor]]:
    """Stand-ins for tensors of one shape, in a context without which torch keeps no kernel."""
    guards = importlib.import_module("torch._guards")
    fake_tensor_mode = importlib.import_module("torch._subclasses").FakeTensorMode
    shape_env = importlib.import_module("torch.fx.experimental.symbolic_shapes").ShapeEnv
    mode = fake_tensor_mode(shape_env=shape_env(), static_shapes=True)
    with guards.tracing(guards.TracingContext(mode)):
        yield functools.partial(mode.from_tensor, static_shapes=True)


def _gives(code: Callable[[list[Any]], Any], inputs: list[Any], expected: Any) -> bool:
    """Whether the code gives the outputs expected, to the bit."""
    try:
        found = code(list(inputs))
        return len(found) == len(expected) and all(
            a.shape == b.shape
            and a.dtype == b.dtype
            and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
            for a, b in zip(found, expected, strict=True)
        )
    except Exception:
        return False


def _output_of(graph: torch.fx.GraphModule) -> torch.fx.Node:
    return next(node for node in graph.graph.nodes if node.op == "output")

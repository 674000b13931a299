"""Compiling: the same numbers, and a fallback that is said once and gives the same numbers."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from manifold_sde import Problem, SamplingNoise, errors, problems
from manifold_sde.compile import compile_function, compiler

GENERATOR = torch.Generator().manual_seed(2)
A = torch.randn(3, 5, dtype=torch.float64, generator=GENERATOR)
B = torch.randn(5, 4, dtype=torch.float64, generator=GENERATOR)


def products(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Products small enough to be written out, and one that is not."""
    long = a.repeat(1, 20)
    return a @ b, a @ b[:, 0], (a[None] @ b[None]).tanh(), long @ long.T


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has said nothing yet and does not know its compiler."""
    monkeypatch.setattr(compiler, "_said", set())
    found = (compiler._compiler, compiler.c_compiler)
    for cached in found:
        cached.cache_clear()
    yield
    for cached in found:
        cached.cache_clear()


@pytest.mark.compile
def test_compiled_functions_give_the_same() -> None:
    """Several outputs, and one: it keeps its shape, whatever its first dimension."""
    compiled = compile_function(products, (A, B))
    assert compiled is not products
    for a, b in ((A, B), (-2.0 * A, B + 1.0)):
        got, want = compiled(a, b), products(a, b)
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-13, atol=1e-13)


@pytest.mark.compile
@pytest.mark.parametrize("shape", [(1, 5), (3, 5), ()])
def test_a_single_output_keeps_its_shape(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return 2.0 * x

    got = compile_function(function, (x,))(x + 1.0)
    assert isinstance(got, Tensor)
    assert torch.equal(got, torch.full(shape, 4.0, dtype=torch.float64))


@pytest.mark.compile
def test_compiled_derivatives_and_noise_of_a_problem() -> None:
    """Gradients, third derivatives and a draw without replacement, in elementary operations too."""
    inputs = torch.randn(3, 2, dtype=torch.float64, generator=GENERATOR)

    def loss(x: Tensor) -> Tensor:
        return F.layer_norm(inputs @ x.reshape(2, 3), (3,), eps=0.1).pow(3).mean(1)

    p = Problem(loss, 6, SamplingNoise(2, replacement=False))

    def kernel(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        third = vmap(p.pointwise.third_derivative)(x, x.roll(1, 1), x.roll(2, 1))
        step = vmap(lambda z, v: p.noise.stochastic_gradient(p.pointwise, z, v[:0], v))(x, u)
        return third, step

    x = torch.randn(5, 6, dtype=torch.float64, generator=GENERATOR)
    u = torch.rand(5, 3, dtype=torch.float64, generator=GENERATOR)
    compiled = compile_function(kernel, (x, u))
    assert compiled is not kernel
    for got, want in zip(compiled(-x, 1.0 - u), kernel(-x, 1.0 - u), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_traced_functions_give_the_same() -> None:
    graph = compiler.trace(products, (A, B))
    for got, want in zip(graph(A + 1.0, B), products(A + 1.0, B), strict=True):
        torch.testing.assert_close(got, want)
    p = problems.varying_circle()
    x = torch.randn(4, 3, dtype=torch.float64, generator=GENERATOR)
    graph = compiler.trace(vmap(p.pointwise.hessian), (x,))
    torch.testing.assert_close(graph(2.0 * x), p.hessian(2.0 * x))


# Fallbacks.


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_it_is_said_once_and_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert not compiler.compiler_available()
    with pytest.warns(errors.CompilationWarning, match=r"install g\+\+") as said:
        function = compile_function(products, (A, B))
    assert len(said) == 1
    assert function is products
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compile_function(products, (A, B)) is products


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("environment", "there", "found"),
    [
        (None, ("g++", "clang++"), "g++"),
        (None, ("clang++",), "clang++"),
        (None, ("c++",), "c++"),
        ("/opt/mine/c++", ("/opt/mine/c++", "g++"), "/opt/mine/c++"),
        ("/opt/mine/c++", ("g++",), None),
        (None, (), None),
    ],
)
def test_which_compiler_is_used(
    monkeypatch: pytest.MonkeyPatch,
    environment: str | None,
    there: tuple[str, ...],
    found: str | None,
) -> None:
    if environment is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", environment)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: name if name in there else None)
    assert compiler.compiler_available() is (found is not None)
    config = compiler.importlib.import_module("torch._inductor.config")
    before = config.cpp.cxx
    with compiler._inductor_options():
        assert config.cpp.cxx == (before if found is None else (None, found))
    assert config.cpp.cxx == before


def cannot_be_traced(x: Tensor) -> Tensor:
    values: list[Any] = vmap(lambda z: z)(x).tolist()
    return x * 2.0 if vmap(lambda z: z.sum().item())(x) else x * values[0]


@pytest.mark.usefixtures("fresh")
def test_what_cannot_be_traced_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compiler_available", lambda: True)
    with pytest.warns(errors.CompilationWarning, match="runs uncompiled: RuntimeError"):
        function = compile_function(cannot_be_traced, (A,))
    assert function is cannot_be_traced


@pytest.mark.usefixtures("fresh")
def test_a_compiler_that_fails_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("the compiler is broken\nand says much more")

    monkeypatch.setattr(compiler, "compiler_available", lambda: True)
    monkeypatch.setattr(compiler, "_compile_graph", fail)
    with pytest.warns(errors.CompilationWarning, match="OSError: the compiler is broken$") as said:
        functions = [compile_function(products, (A, B)) for _ in range(3)]
    assert len(said) == 1
    assert functions == [products] * 3
    for got, want in zip(functions[0](A, B), products(A, B), strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("fresh")
def test_messages_that_differ_are_each_said_once() -> None:
    with pytest.warns(errors.CompilationWarning) as said:
        list(map(compiler.say_once, ("one", "two", "one", "two")))
    assert [str(w.message) for w in said] == ["one", "two"]


def test_modes() -> None:
    assert [compiler.check_mode(m) for m in (True, False, "auto")] == [True, False, "auto"]
    for mode in ("yes", 2, None, "AUTO"):
        with pytest.raises(errors.ArgumentError, match="auto") as caught:
            compiler.check_mode(mode)
        assert caught.value.received == repr(mode)

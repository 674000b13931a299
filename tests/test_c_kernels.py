"""Functions of one point as C code: the numbers of torch, whatever they are called with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from manifold_sde import DirectionDiffusion, Problem, SphericalNoise, problems, rng
from manifold_sde.compile import (
    CKernel,
    Identity,
    Unsupported,
    c_library,
    c_source,
    compile_points,
    compiler,
)
from manifold_sde.compile.random_numbers import fill, fills
from manifold_sde.compile.recording import record
from manifold_sde.geometry.kernels import Kernels
from manifold_sde.loss import Loss
from manifold_sde.solvers import run_sgd, solve
from manifold_sde.torch_norms import elementary

pytestmark = pytest.mark.skipif(c_library.c_compiler() is None, reason="no C compiler")

GENERATOR = torch.Generator().manual_seed(3)
W = torch.randn(4, 6, dtype=torch.float64, generator=GENERATOR)
T = torch.randn(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
EYE = torch.eye(3, dtype=torch.float64)
M = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
X = torch.randn(6, 37, dtype=torch.float64, generator=GENERATOR)
A, B = (torch.randn(6, 37, dtype=torch.float64, generator=GENERATOR) for _ in range(2))


def _products(x: Tensor) -> Tensor:
    m = x.reshape(2, 3)
    return (m @ m.T).square().sum() + torch.trace(m @ m.T) + torch.outer(x, x).triu().sum()


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "a norm": lambda x: (x / x.norm())[2] ** 2 * (1.0 + 0.6 * (x / x.norm())[0]) ** 2,
    "a layer": lambda x: F.gelu(W @ (x / x.norm())).square().mean(),
    "softmax": lambda x: -F.log_softmax(W @ x, 0)[1] + F.softmax(W @ x, 0)[0] ** 2,
    "softplus": lambda x: F.softplus(W @ x).square().sum() + F.softplus(x, beta=2.0).sum(),
    "tanh, erf, sigmoid": lambda x: (torch.tanh(x) * torch.erf(x) + torch.sigmoid(W @ x)[0]).sum(),
    "roots and powers": lambda x: ((1 + x * x).sqrt() + (2 + x.cos()) ** 1.7 + x.abs() ** 3).sum(),
    "logarithms": lambda x: torch.logsumexp(W @ x, 0) + torch.log1p(x * x).sum(),
    "extremes": lambda x: torch.maximum(x[:3], x[3:]).square().sum() + x.clamp(-0.5, 0.7).sum(),
    "where": lambda x: torch.where(x > 0.1, x**3, x.exp()).sum() + F.relu(W @ x).square().sum(),
    "products": _products,
    "angles": lambda x: torch.atan2(x[0], x[1]) ** 2 + x[2] * torch.sin(x[3:]).sum(),
    "forms of second degree": lambda x: torch.einsum("mij,i,j->m", T, x, x).square().sum(),
    "classes": lambda x: F.cross_entropy((W @ x)[None], torch.tensor([2])),
    "places": lambda x: x.scatter(0, torch.tensor([1, 4]), W[0, :2] * x[2]).pow(3).sum(),
    "other norms": lambda x: sum(
        torch.linalg.vector_norm(W @ x, p) ** 2 for p in (1, 3.5, 4, float("inf"), -float("inf"))
    ),
    "products in a row": lambda x: (1.5 + x).cumprod(0).square().sum() + (W @ x).prod() ** 2,
    "order": lambda x: (
        (W[0] * x.sort()[0] ** 3).sum()
        + (x.reshape(2, 3).topk(2, 1)[0].prod(1) + x.reshape(3, 2).median(0)[0].sum()).sum()
        + (W[1] * x.sort(descending=True)[0].square()).sum()
        + x.kthvalue(3)[0] ** 3
    ),
    "largest": lambda x: (
        x.reshape(2, 3).max(1)[0].pow(3).sum() + x.reshape(2, 3).min(0, keepdim=True)[0].prod()
    ),
    "places of the point": lambda x: (
        x.pow(3).index_select(0, x.argmax()[None]).sum()
        + (x.reshape(2, 3) ** 3).gather(1, x.reshape(2, 3).argsort(1)).mul(W[:2, :3]).sum()
        + torch.zeros_like(x).scatter(0, x.argsort(), W[0] * x).pow(3).sum()
        + torch.zeros_like(x).scatter_add(0, x[:4].argsort(), (W @ x)).pow(3).sum()
    ),
    "pools": lambda x: (
        F.max_pool1d(x[None], 2, 1).pow(3).sum()
        + F.max_pool2d(x.reshape(1, 1, 2, 3), 2, padding=1).pow(3).sum()
        + F.avg_pool1d(x[None] ** 2, 3, 2, padding=1).pow(2).sum()
        + F.adaptive_avg_pool1d(x[None] ** 2, 4).pow(2).sum()
        + F.interpolate(x[None, None] ** 2, size=4, mode="linear").pow(2).sum()
    ),
    "bilinear, padded, embedded": lambda x: (
        F.bilinear(x, W @ x, T[:2, :, :4]).square().sum()
        + (F.pad(x.reshape(2, 3), (1, 0, 0, 2), value=0.7) ** 3).sum()
        + (F.embedding(torch.tensor([0, 2, 0]), x.reshape(3, 2)) ** 3).mul(T[0, :3, :2]).sum()
        + torch.hypot(x[0], x[1]) ** 3
    ),
    "convolutions": lambda x: (
        F.conv1d(T[0, :2, :][None], x.reshape(1, 2, 3), W[0, :1], padding=1).pow(3).sum()
        + F.conv1d(x.reshape(1, 2, 3), W[:, :2].reshape(4, 1, 2), groups=2).pow(2).sum()
        + F.conv2d(T[:1, :5][None], x.reshape(1, 1, 2, 3), stride=2, dilation=(1, 2)).pow(2).sum()
        + F.conv2d(x.reshape(1, 1, 2, 3), x[:2].reshape(1, 1, 1, 2) ** 2, padding=1).pow(2).sum()
        + F.conv_transpose1d(
            x[None, None], W[:2, :3].reshape(1, 2, 3), W[0, :2], 2, 1, output_padding=1
        )
        .pow(2)
        .sum()
    ),
}

#: Matrices of the point, whose rows are exchanged at some points and not at others.
MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "determinants": lambda m: torch.linalg.det(m) ** 2 + torch.linalg.slogdet(m)[1],
    "a solution": lambda m: torch.linalg.solve(m, W[:3, :2]).square().sum(),
    "solutions on either side": lambda m: (
        torch.linalg.solve(m.mT, m[:2] ** 2, left=False).sum()
        + torch.linalg.lu_solve(*torch.linalg.lu_factor(m), W[:3, :2], adjoint=True).sum()
    ),
    "an inverse": lambda m: (
        (torch.linalg.inv(m) * W[:3, :3]).sum() + torch.linalg.matrix_power(m, -2).sum()
    ),
    "Cholesky's factor": lambda m: (
        (torch.linalg.cholesky(m @ m.T + EYE) * W[:3, :3]).sum()
        + torch.cholesky_solve(m[:, :2], torch.linalg.cholesky(m @ m.T + EYE)).sum()
        + torch.logdet(m @ m.T + EYE)
    ),
    "triangles": lambda m: (
        torch.linalg.solve_triangular(m.triu(), W[:3, :2], upper=True).sum()
        + torch.linalg.solve_triangular(
            m.tril(), m[:2], upper=False, left=False, unitriangular=True
        ).sum()
    ),
}
LOSSES |= {
    name: lambda x, f=f: f(torch.outer(x[:3], x[3:]).sin() + M + 4.0 * EYE[[1, 2, 0]])
    for name, f in MATRICES.items()
} | {
    "shapes": lambda x: torch.cat([x[1:], x[:1]]).flip(0).roll(2).reshape(3, 2).T[0].var(),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of kernels."""
    monkeypatch.setattr(c_library, "cache_folder", lambda: tmp_path)
    return tmp_path


#: Losses of which the third derivatives take seconds to trace and compile.
SLOW = (
    *("other norms", "products in a row", "order", "places of the point", "pools"),
    *("bilinear, padded, embedded", "convolutions", *MATRICES),
)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("name", "order"),
    [
        pytest.param(name, k, marks=[pytest.mark.thorough] if k > 1 and name in SLOW else [])
        for name in LOSSES
        for k in (1, 2, 3)
    ],
)
def test_derivatives_to_third_order_are_those_of_torch(name: str, order: int) -> None:
    """To rounding, at points that fill no whole number of vectors."""
    loss = Loss(elementary(LOSSES[name], X[:, 0]), 6, None)
    functions: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda x: (loss.loss(x), loss.gradient(x)), (X,)),
        (loss.hessian, (X,)),
        (loss.third_derivative, (X, A, B)),
    ]
    function, arguments = functions[order - 1]
    reasons: list[str] = []
    few = tuple(a[:, :3].contiguous() for a in arguments)
    kernel = compile_points(function, few, reasons=reasons)
    assert isinstance(kernel, CKernel), reasons
    found, want = kernel(*arguments), vmap(function, in_dims=-1, out_dims=-1)(*arguments)
    for f, w in zip(*((v,) if isinstance(v, Tensor) else v for v in (found, want)), strict=True):
        assert f.shape == w.shape
        assert float((f - w).abs().max()) < 1e-12 * max(1.0, float(w.abs().max()))


def test_an_operation_without_forward_mode_in_a_graph() -> None:
    loss = Loss(lambda x: F.silu(W @ x).square().sum(), 6, None)
    loss.reverses = True
    few = tuple(a[:, :3].contiguous() for a in (X, A, B))
    kernel = compile_points(loss.third_derivative, few)
    assert kernel is not None
    want = vmap(loss.third_derivative, in_dims=-1, out_dims=-1)(X, A, B)
    torch.testing.assert_close(kernel(X, A, B), want, rtol=1e-12, atol=1e-12)
    loss.reverses = False  # where reverse mode was not seen to give the same
    assert compile_points(loss.third_derivative, few) is None


def test_a_path_has_the_same_bits_in_any_company() -> None:
    kernel = compile_points(Loss(LOSSES["a layer"], 6, None).hessian, (X[:, :3].contiguous(),))
    assert kernel is not None
    whole = kernel(X)
    for places in ([0], [36], [5, 3], list(range(20, 37)), list(range(16))):
        assert torch.equal(kernel(X[:, places].contiguous())[..., :], whole[..., places])


def test_single_precision() -> None:
    loss, x = Loss(LOSSES["a norm"], 6, None), X.float()
    kernel = compile_points(loss.gradient, (x[:, :3].contiguous(),))
    assert kernel is not None
    found, want = kernel(x), vmap(loss.gradient, in_dims=-1, out_dims=-1)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want)


def test_a_kernel_is_not_called_with_what_it_was_not_compiled_for() -> None:
    """It reads memory by address: other dtypes and shapes get another kernel, or none."""
    problem = Problem(LOSSES["a norm"], 6, SphericalNoise(1.0))
    kernels = Kernels(problem, "c")
    loss, directions = problem.pointwise, X / X.norm(dim=0)
    for y, w in ((directions, A), (directions.float(), A.float()), (directions.float(), A)):
        found = kernels.run_last("product", lambda z, v: problem.noise.product(loss, z, v), y, w)
        want = vmap(lambda z, v: problem.noise.product(loss, z, v), -1, -1)(y, w)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a difference that is a sum."""
    monkeypatch.setitem(c_source._INFIX, "sub", "+")
    assert compile_points(lambda x: x - W[0], (X[:, :3].contiguous(),)) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.linalg.eigvalsh(torch.outer(x, x)),
        lambda x: torch.linalg.inv(torch.outer(x, x).repeat(2, 2) + torch.eye(12)),
    ],
    ids=["an eigendecomposition", "a large matrix"],
)
def test_what_has_no_rule_is_left_to_others(function: Callable[[Tensor], Tensor]) -> None:
    reasons: list[str] = []
    assert compile_points(function, (X[:, :3].contiguous(),), reasons=reasons) is None
    assert len(reasons) == 1
    assert reasons[0].startswith(("no C code for aten._linalg_eigh", "a matrix of 12 rows"))


def test_without_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "c_compiler", lambda: None)
    assert compile_points(torch.sin, (X[:, :3].contiguous(),)) is None


# The recording.


def test_operations_are_recorded_in_order_and_the_needed_ones_run() -> None:
    def function(x: Tensor) -> Tensor:
        torch.linalg.eigvalsh(torch.outer(x, x))  # nothing uses it
        y = x.clone()
        y[1:3] = x[:2]
        return W @ y

    found = record(function, (X[:, 0],))
    names = [operation.name for operation in found.needed()]
    assert "_linalg_eigh" in [operation.name for operation in found.operations]
    assert "_linalg_eigh" not in names
    assert "copy_" in names
    assert [tensor is W for tensor in found.held.values()] == [True]
    kernel = compile_points(function, (X[:, :3].contiguous(),))
    assert kernel is not None
    want = W @ torch.cat([X[:1], X[:2], X[3:]])
    torch.testing.assert_close(kernel(X), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * float(x[0]),
        lambda x: x.square() if x[0] > 0 else x,
        lambda x: x * (2.0 if torch.equal(x, x.abs()) else 1.0),
    ],
)
def test_a_number_of_the_point_that_steers_the_function_is_refused(
    function: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(Unsupported):
        record(function, (X[:, 0],))
    assert compile_points(function, (X[:, :3].contiguous(),)) is None
    # Numbers of what the function holds are the same at every point.
    assert record(lambda x: x * float(W[0, 0]), (X[:, 0],)).operations


def test_checks_of_values_are_left_out_of_a_recording() -> None:
    """The losses of problems check their points where these have values."""
    problem = problems.normalized_linear()
    x = torch.randn(problem.dim, 3, dtype=torch.float64, generator=GENERATOR)
    kernel = compile_points(Loss(problem.loss, problem.dim, None).gradient, (x,))
    assert kernel is not None
    torch.testing.assert_close(kernel(x).T, problem.gradient(x.T), rtol=1e-12, atol=1e-13)


def test_derivatives_that_are_the_users_are_not_looked_up_on_disk(folder: Path) -> None:
    """Two functions of one gradient with other second derivatives are told apart by nothing."""

    class Square(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, weights: Tensor) -> Tensor:
            return 2.0 * ctx.saved_tensors[0] * weights

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return 2.0 * ctx.saved_tensors[0] * tangent

    losses = (lambda x: Square.apply((W @ x) / x.norm()), lambda x: ((W @ x) / x.norm()) ** 2)
    for loss, kept in zip(losses, (0, 1), strict=True):
        problem = Problem(lambda x, loss=loss: loss(x).mean(), 6, SphericalNoise(1.0))
        Kernels(problem, "c").gradient(X.T)
        assert len(list(folder.glob("*.json"))) == kept


# The disk.


def _kernel(data: Tensor, monkeypatch: pytest.MonkeyPatch, *, traced: bool) -> CKernel:
    """A kernel of a loss with data, which is traced or must not be."""

    def function(x: Tensor) -> Tensor:
        return (data @ x).square().sum()

    few = (X[:, :3].contiguous(),)
    identity = Identity.of([(function, (X[:, 0],))])
    assert identity is not None
    calls = []
    real = compiler.scalar_program
    monkeypatch.setattr(compiler, "scalar_program", lambda *a: calls.append(a) or real(*a))
    kernel = compile_points(Loss(function, 6, None).gradient, few, identity.of_kernel("gradient"))
    monkeypatch.setattr(compiler, "scalar_program", real)
    assert kernel is not None
    assert bool(calls) == traced
    want = 2.0 * data.T @ (data @ X)
    torch.testing.assert_close(kernel(X), want, rtol=1e-13, atol=1e-13)
    return kernel


def test_a_kernel_is_found_again_without_tracing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _kernel(W, monkeypatch, traced=True)
    again = _kernel(W, monkeypatch, traced=False)
    assert torch.equal(first(X), again(X))
    # Other data, the same code: the numbers are read when it is called.
    _kernel(2.0 * W, monkeypatch, traced=False)
    assert len(list(folder.glob("*.so"))) == 1
    # Other shapes are another function.
    _kernel(W[:2].contiguous(), monkeypatch, traced=True)


def test_two_views_of_the_same_memory_are_told_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    square = torch.randn(6, 6, dtype=torch.float64, generator=GENERATOR)
    views = (square.T, square)
    for view in views:
        kernel = compile_points(lambda x, view=view: view @ x, (X[:, :3].contiguous(),))
        assert kernel is not None
        c_library.note("key", kernel, views)
        again = c_library.recall("key", views, torch.float64)
        assert again is not None
        for found in (kernel, again):
            torch.testing.assert_close(found(X), view @ X)
    # The broken twin looks at the address and the shape alone.
    monkeypatch.setattr(c_library, "is_same", lambda a, b: a.data_ptr() == b.data_ptr())
    c_library.note("key", kernel, views)
    again = c_library.recall("key", views, torch.float64)
    assert again is not None
    assert float((again(X) - square @ X).abs().max()) > 0.1


def test_a_kernel_can_hold_another_tensor() -> None:
    """The one that it was made of goes on as it was."""
    old, new = torch.ones(2, dtype=torch.float64), torch.full((2,), 3.0, dtype=torch.float64)
    kernel = compile_points(lambda x: x * old[0], (X[:, :3].contiguous(),))
    assert kernel is not None
    other = kernel.holding(old, new)
    assert torch.equal(other(X), 3.0 * X)
    assert torch.equal(kernel(X), X)
    new[0] = 2.0  # read when it is called
    assert torch.equal(other(X), 2.0 * X)
    with pytest.raises(LookupError):
        kernel.holding(new, old)


def test_many_numbers_are_left_to_others() -> None:
    """Before anything is traced."""
    calls: list[int] = []

    def function(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.sum()

    assert compile_points(function, (torch.ones(5000, 3, dtype=torch.float64),)) is None
    assert calls == []
    assert compile_points(function, (torch.ones(50, 3, dtype=torch.float64),)) is not None
    assert calls


def test_where_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is named, the user's cache, or a new one where there is none."""
    find = c_library.cache_folder.__wrapped__
    monkeypatch.setenv("MANIFOLD_SDE_CACHE", str(tmp_path / "named"))
    assert find() == tmp_path / "named"
    monkeypatch.delenv("MANIFOLD_SDE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert find() == tmp_path / "cache" / "manifold_sde"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert find().is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("MANIFOLD_SDE_CACHE", str(tmp_path / "file"))
    assert find().is_dir()


def test_damaged_files_are_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _kernel(W, monkeypatch, traced=True)
    (library,), (note,) = folder.glob("*.so"), folder.glob("*.json")
    c_library._loaded.cache_clear()
    damaged = library.read_bytes()[:1000]
    library.unlink()  # it is mapped into this process
    library.write_bytes(damaged)
    _kernel(W, monkeypatch, traced=True)  # and not mapped into memory, which would crash
    for text in ("{", json.dumps({"library": "x"}), ""):
        note.write_text(text)
        _kernel(W, monkeypatch, traced=True)
    c_library._loaded.cache_clear()


# Random numbers.


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 4e-15), (torch.float32, 2e-6)])
def test_random_numbers_are_those_of_torch(dtype: torch.dtype, close: float) -> None:
    """Uniforms to the bit, normals to rounding, whatever stands beside a path."""
    assert fills(dtype, torch.device("cpu"))
    key, paths = rng.seed_key(2**63 + 12345), torch.arange(3, 603)
    steps = torch.tensor([0, 7, 2**33 + 1])
    for normal, function in ((False, rng.uniforms), (True, rng.normals)):
        want = function(key, 5, paths, steps, 6, dtype)
        common: dict[str, Any] = {"normal": normal, "key": key, "stream": 5}
        found = fill(
            torch.empty_like(want),
            paths=paths,
            steps=steps[:, None],
            components_first=True,
            **common,
        )
        torch.testing.assert_close(found, want, rtol=0.0, atol=close if normal else 0.0)
        alone = fill(
            want.new_empty(3, 6, 1),
            paths=paths[599:],
            steps=steps[:, None],
            components_first=False,
            **common,
        )
        assert torch.equal(alone[..., 0].T, found[..., 599])


def test_numbers_of_nodes_are_those_of_torch() -> None:
    assert fills(torch.float64, torch.device("cpu"))
    paths, key = torch.arange(300), rng.seed_key(1)
    levels = torch.randint(0, 40, (4, 300), generator=GENERATOR)
    positions = torch.randint(0, 2**45, (4, 300), generator=GENERATOR)
    scales = torch.rand(4, 300, dtype=torch.float64, generator=GENERATOR)
    want = rng.node_normals(key, 3, paths, levels, positions, scales, 5)
    found = fill(
        torch.empty_like(want),
        normal=True,
        key=key,
        stream=3,
        paths=paths,
        steps=positions,
        levels=levels,
        scales=scales,
        components_first=False,
    )
    torch.testing.assert_close(found, want, rtol=0.0, atol=4e-15)


@pytest.mark.parametrize("runs", ["solve", "run_sgd"])
def test_a_run_says_what_ran_uncompiled(runs: str) -> None:
    """The largest weight has C code, the gamma function has none."""
    start = torch.eye(3, dtype=torch.float64)[0]
    parts: list[tuple[Any, bool]] = [(torch.lgamma, False)]
    for part, compiled in [*parts, *([(torch.amax, True)] if runs == "run_sgd" else [])]:

        def loss(x: Tensor, part: Callable[..., Any] = part) -> Tensor:
            u = x / x.norm()
            return 0.5 * u[2] ** 2 * (2.0 + part(u[:2] + 3.0).sum())

        problem = Problem(loss, 3, SphericalNoise(0.3), rank=1)
        if runs == "solve":
            equation = DirectionDiffusion(problem)
            found = solve(equation, start, [0.0, 0.01], n_paths=2, dt=0.01, compile="auto").stats
        else:
            found = run_sgd(problem, start, 0.01, 0.1, 3, n_paths=2).stats
        assert found["compiled"] is compiled
        said = found.get("uncompiled", "")
        assert said == "" if compiled else said == "no C code for prims.lgamma.default"

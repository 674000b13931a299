"""Operations of torch as losses, and what becomes of each: the table in docs/operations.md.

Each is a smooth scalar function of a 3 x 3 matrix of norm 1 that follows the weights, so that
every loss here is scale-invariant and all its derivatives are generic. ``python -m
tests.operations`` tries all of them and writes the table.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from tqdm import tqdm

from manifold_sde import Problem, SphericalNoise, errors
from manifold_sde.compile import compile_points, compiler
from manifold_sde.loss import Loss
from manifold_sde.torch_norms import ElementaryFunction

DIM = 9
MARK = "| --- | --- | --- |"
PAGE = Path(__file__).parents[1] / "docs" / "operations.md"
GENERATOR = torch.Generator().manual_seed(11)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


POINT, A, B = normal(3, DIM)
Z = normal(5, DIM)
M = normal(3, 3)
C = normal(3, 2)
V = normal(3)
EYE = torch.eye(3, dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1])
POSITIVE = torch.rand(3, 3, dtype=torch.float64, generator=GENERATOR) + 0.5


def spd(w: Tensor) -> Tensor:
    return w @ w.T + EYE


def regular(w: Tensor) -> Tensor:
    return w + 2.0 * EYE


def weighted(value: Tensor) -> Tensor:
    """A generic number of a tensor of at most 3 x 3."""
    weights = M[: value.shape[0], : value.shape[1]] if value.dim() == 2 else V[: len(value)]
    return (weights * (value + 0.3 * value.square())).sum()


#: The operations, as users write them.
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # Entry by entry.
    "abs": lambda w: weighted((w + 2.0).abs()),
    "exp": lambda w: weighted(w.exp()),
    "expm1": lambda w: weighted(torch.expm1(w)),
    "log": lambda w: weighted((w + 2.0).log()),
    "log1p": lambda w: weighted(torch.log1p(w)),
    "sqrt": lambda w: weighted((w + 2.0).sqrt()),
    "rsqrt": lambda w: weighted((w + 2.0).rsqrt()),
    "pow": lambda w: weighted((w + 2.0) ** 1.7),
    "pow of tensors": lambda w: weighted(torch.pow(w + 2.0, w)),
    "reciprocal": lambda w: weighted(1.0 / (w + 2.0)),
    "sin": lambda w: weighted(torch.sin(3.0 * w)),
    "cos": lambda w: weighted(torch.cos(3.0 * w)),
    "tan": lambda w: weighted(torch.tan(w)),
    "asin": lambda w: weighted(torch.asin(0.7 * w)),
    "acos": lambda w: weighted(torch.acos(0.7 * w)),
    "atan": lambda w: weighted(torch.atan(w)),
    "atan2": lambda w: weighted(torch.atan2(w, w.T + 2.0)),
    "sinh": lambda w: weighted(torch.sinh(w)),
    "cosh": lambda w: weighted(torch.cosh(w)),
    "tanh": lambda w: weighted(torch.tanh(w)),
    "erf": lambda w: weighted(torch.erf(w)),
    "erfinv": lambda w: weighted(torch.erfinv(0.7 * w)),
    "lgamma": lambda w: weighted(torch.lgamma(w + 2.0)),
    "hypot": lambda w: weighted(torch.hypot(w, w.T + 2.0)),
    "logaddexp": lambda w: weighted(torch.logaddexp(w, w.T)),
    "xlogy": lambda w: weighted(torch.xlogy(w, w.T + 2.0)),
    "sinc": lambda w: weighted(torch.sinc(w + 0.1)),
    "clamp": lambda w: weighted(w.clamp(-0.4, 0.4)),
    "maximum": lambda w: weighted(torch.maximum(w, w.T + 0.1)),
    "where": lambda w: weighted(torch.where(w > 0, w.exp(), w.square() + 1.0)),
    "lerp": lambda w: weighted(torch.lerp(w, w.T, w)),
    "frac": lambda w: weighted(torch.frac(w + 2.0)),
    # Activations.
    "sigmoid": lambda w: weighted(torch.sigmoid(w)),
    "logsigmoid": lambda w: weighted(F.logsigmoid(w)),
    "softplus": lambda w: weighted(F.softplus(w)),
    "relu": lambda w: weighted(F.relu(w)),
    "leaky_relu": lambda w: weighted(F.leaky_relu(w)),
    "elu": lambda w: weighted(F.elu(w)),
    "selu": lambda w: weighted(F.selu(w)),
    "gelu": lambda w: weighted(F.gelu(w)),
    "gelu, tanh": lambda w: weighted(F.gelu(w, approximate="tanh")),
    "silu": lambda w: weighted(F.silu(w)),
    "mish": lambda w: weighted(F.mish(w)),
    "hardtanh": lambda w: weighted(F.hardtanh(w, -0.4, 0.4)),
    "hardsigmoid": lambda w: weighted(F.hardsigmoid(w)),
    "hardswish": lambda w: weighted(F.hardswish(w)),
    "softsign": lambda w: weighted(F.softsign(w)),
    "tanhshrink": lambda w: weighted(F.tanhshrink(w)),
    "celu": lambda w: weighted(F.celu(w + 0.2, 0.7)),
    "glu": lambda w: weighted(F.glu(torch.cat([w, w.T], 1), 1)),
    "prelu": lambda w: weighted(F.prelu(w, POSITIVE[0, :1])),
    "softmax": lambda w: weighted(torch.softmax(3.0 * w, 1)),
    "log_softmax": lambda w: weighted(torch.log_softmax(3.0 * w, 1)),
    "softmin": lambda w: weighted(F.softmin(w, 1)),
    # Sums, products and norms.
    "mean": lambda w: weighted(w.mean(1)),
    "var": lambda w: weighted(w.var(1)),
    "std": lambda w: weighted(w.std(1)),
    "prod": lambda w: weighted((w + 2.0).prod(1)),
    "logsumexp": lambda w: weighted(torch.logsumexp(3.0 * w, 1)),
    "amax": lambda w: weighted(w.amax(1)),
    "median": lambda w: weighted(w.median(1)[0]),
    "sort": lambda w: weighted(w.sort(1)[0]),
    "topk": lambda w: weighted(w.topk(2, 1)[0]),
    "cumsum": lambda w: weighted(w.cumsum(1)),
    "cumprod": lambda w: weighted((w + 2.0).cumprod(1)),
    "logcumsumexp": lambda w: weighted(torch.logcumsumexp(3.0 * w, 1)),
    "norm": lambda w: weighted(w / w[0].norm()),
    "norm, p = 3": lambda w: torch.linalg.vector_norm(w + 2.0, 3.0),
    "Frobenius norm": lambda w: torch.linalg.matrix_norm(w + M),
    "nuclear norm": lambda w: torch.linalg.matrix_norm(w, "nuc"),
    "spectral norm": lambda w: torch.linalg.matrix_norm(w, 2),
    "normalize": lambda w: weighted(F.normalize(w, dim=1)),
    "cosine_similarity": lambda w: weighted(F.cosine_similarity(w, M)),
    "cdist": lambda w: weighted(torch.cdist(w, M)),
    "pdist": lambda w: weighted(torch.pdist(w)),
    "renorm": lambda w: weighted(torch.renorm(w, 2.0, 0, 0.1)),
    # Matrices.
    "matmul": lambda w: weighted(w @ w),
    "einsum": lambda w: weighted(torch.einsum("ij,jk,kl->il", w, w, w)),
    "outer": lambda w: weighted(torch.outer(w[0], w[1])),
    "kron": lambda w: weighted(torch.kron(w[:1], w[:, :1])),
    "cross": lambda w: weighted(torch.linalg.cross(w, w.T)),
    "trace": lambda w: torch.trace(w) ** 3,
    "diagonal": lambda w: w.diagonal().sum() ** 3,
    "tril": lambda w: weighted(w.tril()),
    "det": lambda w: torch.linalg.det(regular(w)) ** 2,
    "logdet": lambda w: torch.logdet(spd(w)),
    "slogdet": lambda w: torch.linalg.slogdet(regular(w))[1],
    "inv": lambda w: weighted(torch.linalg.inv(regular(w))),
    "solve": lambda w: weighted(torch.linalg.solve(regular(w), C)),
    "solve with w on the right": lambda w: weighted(torch.linalg.solve(regular(M @ M.T), w)),
    "tensorsolve": lambda w: weighted(torch.linalg.tensorsolve(regular(w), C[:, 0])),
    "solve_triangular": lambda w: weighted(
        torch.linalg.solve_triangular(regular(w).tril(), C, upper=False)
    ),
    "cholesky": lambda w: weighted(torch.linalg.cholesky(spd(w))),
    "cholesky_solve": lambda w: weighted(torch.cholesky_solve(C, torch.linalg.cholesky(spd(w)))),
    "cholesky_inverse": lambda w: weighted(torch.cholesky_inverse(torch.linalg.cholesky(spd(w)))),
    "lu_factor, lu_solve": lambda w: weighted(
        torch.linalg.lu_solve(*torch.linalg.lu_factor(regular(w)), C)
    ),
    "qr": lambda w: weighted(torch.linalg.qr(regular(w))[1]),
    "eigvalsh": lambda w: weighted(torch.linalg.eigvalsh(spd(w))),
    "eigh": lambda w: weighted(torch.linalg.eigh(spd(w + M))[1].square()),
    "svdvals": lambda w: weighted(torch.linalg.svdvals(w + M)),
    "pinv": lambda w: weighted(torch.linalg.pinv((w + M)[:, :2])),
    "lstsq": lambda w: weighted(torch.linalg.lstsq((w + M)[:, :2], C)[0]),
    "matrix_exp": lambda w: weighted(torch.linalg.matrix_exp(w)),
    "matrix_power": lambda w: weighted(torch.linalg.matrix_power(regular(w), -2)),
    "householder_product": lambda w: weighted(torch.linalg.householder_product(w, V * w[0])),
    # Shapes.
    "gather": lambda w: weighted(w.gather(1, LABELS[:, None]) * w),
    "index_select": lambda w: weighted(w.index_select(0, LABELS) * w),
    "advanced indexing": lambda w: weighted(w[LABELS] * w),
    "roll, flip": lambda w: weighted(w.roll(1, 0) * w.flip(1)),
    "masked_fill": lambda w: weighted(w.masked_fill(M > 0, 0.5) * w),
    "scatter_add": lambda w: weighted(w.scatter_add(1, LABELS.expand(3, 3), w.square())),
    "index_add": lambda w: weighted(w.index_add(0, LABELS, w.square())),
    "unfold": lambda w: weighted(w.flatten().unfold(0, 3, 3).square()),
    "as_strided": lambda w: weighted(w.as_strided((2, 2), (3, 1)).square()),
    "fft": lambda w: weighted(torch.fft.fft(w).abs().square()),
    "pad": lambda w: weighted(F.pad(w[:2, :2], (0, 1, 1, 0)).square()),
    # Layers.
    "linear": lambda w: weighted(F.linear(w, M, V).square()),
    "bilinear": lambda w: weighted(F.bilinear(w, w, M.expand(2, 3, 3))),
    "conv1d": lambda w: weighted(F.conv1d(M[None], w[None, :, :2])[0].square()),
    "conv_transpose1d": lambda w: weighted(
        F.conv_transpose1d(M[None], w[:, :2, None])[0][:, :3].square()
    ),
    "max_pool1d": lambda w: weighted(F.max_pool1d(w[None], 2)[0].square()),
    "avg_pool1d": lambda w: weighted(F.avg_pool1d(w[None], 2)[0].square()),
    "adaptive_avg_pool1d": lambda w: weighted(F.adaptive_avg_pool1d(w[None], 2)[0].square()),
    "interpolate": lambda w: weighted(
        F.interpolate(w[None], size=2, mode="linear", align_corners=True)[0].square()
    ),
    "interpolate, bicubic": lambda w: weighted(
        F.interpolate(w[None, None], size=2, mode="bicubic")[0, 0].square()
    ),
    "grid_sample": lambda w: weighted(
        F.grid_sample(M[None, None], torch.tanh(w[:2, :2])[None, None], align_corners=False)[0, 0]
    ),
    "layer_norm": lambda w: weighted(F.layer_norm(w, (3,), eps=0.01)),
    "batch_norm": lambda w: weighted(F.batch_norm(w, None, None, training=True, eps=0.01)),
    "instance_norm": lambda w: weighted(F.instance_norm(w[None], eps=0.01)[0]),
    "group_norm": lambda w: weighted(F.group_norm(w[None], 3, eps=0.01)[0]),
    "rms_norm": lambda w: weighted(F.rms_norm(w, (3,), eps=0.01)),
    "local_response_norm": lambda w: weighted(F.local_response_norm(w[None], 2, alpha=0.5)[0]),
    "native_layer_norm": lambda w: weighted(torch.native_layer_norm(w, (3,), None, None, 0.01)[0]),
    "attention": lambda w: weighted(F.scaled_dot_product_attention(w[None], w[None], M[None])[0]),
    "attention, four dimensions": lambda w: weighted(
        F.scaled_dot_product_attention(w[None, None], w[None, None], M[None, None])[0, 0]
    ),
    "embedding_bag": lambda w: weighted(F.embedding_bag(LABELS[:, None], w).square()),
    "embedding": lambda w: weighted(F.embedding(LABELS, w).square()),
    # Losses.
    "mse_loss": lambda w: F.mse_loss(w, M),
    "l1_loss": lambda w: F.l1_loss(w.square(), M),
    "smooth_l1_loss": lambda w: F.smooth_l1_loss(w.square(), M),
    "huber_loss": lambda w: F.huber_loss(w, M),
    "cross_entropy": lambda w: F.cross_entropy(3.0 * w, LABELS),
    "cross_entropy, smoothed": lambda w: F.cross_entropy(3.0 * w, LABELS, label_smoothing=0.1),
    "nll_loss": lambda w: F.nll_loss(w.square(), LABELS),
    "kl_div": lambda w: F.kl_div(w, POSITIVE, reduction="sum"),
    "binary_cross_entropy": lambda w: F.binary_cross_entropy(torch.sigmoid(w), POSITIVE / 2.0),
    "binary_cross_entropy_with_logits": lambda w: F.binary_cross_entropy_with_logits(w, POSITIVE),
    "soft_margin_loss": lambda w: F.soft_margin_loss(w, M.sign()),
    "multi_margin_loss": lambda w: F.multi_margin_loss(w, LABELS),
    "hinge_embedding_loss": lambda w: F.hinge_embedding_loss(w.square(), M.sign()),
    "triplet_margin_loss": lambda w: F.triplet_margin_loss(w, w.T, M, margin=9.0),
    "gaussian_nll_loss": lambda w: F.gaussian_nll_loss(w, M, w.square() + 1.0),
    "poisson_nll_loss": lambda w: F.poisson_nll_loss(w, POSITIVE),
    "ctc_loss": lambda w: F.ctc_loss(w.log_softmax(1), LABELS[1:], (3,), (2,)),
}


def loss_of(name: str, share: float | None = None) -> Callable[[Tensor], Tensor]:
    """The loss of an operation alone, or its share of a larger one."""

    def loss(x: Tensor) -> Tensor:
        y = x / (x * x).sum().sqrt()
        value = OPERATIONS[name](y.reshape(3, 3))
        return value if share is None else (Z @ y).square().mean() + share * value

    return loss


def problem_of(name: str, share: float | None = None) -> Problem:
    """The problem of the loss, its torch warnings of slow batching unsaid."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        return Problem(loss_of(name, share), DIM, SphericalNoise(0.3))


def status(name: str, share: float | None = None) -> str:
    """What becomes of the loss: "right", "replaced" or "refused"."""
    try:
        problem = problem_of(name, share)
    except errors.DifferentiationError:
        return "refused"
    return "replaced" if isinstance(problem.pointwise.function, ElementaryFunction) else "right"


# Central differences of eighth order of each derivative, from the one before.
WEIGHTS = (4 / 5, -1 / 5, 4 / 105, -1 / 280)


def difference(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, h: float) -> Tensor:
    terms = [w * (f(x + k * h * v) - f(x - k * h * v)) for k, w in enumerate(WEIGHTS, start=1)]
    return sum(terms[1:], terms[0]) / h


def errors_of(pointwise: Loss) -> list[float]:
    """Relative errors of gradient, Hessian by both routes, and third derivative."""
    x, a, b = (v / v.norm() for v in (POINT, A, B))
    f = pointwise

    def product(z: Tensor) -> Tensor:
        return f.hessian_product(z, a)

    pairs = [
        (f.gradient(x) @ a, f.loss, a),
        (product(x), f.gradient, a),
        (f.hessian(x) @ a, f.gradient, a),
        (f.third_derivative(x, a, b), product, b),
    ]
    found = []
    for got, below, v in pairs:
        wants = [difference(below, x, v, h) for h in (3e-3, 1e-3, 3e-4)]
        size = max(float(got.norm()), float(wants[1].norm()), float(below(x).norm()))
        found.append(min(float((got - want).norm()) for want in wants) / size)
    return found


def _derivatives(name: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    f = problem_of(name).pointwise

    def kernel(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return f.gradient(x), f.hessian_product(x, a), f.third_derivative(x, a, b)

    return kernel


def in_c(name: str) -> bool:
    """Whether the derivatives of an operation have C code, which gives those of the function."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        points = tuple(normal(DIM, 4) for _ in range(3))
        return compile_points(_derivatives(name), points) is not None


def compiled(name: str) -> str:
    """What compiles the derivatives of an operation: "C, torch", "torch" or "runs uncompiled".

    Either way they have to be those of the function.
    """
    kernel = _derivatives(name)
    points = tuple(normal(DIM, 4) for _ in range(3))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", errors.CompilationWarning)
        patch.setattr(compiler, "_said", set())
        kernels = compiler.compile_batched(kernel, points)
        points = tuple(normal(DIM, 4) for _ in range(3))
        got, want = kernels(*points), vmap(kernel, in_dims=-1, out_dims=-1)(*points)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9 * float(w.norm()))
    uncompiled = any(issubclass(w.category, errors.CompilationWarning) for w in said)
    return "runs uncompiled" if uncompiled else "C, torch" if in_c(name) else "torch"


# The table.

_ROW = re.compile(r"^\| `(.+?)` \| (\w+) \| (.+?) \|$", re.MULTILINE)


def table() -> dict[str, tuple[str, str]]:
    """What docs/operations.md says: what becomes of each operation, and whether it is compiled."""
    rows = _ROW.findall(PAGE.read_text(encoding="utf-8"))
    return {name: (what, how) for name, what, how in rows}


def write_table() -> None:
    """Try every operation, and write the table."""
    rows = []
    for name in tqdm(OPERATIONS):
        what = status(name)
        rows.append(f"| `{name}` | {what} | {'–' if what == 'refused' else compiled(name)} |")
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    _, _, tail = rest.partition("\n\n")
    PAGE.write_text(head + MARK + "\n".join(["", *rows]) + "\n\n" + tail, encoding="utf-8")


if __name__ == "__main__":
    write_table()

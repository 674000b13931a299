"""Eigendecompositions in C against LAPACK's, and each for itself whatever is beside it."""

import pytest
import torch
from torch import Tensor

from manifold_sde.compile import c_compiler, eigen
from manifold_sde.compile.eigen import LARGEST, eigen_kernel

pytestmark = pytest.mark.skipif(c_compiler() is None, reason="no C compiler")

N = 37  # no multiple of the vectors' length


def matrices(dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Symmetric matrices (D, D, n) of all ranks, of scales from 1e-8 to 1e8; one is diagonal."""
    generator = torch.Generator().manual_seed(dim)
    found = []
    for i in range(N):
        factor = torch.randn(dim, 1 + i % (dim + 2), dtype=torch.float64, generator=generator)
        found.append(10.0 ** (i % 17 - 8) * (factor @ factor.T - (i % 3 == 0) * torch.eye(dim)))
    found[3] = torch.diag(torch.arange(dim).flip(0)).double()
    return torch.stack(found, -1).to(dtype)


def decomposed(a: Tensor) -> tuple[Tensor, Tensor]:
    kernel = eigen_kernel(len(a), a.dtype)
    assert kernel is not None
    values, vectors = kernel(a)
    return values, vectors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dim", [1, 2, 3, 7, LARGEST])
def test_the_same_as_lapack(dim: int, dtype: torch.dtype) -> None:
    a = matrices(dim, dtype)
    values, vectors = decomposed(a)
    allowed = 40.0 * torch.finfo(dtype).eps
    sizes = a.abs().amax((0, 1)).clamp(min=1e-30)
    expected = torch.linalg.eigvalsh(a.movedim(-1, 0)).T
    assert float(((values - expected) / sizes).abs().max()) < allowed * dim
    back = torch.einsum("ikn,kn,jkn->ijn", vectors, values, vectors)
    assert float(((back - a) / sizes).abs().max()) < allowed
    whole = torch.einsum("kin,kjn->ijn", vectors, vectors)
    assert float((whole - torch.eye(dim)[..., None]).abs().max()) < allowed
    assert bool((values.diff(dim=0) >= 0).all())


def hard(dim: int) -> Tensor:
    """Matrices (D, D, 600) at which methods get stuck: repeated, graded, split."""
    generator = torch.Generator().manual_seed(dim)
    uniform = torch.rand(dim, 600, dtype=torch.float64, generator=generator)
    turns = torch.randn(600, dim, dim, dtype=torch.float64, generator=generator)
    turns = torch.linalg.qr(turns)[0]
    values = torch.where(uniform < 0.5, 1.0, -1.0)
    values[:, 1::6] = 10.0 ** (-20.0 * uniform[:, 1::6])
    values[:, 2::6] = 1.0 + 1e-14 * uniform[:, 2::6]
    found = torch.einsum("nik,kn,njk->ijn", turns, values, turns)
    found[:, :, 3::6] = 1.0
    chain = torch.diag((torch.arange(dim) - dim // 2).abs().double())
    chain += sum(torch.diag(torch.ones(dim - 1).double(), side) for side in (-1, 1))
    found[:, :, 4::6] = chain[..., None]
    found[: dim // 2, dim // 2 :, 5::6] = found[dim // 2 :, : dim // 2, 5::6] = 0.0
    return (10.0 ** (40.0 * uniform[0] - 20.0) * (found + found.transpose(0, 1)) / 2).contiguous()


@pytest.mark.parametrize("dim", [5, 25])
def test_matrices_at_which_methods_get_stuck(dim: int) -> None:
    a = hard(dim)
    values, vectors = decomposed(a)
    sizes, allowed = a.abs().amax((0, 1)), 40.0 * torch.finfo(a.dtype).eps
    expected = torch.linalg.eigvalsh(a.movedim(-1, 0)).T
    assert float(((values - expected) / sizes).abs().max()) < allowed * dim
    back = torch.einsum("ikn,kn,jkn->ijn", vectors, values, vectors)
    assert float(((back - a) / sizes).abs().max()) < allowed * dim
    whole = torch.einsum("kin,kjn->ijn", vectors, vectors)
    assert float((whole - torch.eye(dim)[..., None]).abs().max()) < allowed


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e150, 1e290])
def test_squares_that_leave_the_range_are_no_fault(scale: float) -> None:
    single = float(torch.tensor(scale).float())
    for dtype, by in ((torch.float64, scale), (torch.float32, 1e-18 if single == 0.0 else 1e18)):
        a = matrices(7, dtype)[..., 8::17].contiguous()  # of the scale 1
        values, vectors = decomposed(by * a)
        expected, _ = decomposed(a)
        allowed = 40.0 * torch.finfo(dtype).eps * float(a.abs().max())
        assert float((values / by - expected).abs().max()) < allowed
        whole = torch.einsum("kin,kjn->ijn", vectors, vectors)
        assert float((whole - torch.eye(7)[..., None]).abs().max()) < 40.0 * torch.finfo(dtype).eps


def test_broken_twin_that_waits_for_less_than_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not converge is NaN: a repeated eigenvalue leaves rounding beside the diagonal."""
    monkeypatch.setattr(eigen, "_NEGLIGIBLE", 0.1)
    kernel = eigen_kernel.__wrapped__(25, torch.float64)
    assert kernel is not None
    values, _ = kernel(hard(25))
    assert bool(values.isnan().any())


def test_what_is_beside_it_changes_nothing() -> None:
    """Bit for bit, though its neighbours take more steps, or never converge."""
    a = matrices(6)
    alone = [decomposed(a[..., i : i + 1].contiguous()) for i in range(N)]
    a[0, 1, 5] = torch.nan
    a[2, 2, 6] = torch.inf
    values, vectors = decomposed(a)
    assert bool(values[:, 5].isnan().all())
    assert bool(vectors[..., 5].isnan().all())
    for i in set(range(N)) - {5, 6}:
        assert torch.equal(values[:, i : i + 1], alone[i][0])
        assert torch.equal(vectors[..., i : i + 1], alone[i][1])


def test_broken_twin_with_too_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial that a kernel has to pass refuses it."""
    monkeypatch.setattr(eigen, "_STEPS", 1)
    assert eigen_kernel.__wrapped__(6, torch.float64) is None


def test_there_is_none_beyond_its_dimension() -> None:
    assert eigen_kernel(LARGEST + 1, torch.float64) is None

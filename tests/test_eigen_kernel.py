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


def test_what_is_beside_it_changes_nothing() -> None:
    """Bit for bit, though its neighbours take more cycles, or never converge."""
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


def test_broken_twin_with_too_few_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial that a kernel has to pass refuses it."""
    monkeypatch.setattr(eigen, "_CYCLES", 3)
    assert eigen_kernel.__wrapped__(6, torch.float64) is None


def test_there_is_none_beyond_its_dimension() -> None:
    assert eigen_kernel(LARGEST + 1, torch.float64) is None

"""The limiting map of gradient flow, differentiable, with named failures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.func import vmap

from manifold_sde.errors import LimitMapError, RankError
from manifold_sde.geometry.gradient_flow import FlowResult, settle
from manifold_sde.geometry.spectrum import Spectrum, common_rank, find_rank
from manifold_sde.problem import INVARIANCE_TOLERANCE, Problem

#: Newton corrections after the flow has settled; the second one is at rounding level.
_CORRECTIONS = 3
#: Accuracy that single precision can deliver.
_SINGLE_RTOL = 1e-5


class LimitMap:
    """Phi of a problem, by integrating gradient flow.

    A scale-invariant loss is followed from the direction of x, where the flow has a scale of its
    own, and the result is scaled back: Phi is 1-homogeneous and keeps the norm (Lemma 2.7).

    Args:
        problem: The problem.
        rtol: Accuracy of the limit relative to the norm.
        max_steps: Steps of the integrator after which a flow counts as failed.
    """

    def __init__(self, problem: Problem, *, rtol: float, max_steps: int) -> None:
        self.problem = problem
        self.rtol = rtol
        self.max_steps = max_steps

    def __call__(self, x: Tensor) -> Tensor:
        """Phi(x): (..., D) -> (..., D), differentiable in forward and reverse mode."""
        flat = x.reshape(-1, x.shape[-1])
        return _LimitMapFunction.apply(flat, self).reshape(x.shape)  # type: ignore[no-untyped-call]

    def value(self, x: Tensor) -> Tensor:
        """Phi of a flat batch: (n, D) -> (n, D).

        Raises:
            LimitMapError: If some of the flows fail; the others are in its ``partial``.
        """
        return self._solve(x, None)[0]

    def tangent_images(self, x: Tensor, tangents: Tensor) -> Tensor:
        """The derivative of Phi at x applied to tangents: (n, D), (n, D, k) -> (n, D, k)."""
        images = self._solve(x, tangents)[1]
        assert images is not None
        return images

    def _solve(self, x: Tensor, tangents: Tensor | None) -> tuple[Tensor, Tensor | None]:
        loss = self.problem.pointwise
        gradient, hessian = vmap(loss.gradient), vmap(loss.hessian)

        def hessian_product(points: Tensor, columns: Tensor) -> Tensor:
            return vmap(vmap(loss.hessian_product, in_dims=(None, 1), out_dims=1))(points, columns)

        with torch.no_grad():
            invariant = self._scale_invariant(x)
            norms = x.norm(dim=-1, keepdim=True)
            scale = norms if invariant else torch.ones_like(norms)
            single = x.dtype != torch.float64
            result = settle(
                gradient,
                hessian,
                x / scale,
                rtol=max(self.rtol, _SINGLE_RTOL) if single else self.rtol,
                max_steps=self.max_steps,
                rank=self.problem.rank,
                hessian_product=hessian_product,
                tangents=tangents,
            )
            points, images, failures = self._finish(result, hessian, gradient)
            if invariant:
                points = points / points.norm(dim=-1, keepdim=True)
            points = points * scale
        if failures:
            self._refuse(x, points, result, failures, gradient)
        return points, images

    def _scale_invariant(self, x: Tensor) -> bool:
        sample = x[: min(4, len(x))]
        tolerance = INVARIANCE_TOLERANCE.get(x.dtype, 1e-2)
        return bool(self.problem.scale_invariance_violation(sample) <= tolerance)

    def _finish(
        self, result: FlowResult, hessian: Any, gradient: Any
    ) -> tuple[Tensor, Tensor | None, dict[int, str]]:
        """Newton corrections at rounding level, the rank at the limit, and what went wrong."""
        points, images = result.points, result.tangents
        failures: dict[int, str] = {}
        for index in torch.nonzero(~result.settled)[:, 0].tolist():
            finite = bool(torch.isfinite(points[index]).all())
            failures[index] = (
                f"not settled after {self.max_steps} steps" if finite else "the flow is not finite"
            )
        good = torch.nonzero(result.settled)[:, 0]
        if len(good):
            here = points[good]
            values, basis = torch.linalg.eigh(hessian(here))
            for position, index in enumerate(good.tolist()):
                reason = _misfit(values[position], self.problem.rank)
                if reason:
                    failures[index] = reason
            keep = torch.tensor([i not in failures for i in good.tolist()], device=good.device)
            good, here, values, basis = good[keep], here[keep], values[keep], basis[keep]
        if len(good):
            ranks = find_rank(values, self.problem.rank, "the end of the flow")
            if int(ranks.min()) != int(ranks.max()):
                usual = int(ranks.mode().values)
                odd = ranks != usual
                for index, rank in zip(good[odd].tolist(), ranks[odd].tolist(), strict=True):
                    failures[index] = f"the Hessian has rank {rank}, elsewhere {usual}"
                good, here = good[~odd], here[~odd]
                values, basis, ranks = values[~odd], basis[~odd], ranks[~odd]
            spectrum = Spectrum(values, basis, common_rank(ranks))
            for _ in range(_CORRECTIONS):
                here = here - spectrum.pseudo_inverse(gradient(here))
            points = points.clone()
            points[good] = here
            if images is not None:
                images = images.clone()
                tangent = spectrum.tangent_basis
                images[good] = tangent @ (tangent.mT @ images[good])
        return points, images, failures

    def _refuse(
        self,
        x: Tensor,
        points: Tensor,
        result: FlowResult,
        failures: dict[int, str],
        gradient: Any,
    ) -> None:
        failed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        failed[list(failures)] = True
        partial = points.clone()
        partial[failed] = torch.nan
        index = next(iter(failures))
        size = float(gradient(result.points[index : index + 1]).norm())
        raise LimitMapError(
            "gradient flow did not reach the manifold of minimisers",
            failed=failed,
            partial=partial,
            received=f"{len(failures)} of {len(x)} points failed; point {index}: "
            f"{failures[index]}, with gradient norm {size:.3g} and distance estimate "
            f"{float(result.distances[index]):.3g} after flow time "
            f"{float(result.times[index]):.4g} (at unit norm)",
            expected="points of the attraction set U, from which the flow ends on Gamma",
            remedy="start closer to Gamma, or train first; raise Geometry(max_steps=...) if the "
            "distance was still falling; the error's .partial holds the points that arrived",
        )


def _misfit(values: Tensor, declared: int | None) -> str | None:
    """Why a rest point of the flow is not on the manifold, or None."""
    top = values.abs().max()
    if bool(values[0] < -1e-5 * top):
        return f"stalled on a saddle (smallest Hessian eigenvalue {float(values[0]):.3g})"
    try:
        find_rank(values, declared, "the end of the flow")
    except RankError as error:
        return f"{error.problem}: {error.received}"
    return None


class _LimitMapFunction(torch.autograd.Function):
    """Phi on a flat batch (n, D), with the derivative carried along the flow."""

    @staticmethod
    def forward(x: Tensor, limit_map: LimitMap) -> Tensor:
        return limit_map.value(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.limit_map = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return _PullbackFunction.apply(x, cotangent, ctx.limit_map), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return _PushforwardFunction.apply(x, tangent, ctx.limit_map)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, limit_map: LimitMap) -> Any:
        x = x.movedim(in_dims[0], 0)
        flat = _LimitMapFunction.apply(x.reshape(-1, x.shape[-1]), limit_map)  # type: ignore[no-untyped-call]
        return flat.reshape(x.shape), 0


class _LinearImage(torch.autograd.Function):
    """Base of the two linear images: each batches, neither is differentiated again."""

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: second derivatives off the manifold are not offered."""

    @classmethod
    def _batch(cls, info: Any, in_dims: Any, x: Tensor, v: Tensor, limit_map: LimitMap) -> Any:
        x_dim, v_dim = in_dims[0], in_dims[1]
        size = info.batch_size
        x = x.movedim(x_dim, 0) if x_dim is not None else x.expand(size, *x.shape)
        v = v.movedim(v_dim, 0) if v_dim is not None else v.expand(size, *v.shape)
        flat_x, flat_v = x.reshape(-1, x.shape[-1]), v.reshape(-1, v.shape[-1])
        return cls.apply(flat_x, flat_v, limit_map).reshape(v.shape), 0  # type: ignore[no-untyped-call]


class _PushforwardFunction(_LinearImage):
    """d Phi(x) v, by transport of one tangent."""

    @staticmethod
    def forward(x: Tensor, tangent: Tensor, limit_map: LimitMap) -> Tensor:
        return limit_map.tangent_images(x, tangent[..., None])[..., 0]

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, v: Tensor, limit_map: LimitMap) -> Any:
        return _PushforwardFunction._batch(info, in_dims, x, v, limit_map)


class _PullbackFunction(_LinearImage):
    """d Phi(x)^T w, by transport of a basis."""

    @staticmethod
    def forward(x: Tensor, cotangent: Tensor, limit_map: LimitMap) -> Tensor:
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        images = limit_map.tangent_images(x, identity.expand(len(x), -1, -1))
        return (images.mT @ cotangent[..., None])[..., 0]

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, v: Tensor, limit_map: LimitMap) -> Any:
        return _PullbackFunction._batch(info, in_dims, x, v, limit_map)

"""The weights that a layer should have had, to make up for what goes wrong before it.

A layer of the quantized model gets inputs X̃ where the original gets X. Rounding W so that Ŵ·X̃ ≈ W·X̃ leaves the
difference W·(X − X̃) alone; the weights that make the layer's output what it is in the original model are those of

    min_T |T·X̃ − W·X|² + λ|T − W|²          T = W + W·drift·(H + λ)⁻¹,  drift = (X − X̃)·X̃ᵀ / rows

and GPTQ then rounds T in place of W, with the same Hessian H = X̃·X̃ᵀ / rows. If the output is added to a residual stream
that is R̃ where the original has R, T can make up for that, too: R̃ + T·X̃ ≈ R + W·X adds (R − R̃)·X̃ᵀ / rows to W·drift.

Source: least squares. Arai & Ichikawa, "Quantization Error Propagation" (2025), and Zhang et al., "Qronos" (2025), use
the first term in other forms; Li et al., "GPTAQ" (2025), an approximation of it.
"""

import torch
from torch import Tensor

from gptq_ao.errors import SolverError
from gptq_ao.solver.fp32 import ieee_fp32
from gptq_ao.solver.hessian import Hessian
from gptq_ao.solver.normal_equations import solve_with_factor

__all__ = ["compensation_factor", "corrected_target"]

# Of the mean diagonal: the correction is an estimate, and larger than rounding errors.
SMALLEST_DAMPING = 0.3
# How much of the estimates is used. Measured: all of it is worse, on data that was not calibrated with.
OF_INPUTS, OF_RESIDUAL = 0.75, 0.375


def compensation_factor(hessian: Hessian) -> Tensor:
    """Of H + λ above: [K, K] fp32, lower.

    Raises:
        SolverError: H has no factor even when damped.
    """
    k = len(hessian.matrix)
    diagonal = hessian.matrix.diagonal()
    live = diagonal > 0
    mean = diagonal.sum() / live.sum().clamp(min=1)
    # More than for rounding: there H weighs errors, here its inverse multiplies an estimate from the same few rows.
    damp = min(max(k / max(hessian.rows, 1), SMALLEST_DAMPING), 1.0)
    H = hessian.matrix.clone()
    # 1 where nothing was seen: the drift is zero there, whatever it is divided by.
    H.diagonal().add_(damp * mean + (~live))
    with ieee_fp32():
        lower, info = torch.linalg.cholesky_ex(H)
    if info.item():
        raise SolverError(
            f"the Hessian [{k}, {k}] of {hessian.rows} rows is not positive definite even with {damp:.3g} of its mean "
            'diagonal added: check the calibration data, or set compensate="none" for the layer with a rule'
        )
    return lower


def corrected_target(
    weight: Tensor, hessian: Hessian, residual: Tensor | None = None, lower: Tensor | None = None
) -> Tensor:
    """T above, for `weight` [N, K].

    Args:
        weight: floating point.
        hessian: that of the inputs, with its `drift`.
        residual: [N, K] fp32, (R − R̃)·X̃ᵀ / rows; None: the residual stream is not corrected.
        lower: its `compensation_factor`, if that is there already.

    Returns:
        [N, K] fp32.

    Raises:
        SolverError: see `compensation_factor`.
    """
    weight = weight.float()
    if hessian.drift is None and residual is None:
        return weight
    wrong = torch.zeros_like(weight)
    if hessian.drift is not None:
        # Three digits are enough: the drift is a mean of differences of activations that have no more.
        with ieee_fp32(cuda="tf32"):
            wrong.addmm_(weight, hessian.drift, alpha=OF_INPUTS)
    if residual is not None:
        wrong.add_(residual, alpha=OF_RESIDUAL)
    if lower is None:
        lower = compensation_factor(hessian)
    return weight + solve_with_factor(wrong, lower)

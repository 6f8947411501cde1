"""How far a quantized weight is from the original, as the tests measure it."""

from torch import Tensor

from gptq_ao.solver.hessian import Hessian
from gptq_ao.solver.solve import output_energy

__all__ = ["relative_error"]


def relative_error(weight: Tensor, quantized: Tensor, hessian: Hessian) -> float:
    """tr(E·H·Eᵀ) / tr(W·H·Wᵀ) with E = W − Ŵ: the share of the output's energy that the rounding changed."""
    energy = output_energy(weight, hessian)
    return output_energy(weight.float() - quantized, hessian) / energy if energy > 0 else 0.0

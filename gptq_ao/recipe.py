"""What decides how a weight is rounded, beside its values and the data: the settings that a rule may give to each."""

from dataclasses import dataclass

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Weights with equal recipes and the same Hessian are solved together. The defaults are GPTQ as it was published.

    `gptq_config` says what each setting means; `GPTQConfig` checks the values.
    """

    bits: int = 4
    group_size: int = -1
    sym: bool = True
    act_order: str = "none"
    damp_percent: float | None = None
    method: str = "gptq"
    signed_scale: bool = False
    scale_candidates: int = 1
    refine_sweeps: int = 0
    compensate: str = "none"
    adapter_rank: int = 0
    adapter_rounds: int = 2

    @property
    def signed(self) -> bool:
        """Whether a scale may be negative. An asymmetric grid has a zero point for that."""
        return self.sym and self.signed_scale

    @property
    def permutes(self) -> bool:
        """Whether the codes are stored in solving order, so that the activation is permuted at run time."""
        return self.method == "gptq" and self.act_order == "group"

    @property
    def compensates(self) -> bool:
        """Whether the weight makes up for what was quantized before it."""
        return self.method == "gptq" and self.compensate != "none"

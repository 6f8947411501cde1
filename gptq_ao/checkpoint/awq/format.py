"""AWQ's format."""

from gptq_ao.checkpoint.awq.read import AWQ_PARTS, awq_weights, check_activations
from gptq_ao.checkpoint.awq.tensors import encode_awq
from gptq_ao.checkpoint.awq.write import awq_config_of
from gptq_ao.checkpoint.exchange.format import Format
from gptq_ao.checkpoint.exchange.hub_names import grouped

__all__ = ["AWQ"]

AWQ = Format(
    name="awq",
    quant_method="awq",
    parts=AWQ_PARTS,
    read=awq_weights,
    config=awq_config_of,
    encode=lambda weight, dtype: encode_awq(grouped(weight)),
    scale="scales",
    others=r"\.(qweight|qzeros)$",
    needs=("accelerate", "gptqmodel"),
    check_dense=check_activations,
)

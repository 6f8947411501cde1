"""The two versions of GPTQ's format."""

import dataclasses

from gptq_ao.checkpoint.exchange.format import Format
from gptq_ao.checkpoint.exchange.hub_names import grouped
from gptq_ao.checkpoint.gptq.read import GPTQ_PARTS, gptq_weights
from gptq_ao.checkpoint.gptq.tensors import encode_gptq
from gptq_ao.checkpoint.gptq.write import gptq_config_of

__all__ = ["GPTQ", "GPTQ_V2"]

GPTQ = Format(
    name="gptq",
    quant_method="gptq",
    parts=GPTQ_PARTS,
    read=gptq_weights,
    config=lambda model: gptq_config_of(model, "gptq"),
    encode=lambda weight, dtype: encode_gptq(grouped(weight), version=1),
    scale="scales",
    others=r"\.(qweight|qzeros|g_idx)$",
    needs=("optimum", "gptqmodel"),
    config_file="quantize_config.json",
)
# One reader for both: the version is in the config, and only zero points depend on it.
GPTQ_V2 = dataclasses.replace(
    GPTQ,
    name="gptq_v2",
    config=lambda model: gptq_config_of(model, "gptq_v2"),
    encode=lambda weight, dtype: encode_gptq(grouped(weight), version=2),
)

"""compressed-tensors as one of the formats."""

from gptq_ao.checkpoint.compressed_tensors.read import COMPRESSED_PARTS, compressed_weights
from gptq_ao.checkpoint.compressed_tensors.tensors import encode_compressed
from gptq_ao.checkpoint.compressed_tensors.write import compressed_config_of
from gptq_ao.checkpoint.exchange.format import Format
from gptq_ao.checkpoint.exchange.hub_names import grouped

__all__ = ["COMPRESSED_TENSORS"]

COMPRESSED_TENSORS = Format(
    name="compressed-tensors",
    quant_method="compressed-tensors",
    parts=COMPRESSED_PARTS,
    read=compressed_weights,
    config=compressed_config_of,
    encode=lambda weight, dtype: encode_compressed(grouped(weight), dtype),
    scale="weight_scale",
    others=r"_(packed|shape|zero_point|g_idx)$",  # transformers 5.17 calls those of experts gate_up_proj_packed, …
    needs=("compressed_tensors",),
)

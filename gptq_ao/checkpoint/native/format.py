"""The native format as one of the formats, in directories that transformers writes.

`save_quantized` and `quantize_checkpoint` write it through `CheckpointWriter`, which adds a manifest and makes it work
for any module: there the config comes last, as it is only known when the last weight has been solved and stored.
"""

from typing import Any

from gptq_ao.checkpoint.exchange.format import Format
from gptq_ao.checkpoint.exchange.hub_names import ExportedModel
from gptq_ao.checkpoint.native.manifest import entry_json, format_version
from gptq_ao.checkpoint.native.read import NATIVE_PARTS, native_config, native_weights
from gptq_ao.checkpoint.native.tensors import encode_native, stored_entry

__all__ = ["NATIVE"]


def _config(model: ExportedModel) -> dict[str, Any]:
    entries = {name: stored_entry(weight) for name, weight in model.quantized.items()}
    return native_config({name: entry_json(e) for name, e in entries.items()}, format_version(entries))


NATIVE = Format(
    name="native",
    quant_method="gptq_ao",
    parts=NATIVE_PARTS,
    read=native_weights,
    config=_config,
    encode=lambda weight, dtype: encode_native(weight),
    scale="scale",
    others=r"\.(codes|zero_point|perm)$",
    hub_names=False,
)

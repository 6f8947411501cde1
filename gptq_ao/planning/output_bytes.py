"""How large a checkpoint will be."""

from torch import Tensor, nn

from gptq_ao.checkpoint.native.manifest import QuantizedEntry
from gptq_ao.checkpoint.native.write import stored_bytes
from gptq_ao.codes.grid import group_columns
from gptq_ao.model.inspection import state_names
from gptq_ao.passes.records import Selection

__all__ = ["result_size"]


def result_size(model: nn.Module, selection: Selection) -> int:
    """What the model takes in files when the selected weights are quantized."""
    state = model.state_dict(keep_vars=True)
    contents: dict[str, Tensor | QuantizedEntry] = {first: state[first] for first, *_ in state_names(model)}
    for name, c in selection.settings.items():
        k = selection.layouts[name].in_features
        rows = contents[name].numel() // k  # type: ignore[union-attr]  # those of all matrices of a stack
        permuted = c.act_order == "group" and c.method == "gptq"
        contents[name] = QuantizedEntry(c.bits, (rows, k), k // group_columns(k, c.group_size), "", False, permuted)
    return stored_bytes(contents)

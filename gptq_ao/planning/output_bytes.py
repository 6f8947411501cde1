"""How large a checkpoint will be."""

from torch import Tensor, nn

from gptq_ao.checkpoint.native.manifest import QuantizedEntry
from gptq_ao.checkpoint.native.write import stored_bytes
from gptq_ao.model.state import state_names
from gptq_ao.passes.records import Selection

__all__ = ["result_size"]


def result_size(model: nn.Module, selection: Selection) -> int:
    """What the model takes in files when the selected weights are quantized."""
    state = model.state_dict(keep_vars=True)
    contents: dict[str, Tensor | QuantizedEntry] = {first: state[first] for first, *_ in state_names(model)}
    layouts = selection.layouts
    for name, c in selection.settings.items():
        layout = layouts[name]
        spec = layout.packed(c.recipe)
        contents[name] = QuantizedEntry.of(spec, state[name].dtype, layout.transposed, layout.view_shape)
    return stored_bytes(contents)

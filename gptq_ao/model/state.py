"""A model's parameters and persistent buffers, and which of their names are names of one tensor."""

from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.errors import CheckpointError
from gptq_ao.model.weights import ModelWeights, is_offloaded, value_in_memory

__all__ = ["state_names"]


def state_names(model: nn.Module) -> list[list[str]]:
    """The names of every parameter and persistent buffer, in the model's order; those of a tied one in one list.

    Raises:
        CheckpointError: the model has state that is not a tensor.
    """
    # `keep_vars`: the parameters themselves, not detached copies.
    state = model.state_dict(keep_vars=True)
    places: dict[str, Any] = {}
    for name, value in state.items():
        # A module may put anything into its state_dict, through `get_extra_state`.
        if not isinstance(value, Tensor):
            raise CheckpointError(f"state {name!r} is a {type(value).__name__}, not a tensor: it cannot be saved")
        held = value_in_memory(model, name) if value.device.type == "meta" else None
        places[name] = _place(value if held is None else held)
    for a, b in _tied_in_files(model, state, places):
        places = {name: places[a] if place == places[b] else place for name, place in places.items()}
    names: dict[Any, list[str]] = {}
    for name, place in places.items():
        names.setdefault(place, []).append(name)
    return list(names.values())


def _place(tensor: Tensor) -> Any:
    """Equal for two tensors that show the same elements of the same memory. Tied parameters may be two objects
    (`a.data = b.data`), and parameters in the same memory need not be tied (parts of a larger one)."""
    made_of: Any = getattr(tensor, "__tensor_flatten__", None)  # of a subclass that wraps other tensors
    if made_of is not None:
        names, attributes = made_of()
        return type(tensor), repr(attributes), tuple(_place(getattr(tensor, name)) for name in names)
    # Its storage by identity, not by address: on meta there is none. Python objects for one storage come and go.
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _tied_in_files(model: nn.Module, state: dict[str, Any], places: dict[str, Any]) -> list[tuple[str, str]]:
    """Weights that transformers has tied and hooks have put into two files: memory cannot tell that they are tied, nor
    does it show that they are not any more."""
    found = []
    for b, a in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if a in state and b in state and places[a] != places[b] and is_offloaded(model, a) and is_offloaded(model, b):
            get = ModelWeights(model).get
            if state[a].shape == state[b].shape and torch.equal(get(a), get(b)):
                found.append((a, b))
    return found

"""A model that runs although its values are elsewhere: in files, or on another device than the one that computes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.model.weights import ModelWeights, Weights, is_offloaded

__all__ = ["in_pieces"]

Place = tuple[dict[str, Any], str]  # of a module's parameters or buffers, and the name in it


@contextlib.contextmanager
def in_pieces(weights: Weights, device: torch.device) -> Iterator[None]:
    """Within, `weights.model` computes on `device`. The layers of a list have their values only while they run, one
    layer at a time; what is in no list (embeddings, the last norm, the head) has them throughout.

    A model whose values are all there already runs as it is, and so does one that accelerate has dispatched.
    """
    model = weights.model
    if isinstance(weights, ModelWeights) and (weights.device == device or _dispatched(model)):
        yield
        return
    tensors = _tensors(model)
    layers = [layer for each in _lists(model) for layer in each]
    inner = {id(m) for layer in layers for m in layer.modules()}
    pieces = [_Piece(weights, device, [layer], tensors) for layer in layers]
    rest = _Piece(weights, device, [m for m in model.modules() if id(m) not in inner], tensors, deep=False)
    with contextlib.ExitStack() as until_done:
        until_done.callback(rest.drop)
        rest.load()
        for layer, piece in zip(layers, pieces, strict=True):
            until_done.callback(piece.drop)
            until_done.callback(layer.register_forward_pre_hook(piece.load).remove)
            until_done.callback(layer.register_forward_hook(piece.drop, always_call=True).remove)
        yield


class _Piece:
    """Some modules, whose values come and go."""

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        modules: list[nn.Module],
        tensors: dict[int, str],
        *,
        deep: bool = True,
    ) -> None:
        self._weights, self._device, self._tensors = weights, device, tensors
        self._modules = [inner for m in modules for inner in (m.modules() if deep else (m,))]
        self._before: list[tuple[Place, Tensor]] = []

    def load(self, *_: object) -> None:
        loaded: dict[str, Tensor] = {}
        for module in self._modules:
            # Whatever is not in `tensors` has been brought in already, by another piece.
            for place in (module._parameters, module._buffers):
                there: dict[str, Any] = place
                for name, old in [(n, t) for n, t in there.items() if id(t) in self._tensors]:
                    first = self._tensors[id(old)]
                    if first not in loaded:
                        value = self._weights.get(first, self._device)
                        is_parameter = isinstance(old, nn.Parameter)
                        loaded[first] = nn.Parameter(value, requires_grad=False) if is_parameter else value
                    there[name] = loaded[first]
                    self._before.append(((there, name), old))

    def drop(self, *_: object) -> None:
        while self._before:
            (there, name), old = self._before.pop()
            there[name] = old


def _tensors(model: nn.Module) -> dict[int, str]:
    """Parameter or buffer → its first name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {id(t): name for name, t in named}


def _lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    """Those that are in no other."""
    todo = [model]
    while todo:
        for child in todo.pop().children():
            if isinstance(child, nn.ModuleList):
                yield child
            else:
                todo.append(child)


def _dispatched(model: nn.Module) -> bool:
    return any(is_offloaded(model, name) for name, p in model.named_parameters() if p.is_meta)

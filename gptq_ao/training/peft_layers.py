"""The layers that PEFT puts into a model, taken out of it, and what they make of the weights.

What an adapter does to a weight is PEFT's own business: its `merge` runs, on a copy of the layer whose weights are
dense. So all kinds of adapters are merged that PEFT can merge into dense weights: LoRA with all its variants, several
at once, and others.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.errors import ConfigError, NonFiniteError
from gptq_ao.tensor import GroupTensor

__all__ = ["AdaptedWeight", "PlainModel"]


@dataclass(frozen=True)
class AdaptedWeight:
    """A quantized weight that adapters change.

    Attributes:
        layer: of PEFT, around the weight's module.
        parameter: its name there.
        weight: as it is.
    """

    layer: nn.Module
    parameter: str
    weight: GroupTensor

    def merged(self) -> Tensor:
        """With the adapters, fp32."""
        return _merged(self.layer)[self.parameter]


@dataclass
class PlainModel:
    """A model without PEFT's layers. The modules are those of the model that has them, changed in place.

    Attributes:
        model: with adapters merged into what is dense, and modules that were trained as a whole in place.
        adapted: name → quantized weight whose adapters are merged nowhere yet.
        untied: whether the output head does not share the weight of the input embeddings any more.
    """

    model: nn.Module
    adapted: dict[str, AdaptedWeight] = field(default_factory=dict)
    untied: bool = False
    _undo: list[Callable[[], object]] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> "PlainModel":
        """
        Args:
            model: a `PeftModel`, or one into which PEFT or transformers has put adapters.

        Raises:
            ConfigError: there are no adapters, they are merged already or disabled, or cannot be merged.
            NonFiniteError: a merged weight has an element that is NaN or infinite.
        """
        import peft

        base = model
        if isinstance(model, peft.PeftModel):
            if model.active_peft_config.is_prompt_learning:
                raise ConfigError(f"{model.active_peft_config.peft_type} adds inputs: there is nothing to merge")
            base = model.get_base_model()
        made = cls(base)
        tied = _tied(base)
        try:
            layers = list(made._take_out(base, set()))
            if not layers:
                raise ConfigError(f"the {type(model).__name__} has no adapters of PEFT: nothing to merge")
            for name, layer in layers:
                made._merge(name, layer)
            made._name_weights()
        except BaseException:
            made.undo()
            raise
        made._forget_peft()
        if tied and not _tied(base):
            made._set(vars(base.config), "tie_word_embeddings", False)
            made.untied = True
        return made

    def undo(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()

    def _set(self, table: dict[str, Any], key: str, value: Any) -> None:
        before = table[key]
        self._undo.append(lambda: table.__setitem__(key, before))
        table[key] = value

    def _forget_peft(self) -> None:
        table: dict[str, Any] = vars(self.model)
        before: dict[str, Any] = {
            name: table.pop(name) for name in ("peft_config", "_hf_peft_config_loaded") if name in table
        }
        self._undo.append(lambda: table.update(before))

    def _take_out(self, parent: Any, seen: set[int], prefix: str = "") -> Iterator[tuple[str, Any]]:
        """The names and layers that can be merged. Each module is where its layer was."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        if id(parent) in seen:
            return
        seen.add(id(parent))
        for leaf, child in list(parent._modules.items()):
            name = prefix + leaf
            layer: Any = child
            if isinstance(child, ModulesToSaveWrapper):
                trained = child.original_module
                if child.active_adapters:
                    trained = child.modules_to_save[str(child.active_adapter)]
                self._set(parent._modules, leaf, trained)
                layer = child = trained
            elif isinstance(child, AuxiliaryTrainingWrapper):
                layer = getattr(child, "token_adapter", child)
            if isinstance(layer, BaseTunerLayer):
                self._set(parent._modules, leaf, layer.get_base_layer())
                yield name, layer
            elif child is not None:
                yield from self._take_out(child, seen, f"{name}.")

    def _merge(self, name: str, layer: Any) -> None:
        """Into dense parameters; of a quantized one it is only noted, under an unfinished name."""
        if layer.merged_adapters:
            raise ConfigError(
                f"{name!r} has adapters that are merged already: model.unmerge_adapter() first, so that they are "
                "merged into the weights as they were"
            )
        if layer.disable_adapters:
            raise ConfigError(f"the adapters of {name!r} are disabled: model.enable_adapter_layers() to merge them")
        module = layer.get_base_layer()
        try:
            merged = _merged(layer)
        except (NotImplementedError, RuntimeError, AttributeError, ValueError) as e:
            raise ConfigError(
                f"{name!r}: PEFT cannot merge a {type(layer).__name__} ({type(e).__name__}: {str(e).splitlines()[0]})"
            ) from e
        for leaf, value in merged.items():
            old = module._parameters[leaf]
            if torch.equal(value, _fp32(old)):
                continue  # no adapter changes it
            if not torch.isfinite(value).all():
                raise NonFiniteError(f"with its adapters, {name}.{leaf} has elements that are NaN or infinite")
            if isinstance(old, GroupTensor):
                self.adapted[f"{name}.{leaf}"] = AdaptedWeight(layer, leaf, old)
            else:
                new = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
                self._set(module._parameters, leaf, new)

    def _name_weights(self) -> None:
        """Names as parameters have them. A module may have several, and `_take_out` met it by any of them."""
        owners: dict[int, list[str]] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(p), []).append(name)
        modules = {id(w.weight): w for w in self.adapted.values()}
        for key in modules:
            places = {id(self.model.get_submodule(n.rpartition(".")[0])) for n in owners[key]}
            if len(places) > 1:
                raise ConfigError(
                    f"{' and '.join(map(repr, owners[key]))} are one quantized weight, and an adapter changes it for "
                    "one of them: each needs a weight of its own. Merge before quantizing (`merge_and_unload`)"
                )
        self.adapted = {owners[key][0]: w for key, w in modules.items()}


def _tied(model: nn.Module) -> bool:
    """Whether a model of transformers says, rightly, that its head has the weight of its embeddings."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    ends = (getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings"))
    first, last = (getattr(getattr(m, "base_layer", m), "weight", None) for m in ends)
    return first is not None and first is last


def _merged(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters of the module inside of a layer, by name, as its active adapters make them: fp32."""
    from peft.tuners.lora.layer import Linear

    with torch.no_grad():
        chain = _dense_copy(layer)
        layers: list[Any] = chain[1:]
        for each in layers:
            # A class that PEFT makes for quantized weights merges in its own way.
            merge: Any = Linear.merge if isinstance(each, Linear) else type(each).merge
            merge(each)
    return {name: p.detach() for name, p in chain[0]._parameters.items() if p is not None}


def _dense_copy(layer: nn.Module) -> list[nn.Module]:
    """Copies of a module and of the layers around it, from the inside to the outside. Adapters are shared."""
    same = copy.copy(layer)
    if "base_layer" not in layer._modules:
        same._parameters = {
            n: None if p is None else nn.Parameter(_fp32(p), requires_grad=False) for n, p in layer._parameters.items()
        }
        return [same]
    inside = _dense_copy(layer.base_layer)  # type: ignore[arg-type]
    same._modules = {**layer._modules, "base_layer": inside[-1]}
    for name in ("merged_adapters", "_caches"):  # where PEFT notes what it has merged
        if name in vars(same):
            setattr(same, name, copy.copy(getattr(same, name)))
    return [*inside, same]


def _fp32(parameter: Tensor) -> Tensor:
    """A copy of the values."""
    if isinstance(parameter, GroupTensor):
        return parameter.dequantize(torch.float32)
    return parameter.detach().to(torch.float32, copy=True)

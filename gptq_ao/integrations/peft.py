"""PEFT: adapters of every kind on quantized weights, by PEFT's own layers for dense ones.

Its tuners read a base weight when they make an adapter, some of them take a part out of it (PiSSA), and merging writes
it. While one of these runs, the weights of that one layer are dense: PEFT does there what it always does, whatever the
method. Afterwards the same parameter is back. Where its values have changed, they are rounded, each weight with its own
bits and groups, and that is said. What was there before a merge is kept until `unmerge`.
"""

import contextlib
import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from gptq_ao.tensor import GroupTensor
from gptq_ao.tensor.requantize import nearest

__all__ = ["register"]

MADE = (
    "the initialization of the adapter takes a part out of quantized weights ({count} of them), and what is left is "
    "rounded to nearest again. The error is {error:.2g} times the size of that part. To start with less, make the "
    "adapter for the dense model, and quantize that then: quantize_ leaves adapters alone"
)
MERGED = (
    "an adapter is merged into quantized weights ({count} of them), which are rounded to nearest again. The error is "
    "{error:.2g} times the size of what the adapter adds. gptq_ao.training.merge_and_requantize_ chooses the codes by "
    "calibration data instead, and loses less"
)
UNMERGED = (
    "an adapter is taken out of weights ({count} of them) that were quantized, or into which another one was merged, "
    "after it was merged itself: they are rounded to nearest again. The error is {error:.2g} times the size of what it "
    "had added"
)
MERGES = "_gptq_ao_merges"  # attribute of a layer of PEFT: weight → its codes before and after the merge


def register() -> None:
    """Make PEFT's classes work with quantized weights. Importing gptq_ao does this as soon as PEFT is there."""
    for tuner in _with_subclasses(BaseTuner):
        _replace(tuner, "_create_and_replace", _making)
        _replace(tuner, "inject_adapter", functools.partial(_saying, MADE))
        _replace(tuner, "merge_adapter", functools.partial(_saying, MERGED))
        _replace(tuner, "unmerge_adapter", functools.partial(_saying, UNMERGED))
        _replace(tuner, "_unload_and_optionally_merge", functools.partial(_saying, MERGED))
    for layer in _with_subclasses(BaseTunerLayer):
        _replace(layer, "merge", _merging)
        _replace(layer, "unmerge", _unmerging)
    _replace(BaseTunerLayer, "get_base_weight", _reading)
    _replace(BaseTunerLayer, "_cast_input_dtype", _casting)
    # It merges, multiplies, and unmerges.
    _replace(MultiheadAttention, "forward", functools.partial(_with_dense, _base))
    # A copy is trained.
    _replace(ModulesToSaveWrapper, "update", functools.partial(_with_dense, lambda wrapper: wrapper.original_module))
    # Gradients of the weights themselves, which earlier versions do not take.
    loraga: Any = sys.modules.get("peft.tuners.lora.loraga")
    if loraga is not None:
        estimate = loraga.estimate_gradients
        loraga.estimate_gradients = functools.wraps(estimate)(_with_dense(lambda model: model, estimate))
    prepare = peft.prepare_model_for_kbit_training
    by = _preparing(prepare)
    for module in list(sys.modules.values()):  # whoever has imported it by its name
        if getattr(module, "__dict__", {}).get(prepare.__name__) is prepare:
            setattr(module, prepare.__name__, by)


def _with_subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_with_subclasses, cls.__subclasses__()))


def _replace(cls: type, name: str, by: Callable[[Any], Any]) -> None:
    """A class's own method; one that it inherits is replaced where it comes from."""
    if inspect.isfunction(method := vars(cls).get(name)) and not getattr(method, "__isabstractmethod__", False):
        setattr(cls, name, functools.wraps(method)(by(method)))


@dataclass(frozen=True)
class _Weight:
    """A quantized parameter, and where it belongs."""

    owner: nn.Module
    name: str
    parameter: GroupTensor

    def put(self, codes: GroupTensor) -> None:
        """In place: all that refer to the parameter, such as a tied module, see that."""
        self.parameter.data = codes.to(self.parameter.device, self.parameter.dtype)


# Size of the error and of the change, of each weight that was rounded, for who is asked to say it.
_report: ContextVar[list[tuple[float, float]]] = ContextVar("_report")


@contextlib.contextmanager
def _said(text: str) -> Iterator[None]:
    """One warning for all the weights of a model: `text`, with their number and the error."""
    if _report.get(None) is not None:
        yield  # whoever is around this says it
        return
    report: list[tuple[float, float]] = []
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)
    error, change = (math.hypot(*sizes) for sizes in zip(*report, strict=True)) if report else (0.0, 0.0)
    if error > 0:
        warnings.warn(text.format(count=len(report), error=error / change), stacklevel=4)


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _quantized(module: nn.Module) -> dict[str, _Weight]:
    """The quantized weights of a module and of those inside of it, by name."""
    return {
        f"{path}.{name}": _Weight(owner, name, parameter)
        for path, owner in module.named_modules()
        for name, parameter in owner._parameters.items()
        if isinstance(parameter, GroupTensor)
    }


def _plain(module: nn.Module) -> Iterator[nn.Parameter]:
    """What is not quantized beside a quantized weight: a bias."""
    return (p for p in module._parameters.values() if p is not None and not isinstance(p, GroupTensor))


def _same(a: GroupTensor, b: GroupTensor) -> bool:
    return all(torch.equal(x, y.to(x.device)) for x, y in zip(a.parts().values(), b.parts().values(), strict=True))


@contextlib.contextmanager
def _dense(weights: dict[str, _Weight]) -> Iterator[dict[str, Tensor]]:
    """Dense parameters in place of quantized ones, for a while. Gives what they were at the end, by name."""
    values: dict[str, Tensor] = {}
    # Not by `setattr`, which may have been told to make every new parameter on the meta device.
    for w in weights.values():
        w.owner._parameters[w.name] = nn.Parameter(w.parameter.dequantize(), requires_grad=False)
    try:
        yield values
    finally:
        for name, w in weights.items():
            values[name] = getattr(w.owner, w.name).detach()
            vars(w.owner).pop(w.name, None)  # there it is if it was replaced by a tensor that is not a parameter
            w.owner._parameters[w.name] = w.parameter


def _rounded(weights: dict[str, _Weight], values: dict[str, Tensor]) -> dict[str, GroupTensor]:
    """The new codes of those weights whose values have changed. Nothing is replaced yet."""
    codes = {}
    for name, w in weights.items():
        before, now = w.parameter.dequantize(), values[name]
        # On the meta device there are no values.
        if not before.is_meta and not now.is_meta and not torch.equal(before, now):
            codes[name] = nearest(w.parameter, now)
            error, change = (codes[name].dequantize() - now).float().norm(), (now - before).float().norm()
            _report.get().append((float(error), float(change)))
    return codes


def _saying(text: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def and_say(*args: Any, **kwargs: Any) -> Any:
        with _said(text):
            return method(*args, **kwargs)

    return and_say


def _making(create: Callable[..., Any]) -> Callable[..., Any]:
    """`_create_and_replace` of a tuner: makes the layer around a `target`, or one adapter more in it."""
    parameters = inspect.signature(create)

    def create_on_dense(*args: Any, **kwargs: Any) -> Any:
        target = parameters.bind(*args, **kwargs).arguments.get("target")
        weights = {} if target is None else _quantized(_base(target))
        with _said(MADE):
            with _dense(weights) as values:
                made = create(*args, **kwargs)
            for name, codes in _rounded(weights, values).items():
                weights[name].put(codes)
        return made

    return create_on_dense


def _merging(merge: Callable[..., None]) -> Callable[..., None]:
    """`merge` of a layer: adds adapters to the weights."""
    parameters = inspect.signature(merge)

    def merge_and_round(layer: Any, *args: Any, **kwargs: Any) -> None:
        weights = _quantized(_base(layer))
        if not weights:
            merge(layer, *args, **kwargs)
            return
        given = parameters.bind(layer, *args, **kwargs)
        earlier = list(layer.merged_adapters)
        if earlier:
            names = check_adapters_to_merge(layer, given.arguments.get("adapter_names"))
            if not names:
                return
            # All of them once more, so that nothing is rounded twice.
            layer.unmerge()
            given.arguments["adapter_names"] = earlier + names
        plain = {p: p.detach().clone() for w in weights.values() for p in _plain(w.owner)}
        try:
            with _said(MERGED):
                with _dense(weights) as values:
                    merge(*given.args, **given.kwargs)
                rounded = _rounded(weights, values)
        except BaseException:
            # As it was before: adapters are merged, and checked, one after another.
            for p, value in plain.items():
                p.data = value
            layer.merged_adapters = []
            if earlier:
                layer.merge(adapter_names=earlier)
            raise
        before = {name: w.parameter.replace() for name, w in weights.items()}
        setattr(layer, MERGES, {name: (codes, rounded.get(name, codes)) for name, codes in before.items()})
        for name, codes in rounded.items():
            weights[name].put(codes)

    return merge_and_round


def _unmerging(unmerge: Callable[..., None]) -> Callable[..., None]:
    """`unmerge` of a layer. PEFT subtracts what was added, which codes cannot do: those from before are put back."""

    def unmerge_exactly(layer: Any, *args: Any, **kwargs: Any) -> None:
        weights = _quantized(_base(layer))
        if not weights or not layer.merged_adapters:
            unmerge(layer, *args, **kwargs)
            return
        with _said(UNMERGED):
            # Its bookkeeping, and what is dense. That its results can be inaccurate, as it may say, is true of others.
            with _dense(weights) as values, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                unmerge(layer, *args, **kwargs)
            merges = vars(layer).pop(MERGES, {}) if not layer.merged_adapters else {}
            for name, (before, after) in merges.items():
                # Another layer with the same weight may have merged something since.
                if _same(weights[name].parameter, after):
                    weights.pop(name).put(before)
            for name, codes in _rounded(weights, values).items():
                weights[name].put(codes)

    return unmerge_exactly


def _reading(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`get_base_weight` of a layer: a weight that may be changed."""

    def read_dense(layer: Any) -> Tensor:
        weight = read(layer)
        return weight.dequantize() if isinstance(weight, GroupTensor) else weight

    return read_dense


def _casting(cast: Callable[..., Any]) -> Callable[..., Any]:
    """`_cast_input_dtype` of a layer: x for the adapter, unless autocast would cast it back, as PEFT does beside the
    weights of bitsandbytes: the copies take a tenth of a step."""

    def cast_unless_autocast(layer: Any, x: Any, dtype: torch.dtype) -> Any:
        if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type) and _is_quantized(layer):
            return x
        return cast(layer, x, dtype)

    return cast_unless_autocast


def _is_quantized(layer: BaseTunerLayer) -> bool:
    return isinstance(getattr(layer.get_base_layer(), "weight", None), GroupTensor)


def _with_dense(module: Callable[..., nn.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that leaves the weights of `module`, a function of its first argument, as they are."""

    def with_dense(first: Any, *args: Any, **kwargs: Any) -> Any:
        with _dense(_quantized(module(first))):
            return method(first, *args, **kwargs)

    return with_dense


def _preparing(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """`prepare_model_for_kbit_training` makes a model fp32, unless it knows that it is quantized."""

    @functools.wraps(prepare)
    def prepare_quantized(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(p, GroupTensor) for p in model.parameters()):
            return prepare(model, *args, **kwargs)
        before = vars(model).get("quantization_method")
        model.quantization_method = "torchao"
        try:
            return prepare(model, *args, **kwargs)
        finally:
            if before is None:
                del model.quantization_method
            else:
                model.quantization_method = before

    return prepare_quantized

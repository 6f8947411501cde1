"""model + sample batch → Program, by torch.export.

Invariant: every parameter, buffer and constant is a placeholder that maps to one name in the model (the first, if
tied). The model, its config and all global state are as before when this returns, whatever happens.

Every axis of every input is dynamic (`Dim.AUTO`): only what the model itself fixes gets a fixed size. The capture is
functional (no node writes to its inputs) and runs in eval mode, without key-value cache and without the fused inference
path of nn.MultiheadAttention, which hides its weights.
"""

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind

from gptq_ao.batches import Batch
from gptq_ao.errors import CaptureError
from gptq_ao.passes.records import Program

__all__ = ["calibration_mode", "capture"]


def capture(model: nn.Module, batch: Batch, device: torch.device | None = None) -> Program:
    """Trace `model(*batch.args, **batch.kwargs)`. Parameters are replaced by fakes: nothing is computed or allocated.

    Args:
        device: where the traced model is said to be; None: where its first parameter is. Parameters may really be
            elsewhere, or on the meta device.

    Raises:
        CaptureError: torch.export cannot express the model as one graph; the message says why and what to change.
    """
    names = [f"arg{i}" for i in range(len(batch.args))]
    clash = sorted(set(names) & set(batch.kwargs))
    if clash:
        raise CaptureError(f"keyword input {clash[0]!r} has a name that is used for positional inputs: rename it")
    device = device or next(model.parameters()).device
    sample = _two_rows(_moved(batch, device))
    axes = pytree.tree_map(_dynamic, (sample.args, sample.kwargs))
    shapes = {**dict(zip(names, axes[0], strict=True)), **axes[1]}
    with (
        _attributes_restored(model),
        _all_on(model, device),
        calibration_mode(model),
        _plain_signature(model, names, list(batch.kwargs)),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings(
            "ignore", "The tensor attribute", UserWarning
        )  # … assigned in forward: restored on exit
        try:
            exported = torch.export.export(model, sample.args, dict(sample.kwargs), dynamic_shapes=shapes, strict=False)
            if any(_needs_functionalization(n) for n in exported.graph.nodes):
                exported = exported.run_decompositions({})
        except Exception as e:  # torch.export raises whatever the model's forward raises
            raise CaptureError(_explain(e)) from e
    return _program(exported, sample, model)


@contextlib.contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no key-value cache, no fused attention module. All of it is restored on exit."""
    training = [m for m in model.modules() if m.training]
    caching = [c for c in _configs(model) if getattr(c, "use_cache", None)]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        for c in caching:
            c.use_cache = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for c in caching:
            c.use_cache = True
        for m in training:
            m.training = True


def _configs(model: nn.Module) -> list[Any]:
    """The Hugging Face configs of a model's modules and their sub-configs, each once."""
    found: dict[int, Any] = {}
    todo: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    while todo:
        config = todo.pop()
        if id(config) not in found and hasattr(config, "to_dict"):
            found[id(config)] = config
            todo += [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()]
    return list(found.values())


@contextlib.contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """A forward may store tensors on its modules (rotary tables, masks). Under capture they are fakes, which would
    break the next eager forward."""
    tables = ("_parameters", "_buffers", "_modules")
    saved = [(m, dict(m.__dict__), {t: dict(m.__dict__[t]) for t in tables}) for m in model.modules()]
    try:
        yield
    finally:
        for m, attributes, contents in saved:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for table, content in contents.items():
                m.__dict__[table].clear()
                m.__dict__[table].update(content)


@contextlib.contextmanager
def _all_on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model as if all of it were on `device`: fakes for what is not, and without accelerate's hooks, which would
    load real values. Undone by `_attributes_restored`."""
    fakes: dict[int, Any] = {}  # tied ones stay tied
    with FakeTensorMode():
        for module in model.modules():
            if hasattr(module, "_hf_hook"):
                module.forward = module._old_forward  # type: ignore[assignment]
            tables: list[dict[str, Any]] = [module._parameters, module._buffers]
            for table in tables:
                for name, t in table.items():
                    if t is None or t.device == device:
                        continue
                    if id(t) not in fakes:
                        fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
                        fakes[id(t)] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
                    table[name] = fakes[id(t)]
    yield


@contextlib.contextmanager
def _plain_signature(model: nn.Module, positional: list[str], keywords: list[str]) -> Iterator[None]:
    """Give `forward` exactly the inputs of the batch: torch.export bundles what goes through **kwargs, and then no
    dynamic shape matches. The attribute set here goes away with `_attributes_restored`."""
    forward = model.forward

    def flat_forward(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(positional, args, strict=False)), **kwargs}
        return _plain_outputs(forward(*[given.pop(p) for p in positional], **given))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind) for n in (*positional, *keywords)]
    flat_forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    model.forward = flat_forward
    yield


def _plain_outputs(value: Any) -> Any:
    """An output dataclass that pytree does not know becomes a dict: only the tensors matter here."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value) not in pytree.SUPPORTED_NODES:
        return {f.name: _plain_outputs(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def _two_rows(batch: Batch) -> Batch:
    """A batch of one row would fix that axis to 1. Its values do not matter: repeat it."""
    if any(t.dim() == 0 or t.shape[0] != 1 for t in batch.tensors()):
        return batch
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: torch.cat([t, t]), (batch.args, batch.kwargs))
    return Batch(args, kwargs)


def _moved(batch: Batch, device: torch.device) -> Batch:
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (batch.args, batch.kwargs))
    return Batch(args, kwargs)


def _dynamic(leaf: Any) -> dict[int, Any] | None:
    return dict.fromkeys(range(leaf.dim()), Dim.AUTO) if isinstance(leaf, torch.Tensor) else None


def _needs_functionalization(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    mutates = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return mutates or isinstance(node.target, torch._ops.HigherOrderOperator)


def _program(exported: ExportedProgram, sample: Batch, model: nn.Module) -> Program:
    parameters, buffers, constants, inputs = {}, {}, {}, []
    first_name = {id(p): name for name, p in model.named_parameters()}  # of tied parameters, the model's own first one
    for s in exported.graph_signature.input_specs:
        name = s.arg.name
        if s.kind == InputKind.PARAMETER:
            parameters[name] = first_name[id(model.get_parameter(str(s.target)))]
        elif s.kind == InputKind.BUFFER:
            buffers[name] = str(s.target)
        elif s.kind in (InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ):
            constants[name] = exported.constants[str(s.target)]
        elif s.kind == InputKind.USER_INPUT:
            inputs.append(None if isinstance(s.arg, ConstantArgument) else name)
        else:
            raise CaptureError(f"the graph has an input of an unexpected kind: {s.kind}")
    flat, spec = pytree.tree_flatten((sample.args, sample.kwargs))
    ranges = {}
    for symbol, r in exported.range_constraints.items():
        low, high = (float(b) if b.is_finite else float("inf") for b in (r.lower, r.upper))
        ranges[symbol] = (0.0 if low <= 2 else low, high)  # a lower bound of 2 only says "not 0 or 1"
    return Program(
        exported.graph_module,
        parameters,
        buffers,
        constants,
        tuple(inputs),
        {i: value for i, (name, value) in enumerate(zip(inputs, flat, strict=True)) if name is None},
        spec,
        tuple(sample.kwargs),
        ranges,
    )


_REASONS: Sequence[tuple[str, str]] = (
    ("GuardOnDataDependent", "its forward branches on, or sizes a tensor by, the values of a tensor"),
    ("data-dependent", "its forward branches on, or sizes a tensor by, the values of a tensor"),
    ("nonzero", "its forward loops over a set that depends on the data"),
    ("Constraints violated", "it needs a fixed size along an input axis"),
    ("flash_attn", "flash attention cannot be captured: load the model with attn_implementation='sdpa'"),
)


def _explain(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    reason = next((why for key, why in _REASONS if key in text), None)
    advice = f" ({reason})" if reason else ""
    return (
        f"torch.export could not capture the model{advice}. First check that model(*args, **kwargs) runs on a "
        f"calibration batch. It said: {text.strip().splitlines()[0][:300]}"
    )

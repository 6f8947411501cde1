"""model + sample batch → Program, by torch.export.

Invariant: every parameter, buffer and constant is a placeholder that maps to one name in the model (the first, if
tied). The model, its config and all global state are as before when this returns, whatever happens.

The axes of the inputs are dynamic (`Dim.AUTO`), so that batches may differ in size; only what the model itself fixes
gets a fixed size. An exception are the heights and widths of images, if all batches agree. (Fixing all sizes would
halve the time. But what a model expands from parameters to the size of the batch, learned queries for example, would
then be made of parameters alone, and no activation.) The capture runs in `calibration_mode`, on stand-ins for the
weights, and its graph writes to nothing.
"""

import contextlib
import dataclasses
import gc
import inspect
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from gptq_ao.calibration.batches import Batch
from gptq_ao.errors import CalibrationError, CaptureError
from gptq_ao.passes.records import Program, static_size
from gptq_ao.passes.tracing.calibration_mode import calibration_mode
from gptq_ao.passes.tracing.explain import explain
from gptq_ao.passes.tracing.functional import make_functional
from gptq_ao.passes.tracing.graph_module import graph_module
from gptq_ao.passes.tracing.known_values import known_values
from gptq_ao.passes.tracing.layer_calls import layer_calls
from gptq_ao.passes.tracing.stand_in import first_names, running_device, stand_in
from gptq_ao.passes.tracing.transformers_help import check_no_assumption, own_formulas, transformers_help
from gptq_ao.passes.tracing.unroll import NotRepeatableError, unroll

__all__ = ["calibration_mode", "capture"]


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Python does not look for garbage: searching the nodes of a growing graph again and again is a tenth of a trace's
    time. At the end it does: torch.export leaves objects that refer to each other and to the model, which would be in
    memory for as long as they are."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.collect(0)  # what was made since
            gc.enable()


@_uncollected()
def capture(
    model: nn.Module, batch: Batch, device: torch.device | str | None = None, others: Sequence[Batch] = ()
) -> Program:
    """Trace `model(*batch.args, **batch.kwargs)`. No weight is read, moved or allocated: it may be on meta or on disk.

    A model that needs the values of a tensor to know its sizes (the image grids of a vision model) is traced with the
    values of this batch's integer inputs, except those as long as the largest one (the token ids, masks, positions).
    `Program.bind` then asks for the same values in every batch. For the rest see `transformers_help`.

    Args:
        device: that will run the graph. None: that of the model's first parameter which is not on meta, else the CPU.
        others: further batches that the graph has to be valid for. They only say which sizes of images vary.

    Raises:
        CaptureError: torch.export cannot express the model as one graph; the message says why, where in the model's
            code, and what to change.
    """
    # In the graph, positional inputs are called arg0, arg1, …: see `_plain_signature`.
    clash = sorted({f"arg{i}" for i in range(len(batch.args))} & set(batch.kwargs))
    if clash:
        raise CaptureError(f"keyword input {clash[0]!r} has a name that is used for positional inputs: rename it")
    device = running_device(model) if device is None else torch.device(device)
    fixed, is_transformers = _geometry(batch), hasattr(getattr(model, "config", None), "to_dict")
    rigid = _rigid_axes(batch, others)
    # From the most general graph to the most special: any data; then the same geometry in every batch; then functions
    # of transformers replaced and sequences limited. If all fail, the user reads of the model's code, not of those.
    try:
        return _captured(model, batch, device, rigid)
    except CaptureError as e:
        error = e
    if fixed:
        try:
            return _captured(model, batch, device, rigid, fixed)
        except CaptureError as e:
            error = e
    if is_transformers:
        with contextlib.suppress(CaptureError), transformers_help(model) as longest:
            program = _captured(model, batch, device, rigid, fixed)
            check_no_assumption(program.graph)
            return _up_to(program, batch, longest)
    raise error


def _captured(
    model: nn.Module,
    batch: Batch,
    device: torch.device,
    rigid: frozenset[tuple[int, int]],
    fixed: frozenset[int] = frozenset(),
    repeats: bool = True,
    doubled: bool = True,
) -> Program:
    """
    Args:
        doubled: a batch of one row is traced as two.
        repeats: layers that are alike are traced twice only, as far as nothing stands against it.
        rigid: (position among the flattened inputs, axis) of the sizes that become part of the graph.
        fixed: positions of the inputs whose values do.
    """
    # Values that become part of the graph have to be those of the batch itself: then it is not doubled.
    sample = _two_rows(batch) if doubled and not fixed else batch
    first_name = first_names(model)
    # Made here rather than by torch.export: `_guards` reads from it afterwards which branches were taken.
    env = ShapeEnv(tracked_fakes=[], trace_asserts=True)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True, export=True)
    with (
        calibration_mode(model),
        stand_in(model, device, mode),
        own_formulas(model),
        _plain_signature(model, sample, fixed, device) as (args, kwargs),
        layer_calls(model) if repeats else contextlib.nullcontext() as layers,
        warnings.catch_warnings(),
        tracing(TracingContext(mode)),  # torch.export takes its fake mode from there
    ):
        # "… assigned in forward": taken back by stand_in.
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
        args, kwargs = _elsewhere((args, kwargs), device)  # the trace needs shapes; nothing is copied to a GPU for it
        leaves, spec = pytree.tree_flatten((args, kwargs))
        axes = spec.unflatten([_dynamic(leaf, i, rigid) for i, leaf in enumerate(leaves)])
        shapes = {**{f"arg{i}": a for i, a in enumerate(axes[0])}, **axes[1]}
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # on failure, torch prints the graph up to there
                exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            # The fast way first: run_decompositions traces the whole model once more.
            if make_functional(exported.graph_module):
                unroll(exported.graph, exported.graph_signature.inputs_to_lifted_tensor_constants)
            elif layers is None or not layers.took_part:
                exported = exported.run_decompositions({})
            else:
                raise NotRepeatableError("the graph has to be traced again as a whole")
        except Exception as e:  # torch.export raises whatever the model's forward raises
            if layers is None or not layers.took_part:
                raise CaptureError(explain(e)) from e
        else:
            program = _program(exported, batch, first_name, env)
            if sample is batch or _takes(program, batch):
                return dataclasses.replace(program, repeated=0 if layers is None else layers.repeated)
            # The model loops over the rows, over images say, so that their number became a part of the graph.
            return _captured(model, batch, device, rigid, fixed, repeats, doubled=False)
    # Of the model as a whole: without copies of layers it may go well, and only then is its error the user's.
    return _captured(model, batch, device, rigid, fixed, repeats=False, doubled=doubled)


@contextlib.contextmanager
def _plain_signature(
    model: nn.Module, batch: Batch, fixed: frozenset[int], device: torch.device
) -> Iterator[tuple[Any, Any]]:
    """Give `forward` exactly the inputs of the batch: torch.export bundles what goes through **kwargs, and then no
    dynamic shape matches. Yields the inputs, without the fixed ones. `stand_in` takes the attribute back."""
    forward = model.forward
    flat, spec = pytree.tree_flatten((batch.args, batch.kwargs))
    values = {i: flat[i] if device.type == "meta" else flat[i].to(device) for i in fixed}
    positional = [f"arg{i}" for i in range(len(batch.args))]

    def flat_forward(*args: Any, **kwargs: Any) -> Any:
        # By position or by name: bring the inputs back into the order in which the batch is flattened.
        given = {**dict(zip([*positional, *batch.kwargs], args, strict=False)), **kwargs}
        leaves = pytree.tree_leaves((tuple(given.pop(p) for p in positional), {k: given[k] for k in batch.kwargs}))
        # Fixed inputs are not traced: in their place, the forward gets the real values.
        args, kwargs = spec.unflatten([values.get(i, leaf) for i, leaf in enumerate(leaves)])
        with known_values() if values else contextlib.nullcontext():
            return _plain_outputs(forward(*args, **kwargs))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind) for n in (*positional, *batch.kwargs)]
    flat_forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    model.forward = flat_forward
    # None keeps the place in the structure, and is a constant to torch.export, not an input of the graph.
    yield pytree.tree_unflatten([None if i in fixed else leaf for i, leaf in enumerate(flat)], spec)


def _plain_outputs(value: Any, inside: frozenset[int] = frozenset()) -> Any:
    """Objects that pytree does not know (dataclasses, distributions) become dicts of the tensors and objects they hold:
    only the tensors matter here. `inside`: the objects that hold this one."""
    # Nothing in a generator is computed, hence traced, before it is asked for.
    if inspect.isgenerator(value):
        return [_plain_outputs(v, inside) for v in value]

    def plain(leaf: Any) -> Any:
        if not _is_object(leaf) or isinstance(leaf, torch.Tensor):
            return leaf
        held = {n: v for n, v in vars(leaf).items() if _is_object(v) or isinstance(v, dict | list | tuple)}
        # Without `inside`, objects that refer to each other in a circle would never end.
        return {n: _plain_outputs(v, inside | {id(leaf)}) for n, v in held.items() if id(v) not in inside}

    return pytree.tree_map(plain, value)


def _is_object(leaf: Any) -> bool:
    return hasattr(leaf, "__dict__") and not isinstance(leaf, type | torch.SymInt | torch.SymFloat | torch.SymBool)


def _takes(program: Program, batch: Batch) -> bool:
    """Whether the graph is valid for a batch."""
    try:
        program.bind(batch, "the batch")
    except CalibrationError:
        return False
    return True


def _two_rows(batch: Batch) -> Batch:
    """A batch of one row would fix that axis to 1. Its values do not matter: repeat it."""
    if any(t.dim() == 0 or t.shape[0] != 1 for t in batch.tensors()):
        return batch
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: torch.cat([t, t]), (batch.args, batch.kwargs))
    return Batch(args, kwargs)


def _geometry(batch: Batch) -> frozenset[int]:
    """Positions, among the flattened inputs, of the integer ones whose values may decide sizes (grids of images). Those
    as long as the largest are left out: they are token ids, masks or positions, whose values vary."""
    integers = {i: t for i, t in enumerate(pytree.tree_leaves((batch.args, batch.kwargs))) if _is_integer(t)}
    largest = max(integers.values(), key=torch.Tensor.numel, default=None)
    return frozenset(i for i, t in integers.items() if largest is not None and t.shape[-1:] != largest.shape[-1:])


def _is_integer(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not (
        leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool
    )


def _elsewhere(inputs: Any, device: torch.device) -> Any:
    """The tensors as fakes on `device`, in a mode of their own: nothing is copied there."""
    mode = FakeTensorMode()

    def fake(t: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)

    return pytree.tree_map_only(torch.Tensor, fake, inputs)


def _dynamic(leaf: Any, position: int, rigid: frozenset[tuple[int, int]]) -> dict[int, Any] | None:
    if not isinstance(leaf, torch.Tensor):
        return None
    return {axis: Dim.AUTO for axis in range(leaf.dim()) if (position, axis) not in rigid}


def _rigid_axes(batch: Batch, others: Sequence[Batch]) -> frozenset[tuple[int, int]]:
    """All axes but the first of images and videos, where the batches agree. What convolutions, windows and pooling make
    of a height and a width of unknown size are formulas that grow with each layer."""
    leaves = pytree.tree_leaves((batch.args, batch.kwargs))
    more = [pytree.tree_leaves((b.args, {k: b.kwargs.get(k) for k in batch.kwargs})) for b in others]
    alike = [m for m in more if len(m) == len(leaves)]  # another structure is reported by `Program.bind`
    return frozenset(
        (i, axis)
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim() >= 4
        for axis in range(1, leaf.dim())
        # Slices, not an index: the other batch's tensor may have fewer axes.
        if all(isinstance(m[i], torch.Tensor) and m[i].shape[axis:][:1] == leaf.shape[axis : axis + 1] for m in alike)
    )


def _program(exported: ExportedProgram, batch: Batch, first_name: dict[str, str], env: ShapeEnv) -> Program:
    parameters, buffers, constants = {}, {}, {}
    inputs: list[str | None] = []
    placeholders = {n.name: n for n in exported.graph.find_nodes(op="placeholder")}
    for s in exported.graph_signature.input_specs:
        name = s.arg.name
        if s.kind == InputKind.PARAMETER:
            # A tied weight has several placeholders. One name for all of them: it is one weight, solved once.
            parameters[name] = first_name[str(s.target)]
        elif s.kind == InputKind.BUFFER:
            buffers[name] = str(s.target)
        elif s.kind in (InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ):
            constants[name] = exported.constants[str(s.target)]
        elif s.kind == InputKind.USER_INPUT and isinstance(s.arg, ConstantArgument):
            inputs.append(None)
            exported.graph.erase_node(placeholders[name])  # the value is in the graph
        elif s.kind == InputKind.USER_INPUT:
            inputs.append(name)
        else:
            raise CaptureError(f"the graph has an input of an unexpected kind: {s.kind}")
    # What the model would leave in its buffers or inputs comes first among the outputs: it is not wanted.
    (output,) = exported.graph.find_nodes(op="output")
    kinds = [s.kind for s in exported.graph_signature.output_specs]
    output.args = (tuple(v for v, k in zip(output.args[0], kinds, strict=True) if k == OutputKind.USER_OUTPUT),)

    flat, spec = pytree.tree_flatten((batch.args, batch.kwargs))
    ranges = {}
    for symbol, r in exported.range_constraints.items():
        low, high = (float(b) if b.is_finite else float("inf") for b in (r.lower, r.upper))
        ranges[symbol] = (0.0 if low <= 2 else low, high)  # a lower bound of 2 only says "not 0 or 1"
    return Program(
        graph_module(exported.graph_module, exported.graph),
        parameters,
        buffers,
        constants,
        tuple(inputs),
        # Literals: what the graph has fixed, so that `Program.bind` can ask for the same in every batch.
        {i: value for i, (name, value) in enumerate(zip(inputs, flat, strict=True)) if name is None},
        spec,
        tuple(batch.kwargs),
        ranges,
        _guards(env, [placeholders[name].meta["val"] for name in inputs if name is not None]),
        _output_names(exported.call_spec.out_spec, len(output.args[0])),
    )


def _output_names(spec: pytree.TreeSpec | None, count: int) -> tuple[str | None, ...]:
    """Per flattened output its key, if what the model returns has keys."""
    children = spec.children() if spec is not None else []
    keys = spec.context if spec is not None else None
    if not isinstance(keys, list) or len(keys) != len(children) or not all(isinstance(k, str) for k in keys):
        return (None,) * count
    # A key that holds several tensors (hidden states of all layers) is repeated for each.
    names = tuple(key for key, child in zip(keys, children, strict=True) for _ in range(child.num_leaves))
    return names if len(names) == count else (None,) * count


def _up_to(program: Program, batch: Batch, longest: float) -> Program:
    """Valid for sequences (the last axis of the largest integer input) no longer than that."""
    if longest == float("inf"):
        return program
    integers = {n: t for n, t in program.bind(batch, "the batch").items() if _is_integer(t)}
    name = max(integers, key=lambda n: integers[n].numel(), default=None)
    if name is None or integers[name].shape[-1] > longest:
        raise CaptureError(f"sequences longer than {longest:g} change the rotary table")
    size = program.placeholders[name].meta["val"].shape[-1]
    if static_size(size) is not None:
        return program
    # From now on `Program.bind` refuses longer sequences.
    low, high = program.ranges.get(size.node.expr, (0, float("inf")))
    return dataclasses.replace(program, ranges={**program.ranges, size.node.expr: (low, min(high, longest))})


def _guards(env: ShapeEnv, inputs: list[Any]) -> tuple[Any, ...]:
    """The conditions for the branches that the model took, over the symbols in the shapes of its inputs."""
    known = {symbol for t in inputs for s in t.shape if static_size(s) is None for symbol in s.node.expr.free_symbols}
    # Conditions over other symbols are of sizes inside of the graph, which a batch cannot be asked for.
    conditions = dict.fromkeys(env.replace(guard.expr) for guard in env.guards)
    return tuple(c for c in conditions if c.free_symbols and c.free_symbols <= known)

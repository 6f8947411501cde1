"""Restore weights of a quantized model to what they were, some at a time, and see how much that helps."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptq_ao.calibration.batches import as_batch
from gptq_ao.config import BITS
from gptq_ao.diagnosis.diagnosis import Advice, Diagnosis, Position, Restored, WorstToken
from gptq_ao.errors import CalibrationError, CaptureError, ConfigError
from gptq_ao.evaluate import next_tokens
from gptq_ao.model.ambient import own_precision
from gptq_ao.model.weights import replace_parameter
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.find_linears import find_linears
from gptq_ao.passes.products.fused_sets import fused_sets
from gptq_ao.passes.tracing.calibration_mode import calibration_mode
from gptq_ao.pipeline.allocate import allocate
from gptq_ao.presentation.layers import depth_of, kind_of
from gptq_ao.progress import Progress, Steps
from gptq_ao.report import Choice, Unit
from gptq_ao.tensor import GroupTensor

__all__ = ["diagnose"]

_EDGES = (0, 16, 64, 256, 1024, 4096, 16384)
_WORST, _BEFORE = 10, 12  # predictions, and tokens that are shown before each


def diagnose(
    model: nn.Module,
    reference: nn.Module,
    chunks: Tensor,
    *,
    add_bits: float = 0.1,
    batch_size: int = 4,
    decode: Callable[[list[int]], str] | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Which weights of `model` hurt. It is run once for each weight, kind and layer, and left as it was.

    Args:
        reference: the model it was made from, of the same class, on the same device.
        chunks: [n, L] int64, token ids of text that it was not calibrated with. What the reference predicts for them is
            kept: 4 bytes for each token and each word of the vocabulary.
        add_bits: what the advice may cost, per quantized weight.
        batch_size: chunks that run together.
        decode: token ids → text, of the tokenizer.
        progress: see `quantize_`.

    Raises:
        CalibrationError: there is no chunk of at least two tokens.
        ConfigError: `model` has no quantized weight, or `reference` has not the same weights, or `add_bits` ≤ 0.
    """
    if chunks.dim() != 2 or chunks.shape[0] == 0 or chunks.shape[1] < 2:
        raise CalibrationError(f"chunks has shape {tuple(chunks.shape)}: nothing to predict")
    if not add_bits > 0:
        raise ConfigError(f"add_bits is {add_bits!r}: give a positive number of bits per weight")
    quantized = {name: p for name, p in model.named_parameters() if isinstance(p, GroupTensor)}
    originals = _originals(quantized, reference)
    units = _units(reference, chunks, quantized)
    depths = sorted({d for d in map(depth_of, quantized) if d is not None})
    layers = {f"layer {d}": [n for n in quantized if depth_of(n) == d] for d in depths}
    kinds = {kind: [n for n in quantized if kind_of(n) == kind] for kind in dict.fromkeys(map(kind_of, quantized))}
    with ExitStack() as stack:
        stack.enter_context(own_precision())
        for m in (model, reference):
            stack.enter_context(calibration_mode(m))
        expected = [_log_p(reference, ids) for ids in chunks.split(batch_size)]
        divergence = _Divergence(model, chunks, batch_size, expected)
        steps = stack.enter_context(Steps(progress, 1 + len(units) + len(kinds) + len(layers), "run"))
        with steps.step("as it is"):
            each = divergence()
        kl = each.mean().item()

        def restored(what: str, names: Sequence[str]) -> Restored:
            with steps.step(what):
                bits = Counter(quantized[n].bits for n in names).most_common(1)[0][0]
                return Restored(what, tuple(names), bits, divergence.with_values(originals, names).mean().item())

        of_units = [restored(_called(names), names) for names in units]
        of_kinds = [restored(kind, names) for kind, names in kinds.items()]
        of_layers = [restored(layer, names) for layer, names in layers.items()]
        advice = _advice(kl, of_units, quantized, add_bits)
        if advice is not None:
            rules, added, hoped = advice
            names = [n for n in quantized if n.removesuffix(".weight") in rules or n in rules]
            measured = divergence.with_values(originals, names).mean().item()
        worst = _worst(each, divergence, chunks, decode or (lambda ids: " ".join(map(str, ids))))
    return Diagnosis(
        kl=kl,
        tokens=each.numel(),
        weights=_best_first(of_units),
        kinds=_best_first(of_kinds),
        layers=_best_first(of_layers),
        positions=_positions(each),
        worst=worst,
        advice=None if advice is None else Advice(rules, added, hoped, measured),
    )


class _Divergence:
    """KL(reference ‖ model) of each prediction."""

    def __init__(self, model: nn.Module, chunks: Tensor, batch_size: int, expected: list[Tensor]) -> None:
        self.model, self.parts, self.expected = model, chunks.split(batch_size), expected

    def __call__(self) -> Tensor:
        """[n, L − 1] fp64, on the CPU."""
        found = []
        for ids, log_q in zip(self.parts, self.expected, strict=True):
            log_p = _log_p(self.model, ids)
            found.append(F.kl_div(log_p, log_q.to(log_p.device), log_target=True, reduction="none").sum(-1).cpu())
        return torch.cat(found).double()

    def with_values(self, values: "dict[str, Tensor]", names: Sequence[str]) -> Tensor:
        """The same with these values of some parameters."""
        before = {name: self.model.get_parameter(name) for name in names}
        try:
            for name in names:
                replace_parameter(self.model, name, values[name])
            return self()
        finally:
            for name, old in before.items():
                replace_parameter(self.model, name, old)


def _log_p(model: nn.Module, ids: Tensor) -> Tensor:
    return next_tokens(model, ids).float().log_softmax(-1)


def _originals(quantized: dict[str, Any], reference: nn.Module) -> dict[str, Tensor]:
    if not quantized:
        raise ConfigError("the model has no quantized weight: give a quantized one, and the original as reference")
    known = dict(reference.named_parameters())
    for name, p in quantized.items():
        other = known.get(name)
        if other is None or other.shape != p.shape or isinstance(other, GroupTensor):
            has = "has no" if other is None else f"has a {type(other).__name__} {tuple(other.shape)} as"
            raise ConfigError(
                f"the reference {has} {name!r}, which is {tuple(p.shape)} in the model: give the unquantized model "
                "that it was made from"
            )
    return {name: known[name].detach().to(p.device, p.dtype) for name, p in quantized.items()}


def _units(reference: nn.Module, chunks: Tensor, quantized: dict[str, Any]) -> list[tuple[str, ...]]:
    """Weights that engines fuse, which are to have the same bits; of a model that is no graph, each by itself."""
    try:
        program = canonicalize(capture(reference, as_batch({"input_ids": chunks[:1]})))
        sets = fused_sets(find_linears(program)[0])
    except CaptureError:
        sets = ()
    together = [tuple(n for n in names if n in quantized) for names in sets]
    known = {n: names for names in together for n in names}
    return list(dict.fromkeys(known.get(name, (name,)) for name in quantized))


def _advice(
    kl: float, units: Sequence[Restored], quantized: dict[str, Any], add_bits: float
) -> tuple[dict[str, dict[str, int]], float, float] | None:
    """Rules, the bits that they add, and the KL to hope for. Each bit more is taken to leave a quarter of the harm."""
    choices, now, count = [], 0, sum(p.numel() for p in quantized.values())
    for unit in units:
        numbers, harm = sum(quantized[n].numel() for n in unit.names), max(0.0, kl - unit.kl)
        more = [0, *(bits - unit.bits for bits in BITS if bits > unit.bits)]
        choices.append(Unit(unit.names, tuple(Choice(unit.bits + m, numbers * m // 8, harm * 4.0**-m) for m in more)))
    chosen = allocate(choices, now + int(add_bits * count / 8))
    changed = [(u, c) for u, c in zip(units, chosen, strict=True) if c.bits > u.bits]
    if not changed:
        return None
    rules = {name.removesuffix(".weight"): {"bits": c.bits} for u, c in changed for name in u.names}
    hoped = kl - sum(max(0.0, kl - u.kl) - c.cost for u, c in changed)
    return rules, 8 * sum(c.size for _, c in changed) / count, max(0.0, hoped)


def _called(names: Sequence[str]) -> str:
    return names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")


def _best_first(found: Sequence[Restored]) -> tuple[Restored, ...]:
    return tuple(sorted(found, key=lambda r: r.kl))


def _positions(each: Tensor) -> tuple[Position, ...]:
    length = each.shape[1]
    edges = [*(e for e in _EDGES if e < length), length]
    # The first prediction has one token before it.
    return tuple(Position(a + 1, b + 1, each[:, a:b].mean().item()) for a, b in pairwise(edges))


def _worst(
    each: Tensor, divergence: _Divergence, chunks: Tensor, decode: Callable[[list[int]], str]
) -> tuple[WorstToken, ...]:
    width = each.shape[1]
    found = []
    for flat in each.flatten().topk(min(_WORST, each.numel())).indices.tolist():
        row, at = divmod(flat, width)
        ids = chunks[row : row + 1, : at + 2]
        likeliest = _log_p(divergence.model, ids)[0, -1].argmax().item()
        size = divergence.parts[0].shape[0]
        original = divergence.expected[row // size][row % size, at].argmax().item()
        before = decode(chunks[row, max(0, at + 1 - _BEFORE) : at + 1].tolist())
        came, wanted, got = (decode([int(t)]) for t in (chunks[row, at + 1].item(), original, likeliest))
        found.append(WorstToken(before, came, wanted, got, each[row, at].item()))
    return tuple(found)

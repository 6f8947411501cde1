"""What is found out about a quantized model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Advice", "Diagnosis", "Position", "Restored", "WorstToken"]


@dataclass(frozen=True)
class Restored:
    """Weights that had their original values for a moment.

    Attributes:
        what: they are called, a weight, a kind or a layer.
        names: of the parameters.
        bits: of the quantized weights, the most common if they differ.
        kl: KL(original ‖ model) with them restored, nats per token.
    """

    what: str
    names: tuple[str, ...]
    bits: int
    kl: float


@dataclass(frozen=True)
class Position:
    """KL of the predictions at `start` to `stop` − 1 tokens before them."""

    start: int
    stop: int
    kl: float


@dataclass(frozen=True)
class WorstToken:
    """A prediction that quantization changed much: what stood before, what came, what both models thought likeliest."""

    before: str
    token: str
    original: str
    quantized: str
    kl: float


@dataclass(frozen=True)
class Advice:
    """What would help most for its size.

    Attributes:
        rules: as `gptq_config` takes them.
        added_bits: that they cost, per quantized weight.
        kl: expected with them. That of weights is added up, as if each did its harm by itself.
        restored: measured with these weights as in the original: what they can help at most.
    """

    rules: Mapping[str, Mapping[str, int]]
    added_bits: float
    kl: float
    restored: float


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`. `str(diagnosis)` are tables, `to_dict()` is for JSON.

    Attributes:
        kl: KL(original ‖ model), nats per token, over `tokens` predictions.
        weights, kinds, layers: restored one at a time, what helps most first. Weights that engines fuse count as one.
        advice: None if nothing helps.
    """

    kl: float
    tokens: int
    weights: tuple[Restored, ...]
    kinds: tuple[Restored, ...]
    layers: tuple[Restored, ...]
    positions: tuple[Position, ...]
    worst: tuple[WorstToken, ...]
    advice: Advice | None

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        return {**facts, "advice": None if self.advice is None else {**facts["advice"], "text": str(self.summary)}}

    @property
    def summary(self) -> str:
        """The advice in one sentence."""
        if self.advice is None:
            return "no weight gains enough within the bits that may be added: allow more, or smaller groups for all"
        by_bits: dict[int, list[str]] = {}
        for name, settings in self.advice.rules.items():
            by_bits.setdefault(settings["bits"], []).append(name)
        what = "; ".join(f"{', '.join(names)} at {bits} bits" for bits, names in sorted(by_bits.items()))
        return f"{what}: +{self.advice.added_bits:.3f} bits per weight, KL {self.kl:.4f} → about {self.advice.kl:.4f}"

    def __str__(self) -> str:
        lines = [f"KL(original ‖ model) {self.kl:.5f} nats per token, {self.tokens} predictions"]
        for title, found in (("kinds", self.kinds), ("layers", self.layers), ("weights", self.weights)):
            lines.append(f"{title}, KL with one at a time as in the original:")
            lines += [f"  {r.kl:.5f}  {r.kl - self.kl:+.5f}  {r.what} ({r.bits} bits)" for r in found[:10]]
        lines.append("by position:")
        lines += [f"  {p.start} to {p.stop - 1}: {p.kl:.5f}" for p in self.positions]
        lines.append("worst predictions:")
        lines += [f"  {w.kl:.3f}  …{w.before!r} → {w.original!r}, not {w.quantized!r}" for w in self.worst]
        return "\n".join([*lines, f"advice: {self.summary}"])

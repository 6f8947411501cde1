"""Automatic precision: what is measured, what is chosen, and what it leaves alone."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.core.config import config_from_dict, config_to_dict

from gptq_ao import gptq_config, plan, quantize_, quantize_checkpoint
from gptq_ao.calibration.batches import as_batch
from gptq_ao.data import text_batches, token_chunks
from gptq_ao.errors import CalibrationError, ConfigError
from gptq_ao.evaluate import evaluate
from gptq_ao.integrations.torchao import quantize_parameter_
from gptq_ao.integrations.transformers import load_model, load_tokenizer
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.expected_harm import SEQUENCES, expected_harm
from gptq_ao.passes.find_linears import find_linears
from gptq_ao.report import Report
from gptq_ao.tiny_lm.corpus import documents

from ..models import seeded, tiny_llama, token_batches

TINY_LM = Path(__file__).parents[2] / "examples" / "tiny_lm"


def quantized(model: nn.Module, batches: Any, **settings: Any) -> Report:
    report = quantize_(model, gptq_config(**{"group_size": 32, **settings}, calibration=batches))
    assert report is not None
    return report


def harm(model: nn.Module, batches: list[Any], errors: dict[str, Tensor]) -> dict[str, float]:
    """`expected_harm` of a model in memory."""
    program = canonicalize(capture(model, as_batch(batches[0])))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    where = {**program.parameters, **program.buffers}
    layouts = {s.weight: s.layout for s in find_linears(program)[0]}
    bound = [program.bind(as_batch(b), "batch") for b in batches]

    def static(name: str) -> Any:
        return program.constants[name] if name in program.constants else state[where[name]].detach()

    return expected_harm(program, layouts, errors, bound, static, torch.device("cpu"))


def errors_of(model: nn.Module) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    linear = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {n: 1e-3 * torch.randn(w.shape, generator=g) for n, w in linear.items() if "lm_head" not in n}


def by_autograd(model: nn.Module, errors: dict[str, Tensor], losses: list[Tensor]) -> dict[str, float]:
    """½ Σ (∂L/∂W · E)², row by row, in eager."""
    total = dict.fromkeys(errors, 0.0)
    for loss in losses:
        gradients = torch.autograd.grad(loss, [model.get_parameter(n) for n in errors])
        for (name, error), gradient in zip(errors.items(), gradients, strict=True):
            total[name] += (gradient * error).sum(1).square().sum().item() / 2
    return total


def close(found: dict[str, float], expected: dict[str, float]) -> bool:
    # fp32 sums of some thousand terms, in another order: 1e-7·√1000, squared and with room.
    return found.keys() == expected.keys() and all(found[n] == pytest.approx(e, rel=1e-3) for n, e in expected.items())


def test_harm_is_the_fisher_information_along_the_error() -> None:
    model, batches = tiny_llama(), token_batches(count=2)
    errors = errors_of(model)
    generator, losses = torch.Generator(), []
    for number, ids in enumerate(torch.cat([b["input_ids"] for b in batches]).split(1)):
        generator.manual_seed(number)
        log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        losses.append(-log_p.gather(1, drawn).sum())
    expected = by_autograd(model, errors, losses)
    assert close(harm(model, batches, errors), {n: e / (4 * 40) for n, e in expected.items()})


def test_harm_to_other_outputs_is_relative_to_their_energy() -> None:
    model = seeded(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    errors = errors_of(model)
    generator, losses = torch.Generator(), []
    for number, row in enumerate(x.split(1)):
        generator.manual_seed(number)
        y = model(row)
        noise = torch.randn(y.shape, generator=generator)
        losses.append((noise * y).sum() / y.detach().norm())
    expected = by_autograd(model, errors, losses)
    assert close(harm(model, [x], errors), {n: e / 7 for n, e in expected.items()})


def test_padding_does_no_harm() -> None:
    """However long it is, and whatever is in it."""
    model, (batch, _) = tiny_llama(), token_batches(count=2)
    ids = batch["input_ids"]
    errors = errors_of(model)
    plain = harm(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], errors)
    longer = torch.cat([ids, ids[:, :9]], 1)
    mask = torch.ones_like(longer)
    mask[:, 40:] = 0
    assert close(harm(model, [{"input_ids": longer, "attention_mask": mask}], errors), plain)


class Sum(nn.Module):
    """Two layers of the same input, of which one matters a hundred times as much."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        return 100 * self.loud(x) + self.quiet(x.flip(-1))


def test_what_matters_more_gets_more_bits() -> None:
    x = [torch.randn(64, 128, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    report = quantized(seeded(Sum()), x, target_bits=6.0, candidates=(2, 3, 4, 8))
    bits = {w.name: w.bits for w in report.weights}
    assert bits["loud.weight"] == 8
    assert bits["quiet.weight"] < 4
    costs = {d.unit.names[0]: {c.bits: c.cost for c in d.unit.choices} for d in report.precision}
    assert costs["loud.weight"][4] > 1000 * costs["quiet.weight"][4]  # squared
    for of_bits in costs.values():
        assert of_bits[2] > of_bits[3] > of_bits[4] > of_bits[8] > 0


@pytest.mark.parametrize("target", [4.6, 6.5, 8.0])
def test_the_target_is_met_from_below(target: float) -> None:
    model = tiny_llama()
    report = quantized(model, token_batches(), target_bits=target, candidates=(8, 4, 3, 2))
    chosen = {name: d.chosen.bits for d in report.precision for name in d.unit.names}
    assert {w.name: w.bits for w in report.weights} == chosen
    for d in report.precision:  # in the run-time layout, as they are
        assert d.chosen.size == sum(w.bytes for w in report.weights if w.name in d.unit.names)
    assert report.bits_per_weight <= target
    weights = sum(d.weights for d in report.precision)
    steps = [c.size - d.chosen.size for d in report.precision for c in d.unit.choices if c.size > d.chosen.size]
    assert not steps or 8 * min(steps) / weights > target - report.bits_per_weight
    assert {"precision", "solve"} <= report.seconds.keys()


def test_fused_weights_get_the_same_and_rules_are_kept() -> None:
    rules: dict[str, Any] = {
        "re:.*layers.0.*down_proj": {"bits": 8},
        "re:.*layers.1.*o_proj": None,
        "re:.*layers.1.*gate_proj": {"group_size": 64},
        "re:.*layers.1.*up_proj": {"group_size": 64},
        "re:.*layers.0.*o_proj": {"bits": 4, "method": "rtn"},
    }
    report = quantized(tiny_llama(), token_batches(), target_bits=5.5, candidates=(2, 3, 4, 8), rules=rules)
    of = {w.name.removeprefix("model.layers."): w for w in report.weights}
    for layer in "01":
        assert len({of[f"{layer}.self_attn.{n}_proj.weight"].bits for n in "qkv"}) == 1
        assert of[f"{layer}.mlp.gate_proj.weight"].bits == of[f"{layer}.mlp.up_proj.weight"].bits
    assert of["0.mlp.down_proj.weight"].bits == 8
    assert (of["0.self_attn.o_proj.weight"].bits, of["0.self_attn.o_proj.weight"].method) == (4, "rtn")
    assert of["1.mlp.gate_proj.weight"].group_size == 64
    assert "model.layers.1.self_attn.o_proj.weight" in report.excluded
    judged = {n.removeprefix("model.layers.") for d in report.precision for n in d.unit.names}
    fixed = {"0.mlp.down_proj.weight", "0.self_attn.o_proj.weight", "1.self_attn.o_proj.weight"}
    assert judged == {*of, "1.self_attn.o_proj.weight"} - fixed
    bytes_judged = sum(w.bytes for n, w in of.items() if n in judged)
    assert 8 * bytes_judged / sum(d.weights for d in report.precision) <= 5.5


def test_sixteen_bits_leave_a_weight_as_it_is() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    report = quantized(model, token_batches(), target_bits=12, candidates=(4, 16))
    left = [n for d in report.precision for n in d.unit.names if d.chosen.bits == 16]
    assert 0 < len(left) < 14
    for name in left:
        assert report.excluded[name] == "automatic precision: left at 16 bits"
        assert torch.equal(model.get_parameter(name), before[name])
    assert {w.bits for w in report.weights} == {4}
    size = sum(d.chosen.size for d in report.precision)
    assert size == sum(w.bytes for w in report.weights) + 2 * sum(before[n].numel() for n in left)
    assert 8 * size / sum(d.weights for d in report.precision) <= 12


@pytest.mark.parametrize("all_experts", [False, True])
def test_experts_of_a_layer_are_one_unit(all_experts: bool) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    settings = {"expert_min_rows": 8, "calibrate_all_experts": all_experts}
    report = quantized(model, token_batches(), target_bits=6.0, candidates=(2, 3, 4, 8), **settings)
    units = [d for d in report.precision if "experts" in d.unit.names[0]]
    assert [len(d.unit.names) for d in units] == [2, 2]
    assert all(c.cost > 0 for d in units for c in d.unit.choices)


def test_the_same_again_and_nothing_else_changes() -> None:
    model, other = tiny_llama(), tiny_llama()
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        first = quantized(model, token_batches(), target_bits=6.0)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)
    second = quantized(other, token_batches(), target_bits=6.0)
    assert torch.is_grad_enabled()
    assert first.precision == second.precision
    assert all(p.grad is None for p in model.parameters())
    dense = {n: p for n, p in model.named_parameters() if n not in {w.name for w in first.weights}}
    assert len(dense) > 2
    assert all(p.requires_grad for p in dense.values())


def test_the_report_shows_the_decision() -> None:
    report = quantized(tiny_llama(), token_batches(), target_bits=6.0)
    text = str(report)
    assert "expected harm, at bits:" in text
    assert "model.layers.0.self_attn.q_proj.weight +2" in text
    assert text.count("*") == 8 + 1  # a mark for each unit, and the legend
    told = json.loads(json.dumps(report.to_dict()))["precision"]
    assert [d["bits"] for d in told] == [d.chosen.bits for d in report.precision]
    assert {c["bits"] for c in told[0]["choices"]} == {2, 3, 4, 8, 16}
    assert quantized(tiny_llama(), token_batches(), bits=4).precision == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_bits": 3.5, "bits": 3}, "bits=3 and target_bits=3.5 contradict"),
        ({"target_bits": 1.5}, "target_bits is 1.5: give a number between .* 2 and 16"),
        ({"target_bits": 9, "candidates": (2, 8)}, "between .* 2 and 8"),
        ({"target_bits": math.nan}, "target_bits is nan"),
        ({"target_bits": "3"}, "target_bits is '3'"),
        ({"target_bits": True}, "target_bits is True"),
        ({"target_bits": 4, "candidates": (4,)}, "two or more of 2, 3, 4, 8, 16"),
        ({"target_bits": 4, "candidates": (4, 4)}, "each once"),
        ({"target_bits": 4, "candidates": (4, 5)}, "two or more of"),
        ({"target_bits": 4, "candidates": 4}, "candidates is 4"),
        ({"target_bits": 4, "method": "rtn"}, 'needs method="gptq"'),
        ({"target_bits": 4, "rules": {"x": {"method": "rtn"}}}, "rule 'x': .*has to set bits too"),
        ({"target_bits": 4, "preset": "4bit-128"}, "already sets bits"),
        ({"target_bits": 4, "rules": {"x": {"target_bits": 3}}}, "sets 'target_bits'"),
    ],
)
def test_contradicting_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gptq_config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_bits": 3.0}, r"smallest candidates take 4.5556 bits per weight: give 4.556 or more"),
        ({"target_bits": 32 / 2, "candidates": (2, 4, 16), "rules": {"re:.*proj": {"bits": 4}}}, "nothing to choose"),
        ({"target_bits": 8.0, "max_memory": {"cpu": "1GiB", "gpu": 1}}, "max_memory names 'gpu'"),
    ],
)
def test_impossible_targets_leave_the_model_as_it_was(settings: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    limits = settings.pop("max_memory", None)
    with pytest.raises(ConfigError, match=message):
        quantize_(model, gptq_config(group_size=32, calibration=token_batches(), **settings), max_memory=limits)
    assert all(
        torch.equal(model.state_dict()[n], t) and type(model.state_dict()[n]) is Tensor for n, t in before.items()
    )
    assert all(p.grad is None for p in model.parameters())


def test_the_setting_is_serialized() -> None:
    config = gptq_config(target_bits=3.5, candidates=(8, 4, 2))
    assert config.candidates == [2, 4, 8]
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    # Without data, a loader would round single weights to nearest.
    with pytest.raises(ConfigError, match="not those of 'weight' alone: give bits"):
        quantize_parameter_(nn.Linear(32, 32), "weight", config)


def test_everything_at_sixteen_bits_is_refused() -> None:
    config = gptq_config(group_size=32, target_bits=16, calibration=token_batches())
    with pytest.raises(ConfigError, match="leaves every weight as it is"):
        quantize_(tiny_llama(dtype=torch.bfloat16), config)


class Branches(nn.Module):
    """No graph: the path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


class Detour(nn.Module):
    """What `aside` returns reaches the output in no differentiable way."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.aside = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + (self.aside(x) > 0)


def test_models_without_gradients(tmp_path: Path) -> None:
    x = [torch.ones(4, 32)]
    config = gptq_config(group_size=32, target_bits=8.0, calibration=x)
    with pytest.raises(ConfigError, match="target_bits needs gradients of the model as one graph"):
        quantize_(Branches(), config)
    with pytest.raises(ConfigError, match=r"how much aside.weight matters.*rules=\{name: \{'bits': 4\}\}"):
        quantize_(seeded(Detour()), config)
    with pytest.raises(ConfigError, match=r"'a\.weight' is offloaded or not loaded"):
        quantize_(Branches().to("meta"), config)
    with pytest.raises(ConfigError, match=r"target_bits chooses .* plan with bits"):
        plan(seeded(Detour()), config)
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="cannot be streamed"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CalibrationError, match="no calibration data"):
        quantize_(Branches(), gptq_config(target_bits=8.0))


@pytest.mark.long
def test_the_harm_is_the_divergence_that_is_measured() -> None:
    """Of the embedded model, one unit quantized at a time: in the right order, and on the calibration data in nats."""
    original, tokenizer = load_model(str(TINY_LM)), load_tokenizer(str(TINY_LM))
    text = documents("train")[::20]
    batches = text_batches(tokenizer, text, num_samples=SEQUENCES, seq_len=256, batch_size=8)
    heldout = token_chunks(tokenizer, documents("heldout")[:4], 256)[:12]
    chosen = copy.deepcopy(original)
    report = quantized(chosen, batches, group_size=128, target_bits=3.25, candidates=(2, 3, 4), effort="fast")
    whole = copy.deepcopy(original)
    quantized(whole, batches, group_size=128, bits=3, effort="fast")
    expected: list[float] = []
    measured: list[float] = []
    seen: list[float] = []
    for d in report.precision:
        model = copy.deepcopy(original)
        for name in d.unit.names:
            model.get_submodule(name.rpartition(".")[0]).weight = whole.get_parameter(name)
        expected.append(next(c.cost for c in d.unit.choices if c.bits == 3))
        measured.append(evaluate(model, heldout, original).kl or 0.0)
        seen.append(evaluate(model, batches[0]["input_ids"], original).kl or 0.0)
    assert len(expected) == 12
    ranks = torch.tensor([expected, measured]).argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.8
    # Second order, drawn classes, a quarter of the data: within 40 % in sum.
    assert sum(expected) == pytest.approx(sum(seen), rel=0.4)

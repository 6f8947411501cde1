"""Segments of equal form are simulated once: what that says is what simulating all of them would."""

import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from gptq_ao.config import gptq_config
from gptq_ao.model.weights import ModelWeights
from gptq_ao.planning import simulate as module
from gptq_ao.planning.job import Job
from gptq_ao.planning.prepare import prepare
from gptq_ao.planning.simulate import Footprint, simulate

WIDTHS = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": MOE,  # a top-k waits: two tensors in one value
    "gemma3_text": {"sliding_window_pattern": 3, "sliding_window": 8},
}


def model_of(kind: str, layers: int) -> nn.Module:
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(kind, **WIDTHS, **HEADS, **KINDS[kind], num_hidden_layers=layers)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def footprint(model: nn.Module, device: str, **settings: Any) -> Footprint:
    shapes = [(2, 40), (1, 24), (2, 40)]
    config = gptq_config(calibration=[torch.zeros(s, dtype=torch.long) for s in shapes], **settings)
    weights = ModelWeights(model)
    return simulate(weights, prepare(Job.of(weights, config, device="cpu")), torch.device(device))


@pytest.mark.parametrize("settings", [{}, {"effort": "fast"}, {"act_order": "static"}], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # on the latter, weights are not where they are computed with
@pytest.mark.parametrize("kind", [k if k == "llama" else pytest.param(k, marks=pytest.mark.long) for k in KINDS])
def test_equal_segments_are_simulated_once(
    kind: str, device: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = footprint(model_of(kind, 4), device, **settings)
    forms = itertools.count()
    monkeypatch.setattr(module, "graph_form", lambda stage, segment: next(forms))
    assert found == footprint(model_of(kind, 4), device, **settings)
    assert next(forms) == len({name.rpartition("_")[0] for name in found.rows})  # every segment ran


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_more_layers_are_no_more_segments_to_simulate(effort: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    run = module._Simulation.run_segment

    def counted(self: Any, program: Any, stage: Any, segment: Any) -> Any:
        ran.append(segment)
        return run(self, program, stage, segment)

    monkeypatch.setattr(module._Simulation, "run_segment", counted)
    footprint(model_of("llama", 3), "cpu", effort=effort)
    few = len(ran)
    footprint(model_of("llama", 6), "cpu", effort=effort)
    assert len(ran) == 2 * few

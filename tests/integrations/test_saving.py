"""`save_pretrained` and Trainer's checkpoints of a model that was quantized in memory, without adapters."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_ao import gptq_config, load_quantized, quantize_
from gptq_ao.tensor import GroupTensor, tensor_class
from tests.models import tiny_llama, token_batches

IDS = token_batches(1)[0]["input_ids"]


def quantized(**settings: Any) -> Any:
    model = tiny_llama()
    quantize_(model, gptq_config(4, 32, effort="fast", **settings, calibration=token_batches(2)))
    return model


@pytest.mark.parametrize("settings", [{}, {"act_order": "group"}, {"rules": {"lm_head": {"bits": 8}}}], ids=str)
def test_save_pretrained(tmp_path: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    model = quantized(**settings)
    model.config.architectures = ["LlamaForCausalLM"]  # transformers itself notes that
    state, config = set(vars(model)), copy.deepcopy(model.config.to_dict())
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        models: list[Any] = [AutoModelForCausalLM.from_pretrained(tmp_path / name), load_quantized(tmp_path / name)]
        for loaded in models:
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)
            assert type(loaded.model.layers[0].mlp.up_proj.weight) is tensor_class(4)
    assert set(vars(model)) == state
    assert model.config.to_dict() == config
    with pytest.raises(AttributeError):
        _ = model.hf_quantizer


def test_a_dense_model_is_saved_as_ever(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_trainer_without_adapters(tmp_path: Path) -> None:
    """What was never quantized trains; checkpoints are models, from which training goes on."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in token_batches(1, rows=16, length=16)[0]["input_ids"]]

    def train(model: Any, **options: Any) -> Any:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=4,
            save_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(**options)
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model, losses = train(quantized())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    again, resumed = train(quantized(), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed[-2:] == pytest.approx(losses[-2:], abs=1e-5)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    for trained, before in zip(model.parameters(), quantized().parameters(), strict=True):
        assert not isinstance(trained, GroupTensor) or torch.equal(trained, before)


def test_a_whole_training_state(tmp_path: Path) -> None:
    """As Lightning and plain loops save it, in one file that `torch.load` reads without running code."""
    model = quantized()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = tiny_llama(seed=1)
    quantize_(other, gptq_config(4, 32, effort="fast", calibration=token_batches(2)))
    other.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert torch.equal(other(IDS).logits, model(IDS).logits)

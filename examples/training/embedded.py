"""What the examples train: the small language model beside this folder, quantized, and text that it has not seen."""

import tempfile
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_ao import data, gptq_config, quantize_, save_quantized
from gptq_ao.tiny_lm.corpus import documents

SOURCE = Path(__file__).parents[1] / "tiny_lm"
# Adapters beside all quantized weights: that is where QLoRA puts them.
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def quantized(bits: int = 4) -> tuple[Any, Any]:
    """Model and tokenizer. Quantized first: before adapters, optimizers, wrappers."""
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(SOURCE)
    batches = data.text_batches(tokenizer, documents("train")[::100], num_samples=8, seq_len=256)
    quantize_(model, gptq_config(bits=bits, group_size=128, effort="fast", calibration=batches))
    return model, tokenizer


def checkpoint() -> str:
    """A directory with it, for what loads a model by name."""
    model, tokenizer = quantized()
    directory = Path(tempfile.mkdtemp()) / "tiny-4bit"
    save_quantized(model, directory, tokenizer=tokenizer)
    return str(directory)


def texts() -> list[str]:
    return documents("heldout")[:6]


def chunks(tokenizer: Any, count: int = 32, length: int = 128) -> Tensor:
    """[count, length] int64."""
    return data.token_chunks(tokenizer, texts(), length)[:count]

"""What several tests of the commands need."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TINY = str(Path(__file__).parents[2] / "examples" / "tiny_lm")


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    """Of a short run, for a model whose weights GPTQ's readers do not take."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    (tmp_path / "text.txt").write_text("the cat sat on the mat and looked at the dog\n" * 40)
    usual = ("--calibration", str(tmp_path / "text.txt"), "--num-samples", "2", "--seq-len", "32", "--group-size", "16")

    def of(*more: str) -> tuple[str, ...]:
        return ("quantize", str(tmp_path / "a"), str(tmp_path / "q"), *usual, "--effort", "fast", *more)

    return of

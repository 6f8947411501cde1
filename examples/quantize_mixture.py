"""A mixture of experts in 4 bits, its experts stacked: python examples/quantize_mixture.py"""

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from gptq_ao import gptq_config, quantize_


def mixture() -> OlmoeForCausalLM:
    """In place of `OlmoeForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924")`."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    # 8 experts, of which a token gets 2.
    return OlmoeForCausalLM(OlmoeConfig(**sizes, **heads, **special, num_experts=8, num_experts_per_tok=2)).eval()


def main() -> None:
    torch.manual_seed(0)
    model = mixture()
    # An expert learns from the tokens that are sent to it: a mixture needs more text than a dense model of its size.
    batches = [{"input_ids": torch.randint(0, 100, (4, 64))} for _ in range(8)]
    report = quantize_(model, gptq_config(bits=4, group_size=32, expert_min_rows=256, calibration=batches))
    print(report)
    for weight in report.weights:
        if weight.expert_rows:
            print(f"{weight.name}: rows of each expert {weight.expert_rows}")
    # Experts that fewer rows reached were solved with those of all.
    for name, reason in report.fallbacks.items():
        print(f"{name}: {reason}")
    # Routers choose; they are small, and stay as they are unless a rule asks for them.
    assert any("router" in reason for reason in report.excluded.values())

    # For experts that the text misses altogether: all tokens to all experts, for the Hessians only.
    model = mixture()
    every = gptq_config(bits=4, group_size=32, calibrate_all_experts=True, calibration=batches)
    assert quantize_(model, every).fallbacks == {}


if __name__ == "__main__":
    main()

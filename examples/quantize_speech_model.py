"""Whisper, encoder and decoder, in 4 bits: python examples/quantize_speech_model.py"""

import tempfile
from pathlib import Path

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from gptq_ao import gptq_config, load_quantized, quantize_, save_quantized


def speech_model() -> WhisperForConditionalGeneration:
    """In place of `WhisperForConditionalGeneration.from_pretrained("openai/whisper-small")`."""
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 128))}
    sizes = {"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8, **layers}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 0)
    config = WhisperConfig(
        vocab_size=100, max_source_positions=64, max_target_positions=32, suppress_tokens=[], **sizes, **special
    )
    return WhisperForConditionalGeneration(config).eval()


def heard(count: int) -> dict[str, torch.Tensor]:
    """Both sides of recordings: the features that the processor makes of sound, and the tokens of what was said."""
    return {"input_features": torch.randn(count, 8, 128), "decoder_input_ids": torch.randint(1, 100, (count, 12))}


def main() -> None:
    torch.manual_seed(0)
    model = speech_model()
    report = quantize_(model, gptq_config(bits=4, calibration=[heard(4) for _ in range(8)]))
    print(report)
    # What the encoder heard is computed once, and multiplied in every layer of the decoder.
    assert any("encoder_attn.k_proj" in weight.name for weight in report.weights)

    features = heard(2)["input_features"]
    said = model.generate(features, max_new_tokens=8)

    out = Path(tempfile.mkdtemp()) / "whisper-4bit"
    save_quantized(model, out, report=report)
    assert torch.equal(load_quantized(out).generate(features, max_new_tokens=8), said)


if __name__ == "__main__":
    main()

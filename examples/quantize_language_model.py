"""A language model, quantized and held to a limit: python examples/quantize_language_model.py [MODEL [OUT]]

Without MODEL it is the small one beside this file; OUT is a new directory.
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_ao import QualityCheck, data, gptq_config, load_quantized, quantize_, save_quantized
from gptq_ao.tiny_lm.corpus import documents


def main(source: str = str(Path(__file__).parent / "tiny_lm"), out: str = "") -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    # Put text like that the model will see in its place: 128 sequences of 2048 tokens for a large model.
    batches = data.text_batches(tokenizer, documents("train")[::100], num_samples=8, seq_len=256, batch_size=8)
    # Compared with the original on other text, in the same run; a QualityError if it is further off.
    held_out = data.token_chunks(tokenizer, documents("heldout"), 256)[:8]
    check = QualityCheck(held_out, max_kl=0.1)

    report = quantize_(model, gptq_config(bits=4, group_size=128, calibration=batches), quality=check)
    print(report)

    directory = out or str(Path(tempfile.mkdtemp()) / "4bit")
    save_quantized(model, directory, tokenizer=tokenizer, report=report, format="gptq")  # vLLM and others read it
    model = load_quantized(directory)
    prompt = tokenizer("def read(", return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))
    print(f"written to {directory}")


if __name__ == "__main__":
    main(*sys.argv[1:3])

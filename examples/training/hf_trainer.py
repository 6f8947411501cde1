"""QLoRA with the Trainer of transformers, from a checkpoint: python examples/training/hf_trainer.py"""

import tempfile

import torch
from embedded import LORA, checkpoint, chunks
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


def main() -> None:
    directory = checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # bf16: what is not quantized (embeddings, norms), and the activations. The adapters below are fp32.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model = get_peft_model(model, LORA)
    # In place of PEFT's prepare_model_for_kbit_training, which would make all that is not quantized fp32.
    model.enable_input_require_grads()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        bf16=True,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    dataset = [{"input_ids": row, "labels": row} for row in chunks(tokenizer, count=8)]
    trainer = Trainer(model, arguments, train_dataset=dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.save_pretrained(arguments.output_dir)  # the adapter alone
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()

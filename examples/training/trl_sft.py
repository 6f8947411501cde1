"""TRL's SFTTrainer, which loads the checkpoint itself and adds the adapters: python examples/training/trl_sft.py

The command line does the same, without a script (gptq_ao has to be installed, it need not be imported):

    trl sft --model_name_or_path tiny-4bit --use_peft --lora_target_modules all-linear --dataset_name …
"""

import tempfile

import torch
from datasets import Dataset
from embedded import LORA, checkpoint, texts
from trl import SFTConfig, SFTTrainer


def main() -> None:
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        model_init_kwargs={"dtype": torch.bfloat16},
        per_device_train_batch_size=2,
        max_length=128,
        packing=True,
        packing_strategy="wrapped",
        max_steps=12,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        bf16=True,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    dataset = Dataset.from_dict({"text": [texts()[0][:2000]]})
    trainer = SFTTrainer(checkpoint(), args=arguments, train_dataset=dataset, peft_config=LORA)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()

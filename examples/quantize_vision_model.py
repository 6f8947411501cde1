"""A vision transformer in 4 bits: python examples/quantize_vision_model.py"""

import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from gptq_ao import gptq_config, load_quantized, quantize_, save_quantized


def vision_model() -> ViTForImageClassification:
    """In place of `ViTForImageClassification.from_pretrained("google/vit-base-patch16-224")`."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10)).eval()


def main() -> None:
    torch.manual_seed(0)
    model = vision_model()
    # Images as the model's processor makes them: resized, normalized; some hundreds of what the model will see.
    images = DataLoader(TensorDataset(torch.randn(256, 3, 32, 32)), batch_size=16)
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        before = model(x).logits

    report = quantize_(model, gptq_config(bits=4, group_size=32, calibration=lambda: (batch for (batch,) in images)))
    print(report)

    with torch.no_grad():
        after = model(x).logits
    print(f"logits differ by {((after - before).norm() / before.norm()).item():.1%}")

    out = Path(tempfile.mkdtemp()) / "vit-4bit"
    save_quantized(model, out, report=report)
    again = load_quantized(out)
    with torch.no_grad():
        assert torch.equal(again(x).logits, after)


if __name__ == "__main__":
    main()

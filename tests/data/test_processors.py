"""Images, audio and text beside them, by processors made of parts, without a network."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gptq_ao import gptq_config, quantize_
from gptq_ao.data import processor_batches
from gptq_ao.errors import CalibrationError, ConfigError

from ..models import seeded
from .models import tiny

SIZE = {"height": 16, "width": 16}


def images(count: int) -> list[Any]:
    from PIL import Image

    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (20 + n, 24, 3), dtype=np.uint8)) for n in range(count)]


def sounds(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.standard_normal(1600 + 16 * n).astype(np.float32) for n in range(count)]


def vit() -> Any:
    return transformers.ViTImageProcessorPil(size=SIZE)


def clip() -> Any:
    tokenizer = tiny(None)
    tokenizer.pad_token = tokenizer.eos_token
    crop = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE)
    return transformers.CLIPProcessor(crop, tokenizer)


def llava() -> Any:
    tokenizer = tiny(None)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    crop = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE)
    template = (
        "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
        "{% endfor %}"
    )
    return transformers.LlavaProcessor(
        crop, tokenizer, patch_size=8, vision_feature_select_strategy="full", chat_template=template
    )


def whisper() -> Any:
    return transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)


def equal(batches: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert set(batch) == set(other)
        assert all(torch.equal(batch[k], other[k]) for k in other)


def test_images() -> None:
    pictures = images(5)
    expected = [dict(vit()(images=pictures[n : n + 2], return_tensors="pt")) for n in (0, 2, 4)]
    for samples in ([{"images": p} for p in pictures], [{"image": p} for p in pictures], pictures, iter(pictures)):
        equal(processor_batches(vit(), samples, batch_size=2), expected)
    equal(processor_batches(vit(), pictures, batch_size=2, num_samples=2), expected[:1])
    rows = [{"img": p, "label": 3} for p in pictures]
    found = processor_batches(vit(), rows, batch_size=2, columns={"images": "img"})
    equal(found, expected)
    assert found.described == "5 samples in memory, by ViTImageProcessorPil"
    plain = processor_batches(vit(), pictures, do_normalize=False)
    assert plain[0]["pixel_values"].min() >= 0


@pytest.mark.parametrize("streamed", [False, True])
def test_a_dataset(streamed: bool) -> None:
    import datasets

    pictures = images(3)
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [1, 2, 3]})
    source = rows.to_iterable_dataset() if streamed else rows
    expected = [dict(vit()(images=pictures, return_tensors="pt"))]
    equal(processor_batches(vit(), source, batch_size=3, columns={"images": "image"}), expected)
    with pytest.raises(
        ConfigError, match=r"fields \['image', 'label'\], and ViTImageProcessorPil takes images, so 'la"
    ):
        processor_batches(vit(), source)
    with pytest.raises(CalibrationError, match=r"samples are a DatasetDict with \['train'\]: give one of its splits"):
        processor_batches(vit(), datasets.DatasetDict(train=rows))


@pytest.mark.parametrize("kind", ["raw_speech", "audio", "bare", "rated"])
def test_audio(kind: str) -> None:
    arrays = sounds(3)
    kinds: dict[str, list[Any]] = {
        "raw_speech": [{"raw_speech": a} for a in arrays],
        "audio": [{"audio": a} for a in arrays],
        "bare": arrays,
        "rated": [{"audio": {"array": a, "sampling_rate": 16000, "path": None}} for a in arrays],
    }
    expected = dict(whisper()(arrays, sampling_rate=16000, return_tensors="pt"))
    how: dict[str, Any] = {} if kind == "rated" else {"sampling_rate": 16000}
    equal(processor_batches(whisper(), kinds[kind], batch_size=3, **how), [expected])


def test_rates_that_differ() -> None:
    rates = (16000, 8000)
    samples = [{"audio": {"array": a, "sampling_rate": r}} for a, r in zip(sounds(2), rates, strict=True)]
    with pytest.raises(CalibrationError, match=r"the samples from 0 on have the sampling rates \[8000, 16000\]"):
        processor_batches(whisper(), samples, batch_size=2)
    with pytest.raises(CalibrationError, match=r"WhisperFeatureExtractor cannot process sample 1: ValueError.*16000"):
        processor_batches(whisper(), samples)


def test_text_and_images() -> None:
    pictures, texts = images(3), ["a", "a cat on a mat", "dogs"]
    samples = [{"images": p, "text": t} for p, t in zip(pictures, texts, strict=True)]
    expected = dict(clip()(images=pictures, text=texts, padding=True, return_tensors="pt"))
    (found,) = processor_batches(clip(), samples, batch_size=3)
    equal([found], [expected])
    assert (found["attention_mask"] == 0).any()
    fixed = processor_batches(clip(), samples, padding="max_length", max_length=25)
    assert [b["input_ids"].shape for b in fixed] == [(1, 25)] * 3


def test_chats_with_images() -> None:
    picture = images(1)[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " what is it"}]}]
    expected = dict(llava()(images=[picture], text=["<image> what is it"], padding=True, return_tensors="pt"))
    for samples, columns in (
        ([{"images": picture, "messages": chat}], None),
        ([{"images": picture, "text": chat}], None),
        ([{"picture": picture, "chat": chat, "id": 1}], {"images": "picture", "text": "chat"}),
    ):
        equal(processor_batches(llava(), samples, columns=columns), [expected])
    with pytest.raises(ConfigError, match="the chat template of CLIPProcessor cannot be used: ValueError"):
        processor_batches(clip(), [{"images": picture, "messages": chat}])


@pytest.mark.parametrize(
    ("samples", "how", "error", "message"),
    [
        ([], {}, CalibrationError, r"there are no samples \(a generator already read\?\)"),
        (["x"], {}, CalibrationError, "sample 0 is a str, and CLIPProcessor takes images, text"),
        (
            [{"text": "x"}, {"words": "y"}],
            {"columns": {"text": "words"}},
            CalibrationError,
            "fields .'text'., not 'words'",
        ),
        (
            [{"text": "x"}],
            {"columns": {"words": "text"}},
            ConfigError,
            "columns names 'words', and CLIPProcessor takes im",
        ),
        ([{"text": "x", "messages": []}], {}, ConfigError, "'messages' is nothing for it"),
        ([{"text": "x"}], {"batch_size": 0}, ConfigError, "batch_size is 0: give a number, 1 or more"),
        ([{"text": "x"}], {"num_samples": 0}, ConfigError, "num_samples is 0"),
        ([{"text": "x"}, {"text": 7}], {}, CalibrationError, "CLIPProcessor cannot process sample 1: "),
        ([{"text": "x"}, {"text": []}], {}, CalibrationError, "sample 1 is a chat without messages"),
    ],
)
def test_samples_that_cannot_be_used(samples: Any, how: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        processor_batches(clip(), samples, **how)


def test_samples_of_different_fields_do_not_run_together() -> None:
    samples = [{"text": "x"}, {"text": "y", "images": images(1)[0]}]
    with pytest.raises(CalibrationError, match=r"sample 1 has \['images', 'text'\] and sample 0 \['text'\]"):
        processor_batches(clip(), samples, batch_size=2)
    assert len(processor_batches(clip(), samples)) == 2


def test_quantizing_with_images_and_text() -> None:
    """The batches are the model's own inputs."""
    tokenizer = clip().tokenizer
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(
        text_config={**vision, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    model = seeded(transformers.CLIPModel(config)).eval()
    samples = [{"image": p, "text": f"picture {n}" * (1 + n % 2)} for n, p in enumerate(images(6))]
    batches = processor_batches(clip(), samples, batch_size=3, padding="max_length", max_length=40)
    report = quantize_(model, gptq_config(4, 16, effort="fast", calibration=batches))
    assert report is not None
    rows = {w.name.split(".")[0]: w.rows for w in report.weights if ".k_proj." in w.name}
    assert rows == {"text_model": sum(int(b["attention_mask"].sum()) for b in batches), "vision_model": 6 * 5}
    assert report.recipe["calibration data"] == "6 samples in memory, by CLIPProcessor"


def test_quantizing_with_audio() -> None:
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 50}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": 64}
    config = transformers.WhisperConfig(**sizes, **heads, **tokens, max_target_positions=16)
    model = seeded(transformers.WhisperForConditionalGeneration(config)).eval()
    batches = processor_batches(whisper(), sounds(4), batch_size=2, sampling_rate=16000)
    for batch in batches:
        batch["decoder_input_ids"] = torch.ones(2, 4, dtype=torch.long)
    report = quantize_(model, gptq_config(4, 8, effort="fast", calibration=batches))
    assert report is not None
    assert {w.rows for w in report.weights if "encoder.layers" in w.name} == {4 * 50}
    assert report.recipe["calibration data"] == "4 samples in memory, by WhisperFeatureExtractor"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_chats_with_images_run_through_their_model(batch_size: int) -> None:
    """The model loops over images, so that their number becomes a part of its graph."""
    processor = llava()
    tokenizer = processor.tokenizer
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    text = transformers.LlamaConfig(**sizes, vocab_size=len(tokenizer))
    image = tokenizer.convert_tokens_to_ids("<image>")
    how = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, **how)
    model = seeded(transformers.LlavaForConditionalGeneration(config)).eval()
    processor.num_additional_image_tokens = 1
    asked = ("what is it", "a cat or a dog")
    content = [[{"type": "image"}, {"type": "text", "text": words}] for words in asked]
    samples = [
        {"image": picture, "messages": [{"role": "user", "content": parts}]}
        for picture, parts in zip(images(2), content, strict=True)
    ]
    batches = processor_batches(processor, samples, batch_size=batch_size)
    report = quantize_(model, gptq_config(4, 16, effort="fast", calibration=batches))
    assert report is not None
    rows = {w.rows for w in report.weights if "language_model" in w.name and w.stage}
    assert rows == {sum(int(b["attention_mask"].sum()) for b in batches)}

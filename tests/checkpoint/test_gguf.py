"""GGUF files: every number exactly, as the package gguf and transformers read it back. What llama.cpp makes of them is
in `llama_cpp.py`."""

import copy
import functools
import json
import re
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as kinds
from torch import Tensor, nn
from transformers import AddedToken, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from gptq_ao import cli, gptq_config, quantize_, save_quantized
from gptq_ao.checkpoint.convert import convert_checkpoint
from gptq_ao.checkpoint.gguf.blocks import block_kind, to_blocks, why_no_blocks
from gptq_ao.errors import CheckpointError, ConfigError, RoundedScalesWarning
from gptq_ao.tensor import GroupTensor, tensor_class
from gptq_ao.version import VERSION

from ..models import seeded, tiny_llama, token_batches
from .llama_cpp import GEMMA3, MODELS, PHI3, SMALL, WINDOWS, longrope
from .test_directories import assert_same_logits, quantized
from .vocabularies import SPLITS, TEXT, TOKENIZERS, bytes_with_merges, pieces


def usual_heads(name: str) -> Any:
    """A Gemma with heads of 256 numbers."""

    def config() -> Any:
        made = MODELS[name]()
        made.head_dim = made.query_pre_attn_scalar = 256
        return made

    return config


# transformers takes heads of Qwen3 to have 128 numbers, and its experts 768, and the scores of a Gemma to be scaled for
# heads of 256, whatever a file says.
READABLE = {**MODELS, "Qwen3": lambda: transformers.Qwen3Config(**{**SMALL, "head_dim": 128})}
USUAL = ("Gemma 2", "Gemma 2, caps", "Gemma 3", "Gemma 3, other frequencies")
READABLE |= {name: usual_heads(name) for name in USUAL}
READABLE["Qwen3, experts"] = lambda: transformers.Qwen3MoeConfig(
    **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=768, norm_topk_prob=True
)
# transformers does not read how frequencies are scaled, nor what has a value of its own in the largest Gemma 2.
UNREAD = ("scal", "biases", "frequencies", "factors", "large", "caps")
FAMILIES = [name for name in MODELS if not any(word in name for word in UNREAD)]


def built(name: str = "Llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A quantized model of 360 tokens, which a test may change."""
    return copy.deepcopy(_built(name, dtype, json.dumps(settings)))


@functools.cache
def _built(name: str, dtype: torch.dtype, given: str) -> Any:
    settings = json.loads(given)
    model = seeded(AutoModelForCausalLM.from_config(READABLE[name](), dtype=dtype))
    calibration = token_batches(1)
    quantize_(model, gptq_config(**{"group_size": 32, "method": "rtn", **settings}, calibration=calibration))
    return model


def saved(model: Any, path: Path, tokenizer: Any = None) -> Path:
    """Without a word."""
    tokenizer = tokenizer or TOKENIZERS["a token for each byte"]()
    save_quantized(model, path, format="gguf", tokenizer=tokenizer)
    return path


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Key → value, and name → tensor as it is stored."""
    reader = gguf.GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def read(tensor: Any) -> Tensor:
    """fp32, by the package's own arithmetic."""
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))


def random_weight(bits: int, n: int, k: int, groups: int, sym: bool, perm: Tensor | None = None) -> GroupTensor:
    """Scales of both signs, a zero among them, and all codes."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    codes.flatten()[:2] = torch.tensor([0, 2**bits - 1])
    scale = torch.randn(n, groups, generator=generator).half()
    scale.flatten()[-1] = 0
    zero_point = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator)
    zero_point = torch.full_like(zero_point, 2 ** (bits - 1)) if sym else zero_point
    return tensor_class(bits).from_codes(codes, scale, zero_point, dtype=torch.float32, perm=perm)


@pytest.mark.parametrize(("n", "k", "groups"), [(8, 64, 2), (5, 64, 1), (1, 32, 1), (3, 96, 1), (7, 384, 3)])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_blocks_are_exact(bits: int, n: int, k: int, groups: int) -> None:
    """The smallest code of 8 bits is -128, which int8 has; a group of several blocks repeats its scale."""
    weight = random_weight(bits, n, k, groups, sym=True)
    kind = block_kind(weight)
    assert kind == {4: "Q4_0", 8: "Q8_0"}[bits]
    made = to_blocks(weight, kind)
    found = gguf.dequantize(made.data.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(found), weight.dequantize(torch.float32))
    assert made.moved == 0


def test_asymmetric_blocks_differ_by_the_rounding_of_their_offsets() -> None:
    """An offset of at most 15 steps is rounded by at most 2^-11 of itself."""
    weight = random_weight(4, 40, 128, 2, sym=False)
    assert block_kind(weight) == "Q4_1"
    made = to_blocks(weight, "Q4_1")
    found = torch.from_numpy(gguf.dequantize(made.data.numpy(), gguf.GGMLQuantizationType.Q4_1)).double()
    step = weight.scale.double().abs().repeat_interleave(64, 1)
    moved = ((found - weight.dequantize(torch.float32).double()).abs() / step).nan_to_num(0.0).max()
    assert 0 < made.moved <= 15 * 2**-11
    # Products and sums are rounded once more in fp32: 2^-23 of some 15 steps.
    assert moved == pytest.approx(made.moved, abs=32 * 2**-23)
    # Zero points of 0, 1, 2, 4, 8 are products that fp16 has.
    exact = tensor_class(4).from_codes(
        weight.codes(), weight.scale, torch.full_like(weight.zero_point, 4), dtype=torch.float32
    )
    assert to_blocks(exact, "Q4_1").moved == 0


def test_a_block_by_hand() -> None:
    """Feature 0 lies in the low half of the first byte, feature 16 in its high half."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 16], codes[0, 15], codes[0, 31] = 1, 2, 3, 4
    zero_point = torch.full((1, 1), 8, dtype=torch.uint8)
    weight = tensor_class(4).from_codes(codes, torch.tensor([[-1.5]]).half(), zero_point, dtype=torch.float32)
    # −1.5 in fp16 is 0xBE00.
    assert to_blocks(weight, "Q4_0").data.tolist() == [[0x00, 0xBE, 0x21, *([0] * 14), 0x43]]


def test_columns_in_another_order_go_back_where_blocks_allow_it() -> None:
    """Where each block has one group, its columns may be anywhere; groups mixed within a block cannot be held."""
    within = torch.cat([torch.arange(64).flip(0), 64 + torch.randperm(64, generator=torch.Generator().manual_seed(0))])
    weight = random_weight(4, 8, 128, 2, sym=True, perm=within)
    assert why_no_blocks(weight) is None
    made = to_blocks(weight, "Q4_0")
    found = gguf.dequantize(made.data.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(torch.from_numpy(found), weight.dequantize(torch.float32))
    mixed = random_weight(4, 8, 128, 2, sym=True, perm=torch.arange(128).view(64, 2).T.flatten())
    assert "columns are in activation order: the 32 neighbouring" in str(why_no_blocks(mixed))


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (lambda: random_weight(2, 8, 64, 2, True), "it has 2 bits"),
        (lambda: random_weight(3, 8, 64, 2, True), "it has 3 bits"),
        (lambda: random_weight(8, 8, 64, 2, False), "8 bits and is asymmetric.*sym=True"),
        (lambda: random_weight(4, 8, 64, 4, True), "groups of 16: .* more than one scale"),
        (lambda: random_weight(4, 8, 96, 2, True), "groups of 48: .* more than one scale"),
        (lambda: random_weight(4, 8, 48, 1, True), "48 input features, and GGUF needs multiples of 32"),
        (lambda: random_weight(4, 8, 8, 1, True), "8 input features"),
        (
            lambda: tensor_class(4).from_codes(
                torch.zeros(1, 32, dtype=torch.uint8),
                torch.full((1, 1), 6e4).half(),
                torch.full((1, 1), 15, dtype=torch.uint8),
                dtype=torch.float32,
            ),
            "is larger than fp16 can be",
        ),
    ],
)
def test_weights_without_blocks(weight: Any, why: str) -> None:
    assert re.search(why, str(why_no_blocks(weight())))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_the_same_model(name: str, bits: int, tmp_path: Path) -> None:
    """Names, shapes, settings, and the order of rows of q and k in a Llama; every weight bit by bit."""
    model = built(name, bits=bits, group_size=64)
    tokenizer = TOKENIZERS["a token for each byte"]()
    tokenizer.pad_token = tokenizer.eos_token  # else transformers takes a Phi-3 to have its usual one
    saved(model, tmp_path / "m.gguf", tokenizer)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    meant = {n: p.dequantize() if isinstance(p, GroupTensor) else p for n, p in model.named_parameters()}
    found = dict(loaded.named_parameters())
    assert set(found) == set(meant)
    for parameter, value in found.items():
        # A Gemma multiplies by 1 + weight, and that sum is in the file.
        larger = float("norm" in parameter and name.startswith("Gemma"))
        assert torch.equal(value + larger, meant[parameter] + larger), parameter
    for key in ("hidden_size", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters"):
        expected = getattr(model.config, key)
        assert getattr(loaded.config, key) == (pytest.approx(expected) if isinstance(expected, float) else expected)
    assert_same_logits(model, loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_quantized_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Vectors become fp32, which holds them exactly: llama.cpp computes with those only."""
    model = built("Llama, biases", dtype, rules={"re:.*down_proj.weight": None, "lm_head.weight": {"bits": 8}})
    keys, tensors = contents(saved(model, tmp_path / "m.gguf"))
    dense = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    types = {name: t.tensor_type.name for name, t in tensors.items()}
    assert types["token_embd.weight"] == types["blk.1.ffn_down.weight"] == dense
    assert types["blk.0.attn_norm.weight"] == types["blk.1.attn_q.bias"] == "F32"
    assert (types["output.weight"], types["blk.0.attn_v.weight"]) == ("Q8_0", "Q4_0")
    assert torch.equal(read(tensors["token_embd.weight"]), model.model.embed_tokens.weight.float())
    assert torch.equal(read(tensors["output.weight"]), model.lm_head.weight.dequantize(torch.float32))
    assert torch.equal(read(tensors["output_norm.weight"]), model.model.norm.weight.float())
    # llama.cpp turns neighbouring numbers of a head together, transformers those of its two halves.
    bias = model.model.layers[1].self_attn.q_proj.bias.float()
    assert torch.equal(read(tensors["blk.1.attn_q.bias"]), bias.view(4, 2, 32).mT.flatten())
    assert (keys["general.architecture"], keys["general.file_type"], keys["general.quantization_version"]) == (
        "llama",
        gguf.LlamaFileType.MOSTLY_Q8_0,
        2,
    )
    assert (keys["llama.attention.key_length"], keys["llama.rope.dimension_count"]) == (64, 64)


def test_asymmetric_offsets_are_rounded_with_a_word(tmp_path: Path) -> None:
    """What moves is measured, and the file holds it."""
    model = built(sym=False)
    with pytest.warns(RoundedScalesWarning, match=r"14 weights are asymmetric, .* by at most \d\.\de-03 of") as found:
        saved(model, tmp_path / "m.gguf")
    worst = float(re.search(r"most (\S+) of", str(found[0].message)).group(1))  # type: ignore[union-attr]
    _, tensors = contents(tmp_path / "m.gguf")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q4_1"
    off = (read(tensors["blk.0.ffn_up.weight"]) - weight.dequantize(torch.float32)).abs()
    assert 0 < (off / weight.scale.float().abs().repeat_interleave(32, 1)).max() <= worst * 1.05 + 32 * 2**-23


def test_how_it_was_made_is_in_the_file(tmp_path: Path) -> None:
    model = seeded(AutoModelForCausalLM.from_config(MODELS["Llama"](), dtype=torch.float32))
    report = quantize_(model, gptq_config(group_size=32, method="rtn"))
    assert report is not None
    tokenizer = TOKENIZERS["a token for each byte"]()
    save_quantized(model, tmp_path / "m.gguf", format="gguf", tokenizer=tokenizer, report=report)
    keys, _ = contents(tmp_path / "m.gguf")
    assert keys["general.description"] == "; ".join(f"{key}: {value}" for key, value in report.recipe.items()) != ""
    assert keys["general.quantized_by"] == f"gptq_ao {VERSION}"


def test_experts_of_which_one_happens_to_be_symmetric(tmp_path: Path) -> None:
    """They are one tensor, of one type."""
    model = built("Qwen3, experts", sym=False)
    stack = model.model.layers[0].mlp.experts.down_proj
    zero_point = stack.zero_point
    zero_point[3] = 8
    same = type(stack).from_codes(stack.codes(), stack.scale, zero_point, dtype=stack.dtype)
    model.model.layers[0].mlp.experts.down_proj = nn.Parameter(same, requires_grad=False)
    with pytest.warns(RoundedScalesWarning):
        saved(model, tmp_path / "m.gguf")
    _, tensors = contents(tmp_path / "m.gguf")
    found = tensors["blk.0.ffn_down_exps.weight"]
    assert (found.tensor_type.name, read(found).shape) == ("Q4_1", same.shape)
    assert torch.equal(read(found)[3], same.dequantize(torch.float32)[3])


def test_rotary_frequencies_that_are_scaled(tmp_path: Path) -> None:
    keys, tensors = contents(saved(built("Llama, linear scaling"), tmp_path / "a.gguf"))
    assert (keys["llama.rope.scaling.type"], keys["llama.rope.scaling.factor"]) == ("linear", 4.0)
    assert "rope_freqs.weight" not in tensors
    model = built("Llama 3, scaled frequencies")
    keys, tensors = contents(saved(model, tmp_path / "b.gguf"))
    usual = 1000.0 ** -(torch.arange(0, 64, 2).float() / 64)
    # Two divisions and a power in fp32.
    torch.testing.assert_close(
        usual / read(tensors["rope_freqs.weight"]), model.model.rotary_emb.inv_freq, rtol=4 * 2**-23, atol=0
    )
    assert read(tensors["rope_freqs.weight"]).max() == pytest.approx(8.0)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    keys, _ = contents(saved(built(), tmp_path / "m.gguf", tokenizer))
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 360
    known = tokenizer.get_vocab()
    assert {tokens[i]: i for i in known.values()} == known
    padding = [i for i in range(360) if i not in known.values()]
    assert {(tokens[i], types[i]) for i in padding} == {(f"[PAD{i}]", gguf.TokenType.UNUSED) for i in padding}
    unknown: set[int] = set() if tokenizer.unk_token_id is None else {tokenizer.unk_token_id}
    assert {i for i in range(360) if types[i] == gguf.TokenType.UNKNOWN} == unknown
    special = {i for i in range(360) if types[i] == gguf.TokenType.CONTROL}
    assert special == {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} - unknown
    assert keys["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert keys["tokenizer.ggml.add_bos_token"] == (kind in ("Llama 3's", "SentencePiece's", "Gemma's"))
    assert keys["tokenizer.ggml.add_eos_token"] is False
    assert keys.get("tokenizer.chat_template") == tokenizer.chat_template
    expected = {"Llama 3's": "llama-bpe", "Qwen2's": "qwen2", "SentencePiece's": "default", "Gemma's": "default"}.get(
        kind, "gpt-2"
    )
    assert keys["tokenizer.ggml.pre"] == expected
    if expected == "default":
        assert keys["tokenizer.ggml.model"] == "llama"
        assert keys["tokenizer.ggml.add_space_prefix"] == (kind == "SentencePiece's")
        space = " " * keys["tokenizer.ggml.add_space_prefix"]
        assert by_score(space + TEXT, tokens, keys["tokenizer.ggml.scores"], types) == tokenizer(TEXT).input_ids[1:]
    else:
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        assert keys["tokenizer.ggml.merges"] == ([" ".join(m) for m in merges] or ["ĀĀ Ā"])


def by_score(text: str, tokens: list[str], scores: list[float], types: list[int]) -> list[int]:
    """SentencePiece's rule: put together the two neighbours that make the token of the highest score; what is no token
    in the end is its bytes."""
    known = {t: i for i, t in enumerate(tokens)}
    symbols = [*text.replace(" ", "▁")]
    while True:
        pairs = [(scores[known[a + b]], -i) for i, (a, b) in enumerate(pairwise(symbols))
                 if a + b in known and types[known[a + b]] == gguf.TokenType.NORMAL]  # fmt: skip
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found: list[int] = []
    for s in symbols:
        found += [known[s]] if s in known else [known[f"<0x{byte:02X}>"] for byte in s.encode()]
    return found


def with_steps(normalizer: Any = None, pre_tokenizer: Any = None) -> Any:
    tokenizer = bytes_with_merges(SPLITS["qwen2"])
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def sequence(*steps: Any) -> Any:
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def lowercase_pieces() -> Any:
    tokenizer = pieces()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(kinds.WordLevel({"a": 0}, "a"))),
            r"it is of the type WordLevel, and only BPE",
        ),
        (lambda: with_steps(normalizer=normalizers.Lowercase()), r"none of gpt-2, llama-bpe, qwen2"),
        (lambda: with_steps(pre_tokenizer=sequence(pre_tokenizers.Digits())), r"none of gpt-2"),
        (lambda: with_steps(pre_tokenizer=sequence(pre_tokenizers.Split(" ", "isolated"))), r"none of gpt-2"),
        (lambda: with_steps(pre_tokenizer=sequence()), r"none of gpt-2"),
        (lambda: with_steps(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), r"none of gpt-2"),
        (lambda: bytes_with_merges(SPLITS["llama3"], whole=False), r"none of gpt-2"),
        (lambda: bytes_with_merges(SPLITS["qwen2"], whole=True), r"none of gpt-2"),
        (lowercase_pieces, r"before the merges it does {'type': 'Lowercase'}"),
        (object, r"the object cannot be written for llama.cpp: it has no tokenizer.json"),
    ],
    ids=["type", "lowercase", "digits", "pattern", "no-pattern", "space", "words", "words-too", "pieces", "slow"],
)
def test_tokenizers_that_llama_cpp_does_not_have(tokenizer: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        saved(built(), tmp_path / "m.gguf", tokenizer())
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    model = quantized()
    with pytest.raises(CheckpointError, match=r"it has a token of number 256, and the model 96 tokens"):
        saved(model, tmp_path / "m.gguf")


def test_tokenizers_that_split_otherwise_are_written_with_a_word(tmp_path: Path) -> None:
    nfc = with_steps(normalizer=normalizers.NFC())
    with pytest.warns(UserWarning, match=r"a.gguf: the tokenizer brings text into Unicode's form NFC first"):
        saved(built(), tmp_path / "a.gguf", nfc)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.remove(["▁", "▁"]),
        lambda m: m.append(m.pop(m.index(["▁", "def"]))),
        lambda m: m.remove(["▁", "def"]),
    ],
    ids=["none-makes-it", "later", "only-one-makes-it"],
)
def test_pieces_whose_merges_are_not_those_of_sentencepiece(change: Any, tmp_path: Path) -> None:
    """Of a token, all merges that make it are there, one after the other; else llama.cpp does other ones."""
    content = json.loads(pieces().backend_tokenizer.to_str())
    assert ["▁d", "ef"] in content["model"]["merges"]
    change(content["model"]["merges"])
    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    with pytest.warns(UserWarning, match=r"merges are not in the order of scores.* may split text in another way"):
        saved(built(), tmp_path / "m.gguf", odd)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"m.gguf: there is no tokenizer \(give tokenizer=…\), so the file has none"):
        save_quantized(built(), tmp_path / "m.gguf", format="gguf")
    keys, _ = contents(tmp_path / "m.gguf")
    assert keys["tokenizer.ggml.model"] == "no_vocab"
    assert keys["llama.vocab_size"] == 360


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    model = seeded(AutoModelForCausalLM.from_config(transformers.MistralConfig(**SMALL, sliding_window=64)))
    quantize_(model, gptq_config(group_size=32, method="rtn"))
    with pytest.warns(UserWarning, match=r"sliding window of 64 tokens, .* contexts have at most 64 tokens"):
        saved(model, tmp_path / "m.gguf")
    assert contents(tmp_path / "m.gguf")[0]["llama.context_length"] == 64


def test_a_gemma(tmp_path: Path) -> None:
    """What llama.cpp knows of one by its name is not in the file; norms are multiplied by 1 + weight."""
    keys, tensors = contents(saved(built("Gemma 2, caps"), tmp_path / "a.gguf"))
    assert (keys["gemma2.attn_logit_softcapping"], keys["gemma2.final_logit_softcapping"]) == (5.0, 10.0)
    assert (keys["gemma2.attention.sliding_window"], keys["gemma2.context_length"]) == (16, 256)
    model = built("Gemma 3, other frequencies")
    keys, tensors = contents(saved(model, tmp_path / "b.gguf"))
    assert (keys["gemma3.rope.freq_base"], keys["gemma3.rope.freq_base_swa"]) == (1e4, 500.0)
    for name, norm in (
        ("output_norm", model.model.norm),
        ("blk.5.attn_q_norm", model.model.layers[5].self_attn.q_norm),
    ):
        assert torch.equal(read(tensors[f"{name}.weight"]), 1 + norm.weight)
    assert "output.weight" not in tensors  # tied


def test_a_phi3_with_factors(tmp_path: Path) -> None:
    """Fused products stay fused; llama.cpp chooses between two lists of factors itself, which is said."""
    model = of(transformers.Phi3Config(**longrope(512)))
    with pytest.warns(UserWarning, match=r"takes the long_factor of .* contexts of more than 512 tokens, however few"):
        saved(model, tmp_path / "m.gguf")
    keys, tensors = contents(tmp_path / "m.gguf")
    assert keys["phi3.rope.dimension_count"] == 48
    assert keys["phi3.rope.scaling.original_context_length"] == 512
    # As transformers has it: √(1 + log(1024 / 512) / log 512).
    assert keys["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + 1 / 9) ** 0.5)
    assert read(tensors["rope_factors_short.weight"]).tolist() == [1 + i / 32 for i in range(24)]
    assert read(tensors["rope_factors_long.weight"]).tolist() == [4.0 + i for i in range(24)]
    gate_up = model.model.layers[1].mlp.gate_up_proj.weight
    assert torch.equal(read(tensors["blk.1.ffn_up.weight"]), gate_up.dequantize(torch.float32))


def with_phi3_tokens(tokenizer: Any, **how: Any) -> Any:
    tokenizer.add_tokens([AddedToken(t, special=True, **how) for t in ("<unk>", "<s>", "</s>", "<|endoftext|>")])
    return tokenizer


def test_a_name_by_which_llama_cpp_looks_for_tokens(tmp_path: Path) -> None:
    """It does not load a model whose name has "phi-3" in it, and whose tokens are others."""
    model = of(transformers.Phi3Config(**PHI3))
    assert contents(saved(model, tmp_path / "a.gguf"))[0].get("general.name") is None
    known = with_phi3_tokens(bytes_with_merges(SPLITS["qwen2"]), rstrip=True)
    assert contents(saved(model, tmp_path / "b.gguf", known))[0]["general.name"] == "Phi3ForCausalLM"
    save_quantized(model, tmp_path / "my-Phi-3-mini")
    model.config._name_or_path = str(tmp_path / "my-Phi-3-mini")
    with pytest.warns(UserWarning, match=r"no name of the model in it: .* the token '</s>' .*'my-Phi-3-mini'"):
        saved(model, tmp_path / "c.gguf")
    assert contents(saved(model, tmp_path / "d.gguf", known))[0]["general.name"] == "my-Phi-3-mini"


def test_tokens_that_take_spaces_away(tmp_path: Path) -> None:
    stripping = with_phi3_tokens(bytes_with_merges(SPLITS["qwen2"]), rstrip=True)
    with pytest.warns(UserWarning, match=r"special tokens that take spaces beside them away, which they do not in lla"):
        saved(built(), tmp_path / "m.gguf", stripping)


def of(config: Any, kind: Any = AutoModelForCausalLM) -> Any:
    model = seeded(kind.from_config(config, dtype=torch.float32))
    quantize_(model, gptq_config(group_size=32, method="rtn"))
    return model


def gemma(generation: int, **changes: Any) -> Any:
    if generation == 2:
        return of(transformers.Gemma2Config(**{**WINDOWS, **changes}))
    return of(transformers.Gemma3TextConfig(**{**GEMMA3, **changes}))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: quantized("gpt2"), r"a GPT2LMHeadModel \(model_type 'gpt2'\) cannot be .* llama, mistral, qwen2, "),
        (lambda: quantized("mixtral"), r"a MixtralForCausalLM \(model_type 'mixtral'\) cannot be written as GGUF"),
        (lambda: quantized().model, r"a LlamaModel \(model_type 'llama'\) cannot be written"),
        (
            lambda: of(transformers.LlamaConfig(**SMALL), transformers.AutoModelForSequenceClassification),
            r"a LlamaForSequenceClassification",
        ),
        (lambda: of(transformers.LlamaConfig(**SMALL, hidden_act="gelu")), r"hidden_act 'gelu', and .* 'silu'"),
        (lambda: gemma(2, query_pre_attn_scalar=32), r"query_pre_attn_scalar 32, and .* always computes 64: write an"),
        (lambda: gemma(2, layer_types=["full_attention"] * 2), r"layer_types \['full_a.* always computes \['s"),
        (lambda: gemma(2, attn_logit_softcapping=None), r"no attn_logit_softcapping, and llama.cpp always .* with one"),
        (lambda: gemma(3, attn_logit_softcapping=9.0), r"attn_logit_softcapping 9.0, and .* always computes None"),
        (lambda: gemma(3, hidden_activation="silu"), r"hidden_activation 'silu', and .* 'gelu_pytorch_tanh'"),
        (lambda: gemma(3, attention_bias=True), r"attention_bias True, and .* always computes False"),
        (
            lambda: of(transformers.Qwen3Config(**SMALL, attention_bias=True)),
            r"this Qwen3ForCausalLM has attention_bias True, and llama.cpp always computes False: write",
        ),
        (
            lambda: of(transformers.Qwen3MoeConfig(
                **SMALL, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True,
                attention_bias=True)),
            r"this Qwen3MoeForCausalLM has attention_bias True, and llama.cpp always computes False: write",
        ),
        (
            lambda: of(transformers.LlamaConfig(**{**SMALL, "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1000.0, "factor": 2.0, "original_max_position_embeddings": 128}})),
            r"rope_type 'yarn', which is not written for llama.cpp's 'llama'",
        ),
        (
            lambda: of(transformers.Qwen3Config(**{**SMALL, "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1000.0, "factor": 2.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 128}})),
            r"rope_type 'llama3', which is not written for llama.cpp's 'qwen3'",
        ),
        (
            lambda: built("Qwen3, experts", rules={"re:.*experts.*": {"bits": 3}}),
            r"'gguf' cannot hold the weight of 'model.layers.0.mlp.experts.0.*\(and \d+ more\): it has 3 bits",
        ),
        (lambda: quantized(bits=2), r"'gguf' cannot hold the weight of .*and 13 more\): it has 2 bits"),
        (lambda: quantized(group_size=16), r"groups of 16"),
        (lambda: quantized(bits=8, sym=False), r"8 bits and is asymmetric"),
        (tiny_llama, r"the model has no quantized weight"),
        (lambda: nn.Sequential(nn.Linear(32, 32)), r"models that llama.cpp has code for.*: not a Sequential"),
    ],
    ids=["gpt2", "mixtral", "body", "head", "act", "scores", "windows", "no-caps", "caps", "gelu", "biases", "qwen3",
         "qwen3moe", "yarn", "rope", "experts", "2", "16", "8-asym", "dense", "plain"],
)  # fmt: skip
def test_models_that_cannot_be_written(model: Any, message: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that engines fuse
        made = model()
    with pytest.raises(CheckpointError, match=message):
        save_quantized(made, tmp_path / "m.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    model = built()
    with pytest.raises(ConfigError, match=r"one file, whose name ends in \.gguf: .*/out is not such a path"):
        saved(model, tmp_path / "out")
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match=r"there.gguf exists: nothing is overwritten"):
        saved(model, tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"m.gguf could not be written, nothing is left of it"):
        saved(model, tmp_path / "file" / "m.gguf")
    assert saved(model, tmp_path / "new" / "m.gguf").is_file()  # the folder is made
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m.gguf"]


def test_nothing_is_left_of_a_file_that_cannot_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(CheckpointError, match=r"m.gguf could not be written, nothing is left of it: the disk is full"):
        saved(built(), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("gguf", r"GGUF files need the package gguf, .*: pip install 'gptq_ao\[gguf\]'"),
        (
            "transformers.modeling_gguf_pytorch_utils",
            r"by the tables with which transformers reads them .* pip install",
        ),
    ],
)
def test_what_is_missing_is_named(package: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=message):
        saved(model, tmp_path / "m.gguf")


def test_convert(tmp_path: Path) -> None:
    """Of any format; the tokenizer is that of the directory."""
    model = built()
    tokenizer = TOKENIZERS["Qwen2's"]()
    save_quantized(model, tmp_path / "a", format="gptq", tokenizer=tokenizer)
    assert convert_checkpoint(tmp_path / "a", tmp_path / "b.gguf", "gguf") == "gptq"
    saved(model, tmp_path / "c.gguf", tokenizer)
    (keys, tensors), (expected, others) = contents(tmp_path / "b.gguf"), contents(tmp_path / "c.gguf")
    assert keys["tokenizer.ggml.merges"] == expected["tokenizer.ggml.merges"]
    assert set(keys) == set(expected)
    assert {n: t.data.tobytes() for n, t in tensors.items()} == {n: t.data.tobytes() for n, t in others.items()}
    run = CliRunner().invoke(cli.app, ["convert", str(tmp_path / "a"), str(tmp_path / "d.gguf"), "--json"])
    facts = json.loads(run.stdout)
    assert (facts["from"], facts["to"], facts["bytes"]) == ("gptq", "gguf", (tmp_path / "d.gguf").stat().st_size)
    # A name without the suffix says no format.
    run = CliRunner().invoke(cli.app, ["convert", str(tmp_path / "a"), str(tmp_path / "e")])
    assert "--format is missing" in str(run.exception)


def test_tensors_that_the_class_does_not_use_are_named(tmp_path: Path) -> None:
    """As those of layers that predict several tokens at once, which other formats take along."""
    model = built()
    save_quantized(model, tmp_path / "a", tokenizer=TOKENIZERS["Qwen2's"]())
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    dense = tmp_path / "dense"
    seeded(AutoModelForCausalLM.from_config(MODELS["Llama"]())).save_pretrained(dense)
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["mtp.weight"] = torch.ones(4)
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    loaded.config._name_or_path = str(dense)
    unused = r"1 tensors of .* that LlamaForCausalLM does not use are not in the file: .*inv_freq"
    lost = r"are not in this LlamaForCausalLM, so they are not saved: mtp.weight"
    with pytest.warns(UserWarning, match=unused), pytest.warns(UserWarning, match=lost):
        saved(loaded, tmp_path / "m.gguf")

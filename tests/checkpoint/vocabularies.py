"""Small tokenizers of the kinds that llama.cpp has."""

from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

__all__ = ["TEXT", "TOKENIZERS"]

TEXT = "def add(a, b):\n    return a + b  # It's 1234567 + 89, or 'NaN'?\n\n\nclass  Größe:\t\tpass  # 你好 🙂 I'LL\r\n"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPLITS = {"llama3": _START + r"\p{N}{1,3}" + _REST, "qwen2": _START + r"\p{N}" + _REST}


def bytes_with_merges(split: str | None, *, whole: bool = False, bos: bool = False) -> PreTrainedTokenizerFast:
    """A BPE of bytes, trained on the text, with two special tokens and one that is not."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    parts = [] if split is None else [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    made.add_tokens(["return"])
    if bos:
        single = [("<bos>", made.bos_token_id)]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=single
        )
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def pieces(*, gemma: bool = False) -> PreTrainedTokenizerFast:
    """As one that was converted from SentencePiece: a token for every byte, and all merges that make a token, in the
    order of scores. Gemma's puts no space in front."""
    words = [
        "▁d",
        "ef",
        "def",
        "▁def",
        "re",
        "▁re",
        "tu",
        "rn",
        "turn",
        "▁return",
        "▁a",
        "dd",
        "▁add",
        "in",
        "  ",
        "▁▁",
        "as",
    ]
    letters = sorted({c for c in TEXT.replace(" ", "▁") if ord(c) < 0x3000} | set("▁abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    vocabulary += [c for c in letters if c not in "\n\r\t"]
    known = {t: i for i, t in enumerate(vocabulary)}
    merges = [(w[:i], w[i:]) for w in words for i in range(1, len(w)) if w[:i] in known and w[i:] in known]
    tokenizer = Tokenizer(models.BPE(known, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "a token for each byte": lambda: AutoTokenizer.from_pretrained("examples/tiny_lm"),
    "GPT-2's": lambda: bytes_with_merges(None),
    "Llama 3's": lambda: bytes_with_merges(SPLITS["llama3"], whole=True, bos=True),
    "Qwen2's": lambda: bytes_with_merges(SPLITS["qwen2"]),
    "SentencePiece's": pieces,
    "Gemma's": lambda: pieces(gemma=True),
}

"""`eval` and `demo`: how good a model is."""

from dataclasses import asdict
from typing import Annotated

import typer

from gptq_ao.cli.options import (
    AsJson,
    ChunksTogether,
    Column,
    Device,
    Dtype,
    DtypeOption,
    HeldOut,
    Split,
    TrustRemoteCode,
    device_of,
    dtype_of,
    show,
)

__all__ = ["demo", "evaluate"]


def evaluate(
    model: Annotated[str, typer.Argument(help="A quantized or unquantized model: a directory or a hub id.")],
    data: HeldOut,
    reference: Annotated[str | None, typer.Option(help="The original model, for the KL divergence from it.")] = None,
    column: Column = "text",
    split: Split = "test",
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a chunk.")] = 2048,
    # 10^9 stands for all of them.
    max_chunks: Annotated[int, typer.Option(min=1, help="Score at most this many, evenly spaced.")] = 10**9,
    batch_size: ChunksTogether = 4,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity of MODEL, and its KL divergence from a reference."""
    place = device_of(device)  # first: a mistyped option is to fail before a model is loaded
    from gptq_ao.data import read_documents, spaced, token_chunks
    from gptq_ao.evaluate import evaluate as score
    from gptq_ao.integrations.transformers import load_model, load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    chunks = token_chunks(tokenizer, read_documents(data, split=split, column=column), seq_len)
    scored = spaced(chunks, max_chunks)
    loaded, original = (
        None
        if source is None
        else load_model(source, device=place, dtype=dtype_of(dtype), trust_remote_code=trust_remote_code)
        for source in (model, reference)
    )
    assert loaded is not None
    result = score(loaded, scored, original, batch_size)
    protocol = (
        f"{len(scored)} of {len(chunks)} chunks of {seq_len} tokens, evenly spaced; documents are preceded by one "
        f"separator token and concatenated; tokens 2 to {seq_len} of a chunk are scored, log-softmax in fp32"
    )
    kl = "" if result.kl is None else f", KL(reference ‖ model) {result.kl:.5f} nats per token"
    text = f"perplexity {result.perplexity:.4f}{kl}\n{result.tokens} predictions: {protocol}"
    show({"model": model, "reference": reference, **asdict(result), "protocol": protocol}, text, as_json)


def demo(as_json: AsJson = False) -> None:
    """Quantize the small language model that comes with gptq_ao to 4 and 3 bits, and compare."""
    from gptq_ao.demo import run_demo

    result = run_demo()
    show(result.to_dict(), str(result), as_json)

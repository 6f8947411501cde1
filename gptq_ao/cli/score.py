"""`eval` and `demo`: how good a model is."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gptq_ao.cli.options import (
    AsJson,
    ChunksTogether,
    Column,
    Device,
    Dtype,
    DtypeOption,
    Split,
    TrustRemoteCode,
    device_of,
    dtype_of,
    show,
)
from gptq_ao.errors import ConfigError

__all__ = ["demo", "evaluate"]


def evaluate(
    model: Annotated[str, typer.Argument(help="A quantized or unquantized model: a directory or a hub id.")],
    data: Annotated[str | None, typer.Option(help="Text to score: a file, preset or dataset.")] = None,
    reference: Annotated[str | None, typer.Option(help="The original model, for the KL divergence from it.")] = None,
    column: Column = "text",
    split: Split = "test",
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a chunk.")] = 2048,
    # 10^9 stands for all of them.
    max_chunks: Annotated[int, typer.Option(min=1, help="Score at most this many, evenly spaced.")] = 10**9,
    batch_size: ChunksTogether = 4,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, in place of --data: NAME,NAME …")] = None,
    tasks_folder: Annotated[Path | None, typer.Option(help="YAML files that define tasks of one's own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task, the first ones.")] = None,
    few_shot: Annotated[int | None, typer.Option(min=0, help="Examples in each prompt of a task.")] = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity of MODEL, and its KL divergence from a reference; or how well it does tasks of lm-eval."""
    place = device_of(device)  # first: a mistyped option is to fail before a model is loaded
    if tasks is not None:
        if data is not None or reference is not None:
            raise ConfigError("--tasks stands in place of --data, and has no --reference: give the one or the other")
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        _tasks(model, names, (tasks_folder, limit, few_shot, batch_size), place, dtype, trust_remote_code, as_json)
        return
    if data is None:
        raise ConfigError("nothing to score: give --data TEXT, or --tasks NAME,NAME")
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


def _tasks(
    model: str,
    names: list[str],
    how: tuple[Path | None, int | None, int | None, int],
    device: Any,
    dtype: Dtype,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    from gptq_ao.integrations.lm_eval import score_tasks
    from gptq_ao.integrations.transformers import load_model, load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    loaded = load_model(model, device=device, dtype=dtype_of(dtype), trust_remote_code=trust_remote_code)
    found = score_tasks(loaded, tokenizer, names, *how)
    lines = [f"{task}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()) for task, values in found.items()]
    show({"model": model, "tasks": found}, "\n".join(lines), as_json)


def demo(as_json: AsJson = False) -> None:
    """Quantize the small language model that comes with gptq_ao to 4 and 3 bits, and compare."""
    from gptq_ao.demo import run_demo

    result = run_demo()
    show(result.to_dict(), str(result), as_json)

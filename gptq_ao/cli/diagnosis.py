"""`diagnose`: which weights of a quantized model hurt."""

import json
from pathlib import Path
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
from gptq_ao.errors import CheckpointError, ConfigError

__all__ = ["diagnose"]

RULES, FACTS = "rules.yaml", "diagnosis.json"


def diagnose(
    model: Annotated[str, typer.Argument(help="A quantized model: a directory or a hub id.")],
    reference: Annotated[str, typer.Option(help="The original model.")],
    data: HeldOut,
    out: Annotated[
        Path | None, typer.Option(help="Directory for diagnosis.json and rules.yaml.", show_default="MODEL/report")
    ] = None,
    add_bits: Annotated[float, typer.Option(help="What the advice may cost, in bits per quantized weight.")] = 0.1,
    column: Column = "text",
    split: Split = "test",
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a chunk.")] = 512,
    max_chunks: Annotated[int, typer.Option(min=1, help="Use at most this many, evenly spaced.")] = 16,
    batch_size: ChunksTogether = 4,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Which weights of MODEL hurt, and the rules with which to quantize it better."""
    place = device_of(device)  # first: a mistyped option is to fail before a model is loaded
    if out is None and not Path(model).is_dir():
        raise ConfigError(f"{model} is no directory here: give --out, where to write what is found")
    folder = out or Path(model) / "report"
    import yaml

    from gptq_ao.data import read_documents, spaced, token_chunks
    from gptq_ao.diagnosis.diagnose import diagnose as find
    from gptq_ao.integrations.transformers import load_model, load_tokenizer
    from gptq_ao.presentation.files import is_report, read_report, write_report

    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    chunks = token_chunks(tokenizer, read_documents(data, split=split, column=column), seq_len)
    loaded, original = (
        load_model(source, device=place, dtype=dtype_of(dtype), trust_remote_code=trust_remote_code)
        for source in (model, reference)
    )
    scored = spaced(chunks, max_chunks)
    found = find(loaded, original, scored, add_bits=add_bits, batch_size=batch_size, decode=tokenizer.decode)
    facts = found.to_dict()
    lines = [str(found)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (folder / RULES).unlink(missing_ok=True)  # another one's
        if found.advice is not None:
            rules = {name: dict(settings) for name, settings in found.advice.rules.items()}
            (folder / RULES).write_text(yaml.safe_dump(rules, sort_keys=False), encoding="utf-8")
            lines.append(f"gptq-ao quantize … --rules {folder / RULES} follows the advice")
    except OSError as e:
        raise CheckpointError(f"{folder} could not be written: {e}") from e
    if is_report(folder):
        write_report(folder, {**read_report(folder), "diagnosis": facts})
    show({"model": model, "reference": reference, "out": str(folder), **facts}, "\n".join(lines), as_json)

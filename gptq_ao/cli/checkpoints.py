"""`inspect` and `convert`: quantized checkpoints, whatever their format."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gptq_ao.cli.options import AsJson, TrustRemoteCode, show
from gptq_ao.cli.request import EngineName
from gptq_ao.errors import ConfigError

__all__ = ["convert", "inspect"]

Checkpoint = Annotated[Path, typer.Argument(metavar="IN", help="A quantized checkpoint, whatever its format.")]


def inspect(path: Checkpoint, as_json: AsJson = False) -> None:
    """What a quantized checkpoint holds. Reads its configs and headers, no weight."""
    from gptq_ao.checkpoint.files.directory import check_quantized, has_manifest
    from gptq_ao.checkpoint.files.find import find_checkpoint

    directory = find_checkpoint(path)
    # A manifest says more than the other formats can.
    if has_manifest(directory):
        _inspect_native(directory, as_json)
    else:
        check_quantized(directory)
        _inspect_foreign(directory, as_json)


def _inspect_native(path: Path, as_json: bool) -> None:
    from gptq_ao.checkpoint.native.manifest import read_manifest

    manifest = read_manifest(path)
    layers = [
        {
            "name": name,
            "bits": e.bits,
            "shape": list(e.shape),
            "group_size": e.spec.group_size,
            "dtype": e.dtype,
            "act_order": "group" if e.perm else "natural groups",
        }
        for name, e in manifest.quantized.items()
    ]
    size = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    facts: dict[str, Any] = {"path": str(path), "bytes": size, "quantized": layers}
    facts |= {"dense": {n: {"dtype": d, "shape": s} for n, (d, s) in manifest.dense.items()}, "tied": manifest.tied}
    facts |= {"ignored": {n: {"dtype": d, "shape": s} for n, (d, s) in manifest.ignored.items()}}
    lines = [f"{path}: {size / 2**20:.1f} MiB, {len(layers)} quantized and {len(manifest.dense)} other tensors"]
    lines += [f"  {x['name']}  {x['shape']}  {x['bits']} bits, group {x['group_size']}" for x in layers]
    lines += [f"  {n}  {s}  {d}" for n, (d, s) in manifest.dense.items()]
    lines += [f"  {a} is {b}" for a, b in manifest.tied.items()]
    lines += [f"  {n}  {s}  {d}, not used by the model" for n, (d, s) in manifest.ignored.items()]
    show(facts, "\n".join(lines), as_json)


def _inspect_foreign(path: Path, as_json: bool) -> None:
    from gptq_ao.checkpoint.files.shards import NAME_OF
    from gptq_ao.checkpoint.formats import open_quantized

    files = open_quantized(path)
    layers = [
        {"name": name, "bits": w.bits, "shape": list(w.shape), "group_size": w.group_size}
        for name, w in files.weights.items()
    ]
    dense = {n: {"dtype": NAME_OF[t.dtype], "shape": list(t.shape)} for n, t in files.dense.items()}
    size, format = sum(f.stat().st_size for f in path.glob("*.safetensors")), files.format.name
    facts = {"path": str(path), "format": format, "bytes": size, "quantized": layers, "dense": dense}
    lines = [f"{path}: {format}, {size / 2**20:.1f} MiB, {len(layers)} quantized and {len(dense)} other tensors"]
    lines += [f"  {x['name']}  {x['shape']}  {x['bits']} bits, group {x['group_size']}" for x in layers]
    lines += [f"  {n}  {d['shape']}  {d['dtype']}" for n, d in dense.items()]
    show(facts, "\n".join(lines), as_json)


def convert(
    source: Checkpoint,
    out: Annotated[Path, typer.Argument(help="A directory that does not exist yet; or, of GGUF, a file OUT.gguf.")],
    format: Annotated[
        str | None,
        typer.Option(
            help="What to write: native, gptq, gptq_v2, compressed-tensors, awq, mlx, dense (not quantized), or gguf.",
            show_default="gguf, of a file OUT.gguf",
        ),
    ] = None,
    engine: Annotated[
        EngineName | None, typer.Option("--for", help="What is to serve it: warn if it would not.")
    ] = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a quantized checkpoint in another format. The weights stay what they are: nothing is quantized again."""
    from gptq_ao.checkpoint.convert import convert_checkpoint
    from gptq_ao.checkpoint.formats import GGUF

    format = format or (GGUF if out.suffix == ".gguf" else None)
    if format is None:
        raise ConfigError(f"--format is missing: it is known of a file OUT.gguf only, and {out} is no such name")
    found = convert_checkpoint(
        source, out, format, trust_remote_code=trust_remote_code, engine=None if engine is None else engine.value
    )
    size = sum(f.stat().st_size for f in ([out] if out.is_file() else out.glob("*.safetensors")))
    facts = {"source": str(source), "out": str(out), "from": found, "to": format, "bytes": size}
    show(facts, f"{source}, {found}, written to {out} as {format}: {size / 2**20:.1f} MiB", as_json)

"""The README.md that goes with a quantized model: what it is, how it was made, how to load it."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from gptq_ao.checkpoint.exchange.format import Format
from gptq_ao.checkpoint.files.directory import has_manifest, quantization_config
from gptq_ao.checkpoint.origin import Origin
from gptq_ao.errors import CheckpointError
from gptq_ao.report import Report
from gptq_ao.version import VERSION

__all__ = ["CARD", "model_card"]

CARD = "README.md"
_IMPORT = "import gptq_ao  # before the next line: transformers then knows the format"
# A class may be in several mappings: models for images and text also count as language models.
_MOST_TELLING = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")
_LEAST_TELLING = ("AutoModelForPreTraining",)
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
_MAX_BYTES = 2**20


def model_card(
    model: Any,
    format: Format | None,
    weights: Iterable[tuple[int, int]],
    report: Report | None = None,
    origin: Origin | None = None,
) -> str:
    """The text.

    Args:
        model: a Hugging Face model.
        format: that of the files; None: dense.
        weights: bits and group size of every quantized weight.
        report: what `quantize_` returned; None: the card does not say how it was done.
        origin: where the model came from, for what its card says of the license and of the original.
    """
    place = str(getattr(model.config, "_name_or_path", "") or "")
    kept = {} if origin is None else _kept(origin.directory)
    base = place if _is_hub_id(place) else kept.pop("base_model", None)
    kept.pop("base_model", None)
    tags = ["gptq_ao"] if format is None else dict.fromkeys(["gptq_ao", format.quant_method])
    # Formats that transformers has a loader for are loaded without this package.
    first = [_IMPORT] if format is not None and not format.needs else []
    module, loader, trust = _loader(model)
    lines = ["---", "library_name: transformers"]
    lines += yaml.safe_dump({**({"base_model": base} if base else {}), **kept}).splitlines() if base or kept else []
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---", ""]
    lines += [f"# {type(model).__name__}, quantized" + (f" from {base}" if isinstance(base, str) else ""), ""]
    for (bits, group_size), count in sorted(Counter(weights).items()):
        lines.append(f"- {count} weights of {bits} bits, {group_size} input features to a scale")
    lines += [
        f"- format: {'dense' if format is None else format.name}",
        *_recipe(report),
        f"- versions: {_versions()}",
        "",
    ]
    lines += ["```python", *first, f"from {module} import {loader}", ""]
    lines += [f'model = {loader}.from_pretrained("THIS_REPOSITORY"{trust})', "```", ""]
    return "\n".join(lines)


def _loader(model: Any) -> tuple[str, str, str]:
    """The module and the class to load it with, and a further argument; AutoModelFor… if there is one that builds this
    class."""
    import transformers

    kind = type(model)
    for auto, reference in (getattr(model.config, "auto_map", None) or {}).items():
        if str(reference).endswith(f".{kind.__name__}"):
            return "transformers", auto, ", trust_remote_code=True"
    names = [n for n in dir(transformers) if n.startswith("AutoModel") and n not in (*_MOST_TELLING, *_LEAST_TELLING)]
    for name in (*_MOST_TELLING, *names, *_LEAST_TELLING):
        # Of a config, the class or several of which its `architectures` chooses one.
        kinds = getattr(getattr(transformers, name, None), "_model_mapping", {}).get(type(model.config), ())
        if kind in (kinds if isinstance(kinds, tuple | list) else (kinds,)):
            return "transformers", name, ""
    return "transformers" if hasattr(transformers, kind.__name__) else kind.__module__, kind.__name__, ""


def _recipe(report: Report | None) -> list[str]:
    if report is None:
        return []
    lines = [f"- {key}: {value}" for key, value in report.recipe.items()]
    if report.fallbacks:
        lines.append(f"- {len(report.fallbacks)} weights were rounded to nearest, for want of data")
    if report.adapter:
        lines.append(
            "- made for an adapter of PEFT, without which the weights are worse than if none had been made: "
            f"{report.adapter_bits_per_weight:.3f} bits per weight more"
        )
    lines += [f"- {name}: {value:.4g}" for name, value in report.measured.items()]
    return [*lines, f"- {report.bits_per_weight:.3f} stored bits per weight, scales and zero points included"]


def _versions() -> str:
    others = (f"{name} {version(name)}" for name in ("torch", "torchao", "transformers"))
    return ", ".join((f"gptq_ao {VERSION}", *others))


def _kept(directory: Path) -> dict[str, Any]:
    """What the metadata of another card says that holds for this model too. That of quantized files names the model
    that they were made of; that of an original, the one that it was trained from."""
    path = directory / CARD
    if not os.path.isfile(path) or path.stat().st_size > _MAX_BYTES:
        return {}
    parts = re.split(r"^---\s*$", path.read_text(encoding="utf-8", errors="replace"), maxsplit=2, flags=re.MULTILINE)
    try:
        metadata = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
        quantized = has_manifest(directory) or quantization_config(directory) is not None
    except (yaml.YAMLError, ValueError, CheckpointError):
        return {}
    keys = (*_KEPT, "base_model") if quantized else _KEPT
    return {key: metadata[key] for key in keys if key in metadata} if isinstance(metadata, dict) else {}


def _is_hub_id(name: str) -> bool:
    """`owner/name`; a path on someone's machine is nobody's business."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and "\\" not in name

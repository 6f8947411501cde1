"""A quantizer for transformers: `from_pretrained` loads what this package reads, `save_pretrained` writes it again.

`from_pretrained` collects the tensors of a checkpoint and converts them, parameter by parameter. For a quantized weight
it is given one small tensor only, the scales, to learn when and where the parameter is wanted; the weight itself comes
from the reader of this package, which has checked all files before. So there is one reader, and its rules hold here.

With `quantization_config=GptqAoConfig(…)` an unquantized model is loaded as it is, and quantized then.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from gptq_ao.checkpoint.exchange.format import Format
from gptq_ao.checkpoint.files.directory import method_of
from gptq_ao.checkpoint.formats import FORMATS, QuantizedFiles, format_in, open_quantized
from gptq_ao.checkpoint.freed_memory import return_freed_memory
from gptq_ao.checkpoint.origin import origin_of
from gptq_ao.checkpoint.source import Source, source_of
from gptq_ao.config import GPTQConfig, gptq_config
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.integrations.landing import check_landing, keep_stored_dtypes, keep_untied
from gptq_ao.integrations.sharded import part_of
from gptq_ao.model.state import state_names
from gptq_ao.model.weights import ModelWeights
from gptq_ao.pipeline.quantize import quantize_
from gptq_ao.tensor import GroupTensor

__all__ = ["CheckpointConfig", "GptqAoConfig", "GptqAoQuantizer", "TorchAoQuantizer"]


class CheckpointConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint, as it is there."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    @property
    def quant_method(self) -> str:
        return str(method_of(self.content))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.content)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class GptqAoConfig(CheckpointConfig):
    """Quantize a model when it is loaded: `from_pretrained(…, quantization_config=GptqAoConfig(calibration=batches))`.

    Args:
        bits, group_size, calibration, settings: those of `gptq_config`. Without calibration, weights are rounded to
            nearest.

    Raises:
        ConfigError: as `gptq_config`.
    """

    def __init__(
        self, bits: int = 4, group_size: int | None = None, *, calibration: Any = None, **settings: Any
    ) -> None:
        # Only the method goes into config.json; after loading, it is replaced by what the quantized model holds.
        super().__init__({"quant_method": "gptq_ao"})
        if calibration is None:
            settings.setdefault("method", "rtn")
        recipe = gptq_config(bits, group_size, calibration=calibration, **settings)
        recipe.check_no_adapter("from_pretrained")
        self.recipe: GPTQConfig | None = recipe

    def __deepcopy__(self, memo: Any) -> "GptqAoConfig":
        """transformers copies configs; the calibration data, of any size and kind, is shared."""
        same = copy.copy(self)
        same.content = copy.deepcopy(self.content)
        return same


class GptqAoQuantizer(HfQuantizer):
    """See the module's docstring. One object belongs to one model."""

    requires_calibration = False

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: Any = quantization_config
        self._files: QuantizedFiles | None = None
        self._source: Source | None = None
        self._conversions: list[Any] | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized and getattr(self.quantization_config, "recipe", None) is None:
            raise ConfigError(
                f"the model is not quantized, and {type(self.quantization_config).__name__} does not say how to do it "
                "here: give quantization_config=gptq_ao.GptqAoConfig(bits, group_size, calibration=…), whose settings "
                "are those of gptq_config (docs/migrating.md has their names), with calibration="
                "gptq_ao.data.text_batches(tokenizer, dataset)"
            )
        # accelerate writes offloaded tensors as plain arrays, which a tensor subclass is not.
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "quantized weights cannot be offloaded to the disk: give 'cpu' in place of 'disk' in device_map, or, "
                "with 'auto', more memory to the host: max_memory={…, 'cpu': '64GB'}"
            )

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        directory = _directory(model, checkpoint_files or [])
        with torch.device("cpu"):  # transformers calls this where new tensors are on meta
            self._files = open_quantized(directory)
            keep_stored_dtypes(directory, self._files, model)
            # Not strict: a new head that the checkpoint lacks is for transformers to initialize and report.
            self._source = source_of(directory, self._files.tensors, model, strict=False)
        if Path(model.config._name_or_path).is_dir():
            model.config._name_or_path = str(directory)  # with `subfolder`
        check_landing(directory, self._files, self._source)
        keep_untied(self._source)
        # transformers would otherwise warn of codes and zero points that it has not used: it is told to read the scales
        # only.
        model._keys_to_ignore_on_load_unexpected |= {self._files.format.others}

    @property
    def format(self) -> Format:
        """In which a model is saved: a model of a gptq checkpoint as one, so that whatever reads the original reads
        this too."""
        return format_in(self.quantization_config.to_dict(), "the model")

    def read(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """The parameter `name`, and what else is made of the same tensors: name → tensor of the parameter's shape, or
        this process's part of it, made on `device`."""
        assert self._source is not None
        conversion, _ = self._source.conversions[name]
        made = conversion.make(self._source.model, device)
        return {n: part_of(self._source.model, n, t) for n, t in made.items()}

    def get_weight_conversions(self) -> list[WeightConverter]:
        if self._files is None:
            return []
        format = self._files.format
        # One converter for each last part of a parameter's name ("weight"); its pattern matches the scale beside it. If
        # a weight's codes have its name (MLX), that is the "scale", and dense weights come from the reader as well.
        leaves = sorted({name.rpartition(".")[2] for name in self._files.weights})
        scales = {leaf: format.scale if format.hub_names else f"{leaf}.{format.scale}" for leaf in leaves}
        return [WeightConverter([scale], [leaf], operations=[_Read(self)]) for leaf, scale in scales.items()]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """transformers' own conversions (experts are stacked, projections joined) also for quantized weights, if those
        are named as the dense ones are in a hub checkpoint."""
        ours = []
        if self._files is not None and self._files.format.hub_names:
            # The same conversion once more, with scales as its sources: the files name experts' scales as they name
            # their weights.
            for c in weight_conversions:
                if isinstance(c, WeightConverter) and all(s.endswith(".weight") for s in c._original_source_patterns):
                    scale = self._files.format.scale
                    sources = [s.removesuffix("weight") + scale for s in c._original_source_patterns]
                    if self._files.format.stacks is not None:
                        sources = [self._files.format.stacks.name(s) for s in sources]
                    same = WeightConverter(sources, list(c._original_target_patterns), operations=[_Read(self, c)])
                    # They limit to which submodels a conversion applies, so the copy has to have the same.
                    same.scope_prefix, same.base_model_prefix = c.scope_prefix, c.base_model_prefix
                    ours.append(same)
        return [*ours, *weight_conversions, *self.get_weight_conversions()]

    # `device_map="auto"` is decided before anything is loaded, when parameters still look dense.
    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of an element, for `device_map="auto"`. Going by the files: they hold slightly more than the weight."""
        if self._source is not None and param_name in self._source.conversions:
            conversion, _ = self._source.conversions[param_name]
            if conversion.quantized:
                tensors = [tensor for _, _, tensor in conversion.inputs]
                return sum(t.nbytes for t in tensors) / sum(math.prod(t.shape) for t in tensors)
        return float(param.element_size())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._files is not None:
            model._keys_to_ignore_on_load_unexpected -= {self._files.format.others}
        for parameter in model.parameters():
            if isinstance(parameter, GroupTensor):
                parameter.requires_grad_(False)
        self.take_over(model)
        # What others ask whether it can be cast, trained and merged. As a file it is "gptq", but not in memory.
        model.quantization_method = QuantizationMethod.TORCHAO
        if self._files is not None:
            self._files.rounding.warn()
        # They hold the headers of all files.
        self._files = self._source = None
        recipe = getattr(self.quantization_config, "recipe", None)
        if not self.pre_quantized and recipe is not None:
            quantize_(model, recipe)
            self.quantization_config.recipe = None  # and with it the data

    def take_over(self, model: Any) -> None:
        """On saving, this class names and splits the tensors: transformers has nothing left to revert."""
        used = (_original(c) for c in getattr(model, "_weight_conversions", None) or ())
        self._conversions = list({id(c): c for c in used if c is not None}.values())
        model._weight_conversions = []

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the format that was loaded, or the native one."""
        # Of tied parameters one name is written, as transformers does; what is offloaded comes from where it is kept.
        weights = ModelWeights(model)
        values = {first: weights.get(first) for first, *_ in state_names(model)}
        settings = self.quantization_config.to_dict()
        format = self.format
        if format.name == "gptq" and not settings.get("sym", True):
            format = FORMATS["gptq_v2"]  # version 1 is ambiguous for asymmetric weights
        # `export` needs transformers' conversions to split experts again; afterwards `save_pretrained` must not do it
        # twice.
        model._weight_conversions = self._conversions
        try:
            exported = format.export(model, values)
        finally:
            model._weight_conversions = []
        origin = origin_of(model)
        if origin is not None:
            exported = exported.and_plain(origin.matrices)
        content, tensors = format.config(exported), dict(format.tensors(exported, model.dtype))
        if origin is not None:
            tensors |= dict(origin.tensors())
        model.config.quantization_config = self.quantization_config = CheckpointConfig(content)
        return tensors, {}

    # Properties and methods that transformers asks before it saves, trains (adapters) or compiles a model.
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if isinstance(parameter, GroupTensor):
                    dense = parameter.dequantize(wanted or parameter.dtype)
                    module._parameters[name] = nn.Parameter(dense)  # trains, as what was never quantized does
        # The model is dense now: when it is saved, transformers itself reverts its conversions.
        model._weight_conversions = self._conversions
        return model


class TorchAoQuantizer(TorchAoHfQuantizer):
    """transformers' own for `TorchAoConfig(gptq_config(…))`, but for what it cannot write."""

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the native format, if there are weights of this package."""
        if not any(isinstance(p, GroupTensor) for p in model.parameters()):
            return super().get_state_dict_and_metadata(model)
        # torchao's files have a fixed set of names for the parts of a weight. From now on the model is one of ours.
        model.hf_quantizer = GptqAoQuantizer(CheckpointConfig({"quant_method": "gptq_ao"}), pre_quantized=True)
        model.hf_quantizer.take_over(model)
        return model.hf_quantizer.get_state_dict_and_metadata(model)


class _Read(ConversionOps):
    """In place of a conversion of tensors: the parameter, read by `GptqAoQuantizer.read`."""

    def __init__(self, quantizer: GptqAoQuantizer, instead_of: Any = None) -> None:
        self.hf_quantizer = quantizer  # under this name: transformers then casts nothing
        self.instead_of = instead_of  # transformers' conversion of the same parameter

    def __deepcopy__(self, memo: Any) -> "_Read":
        return _Read(self.hf_quantizer)  # transformers copies the operation for each parameter

    def convert(self, input_dict: Any, *args: Any, full_layer_name: str = "", **kwargs: Any) -> dict[str, Tensor]:
        # One tensor, or a list of several (all experts of a layer): only the device is taken from it.
        scales = next(iter(input_dict.values()))
        device = (scales[0] if isinstance(scales, list) else scales).device
        made = self.hf_quantizer.read(full_layer_name, device)
        # What was read on the host is free again once it is on the device.
        if device.type != "cpu":
            return_freed_memory()
        return {name: nn.Parameter(t, requires_grad=_trains(t)) for name, t in made.items()}


def _trains(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not isinstance(tensor, GroupTensor)


def _directory(model: Any, checkpoint_files: list[str]) -> Path:
    """Where the files are that transformers found by joining the index's names, which may be anything."""
    # A local directory or a folder in it; or a hub id: then the files lie in a snapshot of the hub's cache.
    local = Path(str(model.config._name_or_path))
    folders = {Path(file).parent for file in checkpoint_files}
    root = local if local.is_dir() else Path("/")
    odd = {f for f in folders if not f.is_relative_to(root) or ".." in f.relative_to(root).parts}
    directory = min(folders - odd, default=local)
    odd |= folders - {directory}
    if odd:
        raise CheckpointError(
            f"{directory}: its index names files outside of it, in {', '.join(sorted(map(str, odd)))}"
        )
    return directory


def _original(conversion: Any) -> Any:
    """The conversion that is transformers' own: itself, the one it stands for, or None."""
    ours = next((o for o in getattr(conversion, "operations", ()) if isinstance(o, _Read)), None)
    return conversion if ours is None else ours.instead_of

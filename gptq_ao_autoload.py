"""So that programs which never import gptq_ao load its checkpoints: torch calls `watch` at the end of `import torch`.

It is an entry point of the group `torch.backends` (pyproject.toml). What it does takes microseconds and imports nothing
of gptq_ao: the first import from a package runs its `__init__`, so this is a module beside the package. An exception
here would be one of `import torch`.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["METHODS", "watch", "when_imported"]

METHODS = ("gptq_ao", "gptq", "compressed-tensors", "awq", "mlx")  # names of the quantizations that gptq_ao loads
_LOADER = "gptq_ao.integrations.transformers"


def watch() -> None:
    """From now on transformers imports gptq_ao when it meets a checkpoint for it: in `from_pretrained`, or before, when
    a program has a `quantization_config` parsed (lm-eval)."""
    when_imported("transformers.quantizers.auto", _look_first)


def _look_first() -> None:
    # Where `from_pretrained` finds the function, else where it is made. Transformers itself may be what imports torch,
    # in the middle of the import of one of the two; then the other one is still to come.
    places = map(sys.modules.get, ("transformers.modeling_utils", "transformers.quantizers.auto"))
    module: Any = next((m for m in places if hasattr(m, "get_hf_quantizer")), None)
    if module is None:
        return when_imported("transformers.modeling_utils", _look_first)
    own = module.get_hf_quantizer
    if own.__module__ == __name__:
        return None  # by an earlier call of `watch`
    parser: Any = sys.modules["transformers.quantizers.auto"].AutoQuantizationConfig
    own_parse = parser.from_dict

    def parse(stored: Any) -> Any:
        if _LOADER in sys.modules or not _names_ours(stored):
            return own_parse(stored)
        import_module(_LOADER)  # has its own parser, which calls this one
        return parser.from_dict(stored)

    def choose(config: Any, *args: Any, **kwargs: Any) -> Any:
        if _LOADER in sys.modules or not _is_ours(config):
            return own(config, *args, **kwargs)
        import_module(_LOADER)  # has its own choice, which calls this one
        chosen = sys.modules["transformers.modeling_utils"].get_hf_quantizer
        return chosen(config, *args, **kwargs)

    parser.from_dict = staticmethod(parse)
    module.get_hf_quantizer = choose
    return None


def _is_ours(config: Any) -> bool:
    for each in (config, config.get_text_config(decoder=True)):
        # Early compressed-tensors has another name for it, and no method. So has MLX.
        if hasattr(each, "compression_config"):
            return True
        if any(_names_ours(getattr(each, key, None)) for key in ("quantization_config", "quantization")):
            return True
    return False


def _names_ours(stored: Any) -> bool:
    """Whether a `quantization_config` is that of a checkpoint which gptq_ao loads."""
    fields = stored if isinstance(stored, dict) else getattr(stored, "__dict__", {})
    # Native ones have no method, and MLX's neither: see gptq_ao/checkpoint/files/directory.py.
    if "quant_method" not in fields and {"bits", "group_size"} <= {*fields}:
        return True
    return fields.get("quant_method") in METHODS or fields.get("format") == "gptq_ao"


def when_imported(module: str, then: Callable[[], object]) -> None:
    """Call `then`, once, when `module` has been executed; now, if it has been."""
    watching = next((f for f in sys.meta_path if isinstance(f, _Watch) and f.module == module), None)
    if watching is not None:
        watching.then.append(then)
    elif module in sys.modules:
        then()
    else:
        # In front, so that it is asked before the finder that has the module.
        sys.meta_path.insert(0, _Watch(module, [then]))


class _Watch(MetaPathFinder):
    """Finds nothing itself: it lets the others find the module, adds steps to its execution, and then is gone. There is
    one for a module, as two would ask each other without end."""

    def __init__(self, module: str, then: list[Callable[[], object]]) -> None:
        self.module, self.then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        # Not `importlib.util.find_spec`, which would ask this finder again.
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for finder in others if (s := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            # After the module's own code: what the steps need from it does not exist before.
            spec.loader.exec_module = self._then_too(spec.loader.exec_module)  # type: ignore[assignment, method-assign]
        return spec

    def _then_too(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_and_more(module: ModuleType) -> None:
            execute(module)
            # A module may be executed again (importlib.reload).
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                for step in self.then:
                    step()

        return execute_and_more

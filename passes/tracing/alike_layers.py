"""Which layers of a model differ in nothing that their forward can see, except for the numbers in their weights.

Layers of one container are alike if they have the same modules, with parameters and buffers of the same form. What else
they hold may differ (`layer_idx`): `Alike.watched` tells what of it a forward reads, and two layers do the same if they
agree in that.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Alike", "Place", "State", "alike_layers", "hooked", "same_state", "state"]

Place = tuple[str, str]  # name of a module within its layer, and of an attribute
State = Mapping[Any, Any]

_HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)
_TENSORS = ("_parameters", "_buffers")
_TABLES = frozenset({*_TENSORS, "_modules", "_non_persistent_buffers_set"})
_PLAIN = (int, float, complex, bool, str, bytes, types.NoneType, torch.dtype, torch.device, torch.Size, range, slice)
_MISSING = object()
_DEPTH = 4  # of containers in containers; what is nested deeper counts as different


@dataclass(frozen=True, eq=False)
class Alike:
    """
    Attributes:
        layers: three or more; a layer that its container holds twice is in it twice.
        varying: name of a module within its layer → attributes that are not the same in all layers.
    """

    layers: tuple[nn.Module, ...]
    varying: Mapping[str, frozenset[str]]

    @contextlib.contextmanager
    def watched(self, layer: nn.Module) -> Iterator[set[Place]]:
        """Yields the varying attributes that are read within. They are taken out of the modules' dicts, so that Python
        asks `nn.Module.__getattr__` for them, which looks into a table that notes it."""
        reads: set[Place] = set()
        taken: list[tuple[nn.Module, dict[str, Any], Any]] = []
        try:
            for name, m in layer.named_modules():
                keys = self.varying.get(name, frozenset())
                # Where Python finds it in the class, or asks another function, nobody can tell whether it is read.
                asked = type(m).__getattr__ is nn.Module.__getattr__
                hidden = {key for key in keys if not asked or hasattr(type(m), key)}
                reads |= {(name, key) for key in hidden}
                own = {key: vars(m)[key] for key in keys - hidden if key in vars(m)}
                table = vars(m)["_modules"]
                taken.append((m, own, table))
                vars(m)["_modules"] = _Noting(table, own, keys - hidden, name, reads)
                for key in own:
                    del vars(m)[key]
            yield reads
        finally:
            for m, own, modules in taken:
                vars(m)["_modules"] = modules
                vars(m).update(own)

    def agree(self, one: nn.Module, other: nn.Module, reads: Iterable[Place]) -> bool:
        """Whether two layers have the same of what a forward has read."""
        pairs = (((one.get_submodule(name), other.get_submodule(name)), key) for name, key in reads)
        return all(_same(_attribute(a, key), _attribute(b, key), a, b) for (a, b), key in pairs)


def alike_layers(model: nn.Module) -> list[Alike]:
    """The outermost ones: not those inside of a layer that is in such a group itself."""
    found: list[Alike] = []
    todo, seen = [model], set()
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        children = [m for m in module._modules.values() if m is not None]
        groups: dict[Any, list[nn.Module]] = {}
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            for child in children:
                groups.setdefault(_structure(child), []).append(child)
        large = [tuple(g) for g in groups.values() if len(g) > 2 and _usable(g)]
        found += [Alike(g, _varying(g)) for g in large]
        inside = {m for g in large for m in g}
        todo += [c for c in children if c not in inside]
    return found


def hooked(layer: nn.Module) -> bool:
    """Whether something else would be called with what the inner modules of a layer get or return."""
    inner = (m for m in layer.modules() if m is not layer)
    return any(m._forward_hooks or m._forward_pre_hooks for m in inner)


def state(modules: Iterable[nn.Module], tensors: bool = False) -> State:
    """What modules hold, and what is in the containers and objects that they hold; to be compared by `same_state`.

    Args:
        tensors: include parameters and buffers.
    """
    found: dict[Any, Any] = {}
    for m in modules:
        for name, value in vars(m).items():
            if name in _HOOKS or (name in _TENSORS and not tensors):
                continue
            _note(found, (id(m), name), value, depth=2)
    return found


def same_state(one: State, other: State) -> bool:
    """Whether everything is still the same object, or an equal number or string."""
    return one.keys() == other.keys() and all(v is other[k] or _same_plain(v, other[k]) for k, v in one.items())


def _note(found: dict[Any, Any], key: tuple[Any, ...], value: Any, depth: int) -> None:
    found[key] = value
    if not depth or isinstance(value, _PLAIN):
        return
    if isinstance(value, dict):
        inner: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    elif isinstance(value, set | frozenset):
        inner = ((v, None) for v in value)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type | types.FunctionType):
        inner = vars(value).items()
    else:
        return
    for name, v in inner:
        _note(found, (*key, name), v, depth - 1)


def _structure(layer: nn.Module) -> Any:
    """Equal for layers with the same modules, and parameters and buffers of the same form."""
    first: dict[int, int] = {}
    parts: list[Any] = []
    for name, m in layer.named_modules(remove_duplicate=False):
        # A module, parameter or buffer that is there twice is so in all layers.
        parts.append((name, type(m), first.setdefault(id(m), len(first))))
        for table in _TENSORS:
            for key, t in vars(m)[table].items():
                form = (t.shape, t.stride(), t.dtype, t.device, t.requires_grad, type(t)) if t is not None else None
                parts.append((key, form, first.setdefault(id(t), len(first)) if t is not None else None))
        parts.append(frozenset(m._non_persistent_buffers_set))
    return tuple(parts)


def _usable(layers: list[nn.Module]) -> bool:
    """Not those whose forward is no Python, or is not the same function."""
    if any(isinstance(m, torch.jit.ScriptModule) for m in layers[0].modules()):
        return False
    first = layers[0]
    return all(_same(first.forward, other.forward, first, other) for other in layers)


def _varying(layers: tuple[nn.Module, ...]) -> dict[str, frozenset[str]]:
    first, *others = ([m for _, m in layer.named_modules()] for layer in layers)
    found = {}
    for i, (name, _) in enumerate(layers[0].named_modules()):
        own = [others_[i] for others_ in others]
        names = {key for m in (first[i], *own) for key in vars(m)} - _HOOKS - _TABLES
        found[name] = frozenset(
            key
            for key in names
            if not all(_same(_attribute(first[i], key), _attribute(m, key), first[i], m) for m in own)
        )
    return {name: keys for name, keys in found.items() if keys}


def _attribute(module: nn.Module, key: str) -> Any:
    return vars(module).get(key, _MISSING)


def _same(a: Any, b: Any, self_a: Any = None, self_b: Any = None, depth: int = _DEPTH) -> bool:
    """Whether a forward cannot tell one from the other.

    Args:
        self_a, self_b: modules that correspond to one another.
    """
    if a is b or _same_plain(a, b) or (self_a is not None and a is self_a and b is self_b):
        return True
    if type(a) is not type(b) or not depth:
        return False

    def same(x: Any, y: Any) -> bool:
        return _same(x, y, self_a, self_b, depth - 1)

    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__ and same(a.__self__, b.__self__)
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) is dict:
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if type(a) in (set, frozenset):
        return a == b and all(type(v) in _PLAIN for v in (*a, *b))
    if type(a) is functools.partial:
        return same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b)) if hasattr(a, "__dict__") else False
    return False


def _same_plain(a: Any, b: Any) -> bool:
    # By what is printed: 0.0 and -0.0 are equal, and make different graphs.
    return type(a) is type(b) and type(a) in _PLAIN and a == b and repr(a) == repr(b)


class _Noting(dict[str, Any]):
    """A table of modules, in which other attributes are found, too. It notes which of `keys` are asked for: that one is
    not there is an answer as well."""

    def __init__(
        self, modules: dict[str, Any], own: dict[str, Any], keys: frozenset[str], name: str, reads: set[Place]
    ) -> None:
        super().__init__(modules)
        self._own, self._keys, self._name, self._reads = own, keys, name, reads

    def __contains__(self, key: object) -> bool:
        if key in self._keys:
            self._reads.add((self._name, str(key)))
        return key in self._own or super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        return self._own[key] if key in self._own else super().__getitem__(key)

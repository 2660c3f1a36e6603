"""The kernels of transformers' models, replaced function by function.

transformers (5.x) decorates each torch function that a kernel package may replace, and its wrapper
keeps the implementation that it found when the modelling file was imported. Replacing that keeps
every reference to the wrapper. RecurrentGemma and RWKV have no such hook; there exactly the
function that runs the recurrence is replaced.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FunctionType, ModuleType

from torch import nn

from recurra.compat import _hooks, _recurrences

_DECORATOR = "use_kernel_func_from_hub_with_fallback"
_DECORATORS_FILE = "integrations/hub_kernels.py"
_CELLS = ("applicable_params", "func_name", "implementation", "is_new_implementation", "package")
_FOLDERS = ("transformers.models.", "transformers_modules.")


def check() -> None:
    """Raises where the installed transformers differs from what :class:`Patches` relies on.

    Reads its source: importing it takes seconds, and may never be needed.
    """
    folder = Path(importlib.util.find_spec("transformers").submodule_search_locations[0])
    missing = []
    source = _read(folder / _DECORATORS_FILE)
    if not all(re.search(rf"\b{name}\b", source) for name in (*_CELLS, _DECORATOR)):
        missing.append(f"{_DECORATOR} in {_DECORATORS_FILE}")
    for recurrence in _recurrences.ALL:
        text, name = _read(folder / recurrence.file), recurrence.name
        if recurrence.parameters is None:
            if f"self.{name.rpartition('.')[2]} = nn.Conv1d(" not in text:
                missing.append(f"{name} in {recurrence.file}")
        elif _parameters(text, name) != recurrence.parameters:
            missing.append(f"{name}({', '.join(recurrence.parameters)}) in {recurrence.file}")
    if missing:
        raise RuntimeError(
            f"install: transformers {_version()} does not have {', '.join(missing)}, so nothing was"
            " changed; transformers=False leaves it alone and installs the rest"
        )


def _parameters(source: str, name: str) -> tuple[str, ...] | None:
    """The parameters of a function, from the text that defines it."""
    found = re.search(rf"def {name.rpartition('.')[2]}\((.*?)\)(?: ->.*?)?:\n", source, re.S)
    if found is None:
        return None
    return tuple(re.findall(r"(?:^|,)\s*(\w+)", re.sub(r"\[.*?\]", "", found[1])))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _version() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return "of an unknown version"


class Hook:
    """A function of a modelling file that transformers lets a kernel package replace."""

    def __init__(self, name: str, wrapper: FunctionType):
        self.name = name
        self._cells = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__, strict=True))
        self.torch_function = wrapper.__wrapped__

    def __getattr__(self, name: str):
        try:
            return self.__dict__["_cells"][name].cell_contents
        except KeyError:
            raise AttributeError(name) from None

    def use(self, implementation: Callable) -> None:
        self._cells["implementation"].cell_contents = implementation
        parameters = tuple(inspect.signature(implementation).parameters)
        self._cells["applicable_params"].cell_contents = parameters
        own = implementation is self.torch_function
        self._cells["is_new_implementation"].cell_contents = not own


def hooks(module: ModuleType) -> Iterator[Hook]:
    """The hooks that a modelling file defines."""
    for name, value in list(vars(module).items()):
        while callable(value) and getattr(value, "__module__", None) == module.__name__:
            code = getattr(value, "__code__", None)
            if code is not None and set(_CELLS) <= set(code.co_freevars):
                yield Hook(name, value)
                break
            value = getattr(value, "__wrapped__", None)


class Patches(MetaPathFinder):
    """recurra's kernels in the modelling files that are imported, and in those that will be."""

    def __init__(self, packages: tuple[str, ...]):
        self._packages = packages
        self._undo: list[Callable[[], None]] = []
        self.modules: dict[str, ModuleType] = {}

    def apply(self) -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith(_FOLDERS) and module is not None:
                self._patch(module)
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        while self._undo:
            self._undo.pop()()
        self.modules = {}

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(_FOLDERS) or ".modeling_" not in fullname:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)):
                break
        else:
            return None
        # The loader stays what it is, but for one method of this one instance.
        execute = getattr(spec.loader, "exec_module", None)
        if execute is not None:

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    self._patch(module)

            spec.loader.exec_module = exec_module
        return spec

    def _patch(self, module: ModuleType) -> None:
        found = list(hooks(module))
        if not found and callable(getattr(module, _DECORATOR, None)):
            raise RuntimeError(
                f"install: {module.__name__} uses {_DECORATOR} of transformers {_version()}, whose"
                " wrappers recurra does not know"
            )
        for hook in found:
            replacement = _hooks.BY_NAME.get(hook.func_name)
            if hook.package not in self._packages or replacement is None:
                continue
            original = hook.implementation
            if (original.__module__ or "").startswith("recurra."):
                original = hook.torch_function  # found under the name of the package
            hook.use(replacement(hook.torch_function))
            self._undo.append(functools.partial(hook.use, original))
            self.modules[module.__name__] = module
        for recurrence in _recurrences.ALL:
            if module.__name__ == recurrence.module:
                self._undo.append(recurrence.patch(module))
                self.modules[module.__name__] = module

    def lines(self) -> list[str]:
        """For people: what runs on what."""
        head = f"transformers {_version()}: "
        if not self.modules:
            return [head + "every model that is imported from now on"]
        lines = [head + "the models below, and every model that is imported from now on"]
        for name, module in sorted(self.modules.items()):
            uses = [f"{h.func_name}: {_where(h)}" for h in hooks(module)]
            uses += [f"{r.name}: recurra" for r in _recurrences.ALL if r.module == name]
            lines.append(
                f"  {name.rpartition('.')[2].removeprefix('modeling_')}: {', '.join(uses)}"
            )
        return lines


def _where(hook: Hook) -> str:
    if hook.implementation is hook.torch_function:
        return "torch"
    return hook.implementation.__module__.partition(".")[0]


def describe(model: nn.Module, patches: Patches | None) -> str:
    """One line for each kind of layer that uses a hook or a known recurrence."""
    kinds: dict[tuple, int] = {}
    for layer in model.modules():
        uses = tuple(_uses(layer, patches))
        if uses:
            key = (type(layer).__name__, uses)
            kinds[key] = kinds.get(key, 0) + 1
    if not kinds:
        return f"{type(model).__name__}: no layer with a kernel that recurra knows"
    lines = [f"{type(model).__name__}:"]
    for (kind, uses), count in kinds.items():
        lines.append(f"  {kind} x {count}: " + ", ".join(f"{use}: {where}" for use, where in uses))
    return "\n".join(lines)


def _uses(layer: nn.Module, patches: Patches | None) -> Iterator[tuple[str, str]]:
    if type(layer).__module__.startswith("recurra."):
        if "ops" in vars(type(layer)):
            yield "all ops", "recurra"
        return
    module = sys.modules.get(type(layer).__module__)
    if module is None or not type(layer).__module__.startswith(_FOLDERS):
        return
    names = {
        name
        for cls in type(layer).__mro__
        if cls.__module__ == module.__name__
        for method in vars(cls).values()
        if isinstance(method, FunctionType)
        for name in _names(method)
    }
    device = next((p.device.type for p in layer.parameters()), "cpu")
    for hook in hooks(module):
        if hook.name in names:
            where = _where(hook)
            if where == "recurra" and device != "cpu":
                where = f"torch (recurra has no kernel for {device})"
            elif where == "recurra" and not _hooks.takes(hook.func_name, layer):
                where = "torch (recurra's convolution has no such activation)"
            yield hook.func_name, where
    for recurrence in _recurrences.ALL:
        if recurrence.module == module.__name__ and type(layer).__name__ == recurrence.layer:
            patched = patches is not None and module.__name__ in patches.modules
            yield recurrence.name, "recurra" if patched and device == "cpu" else "torch"


def _names(method: FunctionType) -> set[str]:
    names = set(method.__code__.co_names)
    inner = getattr(method, "__wrapped__", None)
    return names | _names(inner) if isinstance(inner, FunctionType) else names

"""The kernels of transformers' models, replaced function by function.

transformers (5.x) decorates each torch function that a kernel package may replace, and its wrapper
keeps the implementation that it found when the modelling file was imported. Replacing that keeps
every reference to the wrapper. RecurrentGemma and RWKV have no such hook; there the functions that
run the recurrence, and RecurrentGemma's convolution before it, are replaced by name.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FunctionType, ModuleType

import torch
from torch import nn

from recurra import _library
from recurra.compat import _hooks, _recurrences

_DECORATOR = "use_kernel_func_from_hub_with_fallback"
_DECORATORS = "transformers.integrations.hub_kernels"
_CELLS = ("applicable_params", "func_name", "implementation", "is_new_implementation", "package")
_FOLDERS = ("transformers.models.", "transformers_modules.")


def check() -> None:
    """Raises where the installed transformers differs from what :class:`Patches` relies on.

    Reads its source: importing it takes seconds, and may never be needed.
    """
    folder = Path(importlib.util.find_spec("transformers").submodule_search_locations[0]).parent
    missing = []
    file = _DECORATORS.replace(".", "/") + ".py"
    source = _read(folder / file)
    if not all(re.search(rf"\b{name}\b", source) for name in (*_CELLS, _DECORATOR)):
        missing.append(f"{_DECORATOR} in {file}")
    for recurrence in _recurrences.ALL:
        name, file = recurrence.name, recurrence.module.replace(".", "/") + ".py"
        if _parameters(_read(folder / file), name) != recurrence.parameters:
            missing.append(f"{name}({', '.join(recurrence.parameters)}) in {file}")
    if missing:
        raise RuntimeError(
            f"install: transformers {_version()} does not have {', '.join(missing)}, so nothing was"
            " changed; transformers=False leaves it alone and installs the rest"
        )


def _parameters(source: str, name: str) -> tuple[str, ...] | None:
    """The parameters of a function, from the text that defines it."""
    owner, _, function = name.rpartition(".")
    if owner:
        source = source.partition(f"class {owner}(")[2]
    found = re.search(rf"def {function}\((.*?)\)(?: ->.*?)?:\n", source, re.S)
    if found is None:
        return None
    return tuple(re.findall(r"(?:^|,)\s*\**(\w+)", re.sub(r"\[.*?\]", "", found[1])))


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


def _hook_of(name: str, value: object) -> Hook | None:
    """The hook that a decorated function is, or that is inside the module that the package kernels
    makes of it."""
    for _ in range(4):
        value = value if isinstance(value, FunctionType) else getattr(type(value), "forward", None)
        if not isinstance(value, FunctionType):
            return None
        if set(_CELLS) <= set(value.__code__.co_freevars):
            return Hook(name, value)
        cells = [c.cell_contents for c in value.__closure__ or () if _is_filled(c)]
        inner = [value.__dict__.get("__wrapped__"), *cells]
        value = next((v for v in inner if isinstance(v, FunctionType)), None)
    return None


def _is_filled(cell) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def hooks(module: ModuleType) -> Iterator[Hook]:
    """The hooks that a modelling file defines."""
    for name, value in list(vars(module).items()):
        if isinstance(value, type) or not callable(value):
            continue
        hook = _hook_of(name, value)
        if hook is not None and hook.torch_function.__module__ == module.__name__:
            yield hook


class Patches(MetaPathFinder):
    """recurra's kernels in the modelling files that are imported, and in those that will be.

    Files that are imported later ask transformers' decorator, which is wrapped, so that it does not
    matter from where they are imported. As a finder this waits for the few files that matter.
    """

    def __init__(self, packages: tuple[str, ...], serve: bool):
        self._packages = packages
        self._serve = serve
        self._undo: list[Callable[[], None]] = []
        self.modules: dict[str, ModuleType] = {}

    def apply(self) -> None:
        for name, module in list(sys.modules.items()):
            if not name.startswith(_FOLDERS) or module is None:
                continue
            found = list(hooks(module))
            if self._serve and not found and _decorates(module):
                raise RuntimeError(
                    f"install: {name} uses {_DECORATOR} of transformers {_version()}, whose"
                    " wrappers recurra does not know"
                )
            for hook in found:
                self._take(hook)
        for name in self._awaited():
            if name in sys.modules:
                self._loaded(sys.modules[name])
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        while self._undo:
            self._undo.pop()()
        self.modules = {}

    def _awaited(self) -> set[str]:
        recurrences = {r.module for r in _recurrences.ALL} if self._serve else set()
        return {_DECORATORS, *recurrences}

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self._awaited():
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
                    self._loaded(module)

            spec.loader.exec_module = exec_module
        return spec

    def _loaded(self, module: ModuleType) -> None:
        if module.__name__ == _DECORATORS:
            self._wrap_decorator(module)
        for recurrence in _recurrences.ALL:
            if self._serve and module.__name__ == recurrence.module:
                self._undo.append(recurrence.patch(module))
                self.modules[module.__name__] = module

    def _wrap_decorator(self, module: ModuleType) -> None:
        original = getattr(module, _DECORATOR, None)
        if original is None:
            return

        @functools.wraps(original)
        def decorator_of(*args, **kwargs):
            decorator = original(*args, **kwargs)

            def decorate(torch_function):
                decorated = decorator(torch_function)
                hook = _hook_of(torch_function.__name__, decorated)
                if hook is not None:
                    self._take(hook)
                elif self._serve:
                    warnings.warn(
                        f"recurra does not reach {torch_function.__qualname__} of"
                        f" {torch_function.__module__}, which stays as it is",
                        stacklevel=2,
                    )
                return decorated

            return decorate

        # The package hands out the decorator, too, and remembers having done so.
        for place in (module, sys.modules.get(_DECORATORS.rpartition(".")[0])):
            if place is not None and vars(place).get(_DECORATOR) is original:
                setattr(place, _DECORATOR, decorator_of)
                self._undo.append(functools.partial(setattr, place, _DECORATOR, original))

    def _take(self, hook: Hook) -> None:
        """Puts recurra's function under a hook; where transformers is to be left alone, its own in
        place of what it found under the name of a package."""
        if hook.package not in self._packages:
            return
        former = hook.implementation
        if _module_of(former).startswith("recurra."):
            former = hook.torch_function
        replacement = _hooks.BY_NAME.get(hook.func_name) if self._serve else None
        hook.use(former if replacement is None else replacement(hook.torch_function, former))
        self._undo.append(functools.partial(hook.use, former))
        if replacement is not None:
            name = hook.torch_function.__module__
            if name in sys.modules:
                self.modules[name] = sys.modules[name]

    def lines(self) -> list[str]:
        """For people: what runs on what."""
        if not self._serve:
            return ["transformers: its own functions"]
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
    return _module_of(hook.implementation).partition(".")[0] or "another package"


def _module_of(function: Callable) -> str:
    return getattr(function, "__module__", None) or ""


def _decorates(module: ModuleType) -> bool:
    """Whether the source of a module uses the decorator."""
    if not callable(getattr(module, _DECORATOR, None)):
        return False
    source = _read(Path(getattr(module, "__file__", None) or ""))
    return re.search(rf"^@{_DECORATOR}\(", source, re.M) is not None


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
    device = next((p.device for p in layer.parameters()), torch.device("cpu"))
    served = _library.serves(device)
    for hook in hooks(module):
        if hook.name in names:
            where = _where(hook)
            if where == "recurra" and not served:
                where = f"torch (recurra has no kernel for {device.type})"
            elif where == "recurra" and not _hooks.takes(hook.func_name, layer):
                where = "torch (recurra's convolution has no such activation)"
            yield hook.func_name, where
    for recurrence in _recurrences.ALL:
        if recurrence.module == module.__name__ and type(layer).__name__ == recurrence.layer:
            patched = patches is not None and recurrence.module in patches.modules
            yield recurrence.name, "recurra" if patched and served else "torch"


def _names(method: FunctionType) -> set[str]:
    names = set(method.__code__.co_names)
    inner = getattr(method, "__wrapped__", None)
    return names | _names(inner) if isinstance(inner, FunctionType) else names

"""Makes ``import mamba_ssm``, ``import causal_conv1d`` and ``import fla`` find the stand-ins."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType

NAMES = ("causal_conv1d", "fla", "mamba_ssm")


class StandIns(MetaPathFinder):
    """The stand-ins of some packages in ``sys.modules``.

    As a finder it is only asked for modules of theirs that recurra does not have, and says so.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self._real: dict[str, ModuleType] = {}

    def install(self) -> None:
        for name in self.names:
            for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
                self._real[loaded] = sys.modules.pop(loaded)
            prefix = f"recurra.compat.{name}"
            package = importlib.import_module(prefix)
            sys.modules[name] = package
            for module in pkgutil.walk_packages(package.__path__, prefix + "."):
                alias = module.name.removeprefix("recurra.compat.")
                sys.modules[alias] = importlib.import_module(module.name)
        sys.meta_path.insert(0, self)

    def uninstall(self) -> None:
        if self in sys.meta_path:  # a caller may have put another list there
            sys.meta_path.remove(self)
        for name in self.names:
            for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
                del sys.modules[loaded]
        sys.modules.update(self._real)
        self._real = {}

    def find_spec(self, fullname, path=None, target=None):
        package = fullname.partition(".")[0]
        if package not in self.names:
            return None
        raise ModuleNotFoundError(
            f"recurra, which stands in for {package}, does not have {fullname}", name=fullname
        )


def present(name: str) -> bool:
    """Whether the real package is there."""
    module = sys.modules.get(name)
    if module is not None:
        return True
    try:
        spec = importlib.util.find_spec(name)
        return spec is not None and spec.origin is not None  # not just a folder of that name
    except (ImportError, ValueError):
        return False

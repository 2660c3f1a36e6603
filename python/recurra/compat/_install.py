"""``recurra.install()`` and its undoing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recurra.compat import _packages, _transformers


class Installation:
    """What :func:`install` did, until :meth:`uninstall`, or until the end of a ``with``."""

    def __init__(
        self,
        stand_ins: _packages.StandIns,
        real: tuple[str, ...],
        patches: _transformers.Patches,
    ):
        self._stand_ins, self.real, self._patches = stand_ins, real, patches

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages that recurra stands in for."""
        return self._stand_ins.names

    def uninstall(self) -> None:
        """Puts everything back as it was before :func:`install`."""
        global _current
        if _current is not self:
            return
        _current = None
        self._patches.remove()
        self._stand_ins.uninstall()

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        self.uninstall()

    def __str__(self) -> str:
        lines = [f"{name}: recurra stands in for it" for name in self.packages]
        lines += [f"{name}: the real package; force=True replaces it" for name in self.real]
        return "\n".join(lines + self._patches.lines())


_current: Installation | None = None


def install(
    *, force: bool = False, report: bool = False, transformers: bool | None = None
) -> Installation:
    """Puts recurra's kernels under code that uses mamba_ssm, causal_conv1d, fla or transformers.

    ``import mamba_ssm``, ``import causal_conv1d`` and ``import fla`` find the modules of
    :mod:`recurra.compat` from then on, and transformers' models run their convolutions, scans and
    decoding steps on recurra's kernels, on the CPU and on CUDA, whether they are imported already
    or later. What recurra does not have stays as it is, function by function. A second call first
    undoes the first. Models that were compiled before keep what they were compiled from.

    Args:
        force: stand in for packages that are there, too.
        report: print what runs on what.
        transformers: False keeps its models on its own functions; None reaches it where it is
            installed.

    Returns:
        What was done; its ``uninstall()``, or leaving a ``with`` block of it, or
        :func:`uninstall` undoes it.

    Raises:
        RuntimeError: transformers is there, but not as recurra knows it. Nothing is changed then.
    """
    from recurra.compat import _packages, _transformers  # which programs without install() spare

    global _current
    there = _packages.present("transformers")
    if transformers and not there:
        raise RuntimeError("install: transformers=True, but there is no transformers to import")
    serve = there and transformers is not False
    if serve:
        _transformers.check()
    uninstall()
    real = () if force else tuple(name for name in _packages.NAMES if _packages.present(name))
    stand_ins = _packages.StandIns(tuple(n for n in _packages.NAMES if n not in real))
    patches = _transformers.Patches(stand_ins.names, serve)
    try:
        stand_ins.install()
        patches.apply()
    except BaseException:
        patches.remove()
        stand_ins.uninstall()
        raise
    _current = Installation(stand_ins, real, patches)
    if report:
        print(_current)
    return _current


def uninstall() -> None:
    """Undoes :func:`install`; does nothing where nothing is installed."""
    if _current is not None:
        _current.uninstall()


def report(model) -> str:
    """Prints, and returns, which layers of a model run on which kernel.

    Args:
        model: a :class:`torch.nn.Module`; of transformers' models the layers with convolutions,
            scans and recurrences are told, one line a kind of layer.
    """
    from recurra.compat import _transformers

    text = _transformers.describe(model, _current._patches if _current else None)
    print(text)
    return text

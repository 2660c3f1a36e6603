"""Stands in for mamba_ssm, causal_conv1d and fla, and reaches under transformers.

``recurra.compat.mamba_ssm``, ``.causal_conv1d`` and ``.fla`` have the modules, names, arguments,
shapes and semantics of these packages, on recurra's ops. What recurra does not have is absent.
:func:`recurra.install` makes other people's code find them.
"""

from recurra.compat._install import Installation, install, report, uninstall

__all__ = ["Installation", "install", "report", "uninstall"]

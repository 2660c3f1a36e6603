"""What the documentation of a torch function says of one that computes the same on other arrays."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable


def documentation(like: Callable, gradient: str | None = None) -> str:
    """The documentation of a torch function for arrays.

    Args:
        like: the torch function.
        gradient: the sentence on derivatives; None where there are none.
    """

    def without(pattern: str, instead: str = "") -> None:
        nonlocal text
        text = re.sub(pattern.replace(" ", r"\s+"), instead, text, flags=re.DOTALL)

    text = inspect.getdoc(like) or ""
    without(r"Differentiable\b.*?\.(?=\s)", gradient or "No derivatives.")
    without(r"Gradients reach.*? again raises\.", gradient or "No derivatives.")
    if gradient is None:
        without(r"(,)? and whose gradient is summed over it in a fixed order")
        without(r"; also when differentiated twice")
    without(r"name of the cell, or one of your own.*?jit\.md\)", "name of the cell")
    without(r"\b[Tt]ensor(s?)\b", r"array\1")
    without("RuntimeError", "ValueError")
    without("shape, dtype or device", "shape or dtype")
    without(r" On CUDA .*?\.(?=\s)")
    without(", or gradients are enabled and an input requires one")
    return text

"""How an op of the library gets its fake, autograd, autocast and vmap behaviour.

Everything here is registered with the dispatcher, so `torch.ops.recurra.*` and the functions of
`recurra` behave the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LIBRARY = torch.library.Library("recurra", "FRAGMENT")


def fake(name: str) -> Callable:
    """Registers the function below as the shape and dtype rule of ``name``."""
    return torch.library.register_fake(f"recurra::{name}", lib=LIBRARY)


def autograd(name: str, setup: Callable, backward: Callable) -> None:
    """Registers the derivative of ``name``.

    torch.library.register_autograd would do, but refuses keyword-only tensors, which the schemas
    have on purpose, and leaves torch.func to fail without a name.

    Args:
        name: the op.
        setup: ``setup(ctx, inputs, output)`` with ``inputs`` a dict by argument name.
        backward: ``backward(ctx, *cotangents)``, a dict of gradients by argument name. The
            cotangent of an output that nothing depends on is None.
    """
    op = getattr(torch.ops.recurra, name).default
    arguments = op._schema.arguments
    names = [argument.name for argument in arguments]
    keyword_only = [argument.name for argument in arguments if argument.kwarg_only]
    positional = len(names) - len(keyword_only)
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *values):
            with torch._C._AutoDispatchBelowAutograd():
                output = op.redispatch(
                    keyset & torch._C._after_autograd_keyset,
                    *values[:positional],
                    **dict(zip(keyword_only, values[positional:], strict=True)),
                )
            ctx.set_materialize_grads(False)
            setup(ctx, dict(zip(names, values, strict=True)), output)
            return output

        @staticmethod
        def backward(ctx, *cotangents):
            gradients = backward(ctx, *cotangents)
            # Of an input that was None torch accepts no gradient.
            needed = zip(names, ctx.needs_input_grad[1:], strict=True)
            return None, *(gradients.get(name) if need else None for name, need in needed)

    Function.__name__ = Function.__qualname__ = f"recurra.{name}"

    def kernel(keyset, *args, **kwargs):
        if torch.is_grad_enabled() and any(
            isinstance(argument, Tensor) and argument.requires_grad
            for argument in (*args, *kwargs.values())
        ):
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(
                    f"recurra: derivatives of {name.removeprefix('_')} under torch.func are not "
                    "implemented; use torch.autograd"
                )
            rest = names[len(args) :]
            values = (kwargs[n] if n in kwargs else defaults[n] for n in rest)
            return Function.apply(keyset, *args, *values)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def no_second_derivative(backward_name: str, name: str) -> None:
    """Makes differentiating the op ``backward_name`` of ``name`` an error instead of zeros."""

    def backward(ctx, *cotangents):
        raise RuntimeError(f"recurra: second derivative of {name} is not implemented")

    autograd(backward_name, lambda ctx, inputs, output: None, backward)


def autocast(name: str, activations: Sequence[int]) -> None:
    """Under autocast, brings activations that do not share a dtype to the autocast dtype.

    Never upcasts: activations that already agree stay as they are, float64 is left alone, and
    parameters and states are not touched.

    Args:
        name: the op.
        activations: positions of the activations among its positional arguments.
    """
    op = getattr(torch.ops.recurra, name).default

    def for_device(device_type: str, key: str) -> None:
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                given = [
                    args[i].dtype
                    for i in activations
                    if i < len(args) and isinstance(args[i], Tensor)
                ]
                if len(set(given)) > 1:
                    target = torch.get_autocast_dtype(device_type)
                    args = [
                        _lower(arg, target) if i in activations else arg
                        for i, arg in enumerate(args)
                    ]
                return op(*args, **kwargs)

        LIBRARY.impl(name, kernel, key)

    for_device("cpu", "AutocastCPU")
    for_device("cuda", "AutocastCUDA")


def _lower(argument, target: torch.dtype):
    if not isinstance(argument, Tensor) or argument.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        return argument
    return argument.to(target)


def no_grad_step(name: str, whole: str) -> None:
    """Makes a step op refuse inputs that require a gradient, naming the op that has one."""
    op = getattr(torch.ops.recurra, name).default

    def kernel(*args, **kwargs):
        if torch.is_grad_enabled():
            for argument in (*args, *kwargs.values()):
                if isinstance(argument, Tensor) and argument.requires_grad:
                    raise RuntimeError(
                        f"recurra: {name} has no gradient; use {whole} over the whole sequence, "
                        "or call it under torch.no_grad()"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    LIBRARY.impl(name, kernel, "Autograd")

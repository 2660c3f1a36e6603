"""How an op of the library gets its fake, autograd, autocast and vmap behaviour.

Everything here is registered with the dispatcher, so `torch.ops.recurra.*` and the functions of
`recurra` behave the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("recurra", "FRAGMENT")

# What autocast casts.
CASTABLE = {torch.float32, torch.bfloat16, torch.float16}

_NO_FUNCTORCH = (
    "recurra: derivatives of {} under torch.func are not implemented; use torch.autograd"
)


def fake(name: str) -> Callable:
    """Registers the function below as the shape and dtype rule of ``name``."""
    return torch.library.register_fake(f"recurra::{name}", lib=LIBRARY)


def differentiated(name: str, arguments: Iterable) -> bool:
    """Whether reverse mode must record this call; forward mode raises instead of losing it."""
    # Without this the tangents would be lost: torch takes a missing one for zero.
    if forward_ad._current_level >= 0 and any(
        isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None
        for argument in arguments
    ):
        raise RuntimeError(
            f"recurra: forward-mode derivatives of {name} under torch.func and "
            "torch.autograd.forward_ad are not implemented; use torch.autograd"
        )
    return torch.is_grad_enabled() and any(
        isinstance(argument, Tensor) and argument.requires_grad for argument in arguments
    )


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
    public = name.removeprefix("_")
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
            # A formula may know more gradients than were asked for: one for an argument that was
            # not given is an error to torch.
            return None, *(
                gradients.get(argument) if needed else None
                for argument, needed in zip(names, ctx.needs_input_grad[1:], strict=True)
            )

    Function.__name__ = Function.__qualname__ = f"recurra.{name}"

    def kernel(keyset, *args, **kwargs):
        if differentiated(public, (*args, *kwargs.values())):
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(_NO_FUNCTORCH.format(public))
            rest = names[len(args) :]
            values = (kwargs[n] if n in kwargs else defaults[n] for n in rest)
            return Function.apply(keyset, *args, *values)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def autograd_through(name: str, saving: str, outputs: int) -> None:
    """Differentiates ``name`` as the first ``outputs`` results of the op ``saving``.

    ``saving`` computes the same and returns, behind those results, what its backward wants kept.
    """
    op = getattr(torch.ops.recurra, name).default
    saving_op = getattr(torch.ops.recurra, saving).default

    def kernel(keyset, *args, **kwargs):
        if differentiated(name, (*args, *kwargs.values())):
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(_NO_FUNCTORCH.format(name))
            return saving_op(*args, **kwargs)[:outputs]
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
                given = {
                    args[i].dtype
                    for i in activations
                    if i < len(args) and isinstance(args[i], Tensor) and not args[i].is_complex()
                }
                if len(given) > 1 and given <= CASTABLE:
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
    if isinstance(argument, Tensor) and argument.dtype in CASTABLE:
        return argument.to(target)
    return argument


def no_grad(name: str, instead: str, state: str | None = None) -> None:
    """Makes an op refuse inputs that require a gradient.

    Args:
        name: the op.
        instead: what has a gradient, as the message names it.
        state: the op's first argument where that is written in place.
    """
    op = getattr(torch.ops.recurra, name).default
    public = name.removeprefix("_").removesuffix("_functional")

    def kernel(keyset, *args, **kwargs):
        if differentiated(public, (*args, *kwargs.values())):
            raise RuntimeError(
                f"recurra: {public} has no gradient; use {instead}, or call it under "
                "torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            out = op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)
        if state is not None:
            # So that a graph which saved the state before this step refuses to use it.
            written = args[0] if args else kwargs[state]
            if not written.is_inference():
                torch.autograd.graph.increment_version(written)
        return out

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def no_grad_step(name: str, whole: str) -> None:
    """Makes a step op, whose state is ``h``, refuse inputs that require a gradient, naming the op
    that has one."""
    no_grad(name, _whole(whole), state="h")


def _whole(name: str) -> str:
    return f"{name} over the whole sequence"


def functional_step(name: str, whole: str) -> Callable:
    """The step op ``name``, whose complex state inductor can compile.

    inductor's passes leave nodes of complex tensors out, and so never bring back an op that writes
    one from the form in which it writes nothing. So that form is an op here, ``_NAME_functional``,
    whose new states, returned before the output, are copied over the old: with slots theirs alone.

    Args:
        name: the op, whose state is its first argument.
        whole: the op that has a gradient.
    """
    op = getattr(torch.ops.recurra, name).default
    arguments = str(op._schema).partition("(")[2].removesuffix("Tensor")
    without = f"_{name}_functional"
    LIBRARY.define(f"{without}({arguments.replace('Tensor(a!)', 'Tensor')}(Tensor, Tensor)")

    def used(slots: Tensor | None, h: Tensor) -> Tensor | None:
        """The states that are copied; None for all."""
        if slots is None or h.shape[0] == 0:
            return None
        return slots.clamp(0, h.shape[0] - 1).long()

    def kernel(h: Tensor, *args, slots: Tensor | None = None, **kwargs) -> tuple[Tensor, Tensor]:
        rows = used(slots, h)
        if rows is None:
            h = h.clone()
            return h, op(h, *args, slots=slots, **kwargs)
        # Memory that is not touched takes no time. A slot that stands for none reads a state, and
        # writes what has become of it.
        new = torch.empty_like(h)
        new[rows] = h[rows]
        out = op(new, *args, slots=slots, **kwargs)
        return new[rows], out

    LIBRARY.impl(without, kernel, "CompositeExplicitAutograd")
    fake(without)(kernel)
    no_grad(without, _whole(whole))
    functional = getattr(torch.ops.recurra, without).default

    def step(h: Tensor, *args, slots: Tensor | None = None, **kwargs) -> Tensor:
        new, out = functional(h, *args, slots=slots, **kwargs)
        rows = used(slots, h)
        h.copy_(new) if rows is None else h.index_copy_(0, rows, new)
        return out

    return step

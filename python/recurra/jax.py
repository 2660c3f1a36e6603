"""The ops on JAX arrays, as custom calls of XLA with derivatives: kernels, checks and bits of the
torch ops, under `jax.jit`, `jax.grad` and `jax.vmap`, on the CPU and on CUDA.

Shapes and dtypes are checked when a call is traced and raise ValueError, or TypeError for what is
no array, in the words of the torch ops. Values, those of ``cu_seqlens``, are checked when it runs:
then JAX raises JaxRuntimeError, or ValueError where it has run the same function before, with the
sentence in it. On CUDA they are clamped instead, which :func:`check_status` tells.
"""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any, NamedTuple

import numpy as np
import torch

from recurra import _library, _status, ops
from recurra._check import dtype_name, fail
from recurra._documentation import documentation

try:
    import jax
    import jax.numpy as jnp
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir
except ImportError as error:
    raise ImportError("recurra.jax needs JAX, 0.6 or later: pip install 'recurra[jax]'") from error
try:
    from recurra import _native
except ImportError as error:
    raise ImportError(
        "recurra.jax needs recurra._native, which is not built: install pybind11, then recurra "
        "again"
    ) from error

__all__ = ["causal_conv1d", "check_status", "linear_scan", "rnn", "selective_scan"]

_TARGET = "recurra"
jax.ffi.register_ffi_target(_TARGET, _native.xla_handler(), platform="cpu")
_native.follow_torch()
_cuda, _no_cuda = _library.xla_cuda()
if _cuda is not None:
    _handler = jax.ffi.pycapsule(_cuda.recurra_xla_cuda)
    jax.ffi.register_ffi_target(_TARGET, _handler, platform="CUDA")

_Pairs = tuple[tuple[str, Any], ...]


class _Schema(NamedTuple):
    """What the schema of a torch op says of its arguments.

    Attributes:
        arrays: the tensors, in order.
        options: all others.
        optional: those of both that may be None.
        rows: the tensors whose first dimension is that of the batch or of the sequences, or 1.
        lead: the tensor that sets the dtype.
    """

    arrays: tuple[str, ...]
    options: tuple[str, ...]
    optional: frozenset[str]
    rows: frozenset[str]
    lead: str


@functools.cache
def _schema(op: str) -> _Schema:
    arguments = getattr(torch.ops.recurra, op).default._schema.arguments
    arrays = tuple(a.name for a in arguments if "Tensor" in str(a.type))
    requirements = torch.ops.recurra._requirements(op).split()
    rows = {r.split(":")[0] for r in requirements if "(B" in r or "(S" in r}
    return _Schema(
        arrays,
        tuple(a.name for a in arguments if a.name not in arrays),
        frozenset(a.name for a in arguments if "Optional" in str(a.type)),
        frozenset(rows),
        requirements[0].split(":")[0],
    )


class _Derivative(NamedTuple):
    """How an op is differentiated.

    Attributes:
        saving: the op that computes the same and keeps what the backward reads.
        kept: the name in the backward of the result that it reads, and which one that is.
        backward: the op that computes the gradients.
        cotangents: the names there of the cotangents of the first results.
        gradients: of which arguments it returns gradients, in order.
    """

    saving: str
    kept: tuple[str, int] | None
    backward: str
    cotangents: tuple[str, ...]
    gradients: tuple[str, ...]


_SCAN_INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "h0")
_DERIVATIVES = {
    "linear_scan": _Derivative(
        "linear_scan", ("h", 0), "_linear_scan_backward", ("dh", "dh_last"), ("a", "b", "h0")
    ),
    "causal_conv1d": _Derivative(
        "causal_conv1d",
        None,
        "_causal_conv1d_backward",
        ("dy", "dh_last"),
        ("x", "weight", "bias", "h0"),
    ),
    "selective_scan": _Derivative(
        "_selective_scan_save",
        ("saved", 2),
        "_selective_scan_backward",
        ("dy", "dh_last"),
        _SCAN_INPUTS,
    ),
    "rnn": _Derivative(
        "_rnn_save", ("saved", 4), "_rnn_backward", ("dy", "dh_last"), ("x", "params", "h0")
    ),
}
_GRADIENTS = {d.backward: d.gradients for d in _DERIVATIVES.values()}


# ---- one primitive for all ops ----------------------------------------------------------------

_primitive = Primitive("recurra")
_primitive.multiple_results = True


def _bind(op: str, arrays: dict[str, Any], options: dict[str, Any]) -> list:
    """Calls an op with those of the arrays and options that it has and that are not None."""
    schema = _schema(op)
    given = tuple(k for k in schema.arrays if arrays.get(k) is not None)
    pairs = tuple((k, options[k]) for k in schema.options if options.get(k) is not None)
    return _primitive.bind(*(arrays[k] for k in given), op=op, given=given, options=pairs)


def _meta(aval) -> torch.Tensor:
    # A dtype that torch lacks stands for itself by one that no op takes either.
    dtype = getattr(torch, str(aval.dtype), None)
    if dtype is None or dtype_name(dtype) == "another dtype":
        dtype = torch.float8_e5m2
    return torch.empty(aval.shape, dtype=dtype, device="meta")


@_primitive.def_abstract_eval
def _shapes(*avals, op: str, given: tuple[str, ...], options: _Pairs):
    """The checks of the torch op, and the shapes that it returns."""
    arrays = dict(zip(given, avals, strict=True))
    for name, aval in arrays.items():
        if not all(isinstance(n, (int, np.integer)) for n in aval.shape):
            fail_as(
                ValueError,
                op,
                f"the shape of {name} must be known when the call is compiled, got "
                f"({', '.join(map(str, aval.shape))}): export with sizes that are numbers",
            )
    missing = [k for k in _schema(op).arrays if k not in given]
    function = getattr(torch.ops.recurra, op).default
    try:
        with torch.no_grad():
            out = function(
                **{k: _meta(v) for k, v in arrays.items()},
                **dict.fromkeys(missing),
                **dict(options),
            )
    except RuntimeError as error:
        message, lead = str(error), _schema(op).lead
        wrong = message.partition(": ")[2].partition(" ")[0]
        if wrong in arrays:  # torch has no name for many dtypes of JAX
            message = message.replace("got another dtype", f"got {arrays[wrong].dtype}")
        if f"{lead} must have dtype float32, float64" in message:
            message += f': pass {lead}.astype("float32")'
        raise ValueError(message) from None
    lead = arrays[_schema(op).lead]
    return [
        _like(lead, tuple(x.shape), jnp.dtype(str(x.dtype).removeprefix("torch."))) for x in out
    ]


# ---- jax.shard_map, which keeps account of the axes of the mesh that arrays vary along --------


def _axes(aval) -> frozenset[str]:
    kind = getattr(aval, "manual_axis_type", None)  # the name changes between versions of JAX
    return frozenset(getattr(kind, "varying", ()) or getattr(aval, "vma", ()))


def _like(aval, shape: tuple[int, ...], dtype):
    """What an array is that varies as another one does."""
    if not _axes(aval):
        return jax.core.ShapedArray(shape, dtype)
    whole = aval.sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(shape)))
    return aval.update(shape=shape, dtype=dtype, weak_type=False, sharding=whole)


def _vary_alike(op: str, arrays: dict[str, Any]) -> list:
    """The arrays with all axes that any of them varies along; gradients are summed over those that
    are added here."""
    axes = {k: _axes(jax.typeof(x)) for k, x in arrays.items()}
    every = frozenset().union(*axes.values())
    if every and not hasattr(jax.lax, "pcast"):
        fail_as(ValueError, op, "inside jax.shard_map this version of JAX needs check_vma=False")
    return [
        jax.lax.pcast(x, tuple(sorted(every - axes[k])), to="varying") if axes[k] < every else x
        for k, x in arrays.items()
    ]


@functools.cache
def _compiled(op: str, given: tuple[str, ...], options: _Pairs):
    return jax.jit(functools.partial(_primitive.bind, op=op, given=given, options=options))


@_primitive.def_impl
def _run(*arrays, op: str, given: tuple[str, ...], options: _Pairs):
    with jax.disable_jit(False):  # a custom call runs in no other way
        return _compiled(op, given, options)(*arrays)


def _lower(context, *operands, op: str, given: tuple[str, ...], options: _Pairs):
    kinds = {bool: np.bool_, int: np.int64, float: np.float64, str: str}
    attributes = {k: kinds[type(v)](v) for k, v in options}
    attributes["given"] = "".join("01"[k in given] for k in _schema(op).arrays)
    return jax.ffi.ffi_lowering(_TARGET)(context, *operands, op=op, **attributes)


def _refuse(platform: str, kernels: str):
    def lower(context, *operands, op: str, **_):
        fail_as(
            ValueError,
            op,
            f"this computation is placed on {platform}, and recurra.jax has {kernels} place it "
            'with jax.default_device(jax.devices("cpu")[0])',
        )

    return lower


_rules = {"cpu": _lower, "cuda": _lower}
for _platform in ("rocm", "tpu"):
    _rules[_platform] = _refuse(_platform, "kernels for the CPU and for CUDA only:")
if _cuda is None:
    _rules["cuda"] = _refuse("cuda", f"no CUDA kernels here, since {_no_cuda}, or")
for _platform, _rule in _rules.items():
    mlir.register_lowering(_primitive, _rule, platform=_platform)


def fail_as(kind: type[Exception], op: str, message: str):
    """Raises that kind of error with the sentence that `fail` makes."""
    try:
        fail(op, message)
    except RuntimeError as error:
        raise kind(str(error)) from None


def _no_second_derivative(primals, tangents, *, op: str, **_):
    fail_as(NotImplementedError, op, "the second derivative is not implemented in recurra.jax")


ad.primitive_jvps[_primitive] = _no_second_derivative


# ---- vmap -------------------------------------------------------------------------------------


def _folds(op: str, sizes: dict[str, tuple], options: dict, batched: frozenset[str]) -> bool:
    """Whether a call for each example is one with more rows, with the same bits.

    It is where all that examples have apart, results included, lies by rows; rows that are packed
    into one do not.

    Args:
        op: the op.
        sizes: the shape of each argument for one example.
        options: its options.
        batched: the arguments that examples have apart.
    """
    rows = sizes[_schema(op).lead][0]
    by_rows = {k for k in sizes if k in _schema(op).rows and sizes[k][0] == rows}
    if "cu_seqlens" in sizes or options.get("algorithm", "sequential") != "sequential":
        return False
    gradients = {("h" if k == "b" else k) for k in _GRADIENTS.get(op, ())} & sizes.keys()
    return batched <= by_rows and gradients <= by_rows


def _batch(arrays, axes, *, op: str, given: tuple[str, ...], options: _Pairs):
    count = next(x.shape[d] for x, d in zip(arrays, axes, strict=True) if d is not None)
    batched = frozenset(k for k, d in zip(given, axes, strict=True) if d is not None)
    first = {
        k: jnp.asarray(x) if d is None else jnp.moveaxis(x, d, 0)
        for k, x, d in zip(given, arrays, axes, strict=True)
    }
    sizes = {k: x.shape[1:] if k in batched else x.shape for k, x in first.items()}
    # One example is checked first: that is what the caller knows, not the rows of a call for all.
    example = [jax.core.ShapedArray(sizes[k], first[k].dtype) for k in given]
    results = _shapes(*example, op=op, given=given, options=options)
    call = functools.partial(_primitive.bind, op=op, given=given, options=options)
    if not _folds(op, sizes, dict(options), batched):

        def one(apart):
            return call(*(apart.get(k, first[k]) for k in given))

        out = jax.lax.map(one, {k: first[k] for k in batched})
        return out, [0] * len(out)

    rows, schema = sizes[_schema(op).lead][0], _schema(op)

    def folded(name: str):
        x, shape = first[name], sizes[name]
        if name not in batched:
            if name not in schema.rows or shape[0] != rows:
                return x  # the same for all rows
            x = jnp.broadcast_to(x, (count, *shape))
        return x.reshape(count * shape[0], *shape[1:])

    out = call(*(folded(k) for k in given))
    apart = [
        x.reshape(count, *result.shape) if x.ndim else jnp.broadcast_to(x, (count,))
        for x, result in zip(out, results, strict=True)
    ]
    return apart, [0] * len(apart)


batching.primitive_batchers[_primitive] = _batch


# ---- derivatives ------------------------------------------------------------------------------


def _conjugate(x):
    # What JAX calls the gradient of a complex number is the conjugate of what torch does.
    return jnp.conj(x) if jnp.iscomplexobj(x) else x


@functools.cache
def _differentiable(op: str, given: tuple[str, ...], options: _Pairs, results: int):
    """The op as a function of the given arrays, with its derivative."""
    how, flags = _DERIVATIVES[op], dict(options)

    @jax.custom_vjp
    def call(*arrays):
        return tuple(_bind(op, dict(zip(given, arrays, strict=True)), flags))

    def forward(*primals):
        arrays = {k: x.value for k, x in zip(given, primals, strict=True)}
        out = _bind(how.saving, arrays, flags)
        kept = {} if how.kept is None else {how.kept[0]: out[how.kept[1]]}
        return tuple(out[:results]), {**arrays, **kept}

    def backward(kept, cotangents):
        zero = jax.custom_derivatives.SymbolicZero
        cots = {
            name: None if isinstance(c, zero) else _conjugate(c)
            for name, c in zip(how.cotangents, cotangents, strict=False)
        }
        out = _bind(how.backward, {**kept, **cots}, flags)
        gradients = dict(zip(how.gradients, out, strict=True))
        return tuple(_conjugate(gradients[k]) if k in gradients else None for k in given)

    call.defvjp(forward, backward, symbolic_zeros=True)
    # Compiled by itself too: jax.shard_map takes such a derivative in a compiled function only.
    return jax.jit(call)


def check_status(device: jax.Device | str | None = None) -> None:
    """Raises where a kernel on a GPU was given ``cu_seqlens`` that it had to clamp.

    Their values lie on the device and are not checked when a call runs there, which would wait for
    it: kernels clamp them and leave a mark. This function waits for all that was put on the device,
    by torch as well, and then reads the marks and takes them away. It speaks of calls whose results
    are ready (``jax.block_until_ready``): JAX may not have started others yet. On the CPU, where
    the call itself raises, it returns at once.

    Args:
        device: an NVIDIA GPU or a CPU, or the first one of a platform such as "gpu"; the one that
            JAX places computations on when None.

    Raises:
        RuntimeError: an argument of an op had such values since this was last called; a sentence
            for each.
    """
    if device is None:
        device = jax.config.jax_default_device  # a device, the name of a platform, or None
    if not isinstance(device, jax.Device):
        device = jax.local_devices(backend=device)[0]
    cuda = device.platform == "gpu" and "rocm" not in device.client.platform_version
    if not cuda or _cuda is None:
        return
    said = ctypes.create_string_buffer(4096)
    failed = _cuda.recurra_cuda_status(device.local_hardware_id, said, ctypes.c_size_t(len(said)))
    text = said.value.decode()
    if failed:
        raise RuntimeError(text)
    if text:
        raise RuntimeError("recurra: " + "; ".join(_status.sentences(text, device)))


def _or_none(op: str, name: str) -> str:
    return " or None" if name in _schema(op).optional else ""


def _array(op: str, name: str, x):
    if not isinstance(x, (jax.Array, np.ndarray)):
        fail_as(
            TypeError,
            op,
            f"{name} must be a jax.Array{_or_none(op, name)}, got {type(x).__name__}: pass "
            f"jax.numpy.asarray({name})",
        )
    if isinstance(x, np.ndarray) and not x.dtype.isnative:
        fail_as(
            ValueError,
            op,
            f"{name} must be in the byte order of this machine, got {x.dtype.str}: pass "
            f'{name}.astype({name}.dtype.newbyteorder("="))',
        )
    if isinstance(x, np.ndarray) and x.dtype.kind in "iu" and x.size:
        held = np.iinfo(jax.dtypes.canonicalize_dtype(x.dtype))
        if x.min() < held.min or x.max() > held.max:  # which JAX would wrap
            fail_as(
                ValueError,
                op,
                f"{name} must be from {held.min} to {held.max}, got {x.min()} to {x.max()}: "
                'jax.config.update("jax_enable_x64", True) lets JAX hold more',
            )
    return x


def _option(op: str, name: str, value):
    for kinds, kind, what in (
        ((bool, np.bool_), bool, "True or False"),
        ((int, np.integer), int, "an integer"),
        ((str,), str, "a string"),
    ):
        if _kind(op, name) is kind:
            got = repr(value)
            if isinstance(value, kinds):
                if kind is not int or -(2**63) <= value < 2**63:
                    return kind(value)
                what = "an integer of 64 bits"
            elif isinstance(value, jax.core.Tracer):
                got = "a traced value, which is not known when the call is compiled"
            fail_as(TypeError, op, f"{name} must be {what}{_or_none(op, name)}, got {got}")
    raise AssertionError(f"{op} has an option {name} of another kind")


@functools.cache
def _kind(op: str, name: str) -> type:
    arguments = getattr(torch.ops.recurra, op).default._schema.arguments
    text = next(str(a.type) for a in arguments if a.name == name)
    return bool if "bool" in text else int if "int" in text else str


def _call(op: str, results: int, arrays: dict[str, Any], **options):
    def has(name: str, value) -> bool:
        return value is not None or name not in _schema(op).optional

    given = {k: _array(op, k, x) for k, x in arrays.items() if has(k, x)}
    flags = tuple((k, _option(op, k, v)) for k, v in options.items() if has(k, v))
    return _differentiable(op, tuple(given), flags, results)(*_vary_alike(op, given))


_COPIED = r"as\1, which XLA copies"
_ERRORS = """\
    jax.errors.JaxRuntimeError: instead of ValueError, as JAX has it, for what is found when the
        call runs, such as values of ``cu_seqlens``.
    TypeError: an argument is no array, or an option of another type.
    NotImplementedError: it is differentiated twice.
"""


def _of(like):
    def describe(function):
        gradient = "Differentiable once, in reverse mode."
        text = documentation(like, gradient).replace("dtype and memory order", "dtype")
        text = re.sub(r",\s+any\s+strides|;\s+also\s+when\s+differentiated\s+twice", "", text)
        text = re.sub(
            r"as\s+transposed\s+views,(\s+\S+swapaxes\(1, 2\)``), at\s+no\s+cost", _COPIED, text
        )
        function.__doc__ = f"{text.rstrip()}\n{_ERRORS}"
        return function

    return describe


@_of(ops.linear_scan)
def linear_scan(
    a: jax.Array,
    b: jax.Array,
    h0: jax.Array | None = None,
    *,
    log_a: bool = False,
    reverse: bool = False,
    cu_seqlens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    arrays = {"a": a, "b": b, "h0": h0, "cu_seqlens": cu_seqlens}
    return _call("linear_scan", 2, arrays, log_a=log_a, reverse=reverse)


@_of(ops.causal_conv1d)
def causal_conv1d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    h0: jax.Array | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    arrays = {"x": x, "weight": weight, "bias": bias, "h0": h0, "cu_seqlens": cu_seqlens}
    return _call("causal_conv1d", 2, arrays, activation=activation)


@_of(ops.selective_scan)
def selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    *,
    delta_softplus: bool = False,
    h0: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    arrays = dict(zip(_SCAN_INPUTS, (u, delta, A, B, C, D, z, delta_bias, h0), strict=True))
    arrays["cu_seqlens"] = cu_seqlens
    return _call("selective_scan", 2, arrays, delta_softplus=delta_softplus)


@_of(ops.rnn)
def rnn(
    x: jax.Array,
    params: jax.Array,
    h0: jax.Array | None = None,
    *,
    cell: str,
    algorithm: str = "auto",
    chunk: int | None = None,
    max_passes: int | None = None,
    on_fail: str = "sequential",
    return_states: bool = False,
    reset: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    arrays = {"x": x, "params": params, "h0": h0, "reset": reset, "cu_seqlens": cu_seqlens}
    return _call(
        "rnn",
        4,
        arrays,
        cell=cell,
        algorithm=algorithm,
        chunk=chunk,
        max_passes=max_passes,
        on_fail=on_fail,
        return_states=return_states,
    )

"""The packages that users would otherwise run, each as a person who knows it would use it.

Every peer gets its inputs in the layout that suits it, converted before the clock starts. Each
function returns the calls by name and, for what is not installed, why.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

Calls = dict[str, Callable[[], object]]

NUMBA = "numba prange"
JAX_LAX = "jax lax.scan"  # on arrays with time first, as it wants them
JAX_LAX_BATCH_FIRST = "jax lax.scan, batch first"  # on the op's arrays, turned inside the call
JAX_ASSOCIATIVE = "jax associative_scan"
MAMBA = "mamba reference in torch"
TORCH_CONV = "torch grouped conv1d"
TORCH_LOOP = "torch loop"
TORCH_COMPILE = "torch.compile of the loop"


def _missing(package: str) -> str | None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"not installed ({error})"
    return None


# numba --------------------------------------------------------------------------------------------


@functools.cache
def _numba_scans():
    """Parallel over batch and blocks of channels; the inner loop, over channels, is vectorised."""
    import numba
    import numpy as np

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))

    @numba.njit(parallel=True)
    def forward(a, b, h, width):
        B, T, D = b.shape
        blocks = (D + width - 1) // width
        for task in numba.prange(B * blocks):
            n, c0 = task // blocks, task % blocks * width
            c1 = min(c0 + width, D)
            h[n, 0, c0:c1] = b[n, 0, c0:c1]
            for t in range(1, T):
                # Rows of their own, so that the compiler sees indices that start at 0.
                gate, x = a[n, t, c0:c1], b[n, t, c0:c1]
                before, now = h[n, t - 1, c0:c1], h[n, t, c0:c1]
                for c in range(c1 - c0):
                    now[c] = gate[c] * before[c] + x[c]

    @numba.njit(parallel=True)
    def backward(a, h, dh, da, db, width):
        B, T, D = h.shape
        blocks = (D + width - 1) // width
        for task in numba.prange(B * blocks):
            n, c0 = task // blocks, task % blocks * width
            c1 = min(c0 + width, D)
            db[n, T - 1, c0:c1] = dh[n, T - 1, c0:c1]
            for t in range(T - 1, 0, -1):
                g, gate, before = db[n, t, c0:c1], a[n, t, c0:c1], h[n, t - 1, c0:c1]
                dgate, g_before, x = da[n, t, c0:c1], db[n, t - 1, c0:c1], dh[n, t - 1, c0:c1]
                for c in range(c1 - c0):
                    dgate[c] = g[c] * before[c]
                    g_before[c] = x[c] + gate[c] * g[c]
            da[n, 0, c0:c1] = 0

    return np, forward, backward


def _numba_linear_scan(a: Tensor, b: Tensor, backward: bool) -> Callable[[], object]:
    np, run_forward, run_backward = _numba_scans()
    x, y = a.numpy(), b.numpy()
    width = max(16, min(256, b.shape[2] * b.shape[0] // (4 * torch.get_num_threads()) // 16 * 16))
    dh = np.ones_like(y)

    def run():
        h = np.empty_like(y)
        run_forward(x, y, h, width)
        if not backward:
            return h
        da, db = np.empty_like(y), np.empty_like(y)
        run_backward(x, h, dh, da, db, width)
        return da, db

    return run


# jax ----------------------------------------------------------------------------------------------


def _jax_arrays(tensors: dict[str, Tensor], time_first: tuple[str, ...]):
    """As jax arrays, with time as the first axis where a scan runs over it."""
    import jax.numpy as jnp

    return {
        k: jnp.asarray((v.transpose(0, 1) if k in time_first else v).contiguous().numpy())
        for k, v in tensors.items()
    }


def _jax_call(function, arrays: dict, backward: bool) -> Callable[[], object]:
    """The jitted function, or its output and gradients for all inputs."""
    import jax

    if not backward:
        compiled = jax.jit(function)
        return lambda: jax.block_until_ready(compiled(arrays))

    @jax.jit
    def with_gradients(arrays, dy):
        y, pull = jax.vjp(function, arrays)
        return y, pull(dy)

    dy = jax.block_until_ready(jax.jit(function)(arrays))
    return lambda: jax.block_until_ready(with_gradients(arrays, dy))


def _jax_linear_scan(x):
    import jax

    def step(h, inputs):
        a, b = inputs
        h = a * h + b
        return h, h

    return jax.lax.scan(step, x["b"][0] * 0, (x["a"], x["b"]))[1]


def _jax_selective_scan(x):
    import jax
    import jax.numpy as jnp

    dt = jax.nn.softplus(x["delta"] + x["delta_bias"])
    A = x["A"]

    def step(h, inputs):
        dt, du, B, C = inputs
        h = jnp.exp(dt[:, :, None] * A) * h + du[:, :, None] * B[:, None, :]
        return h, (h * C[:, None, :]).sum(-1)

    h0 = jnp.zeros((dt.shape[1], *A.shape), dt.dtype)
    _, y = jax.lax.scan(step, h0, (dt, dt * x["u"], x["B"], x["C"]))
    return (y + x["D"] * x["u"]) * jax.nn.silu(x["z"])


def _combine(first, second):
    """Two steps h -> a h + b as one."""
    return first[0] * second[0], second[0] * first[1] + second[1]


def _batch_first(scan):
    """The scan, of arrays with time first, as a function of those of the op."""
    import jax.numpy as jnp

    def call(x):
        turned = {k: jnp.swapaxes(v, 0, 1) if v.ndim == 3 else v for k, v in x.items()}
        return jnp.swapaxes(scan(turned), 0, 1)

    return call


def _associative_linear_scan(x):
    import jax

    return jax.lax.associative_scan(_combine, (x["a"], x["b"]))[1]


def _associative_selective_scan(x):
    import jax
    import jax.numpy as jnp

    dt = jax.nn.softplus(x["delta"] + x["delta_bias"])
    decay = jnp.exp(dt[..., None] * x["A"])
    drive = (dt * x["u"])[..., None] * x["B"][:, :, None]
    h = jax.lax.associative_scan(_combine, (decay, drive))[1]
    y = (h * x["C"][:, :, None]).sum(-1)
    return (y + x["D"] * x["u"]) * jax.nn.silu(x["z"])


# Elements of h up to which all of them fit into memory, several times over.
_MOST_STATES = 1 << 26


def jax_scans(op: str, inputs: dict[str, Tensor], states: int, backward: bool):
    """What JAX has for the recurrence, one step after another and as a tree.

    Args:
        op: linear_scan or selective_scan.
        inputs: of the op, (B, T, ...).
        states: elements of h at all steps together.
        backward: with the gradients of all inputs.
    """
    one, tree = {
        "linear_scan": (_jax_linear_scan, _associative_linear_scan),
        "selective_scan": (_jax_selective_scan, _associative_selective_scan),
    }[op]
    arrays = _jax_arrays(inputs, tuple(k for k, v in inputs.items() if v.dim() == 3))
    calls: Calls = {
        JAX_LAX: _jax_call(one, arrays, backward),
        JAX_LAX_BATCH_FIRST: in_jax(_batch_first(one), inputs, backward),
    }
    absent: dict[str, str] = {}
    if states > _MOST_STATES:
        absent[JAX_ASSOCIATIVE] = f"holds {4e-9 * states:.1f} GB several times over"
    else:
        calls[JAX_ASSOCIATIVE] = _jax_call(tree, arrays, backward)
    return calls, absent


def in_jax(function: Callable, inputs: dict[str, Tensor], backward: bool) -> Callable[[], object]:
    """A function of arrays, compiled, on these inputs; or its output and all gradients."""
    return _jax_call(function, _jax_arrays(inputs, ()), backward)


# torch --------------------------------------------------------------------------------------------


def _mamba_reference(x: dict[str, Tensor]) -> Tensor:
    """exp(delta A) and delta B u for all steps at once, then a loop over them."""
    dt = torch.nn.functional.softplus(x["delta"] + x["delta_bias"])
    decay = torch.exp(torch.einsum("btd,dn->bdtn", dt, x["A"]))
    drive = torch.einsum("btd,btn,btd->bdtn", dt, x["B"], x["u"])
    h = torch.zeros_like(decay[:, :, 0])
    ys = []
    for t in range(dt.shape[1]):
        h = decay[:, :, t] * h + drive[:, :, t]
        ys.append(torch.einsum("bdn,bn->bd", h, x["C"][:, t]))
    y = torch.stack(ys, 1) + x["D"] * x["u"]
    return y * torch.nn.functional.silu(x["z"])


def _torch_conv(x: Tensor, weight: Tensor, bias: Tensor, backward: bool) -> Callable[[], object]:
    """Grouped convolution on (B, D, L), its own layout, then SiLU."""
    D, W = weight.shape
    inputs = [
        t.detach().clone().requires_grad_(backward)
        for t in (x.transpose(1, 2).contiguous(), weight, bias)
    ]

    def forward():
        x, weight, bias = inputs
        y = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=W - 1, groups=D)
        return torch.nn.functional.silu(y[..., : x.shape[2]])

    if not backward:
        return forward
    dy = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(forward(), inputs, dy)


# What a case has beside it ------------------------------------------------------------------------


def linear_scan(inputs: dict[str, Tensor], backward: bool) -> tuple[Calls, dict[str, str]]:
    """numba and jax."""
    calls: Calls = {}
    absent: dict[str, str] = {}
    if reason := _missing("numba"):
        absent[NUMBA] = reason
    else:
        calls[NUMBA] = _numba_linear_scan(inputs["a"], inputs["b"], backward)
    if reason := _missing("jax"):
        absent[JAX_LAX] = reason
    else:
        calls[JAX_LAX] = _jax_call(_jax_linear_scan, _jax_arrays(inputs, ("a", "b")), backward)
    return calls, absent


def selective_scan(inputs: dict[str, Tensor], backward: bool) -> tuple[Calls, dict[str, str]]:
    """jax and, forward only, the formulation of mamba's reference, quadratic in L backwards."""
    calls: Calls = {}
    absent: dict[str, str] = {}
    if reason := _missing("jax"):
        absent[JAX_LAX] = reason
    else:
        time_first = ("u", "delta", "B", "C", "z")
        calls[JAX_LAX] = _jax_call(_jax_selective_scan, _jax_arrays(inputs, time_first), backward)
    if not backward:
        calls[MAMBA] = lambda: _mamba_reference(inputs)
    return calls, absent


def causal_conv1d(inputs: dict[str, Tensor], backward: bool) -> tuple[Calls, dict[str, str]]:
    """torch's own grouped convolution."""
    run = _torch_conv(inputs["x"], inputs["weight"], inputs["bias"], backward)
    return {TORCH_CONV: run}, {}


@functools.cache
def _numba_paragru():
    """Parallel over batch and blocks of channels; the inner loop, over channels, is vectorised."""
    import numba
    import numpy as np

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))

    @numba.njit(parallel=True, fastmath=True, error_model="numpy")
    def forward(x, p, y, width):
        B, T, _, N = x.shape
        blocks = (N + width - 1) // width
        one = np.float32(1)
        for task in numba.prange(B * blocks):
            n, c0 = task // blocks, task % blocks * width
            c1 = min(c0 + width, N)
            h = np.zeros(c1 - c0, np.float32)
            a_z, a_r, a_n = p[0, c0:c1], p[1, c0:c1], p[2, c0:c1]
            for t in range(T):
                x_z, x_r, x_n = x[n, t, 0, c0:c1], x[n, t, 1, c0:c1], x[n, t, 2, c0:c1]
                out = y[n, t, c0:c1]
                for c in range(c1 - c0):
                    z = one / (one + np.exp(-(a_z[c] * h[c] + x_z[c])))
                    r = one / (one + np.exp(-(a_r[c] * h[c] + x_r[c])))
                    candidate = np.tanh(a_n[c] * (r * h[c]) + x_n[c])
                    h[c] = h[c] + z * (candidate - h[c])
                    out[c] = h[c]

    return np, forward


def rnn(
    inputs: dict[str, Tensor], shape: tuple[int, ...], backward: bool
) -> tuple[Calls, dict[str, str]]:
    """ParaGRU as its users write it: a loop over steps in torch, compiled where it is short enough
    to be unrolled, and loops in numba."""
    from recurra.reference.cells import paragru

    def loop(x: Tensor, p: Tensor) -> Tensor:
        h = x.new_zeros(1, x.shape[0], x.shape[3])
        ys = []
        for row in x.unbind(1):
            h = paragru(row.transpose(0, 1), h, p[:, None])
            ys.append(h[0])
        return torch.stack(ys, 1)

    x, p = inputs["x"], inputs["params"]
    calls: Calls = {}
    absent: dict[str, str] = {}

    def add(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        if not backward:
            calls[name] = lambda: function(x, p)
            return
        leaves = [t.detach().clone().requires_grad_() for t in (x, p)]
        dy = torch.randn(x.shape[0], x.shape[1], x.shape[3])
        calls[name] = lambda: torch.autograd.grad(function(*leaves), leaves, dy)

    add(TORCH_LOOP, loop)
    if shape[1] <= 512:
        add(TORCH_COMPILE, torch.compile(loop, dynamic=False))
    else:
        absent[TORCH_COMPILE] = "at T = 512 and below"
    if backward:
        absent[NUMBA] = "forward only"
    elif reason := _missing("numba"):
        absent[NUMBA] = reason
    else:
        np, forward = _numba_paragru()
        width = max(16, min(256, shape[2] * shape[0] // (4 * torch.get_num_threads()) // 16 * 16))

        def run():
            y = np.empty((shape[0], shape[1], shape[2]), np.float32)
            forward(x.numpy(), p.numpy(), y, width)
            return y

        calls[NUMBA] = run
    return calls, absent

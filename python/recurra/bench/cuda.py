"""The ops on a GPU beside what its memory allows: ``recurra bench --device cuda``.

Times are those of the device, by events around calls that are queued together; every figure stands
beside the copy bandwidth of the same run. Where a scan splits time (few channels), it has to read
its inputs twice, and the bytes of that form are what it is held to.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import recurra
from recurra.bench.rnn import inputs as rnn_inputs

_DEVICE = "cuda"
_REPEAT = 15
_SPLIT_BELOW = 1 << 14  # bytes of a step below which linear_scan splits time

# What is timed. The last ones of selective_scan and block_scan are split in time.
SCANS = ((8, 4096, 2048), (1, 1048576, 64), (64, 2048, 512))  # B, T, D
SELECTIVE = (((8, 4096, 2048, 16), False), ((1, 1048576, 64, 16), True))  # B, L, D, N
CONV = (8, 4096, 2048)
SOFTMAX = (8, 4096, 2048)
BLOCKS = (  # B, T, blocks, k
    ((8, 4096, 512, 4), False),
    ((1, 524288, 16, 4), True),
    ((1, 65536, 8, 16), True),
)
CHANNELS = (2**8, 2**11, 2**14, 2**15, 2**17)  # of rnn, B N
LENGTHS = (512, 4096, 32768, 131072)
LARGEST = 2**28  # inputs of a case of rnn, numbers
COPIED = 2**28  # numbers


Case = dict[str, object]


@dataclasses.dataclass
class Line:
    """A case: what is called, and what it has to do at least.

    Attributes:
        name: OP/SHAPE/DTYPE/KIND.
        call: queues the work once.
        bytes: what has to be moved.
        exponentials: how many exponentials have to be taken.
        limit: the most it may take, times the floor; None where nothing is asked.
        note: which form it is.
    """

    name: str
    call: Callable[[], object]
    bytes: float
    exponentials: float = 0
    limit: float | None = None
    note: str = ""


def seconds(call: Callable[[], object], repeat: int = _REPEAT) -> float:
    """Median time of a call on the device."""
    call()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(COPIED, device=_DEVICE).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def exp_rate() -> float:
    """Exponentials per second of the special function units: sixteen a cycle and multiprocessor."""
    about = torch.cuda.get_device_properties(0)
    clock = getattr(about, "clock_rate", 1_980_000) * 1e3
    return 16 * about.multi_processor_count * clock


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=_DEVICE).to(dtype)


def _both(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Callable, Callable]:
    """The forward, and the backward alone: its graph is kept."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    dy = torch.randn_like(y)
    return (
        lambda: function(*inputs),
        lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True),
    )


def _name(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{op}/{'x'.join(map(str, shape))}/{str(dtype).removeprefix('torch.')}"


def _scan(function: Callable, rows: int, dtype: torch.dtype, n: int, arrays: tuple[int, int]):
    """Bytes of forward and backward and the form, by how many channels there are to run."""
    item = torch.finfo(dtype).bits // 8
    split = rows * item < _SPLIT_BELOW
    again = (2, 2) if split else (0, 0)
    moved = [(one + more) * n * item for one, more in zip(arrays, again, strict=True)]
    return moved, "time is split" if split else ""


def _linear() -> Iterator[Line]:
    for shape, dtype in itertools.product(SCANS, (torch.float32, torch.bfloat16)):
        a = torch.rand(shape, device=_DEVICE).to(dtype)
        b = _normal(*shape, dtype=dtype)
        forward, backward = _both(lambda a, b: recurra.linear_scan(a, b)[0], a, b)
        moved, note = _scan(forward, shape[0] * shape[2], dtype, b.numel(), (3, 5))
        name = _name("linear_scan", shape, dtype)
        yield Line(f"{name}/forward", forward, moved[0], limit=1 / 0.85, note=note)
        yield Line(f"{name}/backward", backward, moved[1], limit=1 / 0.8, note=note)


def _conv() -> Iterator[Line]:
    for dtype in (torch.float32, torch.bfloat16):
        x = _normal(*CONV, dtype=dtype)
        weight, bias = _normal(CONV[2], 4), _normal(CONV[2])
        forward, backward = _both(
            lambda x, w, b: recurra.causal_conv1d(x, w, b, activation="silu")[0], x, weight, bias
        )
        name = _name("causal_conv1d", CONV, dtype)
        yield Line(f"{name}/forward", forward, 2 * x.nbytes, limit=1 / 0.85)
        yield Line(f"{name}/backward", backward, 3 * x.nbytes)


def _softmax() -> Iterator[Line]:
    s, v = _normal(*SOFTMAX), _normal(*SOFTMAX)
    decay, bonus = torch.rand(SOFTMAX[2], device=_DEVICE), _normal(SOFTMAX[2])
    forward, backward = _both(
        lambda s, v, d, b: recurra.softmax_scan(s, v, decay=d, bonus=b)[0], s, v, decay, bonus
    )
    name, n = _name("softmax_scan", SOFTMAX, s.dtype), s.numel()
    yield Line(f"{name}/forward", forward, 12 * n, n)
    yield Line(f"{name}/backward", backward, 20 * n, n)


def _blocks() -> Iterator[Line]:
    for (B, L, N, k), split in BLOCKS:
        A, b = _normal(B, L, N, k, k) / k, _normal(B, L, N, k)
        forward, backward = _both(lambda A, b: recurra.block_scan(A, b)[0], A, b)
        again = split * (A.nbytes + b.nbytes)  # A and b, or dh, are read once more
        note = "time is split" if split else ""
        name = _name("block_scan", (B, L, N, k), b.dtype)
        yield Line(f"{name}/forward", forward, A.nbytes + 2 * b.nbytes + again, note=note)
        yield Line(f"{name}/backward", backward, 2 * A.nbytes + 3 * b.nbytes + again, note=note)


def _selective() -> Iterator[Line]:
    for shape, split in SELECTIVE:
        yield from _selective_of(shape, split)


def _selective_of(shape: tuple[int, int, int, int], split: bool) -> Iterator[Line]:
    """Of a shape at which time is split, whose inputs are read and gates taken twice, or not."""
    B, L, D, N = shape
    bf16 = torch.bfloat16
    u, z = _normal(B, L, D, dtype=bf16), _normal(B, L, D, dtype=bf16)
    delta = (0.5 * torch.rand(B, L, D, device=_DEVICE)).to(bf16)
    A = -torch.rand(D, N, device=_DEVICE) - 0.5
    Bs, Cs = _normal(B, L, N, dtype=bf16), _normal(B, L, N, dtype=bf16)
    skip = _normal(D)
    forward, backward = _both(
        lambda u, delta, A, Bs, Cs, skip, z: recurra.selective_scan(
            u, delta, A, Bs, Cs, D=skip, z=z, delta_softplus=True
        )[0],
        *(u, delta, A, Bs, Cs, skip, z),
    )
    moved = 4 * u.nbytes + Bs.nbytes + Cs.nbytes
    name = _name("selective_scan", shape, bf16)
    n = B * L * D * N
    if split:
        # Again u, delta and B; or dy, z, delta and C.
        note = "time is split"
        yield Line(f"{name}/forward", forward, moved + 2 * u.nbytes + Bs.nbytes, 2 * n, note=note)
        again = 3 * u.nbytes + Cs.nbytes
        yield Line(f"{name}/backward", backward, 2 * moved + again, 2 * n, note=note)
        return
    yield Line(f"{name}/forward", forward, moved, n, limit=1.5)
    yield Line(f"{name}/backward", backward, 2 * moved, n)


def _verdict(ratio: float, limit: float | None) -> str:
    if limit is None:
        return ""
    return f", at most {limit:.2f}: {'met' if ratio <= limit else 'MISSED'}"


def _measured(lines: Iterator[Line], bandwidth: float, exponentials: float) -> Iterator[Case]:
    seen: dict[str, float] = {}
    for line in lines:
        taken = seen[line.name] = seconds(line.call)
        floor = max(line.bytes / bandwidth, line.exponentials / exponentials)
        ratio = taken / floor
        note = f"  ({line.note})" if line.note else ""
        print(
            f"{line.name:48}{taken * 1e6:10.1f} us  {line.bytes / taken * 1e-9:7.0f} GB/s"
            f"  {ratio:6.2f} x floor{_verdict(ratio, line.limit)}{note}"
        )
        yield {
            "case": line.name,
            "seconds": taken,
            "floor": floor,
            "ratio": ratio,
            "limit": line.limit,
            "note": line.note,
        }
        is_backward = line.name.startswith("selective_scan") and line.name.endswith("backward")
        if is_backward and not line.note:  # asked where time is not split
            forward = seen[line.name.replace("/backward", "/forward")]
            yield _compared(f"{line.name} / forward", taken / forward, 3.5)


def _compared(name: str, ratio: float, limit: float) -> Case:
    print(f"{name:77}{ratio:6.2f}{_verdict(ratio, limit)}")
    return {"case": name, "ratio": ratio, "limit": limit}


def _rnn(bandwidth: float) -> Iterator[Case]:
    """Sequential, Newton's method and what ``auto`` takes, by channels and length."""
    print(f"\n{'rnn, us':24}{'sequential':>14}{'newton':>14}{'auto':>14}{'x floor':>10}")
    for cell, channels, T in itertools.product(("paragru", "paralstm"), CHANNELS, LENGTHS):
        G = len(recurra.cells()[cell].inputs)
        name = f"rnn/{cell}/{channels}x{T}"
        if channels * T * G > LARGEST:
            print(f"{cell:10}{channels:7}{T:7}   left out: more than {LARGEST} inputs")
            continue
        given = {k: v.to(_DEVICE) for k, v in rnn_inputs(cell, 1, T, channels).items()}
        times: dict[str, float | None] = {}
        for algorithm in ("sequential", "newton", "auto"):

            def call(given=given, algorithm=algorithm, cell=cell):
                return recurra.rnn(**given, cell=cell, algorithm=algorithm)

            try:
                times[algorithm] = seconds(call, 5)
            except RuntimeError as error:
                times[algorithm] = None
                if "CUDA error" in str(error):
                    raise
        floor = 4 * channels * T * (G + 1) / bandwidth
        words = [f"{t * 1e6:14.0f}" if t else f"{'absent':>14}" for t in times.values()]
        sequential, newton, auto = times.values()
        ratio = auto / floor if auto else float("nan")
        print(f"{cell:10}{channels:7}{T:7}{''.join(words)}{ratio:10.2f}")
        yield {"case": name, "floor": floor, "seconds": times}
        if auto:
            better = min(t for t in (sequential, newton) if t)
            yield _compared(f"{name} auto / the better", auto / better, 1.15)
        if auto and channels >= 2**15:
            yield _compared(f"{name} auto / floor", ratio, 1.5)
        if newton and sequential and channels <= 2**11 and T >= 32768:
            yield _compared(f"{name} newton / sequential", newton / sequential, 1 / 5)


def _steps() -> Iterator[Case]:
    """A step at B = 1 within a CUDA graph of many."""
    D, many = 1536, 100
    h, a, b = (_normal(1, D) for _ in range(3))
    conv, x, weight = _normal(1, 3, D), _normal(1, D), _normal(D, 4)
    state, A, B = _normal(1, D, 16), -torch.rand(D, 16, device=_DEVICE), _normal(1, 16)
    info = recurra.cells()["paragru"]
    hidden, gates = _normal(1, len(info.states), D), _normal(1, len(info.inputs), D)
    parameters = _normal(len(info.params), D)
    A4, b4, h4 = _normal(1, D // 4, 4, 4), _normal(1, D // 4, 4), _normal(1, D // 4, 4)
    pair = torch.zeros(1, 3, D, device=_DEVICE)
    calls = {
        "linear_scan_step": lambda: recurra.linear_scan_step(h, a, b),
        "causal_conv1d_step": lambda: recurra.causal_conv1d_step(conv, x, weight),
        "selective_scan_step": lambda: recurra.selective_scan_step(state, x, x, A, B, B),
        "block_scan_step": lambda: recurra.block_scan_step(h4, A4, b4),
        "softmax_scan_step": lambda: recurra.softmax_scan_step(pair, x, x),
        "rnn_step": lambda: recurra.rnn_step(hidden, gates, parameters, cell="paragru"),
    }
    print()
    for name, call in calls.items():
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(many):
                call()
        taken = seconds(graph.replay) / many
        met = "met" if taken <= 6e-6 else "MISSED"
        print(f"{name:48}{taken * 1e6:10.2f} us, at most 6: {met}")
        yield {"case": name, "seconds": taken, "ratio": taken / 6e-6, "limit": 1.0}


def run(save: Callable[[Case, list[Case]], None] = lambda about, cases: None) -> list[Case]:
    """Prints the whole table and returns it.

    What goes wrong in the cases of one op is told and leaves the others as they are.

    Args:
        save: called with the machine and all cases after each of them, so that whoever ends this
            early has those before.

    Raises:
        RuntimeError: there is no GPU, or the CUDA library is not loaded.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("recurra bench --device cuda needs a GPU, and torch finds none")
    bandwidth, exponentials = copy_bandwidth(), exp_rate()
    about: Case = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_second": bandwidth,
        "exponentials_per_second": exponentials,
    }
    print(
        f"{about['device']}, torch {torch.__version__}, copies at {bandwidth * 1e-9:.0f} GB/s, "
        f"{exponentials * 1e-9:.0f} exponentials a ns at most\n"
    )
    results: list[Case] = []
    lines = {
        "linear_scan": _linear(),
        "selective_scan": _selective(),
        "causal_conv1d": _conv(),
        "softmax_scan": _softmax(),
        "block_scan": _blocks(),
    }
    cases = {op: _measured(of_op, bandwidth, exponentials) for op, of_op in lines.items()}
    for op, of_op in (cases | {"rnn": _rnn(bandwidth), "steps": _steps()}).items():
        try:
            for case in of_op:
                results.append(case)
                save(about, results)
        except Exception as error:  # memory that is full, or a kernel that fails
            print(f"{op}: {type(error).__name__}: {error}")
            results.append({"case": op, "error": str(error)})
            save(about, results)
    return results

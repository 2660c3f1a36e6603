"""What a case of the bench is, and how it is verified before it is timed: on the tensors and by the
calls that are timed.

Forward: a few batch rows and channels of the result against ``recurra.reference`` in float64.
Backward: the same with a cotangent that is zero outside those rows and channels, so that every
gradient, the sums over channels and batch included, is determined by the slice. The error may be a
few times that of the same reference in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

import recurra
from recurra.bench.floors import Floor

FORWARD, BACKWARD, STEP, MEMORY = "forward", "forward+backward", "step", "memory"
IMPORT, LM, RWKV4, GRIFFIN, DROP_IN = "import", "lm", "rwkv4", "griffin", "drop-in"
SERVING, ONNX, JAX, NUMPY = "serving", "onnx", "jax", "numpy"


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio of two times that must not exceed, or must reach, a limit.

    Attributes:
        time: the name of the time in question: ``recurra``, a variant or a peer.
        over: what it is divided by: ``floor``, another time, or ``microseconds`` for the time
            of a call itself.
        limit: the limit of the ratio.
        at_least: the ratio must reach the limit instead of staying below it.
    """

    time: str
    over: str
    limit: float
    at_least: bool = False


@dataclasses.dataclass
class Built:
    """A case with its tensors: the calls to time and what they need at least.

    Attributes:
        verify: raises AssertionError where a result is wrong; returns the largest error as a
            fraction of what is allowed.
        runs: the calls by name; ``recurra`` is the op in its own layout.
        floor: what the op has to do at least.
        peers: calls of other packages, by name.
        absent: for each peer that is not there, why.
        calls: how many calls one run makes.
    """

    verify: Callable[[], float]
    runs: dict[str, Callable[[], object]]
    floor: Floor | None
    peers: dict[str, Callable[[], object]] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    calls: int = 1


@dataclasses.dataclass
class Measured:
    """A number with a limit; a case may be several of them.

    Attributes:
        value: what came, in ``unit``.
        limit: it must not exceed, or with ``at_least`` must reach; None where nothing is asked.
        text: what it is made of.
    """

    value: float
    unit: str
    limit: float | None
    text: str
    at_least: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: an op, a shape, and forward, forward+backward or step."""

    op: str
    shape: tuple[int, ...]
    kind: str
    build: Callable[[bool], Built | list[Measured]]
    targets: tuple[Target, ...] = ()
    axes: tuple[str, ...] = ()  # what the sizes of the shape are; where none, those of the op

    @property
    def name(self) -> str:
        """OP/SHAPE/KIND, by which the command line selects."""
        return "/".join(filter(None, (self.op, "x".join(map(str, self.shape)), self.kind)))

    @property
    def missing(self) -> bool:
        """Whether this build of recurra lacks the op."""
        if self.op in (IMPORT, LM, RWKV4, GRIFFIN, DROP_IN, SERVING, ONNX, JAX, NUMPY):
            return False
        function = f"{self.op}_step" if self.kind == STEP else self.op
        return not hasattr(recurra, function) or not hasattr(recurra.reference, function)


# Verification -------------------------------------------------------------------------------------


def assert_close(name: str, got: Tensor, exact: Tensor, plain: Tensor) -> float:
    """The error of ``got``, as a fraction of eight times that of ``plain`` and four roundings."""
    eps = torch.finfo(got.dtype).eps
    error = (got.double() - exact).abs().max().item()
    allowed = 8 * (plain.double() - exact).abs().max().item() + 4 * eps * exact.abs().max().item()
    # Not `error > allowed`, which a NaN would pass.
    if not error <= allowed:
        raise AssertionError(f"{name} is off by {error:.3g}, allowed are {allowed:.3g}")
    return error / allowed if allowed else 0.0


def some(count: int, most: int) -> list[int]:
    """At most ``most`` indices below ``count``, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


@dataclasses.dataclass
class Problem:
    """An op with its arguments: what is common to timing and verifying it.

    Attributes:
        inputs: the tensor arguments by name.
        call: runs the op, or its reference, on such arguments and returns the output.
        reference: the function of the reference.
        pick: for each input, the part that belongs to given rows and channels.
    """

    inputs: dict[str, Tensor]
    call: Callable[[Callable, dict[str, Tensor]], Tensor]
    op: Callable
    reference: Callable
    pick: dict[str, Callable[[Tensor, list[int], list[int]], Tensor]]

    def forward(self) -> Tensor:
        return self.call(self.op, self.inputs)

    def gradients(self, dy: Tensor) -> dict[str, Tensor]:
        """Forward and backward, as a training step does."""
        y = self.call(self.op, self.leaves)
        return dict(zip(self.leaves, torch.autograd.grad(y, self.leaves.values(), dy), strict=True))

    @functools.cached_property
    def leaves(self) -> dict[str, Tensor]:
        return {k: v.detach().requires_grad_() for k, v in self.inputs.items()}

    def _slice(self, dtype: torch.dtype, rows: list[int], channels: list[int], grad: bool):
        return {
            k: self.pick[k](v, rows, channels).to(dtype).contiguous().requires_grad_(grad)
            for k, v in self.inputs.items()
        }

    def verify(self, backward: bool) -> float:
        lead = next(iter(self.inputs.values()))
        rows, channels = some(lead.shape[0], 2), some(lead.shape[-1], 8)
        exact = self._slice(torch.float64, rows, channels, backward)
        plain = self._slice(torch.float32, rows, channels, backward)
        y64, y32 = self.call(self.reference, exact), self.call(self.reference, plain)
        with torch.no_grad():
            y = self.forward()
        worst = assert_close("the output", y[rows][:, :, channels], y64.detach(), y32.detach())
        if not backward:
            return worst
        dy = torch.zeros_like(y)
        small = torch.randn(y64.shape).to(y.dtype)
        for i, row in enumerate(rows):
            dy[row, :, channels] = small[i]
        got = self.gradients(dy)
        want64 = torch.autograd.grad(y64, exact.values(), small.double())
        want32 = torch.autograd.grad(y32, plain.values(), small.float())
        for (k, full), g64, g32 in zip(got.items(), want64, want32, strict=True):
            part = self.pick[k](full, rows, channels)
            worst = max(worst, assert_close(f"the gradient of {k}", part, g64, g32))
            if (full != 0).sum() > part.numel():
                raise AssertionError(f"the gradient of {k} leaks into other rows or channels")
        return worst


def rows_and_channels(x: Tensor, rows: list[int], channels: list[int]) -> Tensor:
    return x[rows][:, :, channels]


def rows_of(x: Tensor, rows: list[int], channels: list[int]) -> Tensor:
    return x[rows]


def channels_of(x: Tensor, rows: list[int], channels: list[int]) -> Tensor:
    return x[channels]


def build(make: Callable[..., Problem], kind: str, floor: Floor) -> Built:
    """The problem in float32, its transposed and its bfloat16 form."""
    problems = {
        "recurra": make(),
        "transposed": make(transposed=True),
        "bfloat16": make(dtype=torch.bfloat16),
    }

    def verify() -> float:
        worst = 0.0
        for name, problem in problems.items():
            try:
                worst = max(worst, problem.verify(kind == BACKWARD))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        return worst

    return Built(
        verify,
        {
            name: problem.forward if kind == FORWARD else training_step(problem)
            for name, problem in problems.items()
        },
        floor,
    )


def training_step(problem: Problem) -> Callable[[], object]:
    with torch.no_grad():
        dy = torch.randn_like(problem.forward())
    return lambda: problem.gradients(dy)


def laid_out(x: Tensor, transposed: bool) -> Tensor:
    """``x`` (B, T, D) as it is, or as a view of a (B, D, T) tensor."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x

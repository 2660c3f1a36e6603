"""State space models constant over time: S4D, S5 and LSSL, each as a recurrence and as a
convolution."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurra._check import state_dtype
from recurra.nn._complex import complex_scan, complex_step, to_complex, to_real
from recurra.nn._config import MixerConfig, check_fields
from recurra.nn._mixer import Kept, readable
from recurra.nn._scan import Apply, ScanMixer

_VIEWS = ("auto", "recurrent", "convolution")


@dataclasses.dataclass(frozen=True)
class S4DConfig(MixerConfig):
    """Sizes of an :class:`S4D` mixer.

    Attributes:
        d_state: N, states of a channel, in N/2 conjugate pairs.
        dt_min: least time step at the beginning; small for long memories.
        dt_max: largest.
        view: recurrent, or convolution, by fast Fourier transforms, for whole sequences and
            chunks; steps are recurrent always. Both give the same, but an input that is not
            finite spoils all outputs of its convolution, those before it too. "auto" takes the
            faster: for S4D the convolution from 64 inputs on, else the recurrence.

    Raises:
        ValueError: the view is unknown, or a size is out of range.
    """

    kind: ClassVar[str] = "s4d"
    letter: ClassVar[str] = "D"
    largest: ClassVar[int] = 65536

    d_state: int = 64
    dt_min: float = 0.001
    dt_max: float = 0.1
    view: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self, d_state=(1, self.largest), dt_min=(1e-8, 1e4), dt_max=(self.dt_min, 1e4))
        if self.view not in _VIEWS:
            raise ValueError(
                f"{type(self).__name__}: view must be one of {', '.join(_VIEWS)}, "
                f"got {self.view:.100}"
            )
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.d_state % 2:
            raise ValueError(f"{type(self).__name__}: d_state must be even, got {self.d_state}")

    def make(self, d_model: int) -> S4D:
        """The mixer."""
        return S4D(d_model, self)


@dataclasses.dataclass(frozen=True)
class S5Config(S4DConfig):
    """Sizes of an :class:`S5` mixer: as :class:`S4DConfig`, but the states, at most 2048, are
    those of all channels together."""

    kind: ClassVar[str] = "s5"
    letter: ClassVar[str] = "S"
    largest: ClassVar[int] = 2048  # their first frequencies are eigenvalues of a matrix

    def make(self, d_model: int) -> S5:
        """The mixer."""
        return S5(d_model, self)


@dataclasses.dataclass(frozen=True)
class LSSLConfig(S4DConfig):
    """Sizes of an :class:`LSSL` mixer: as :class:`S4DConfig`, with at most 16 states a channel,
    each of which meets all others at every step.

    Attributes:
        alpha: of the generalised bilinear transform: 0 for Euler's, 1 for the backward one.
    """

    kind: ClassVar[str] = "lssl"
    letter: ClassVar[str] = "P"
    largest: ClassVar[int] = 16

    d_state: int = 16
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, alpha=(0.0, 1.0))

    def _check_pairs(self) -> None:
        """States are real and need not come in pairs."""

    def make(self, d_model: int) -> LSSL:
        """The mixer."""
        return LSSL(d_model, self)


def causal_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """y_t = sum_l kernel_l u_{t-l} for u (B, T, D) and a kernel (D, T) of each channel."""
    T = u.shape[1]
    product = torch.fft.rfft(u.mT, 2 * T) * torch.fft.rfft(kernel, 2 * T)
    return torch.fft.irfft(product, 2 * T)[..., :T].mT


def powers(z: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """exp(z t) of z (D, N) for all t below T as two factors, of i in ``near`` (D, N, L) and of j L
    in ``far`` (D, N, J), where t is i + j L: far fewer numbers than one for each step."""
    L = int(T**0.5) + 1
    near = torch.arange(L, device=z.device)
    far = L * torch.arange(-(-T // L), device=z.device)
    return torch.exp(z[..., None] * near), torch.exp(z[..., None] * far)


def sums_of_powers(w: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """Re(sum_n w_n exp(z_n t)) for weights w (B, D, N) at each t of :func:`powers`, and perhaps
    some more: (B, D, J L)."""
    B, D, _ = w.shape
    rows = (w[..., None] * far).permute(1, 0, 3, 2).conj()  # Re(x y) is a product with conj(x)
    rows = torch.view_as_real(rows.resolve_conj()).reshape(D, B * far.shape[-1], -1)
    columns = torch.view_as_real(near.mT.contiguous()).flatten(2)
    return (rows @ columns.mT).view(D, B, -1).transpose(0, 1)


def weighted_by_powers(u: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """sum_t u_t exp(z_n t) for u (B, D, T): (B, D, N)."""
    (B, D, T), (L, J) = u.shape, (near.shape[-1], far.shape[-1])
    rows = F.pad(u, (0, J * L - T)).transpose(0, 1).reshape(D, B * J, L)
    columns = torch.view_as_real(near.mT.contiguous()).flatten(2)
    inner = torch.view_as_complex((rows @ columns).view(D, B, J, -1, 2))
    return (inner * far.mT[:, None]).sum(2).transpose(0, 1)


def krylov(A: Tensor, v: Tensor, T: int) -> Tensor:
    """v, A v, ..., A^(T-1) v for A (..., N, N) and v (..., N), as (..., T, N), by doubling."""
    rows = v[..., None, :]
    while rows.shape[-2] < T:
        rows = torch.cat([rows, rows @ A.mT], -2)
        A = A @ A
    return rows[..., :T, :]


def exp_and_phi(z: Tensor) -> tuple[Tensor, Tensor]:
    """exp(z) and exp(z) - 1, of which no bit is lost close to 0, of complex numbers."""
    x, y = z.real, z.imag
    real = torch.expm1(x) * torch.cos(y) - 2 * torch.sin(y / 2).square()
    e = torch.exp(z)
    return e, torch.complex(real, e.imag)


def zero_order_hold(
    dt: Tensor, A_real_log: Tensor, A_imag: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """z = dt A, exp(z) and (exp(z) - 1) / A, what the input is multiplied by, of a diagonal A whose
    real part is negative."""
    A = torch.complex(-A_real_log.exp().clamp(min=1e-30), A_imag)  # 0 would be divided by 0
    z = dt * A
    a, less = exp_and_phi(z)
    return z, a, less / A


def hippo_legs(N: int) -> tuple[Tensor, Tensor]:
    """A (N, N) and B (N,) of HiPPO-LegS, which keep the Legendre coefficients of all that was:
    Gu et al., "HiPPO: recurrent memory with optimal polynomial projections" (2020), theorem 2."""
    n = torch.arange(N, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    return -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1), root


@functools.lru_cache(maxsize=8)
def hippo_frequencies(N: int) -> np.ndarray:
    """The N/2 positive imaginary parts of the eigenvalues of HiPPO-LegS's normal part; the real
    ones are -1/2. S5's paper, section 3.3."""
    root = np.sqrt(np.arange(N) + 0.5)
    outer = np.outer(root, root)
    return np.linalg.eigvalsh(1j * (np.tril(outer, -1) - np.triu(outer, 1)))[N // 2 :]


class StateSpace(ScanMixer):
    """What the three have in common: y = SSM(x) + D x, then GELU and a gated linear unit."""

    # The parameters of its system, and the fewest inputs of which the convolution is faster.
    system: ClassVar[tuple[str, ...]]
    convolved_from: ClassVar[float] = math.inf

    def __init__(self, d_model: int, config: S4DConfig, steps: int):
        super().__init__(d_model)
        self.config, self.view = config, config.view
        self._kept = Kept()
        self.log_dt = nn.Parameter(torch.empty(steps))
        self.D = nn.Parameter(torch.empty(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Time steps log-uniform between their bounds; D normal; the rest as :meth:`_reset`."""
        if self.D.is_meta:  # takes its time even where there is nothing to fill
            return
        nn.init.uniform_(self.log_dt, math.log(self.config.dt_min), math.log(self.config.dt_max))
        nn.init.normal_(self.D)
        self.out_proj.reset_parameters()
        self._reset()

    def _parameters_of_system(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.system]

    def _wide(self) -> list[Tensor]:
        """Its parameters in the dtype of states: 16 bits are not enough for a system."""
        return [p.to(state_dtype(p.dtype)) for p in self._parameters_of_system()]

    def _system_of_step(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._kept(self._system, *self._parameters_of_system())

    def _before(self, x: Tensor, linear: Apply) -> tuple[Tensor, Tensor]:
        return x.to(state_dtype(x.dtype)), x

    def _scan(self, u: Tensor, h: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False):
            if cu_seqlens is None:
                return self._view_of(u, h)
            S = h.shape[0]
            if not S or not self._convolves(u.shape[1] // S) or not readable(cu_seqlens):
                return self._recurrence(u, h, cu_seqlens)
            # One after another: together they would take the memory of a recurrence.
            each = zip(u.split(cu_seqlens.diff().tolist(), 1), h.split(1), strict=True)
            y, last = zip(*(self._view_of(*one) for one in each), strict=True)
            return torch.cat(y, 1), torch.cat(last)

    def _view_of(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if u.numel() and self._convolves(u.shape[1]):
            return self._convolution(u, h)
        return self._recurrence(u, h, None)

    def _convolves(self, T: int) -> bool:
        if self.view != "auto":
            return self.view == "convolution"
        # The factors of powers() have sizes that no exported program can leave open.
        return not torch.compiler.is_exporting() and self.convolved_from <= T

    def _after(self, y: Tensor, x: Tensor, linear: Apply) -> Tensor:
        y = F.gelu(y.to(x.dtype) + self.D * x)
        return F.glu(linear(self.out_proj, y), dim=-1)


class S4D(StateSpace):
    r"""Diagonal state space of each channel: Gu, Gupta, Goel and Re, "On the parameterization and
    initialization of diagonal state space models" (2022), section 3 and algorithm 1; S4D-Lin.

    :math:`h' = A h + u`, :math:`y = 2\,\mathrm{Re}(C h)` with zero-order hold in steps of dt.

    Rounding a frequency or a time step turns every state a little more with each input. Cast to
    bfloat16 as a whole, a new mixer is 19 to 27 % off over 1024 inputs; with ``log_dt`` and
    ``A_imag`` left in float32, as they may be and as autocast leaves them, 0.5 %.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    system = ("log_dt", "A_real_log", "A_imag", "C")
    convolved_from = 64

    def __init__(self, d_model: int, config: S4DConfig | None = None):
        config = config or S4DConfig()
        super().__init__(d_model, config, d_model)
        pairs = (d_model, config.d_state // 2)
        self.state_shapes = ((math.prod(pairs), 2),)
        self.A_real_log = nn.Parameter(torch.empty(pairs))
        self.A_imag = nn.Parameter(torch.empty(pairs))
        self.C = nn.Parameter(torch.empty(*pairs, 2))
        self.reset_parameters()

    def _reset(self) -> None:
        """A = -1/2 + i pi n, C complex normal."""
        nn.init.constant_(self.A_real_log, math.log(0.5))
        self.A_imag.copy_(math.pi * torch.arange(self.A_imag.shape[1]).expand_as(self.A_imag))
        nn.init.normal_(self.C, std=0.5**0.5)

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """dt A, exp(dt A), and C times what the input is multiplied by; all (D, N/2)."""
        log_dt, real, imag, C = self._wide()
        z, a, b = zero_order_hold(log_dt.exp()[:, None], real, imag)
        return z, a, torch.view_as_complex(C) * b

    def _spread(self, u: Tensor, a: Tensor) -> Tensor:
        """The input of every state of its channel, in one row."""
        return u[..., None].expand(*u.shape, a.shape[1]).flatten(-2).to(a.dtype)

    def _read(self, y: Tensor, c: Tensor) -> Tensor:
        """What each channel makes of its states."""
        return 2 * (y.unflatten(-1, c.shape) * c).real.sum(-1)

    def _recurrence(self, u: Tensor, h: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        _, a, c = self._system()
        b = self._spread(u, a)
        y, h = complex_scan(self.ops, a.view(1, 1, -1), b, h, cu_seqlens=cu_seqlens)
        return self._read(y, c), h

    def _convolution(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z, a, c = self._system()
        T, h = u.shape[1], torch.view_as_complex(h).unflatten(-1, a.shape)
        near, far = powers(z, T)
        kernel, *free = 2 * sums_of_powers(torch.cat([c[None], c * a * h]), near, far)[..., :T]
        y = causal_convolution(u, kernel) + torch.stack(free).mT
        last = weighted_by_powers(u.flip(1).mT, near, far) + torch.exp(z * T) * h
        return y, torch.view_as_real(last.flatten(1))

    def _scan_step(self, u: Tensor, h: Tensor, slots: Tensor | None) -> Tensor:
        _, a, c = self._system_of_step()
        return self._read(
            complex_step(self.ops, a.view(1, -1), self._spread(u, a), h, slots=slots), c
        )


class S5(StateSpace):
    r"""One diagonal state space of all channels: Smith, Warrington and Linderman, "Simplified state
    space layers for sequence modeling" (2023), section 3.

    :math:`h' = \Lambda h + B u`, :math:`y = 2\,\mathrm{Re}(C h)` with zero-order hold in steps of
    dt, one for each pair of states.

    As for :class:`S4D` rounded frequencies and time steps matter: cast to bfloat16 as a whole, a
    new mixer is 3 to 6 % off over 1024 inputs; with ``log_dt`` and ``A_imag`` in float32, 0.5 %.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    system = ("log_dt", "A_real_log", "A_imag")

    def __init__(self, d_model: int, config: S5Config | None = None):
        config = config or S5Config()
        N = config.d_state
        super().__init__(d_model, config, N // 2)
        self.state_shapes = ((N // 2, 2),)
        self.A_real_log = nn.Parameter(torch.empty(N // 2))
        self.A_imag = nn.Parameter(torch.empty(N // 2))
        # Complex matrices as real ones: B to both parts of the state, C from both.
        self.in_proj = nn.Linear(d_model, N, bias=False)
        self.state_proj = nn.Linear(N, d_model, bias=False)
        self.reset_parameters()

    def _reset(self) -> None:
        """Eigenvalues of HiPPO-LegS's normal part, B and C normal."""
        nn.init.constant_(self.A_real_log, math.log(0.5))
        self.A_imag.copy_(torch.tensor(hippo_frequencies(self.config.d_state)))
        nn.init.normal_(self.in_proj.weight, std=(2 * self.in_proj.in_features) ** -0.5)
        nn.init.normal_(self.state_proj.weight, std=self.config.d_state**-0.5)

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """dt Lambda, exp(dt Lambda), and what B u is multiplied by; all (N/2,)."""
        log_dt, real, imag = self._wide()
        return zero_order_hold(log_dt.exp(), real, imag)

    def _before(self, x: Tensor, linear: Apply) -> tuple[Tensor, Tensor]:
        return to_complex(linear(self.in_proj, x)), x

    def _recurrence(self, u: Tensor, h: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        _, a, b = self._system()
        return complex_scan(self.ops, a[None, None], b * u, h, cu_seqlens=cu_seqlens)

    def _convolution(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z, a, b = self._system()
        T = u.shape[1]
        powers = torch.exp(z * torch.arange(T, device=z.device)[:, None])
        product = torch.fft.fft(b * u, 2 * T, 1) * torch.fft.fft(powers, 2 * T, 0)
        y = torch.fft.ifft(product, dim=1)[:, :T]
        y = y + powers * (a * torch.view_as_complex(h))[:, None]
        return y, torch.view_as_real(y[:, -1])

    def _scan_step(self, u: Tensor, h: Tensor, slots: Tensor | None) -> Tensor:
        _, a, b = self._system_of_step()
        return complex_step(self.ops, a[None], b * u, h, slots=slots)

    def _after(self, h: Tensor, x: Tensor, linear: Apply) -> Tensor:
        return super()._after(2 * linear(self.state_proj, to_real(h, x.dtype)), x, linear)


class LSSL(StateSpace):
    r"""Linear state space layer, beginning as HiPPO-LegS: Gu et al., "Combining recurrent,
    convolutional, and continuous-time models with linear state space layers" (2021), section 3.

    :math:`h' = A h + B u`, :math:`y = C h` with a dense A, by the generalised bilinear transform
    in steps of dt, one for each channel.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    system = ("log_dt", "A", "B", "C")

    def __init__(self, d_model: int, config: LSSLConfig | None = None):
        config = config or LSSLConfig()
        super().__init__(d_model, config, d_model)
        N = config.d_state
        self.state_shapes = ((d_model, N),)
        self.A = nn.Parameter(torch.empty(N, N))
        self.B = nn.Parameter(torch.empty(N))
        self.C = nn.Parameter(torch.empty(d_model, N))
        self.reset_parameters()

    def _reset(self) -> None:
        """A and B of HiPPO-LegS, C normal."""
        A, B = hippo_legs(self.config.d_state)
        self.A.copy_(A)
        self.B.copy_(B)
        nn.init.normal_(self.C, std=self.config.d_state**-0.5)

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (D, N, N) and B (D, N) of a step of each channel, and C."""
        log_dt, A, B, C = self._wide()
        alpha, dt = self.config.alpha, log_dt.exp()[:, None, None]
        eye = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
        ahead = torch.cat([eye + (1 - alpha) * dt * A, dt * B[:, None]], -1)
        solved = torch.linalg.solve(eye - alpha * dt * A, ahead)
        return solved[..., :-1], solved[..., -1], C

    def _recurrence(self, u: Tensor, h: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        A, B, C = self._system()
        y, h = self.ops.block_scan(A[None, None], u[..., None] * B, h, cu_seqlens=cu_seqlens)
        return (y * C).sum(-1), h

    def _convolution(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        A, B, C = self._system()
        T = u.shape[1]
        powers, free = krylov(A, B, T), krylov(A, h, T + 1)
        y = causal_convolution(u, (powers * C[:, None]).sum(-1))
        y = y + (free[:, :, 1:] * C[:, None]).sum(-1).mT
        return y, torch.einsum("dtn,btd->bdn", powers.flip(1), u) + free[:, :, -1]

    def _scan_step(self, u: Tensor, h: Tensor, slots: Tensor | None) -> Tensor:
        A, B, C = self._system_of_step()
        return (self.ops.block_scan_step(h, A[None], u[..., None] * B, slots=slots) * C).sum(-1)

"""One step of every cell, in plain torch.

``cell(x, h, p) -> h``: inputs x (G, ...), states h (S, ...) and parameters p (P, ...), one row a
name; everything is pointwise in the other dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def elstm(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """eLSTM (arXiv 2305.19044): inputs forget, candidate; state c."""
    x_f, x_z = x
    (c,) = h
    w_f, w_z = p
    f = torch.sigmoid(w_f * c + x_f)
    z = torch.tanh(w_z * c + x_z)
    return (f * c + (1 - f) * z)[None]


def indrnn(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """IndRNN (arXiv 1803.04831): input x, state h."""
    return torch.relu(p * h + x)


def janet(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """JANET (arXiv 1804.04849): inputs forget, candidate; state h."""
    x_f, x_n = x
    (y,) = h
    a_f, a_n = p
    s = a_f * y + x_f
    return (torch.sigmoid(s) * y + torch.sigmoid(1 - s) * torch.tanh(a_n * y + x_n))[None]


def lem(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """LEM (arXiv 2110.04744): inputs step_y, step_z, z, y; states y, z."""
    x_s, x_t, x_z, x_y = x
    y, z = h
    a_s, a_t, a_z, a_y, dt = p
    step_y = dt * torch.sigmoid(a_s * y + x_s)
    step_z = dt * torch.sigmoid(a_t * y + x_t)
    z = (1 - step_z) * z + step_z * torch.tanh(a_z * y + x_z)
    return torch.stack([(1 - step_y) * y + step_y * torch.tanh(a_y * z + x_y), z])


def mgu(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """MGU (arXiv 1603.09420): inputs forget, candidate; state h."""
    x_f, x_n = x
    (y,) = h
    a_f, a_n = p
    f = torch.sigmoid(a_f * y + x_f)
    return ((1 - f) * y + f * torch.tanh(a_n * (f * y) + x_n))[None]


def mingru(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """minGRU (arXiv 2410.01201): inputs update, candidate; state h; scale of the gate."""
    x_z, x_n = x
    z = p * torch.sigmoid(x_z)
    return (1 - z) * h + z * _positive(x_n)


def minlstm(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """minLSTM (arXiv 2410.01201): inputs forget, input, candidate; state h; scale of the gate."""
    x_f, x_i, x_n = x
    softplus = torch.nn.functional.softplus
    z = p * torch.sigmoid(softplus(-x_f) - softplus(-x_i))
    return (1 - z) * h + z * _positive(x_n)


def _positive(x: Tensor) -> Tensor:
    """g of minGRU and minLSTM, which is continuous and positive."""
    return torch.where(x < 0, torch.sigmoid(x), x + 0.5)


def paragru(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """ParaGRU (arXiv 2510.21450): inputs update, reset, candidate."""
    x_z, x_r, x_n = x
    a_z, a_r, a_n = p
    (s,) = h
    z = torch.sigmoid(a_z * s + x_z)
    r = torch.sigmoid(a_r * s + x_r)
    n = torch.tanh(a_n * (r * s) + x_n)
    return (z * n + (1 - z) * s)[None]


def paralstm(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """ParaLSTM (arXiv 2510.21450): inputs forget, cell, output; states c, h."""
    x_f, x_g, x_o = x
    c, y = h
    a_f, a_g, a_o, c_f, c_o = p
    f = torch.sigmoid(a_f * y + c_f * c + x_f)
    g = torch.tanh(a_g * y + x_g)
    c = f * c + (1 - f) * g
    o = torch.sigmoid(a_o * y + c_o * c + x_o)
    return torch.stack([c, o * torch.tanh(c)])


def peephole_lstm(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """LSTM with peepholes (Gers and Schmidhuber 2000): inputs input, forget, cell, output; states
    c, h."""
    x_i, x_f, x_g, x_o = x
    c, y = h
    a_i, a_f, a_g, a_o, p_i, p_f, p_o = p
    i = torch.sigmoid(a_i * y + p_i * c + x_i)
    f = torch.sigmoid(a_f * y + p_f * c + x_f)
    c = f * c + i * torch.tanh(a_g * y + x_g)
    o = torch.sigmoid(a_o * y + p_o * c + x_o)
    return torch.stack([c, o * torch.tanh(c)])


def slstm(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """sLSTM (arXiv 2405.04517): inputs input, forget, cell, output; states c, n, m, h."""
    x_i, x_f, x_z, x_o = x
    c, n, m, y = h
    r_i, r_f, r_z, r_o = p
    i = r_i * y + x_i
    decayed = m + torch.nn.functional.logsigmoid(r_f * y + x_f)
    top = torch.where(n <= 0, i, torch.maximum(i, decayed))
    f = torch.exp((decayed - top).clamp(max=0))
    g = torch.exp(i - top)
    c = f * c + g * torch.tanh(r_z * y + x_z)
    n = f * n + g
    return torch.stack([c, n, top, torch.sigmoid(r_o * y + x_o) * c / n])


def sru(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """SRU (arXiv 1709.02755): inputs candidate, forget, reset, skip; states c, h."""
    x_c, x_f, x_r, skip = x
    c = h[0]
    v_f, v_r = p
    f = torch.sigmoid(v_f * c + x_f)
    r = torch.sigmoid(v_r * c + x_r)
    c = f * c + (1 - f) * x_c
    return torch.stack([c, r * c + (1 - r) * skip])


def tanh(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """The diagonal Elman cell."""
    return torch.tanh(p * h + x)


def unicornn(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """UnICORNN (arXiv 2103.05487): input x; states y, z."""
    y, z = h
    w, c, alpha, dt = p
    step = dt * torch.sigmoid(c)
    z = z - step * (torch.tanh(w * y + x[0]) + alpha * y)
    return torch.stack([y + step * z, z])

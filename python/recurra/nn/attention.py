"""Local attention: softmax over the last inputs alone, which are all that it remembers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurra._check import state_dtype
from recurra.nn._config import MixerConfig, check_fields
from recurra.nn._mixer import Mixer, readable
from recurra.nn._positions import positions
from recurra.nn._scan import apply_step

# Queries that are compared with their keys at once: memory is theirs, not the square of T.
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Sizes of an :class:`Attention` mixer.

    Attributes:
        heads: of the queries.
        kv_heads: of keys and values, which must divide ``heads``; 1 is multi-query attention.
        head_dim: width of a head; ``d_model // heads`` when None.
        window: how many inputs, its own among them, an output sees.
        rope_theta: base of the rotary embedding.
        rotary: part of each head that is rotated.
        bias: whether queries, keys and values have one.
        out_bias: whether the output has one.

    Raises:
        ValueError: a size is out of range.
    """

    kind: ClassVar[str] = "attention"
    letter: ClassVar[str] = "A"

    heads: int = 4
    kv_heads: int = 1
    head_dim: int | None = None
    window: int = 1024
    rope_theta: float = 10000.0
    rotary: float = 0.5
    bias: bool = False
    out_bias: bool = True

    def __post_init__(self) -> None:
        check_fields(
            self,
            heads=(1, 1 << 16),
            kv_heads=(1, 1 << 16),
            head_dim=(1, 1 << 16),
            window=(1, 1 << 24),
            rope_theta=(1.0, 1e12),
            rotary=(0.0, 1.0),
        )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"AttentionConfig: kv_heads must divide heads = {self.heads}, got {self.kv_heads}"
            )

    def make(self, d_model: int) -> Attention:
        """The mixer."""
        return Attention(d_model, self)


class AttentionState(NamedTuple):
    """What an :class:`Attention` remembers.

    Attributes:
        k: the last rotated keys, (B, window, kv_heads, head_dim); that of input n of the sequence
            is at n % window.
        v: the last values, likewise.
        seen: how many inputs came so far, (B,), int64.

    Keys and values are of the dtype of the model: nothing is summed up in them.
    """

    k: Tensor
    v: Tensor
    seen: Tensor


class Attention(Mixer):
    """Local attention with rotary positions, in which heads of queries share keys and values:
    De et al., "Griffin" (2024), section 2.3; Su et al., "RoFormer" (2021), equation 34; Shazeer,
    "Fast transformer decoding" (2019).

    Parameters have the names of transformers' RecurrentGemmaAttention, whose ``o_proj`` is
    ``out_proj``.

    Args:
        d_model: width of the inputs and outputs.
        config: the sizes inside.
    """

    State = AttentionState

    def __init__(self, d_model: int, config: AttentionConfig | None = None):
        super().__init__(d_model)
        self.config = config = config or AttentionConfig()
        H, G = config.heads, config.kv_heads
        self.E = E = d_model // H if config.head_dim is None else config.head_dim
        self.rotated = int(config.rotary * E)
        if E < 1:
            raise ValueError(f"Attention: heads must be at most d_model = {d_model}, got {H}")
        if self.rotated % 2:
            raise ValueError(f"Attention: rotary * head_dim must be even, got {self.rotated}")
        self.state_shapes = (*2 * ((config.window, G, E),), ())
        self.q_proj = nn.Linear(d_model, H * E, bias=config.bias)
        self.k_proj = nn.Linear(d_model, G * E, bias=config.bias)
        self.v_proj = nn.Linear(d_model, G * E, bias=config.bias)
        self.out_proj = nn.Linear(H * E, d_model, bias=config.out_bias)

    def reset_parameters(self) -> None:
        """As in torch.nn."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            layer.reset_parameters()

    def state_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Of the three tensors of a state."""
        return dtype, dtype, torch.int64

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The heads of projections (..., heads * head_dim) of inputs at ``at`` (...): queries and
        keys rotated, all (..., heads, head_dim)."""
        q, k, v = (x.unflatten(-1, (-1, self.E)) for x in (q, k, v))
        half = self.rotated // 2
        # In float64, where no position is too far for its angle.
        powers = torch.arange(half, dtype=torch.float64, device=q.device) / max(half, 1)
        angle = at[..., None, None] * self.config.rope_theta**-powers
        cos, sin = (x.to(state_dtype(q.dtype)) for x in (angle.cos(), angle.sin()))

        def rotate(x: Tensor) -> Tensor:
            a, b, rest = x.split((half, half, self.E - 2 * half), -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest.to(cos.dtype)], -1).to(
                x.dtype
            )

        return rotate(q), rotate(k), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Softmax attention of q (B, Q, heads, E) over k and v (B, K, kv_heads, E) where ``mask``,
        (1 or B, Q, K), is true: (B, Q, heads * E)."""
        B, Q, H, _ = q.shape
        G = k.shape[2]
        # Heads that share keys are rows of one product with them.
        rows = q.view(B, Q, G, H // G, self.E).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = mask[:, None, None].expand(-1, 1, H // G, -1, -1).flatten(2, 3)
        y = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), mask)
        return y.view(B, G, H // G, Q, self.E).permute(0, 3, 1, 2, 4).flatten(2)

    def _local(self, q: Tensor, k: Tensor, v: Tensor, past: AttentionState) -> Tensor:
        """Attention of T inputs that follow on those of ``past``: (B, T, heads * E)."""
        W, T, seen = self.config.window, q.shape[1], past.seen
        compiled = torch.compiler.is_compiling()
        # No more keys of the past than the rows have. Counting waits for a device.
        count = W - 1
        if seen.is_cpu and readable(seen):
            count = min(count, int(seen.max()) if len(seen) else 0)
        slots = (seen[:, None] + torch.arange(-count, 0, device=seen.device)) % W
        rows = torch.arange(seen.shape[0], device=seen.device)[:, None]
        k = torch.cat([past.k[rows, slots].to(k.dtype), k], 1)
        v = torch.cat([past.v[rows, slots].to(v.dtype), v], 1)
        if compiled:
            there = torch.arange(1 - W, T, device=seen.device) >= -seen[:, None]
            return self._all_blocks(q, k, v, there)
        out = []
        for begin in range(0, T, _BLOCK):
            # Query t is key count + t and sees the W keys up to that one.
            end, low = min(begin + _BLOCK, T), max(0, begin + count - W + 1)
            key = torch.arange(low, count + end, device=q.device)
            ago = torch.arange(count + begin, count + end, device=q.device)[:, None] - key
            mask = ((ago >= 0) & (ago < W))[None]
            if low < count:
                mask = mask & (key >= count - seen[:, None])[:, None]
            part = slice(low, count + end)
            out.append(self._attend(q[:, begin:end], k[:, part], v[:, part], mask))
        return torch.cat(out, 1) if out else q.flatten(2)

    def _all_blocks(self, q: Tensor, k: Tensor, v: Tensor, there: Tensor) -> Tensor:
        """The same for T queries and window - 1 keys more, those of them that are ``there``, (B,
        T + window - 1); all blocks in one call: a program with a loop over them would be one for
        each T."""
        W, (B, T) = self.config.window, q.shape[:2]
        # Never whole blocks, nor one, which would be other programs.
        n, span = T // _BLOCK + (1 if isinstance(T, int) else 2), W - 1 + _BLOCK
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, n * _BLOCK - T)) for x in (q, k, v))
        q = q.reshape(B * n, _BLOCK, *q.shape[2:])
        k, v = (x.unfold(1, span, _BLOCK).permute(0, 1, 4, 2, 3).flatten(0, 1) for x in (k, v))
        there = F.pad(there, (0, n * _BLOCK - T)).unfold(1, span, _BLOCK).flatten(0, 1)
        key = torch.arange(span, device=q.device)
        ago = W - 1 + torch.arange(_BLOCK, device=q.device)[:, None] - key
        # Each sees itself, so that a row which is none has a softmax too.
        mask = ((ago >= 0) & (ago < W)) & there[:, None] | (ago == 0)
        y = self._attend(q, k, v, mask).view(B, n * _BLOCK, -1)
        return y[:, torch.arange(T, device=y.device)]  # a slice of all would be another program

    def _remember(self, k: Tensor, v: Tensor, past: AttentionState) -> AttentionState:
        """The state after T more inputs with these keys and values."""
        W, (B, T), seen = self.config.window, k.shape[:2], past.seen[:, None]
        both = (past.k, k), (past.v, v)
        if torch.compiler.is_compiling():
            # For any T: a program would be one for those up to the window, or for those beyond.
            at = self._in_ring(past.seen + T)
            row = torch.where(at < seen, at % W, W + at - seen)
            rows = torch.arange(B, device=row.device)[:, None]
            k, v = (torch.cat([ring, x.to(ring.dtype)], 1)[rows, row] for ring, x in both)
        else:
            last = torch.arange(max(0, T - W), T, device=k.device)
            slots = ((seen + last) % W)[..., None, None].expand(-1, -1, *k.shape[2:])
            k, v = (
                ring.scatter(1, slots, x[:, T - len(last) :].to(ring.dtype)) for ring, x in both
            )
        return AttentionState(k, v, past.seen + T)

    def _in_ring(self, seen: Tensor) -> Tensor:
        """Which input is in each slot, (S, window), after so many of S sequences; below 0 where
        none was."""
        W, last = self.config.window, seen[:, None] - 1
        return last - (last - torch.arange(W, device=seen.device)) % W

    def _packed_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, past: AttentionState, cu_seqlens: Tensor
    ) -> tuple[Tensor, AttentionState]:
        """Attention of S packed sequences and their next state in one program, whatever their
        lengths: each stands behind the window - 1 inputs before it, in one long sequence."""
        W, (S, T), seen = self.config.window, (past.seen.shape[0], q.shape[1]), past.seen
        ends, device = cu_seqlens.long(), q.device
        starts, lengths = ends[:-1], ends.diff()
        k, v = (
            torch.cat([ring.flatten(0, 1).to(x.dtype), x[0]])
            for ring, x in ((past.k, k), (past.v, v))
        )

        def row(sequence: Tensor, at: Tensor) -> Tensor:
            """Where in those the input at this position of a sequence is."""
            old = sequence * W + at % W
            return torch.where(
                at < seen[sequence], old, S * W + starts[sequence] + at - seen[sequence]
            )

        sequences, N = torch.arange(S, device=device), T + S * (W - 1)
        own = torch.repeat_interleave(sequences, lengths + W - 1, output_size=N)
        ahead = (own + 1) * (W - 1)  # inputs before that are none of T
        at = torch.arange(N, device=device) - ahead - starts[own] + seen[own]
        each = F.pad(row(own, at), (W - 1, 0))
        there = F.pad(at >= 0, (W - 1, 0))
        mine = torch.repeat_interleave(sequences, lengths, output_size=T)
        queries = torch.arange(T, device=device) + (mine + 1) * (W - 1)
        y = self._all_blocks(
            q.new_zeros(1, N, *q.shape[2:]).index_copy(1, queries, q),
            k[each][None],
            v[each][None],
            there[None],
        )
        kept = row(sequences[:, None], self._in_ring(seen + lengths))
        state = AttentionState(k[kept].to(past.k.dtype), v[kept].to(past.v.dtype), seen + lengths)
        return y[:, queries], state

    def forward(
        self, x: Tensor, state: AttentionState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Mixes whole sequences, or the next chunk of them.

        Args:
            x: (B, T, d_model).
            state: what the last call returned; that of nothing seen when None. With
                ``cu_seqlens`` one row for each sequence.
            cu_seqlens: (S + 1,), the ends of S sequences packed along T; B must be 1.

        Returns:
            y, shape of ``x``, and the state after the last input. Gradients flow through both.

        Raises:
            ValueError: ``x`` is none of this mixer, or ``cu_seqlens`` or the state does not fit it.
        """
        rows = self.check(x, state, cu_seqlens)
        state = state or self.initial_state(rows)
        at, _ = positions(state.seen, x.shape[1], cu_seqlens)
        q, k, v = self._heads(self.q_proj(x), self.k_proj(x), self.v_proj(x), at)
        if cu_seqlens is None:
            y, state = self._local(q, k, v, state), self._remember(k, v, state)
            return self.out_proj(y), state
        if not readable(cu_seqlens):
            y, state = self._packed_blocks(q, k, v, state, cu_seqlens)
            return self.out_proj(y), state
        ends = cu_seqlens.tolist()
        parts, after = [], []
        for n, (begin, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
            past = AttentionState(*(s[n : n + 1] for s in state))
            here = [z[:, begin:end] for z in (q, k, v)]
            parts.append(self._local(*here, past))
            after.append(self._remember(*here[1:], past))
        y = torch.cat(parts, 1) if parts else q.flatten(2)
        state = (
            AttentionState(*(torch.cat(s) for s in zip(*after, strict=True))) if after else state
        )
        return self.out_proj(y), state

    @torch.no_grad()
    def step(self, x: Tensor, state: AttentionState) -> Tensor:
        """Mixes one input, (B, d_model), and updates ``state`` in place; without gradients."""
        self.check_step(x, state)
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = self._heads(*(apply_step(m, x) for m in layers), state.seen)
        W, rows = self.config.window, torch.arange(x.shape[0], device=x.device)
        state.k[rows, state.seen % W] = k.to(state.k.dtype)
        state.v[rows, state.seen % W] = v.to(state.v.dtype)
        count = W
        if x.is_cpu and readable(state.seen):
            count = min(W, int(state.seen.max()) + 1) if len(x) else 0
        mask = torch.arange(count, device=x.device) <= state.seen[:, None]
        k, v = (x[:, :count].to(q.dtype) for x in (state.k, state.v))
        y = self._attend(q[:, None], k, v, mask[:, None])
        state.seen.add_(1)
        return apply_step(self.out_proj, y[:, 0])

"""What the tests of mixers share: what is true of every model, whatever its mixers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import recurra
from recurra.lm import LMConfig


def states(state) -> list[torch.Tensor]:
    """Every tensor of a model's state."""
    return [x for layer in state for x in layer]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same in float64 but for the order of a few sums."""
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def assert_states_close(got, want) -> None:
    for x, y in zip(states(got), states(want), strict=True):
        close(x, y)


def assert_whole_is_chunked_is_stepped(lm: recurra.LM, lengths: list[int]):
    """Two sequences cut into chunks of these lengths. Returns the state after them."""
    tokens = torch.randint(0, lm.config.vocab_size, (2, sum(lengths)))
    whole, last = lm(tokens)
    state, chunks = None, []
    for chunk in tokens.split(lengths, 1):
        logits, state = lm(chunk, state)
        chunks.append(logits)
    close(torch.cat(chunks, 1), whole)
    stepped = lm.initial_state(2)
    close(torch.stack([lm.step(token, stepped) for token in tokens.unbind(1)], 1), whole)
    assert_states_close(state, last)
    assert_states_close(stepped, last)
    return last


def rows(state, n: int):
    """The state of one sequence."""
    return [type(s)(*(x[n : n + 1] for x in s)) for s in state]


def assert_packed_is_apart(lm: recurra.LM, lengths: list[int], before=None):
    """Sequences of these lengths, packed and each alone, from nothing or from the rows of a
    state. Returns the state after them."""
    tokens = torch.randint(0, lm.config.vocab_size, (1, sum(lengths)))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    packed, last = lm(tokens, before, cu_seqlens=ends)
    apart = [
        lm(part, None if before is None else rows(before, n))
        for n, part in enumerate(tokens.split(lengths, 1))
    ]
    close(packed, torch.cat([y for y, _ in apart], 1))
    for n, (_, state) in enumerate(apart):
        assert_states_close(rows(last, n), state)
    return last


def assert_gradients_are_those_of_the_reference(
    make: Callable[[], recurra.LM],
    loss: Callable[[recurra.LM], torch.Tensor],
    unused: Callable[[str], bool] = lambda name: False,
) -> None:
    """Of two equal models, one with the ops of ``recurra.reference``. Every parameter has a
    gradient but those that are ``unused``."""
    lm, plain = make(), make()
    plain.use_ops(recurra.reference)
    both = (torch.autograd.grad(loss(each), list(each.parameters())) for each in (lm, plain))
    names = [name for name, _ in lm.named_parameters()]
    for name, got, want in zip(names, *both, strict=True):
        assert unused(name) or got.abs().max() > 0, name
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10, msg=name)


def next_token_loss(tokens: torch.Tensor) -> Callable[[recurra.LM], torch.Tensor]:
    return lambda lm: F.cross_entropy(lm(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())


def learn_a_cycle(config: LMConfig) -> tuple[recurra.LM, torch.Tensor, list[float]]:
    """A model of 16 tokens after sixty steps on a cycle, the cycle, and the losses."""
    torch.manual_seed(0)
    lm = recurra.LM(config)
    assert config.parameter_count() == sum(p.numel() for p in lm.parameters())
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    tokens = (torch.arange(41) * 7 % 16).repeat(4, 1)
    losses = []
    for _ in range(60):
        loss = next_token_loss(tokens)(lm)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return lm, tokens, losses

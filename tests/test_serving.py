"""Steps in slots, and requests served together against each of them alone."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

import recurra
from mixers import rows, states
from recurra.lm import CONFIGS, LMConfig
from recurra.lm.serving import Engine
from recurra.nn import HGRNConfig

# Every mixer that steps in slots, by a model that has it.
SLOTTED = (
    "tiny",
    "mingru",
    "paralstm",
    "hgrn",
    "hawk",
    "lrnn",
    "lru",
    "scrn",
    "s4d",
    "s5",
    "lssl",
    "aaren",
)
SERVED = ("tiny", "hawk", "hgrn", "mingru")


def small(name: str, **more) -> recurra.LM:
    """In float64, where no two logits are as close as roundings are, and with a head of its own:
    what is likely depends on more than the last token."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layers": 2, "vocab_size": 64, "tie_embeddings": False}
    return recurra.LM(dataclasses.replace(CONFIGS[name], **sizes, **more)).double().eval()


@pytest.mark.parametrize("name", SLOTTED)
def test_a_step_in_slots_is_a_step_of_these_rows(name):
    lm = small(name)
    with torch.no_grad():
        _, pool = lm(torch.randint(0, 64, (5, 4)))
        pool = [type(part)(*(x.clone() for x in part)) for part in pool]
        before = [type(part)(*(x.clone() for x in part)) for part in pool]
        slots = torch.tensor([3, -1, 0])
        tokens = torch.randint(0, 64, (3,))
        got = lm.step(tokens, pool, slots)
    for row, slot in ((0, 3), (2, 0)):
        alone = rows(before, slot)
        assert torch.equal(lm.step(tokens[row, None], alone)[0], got[row])
        assert all(map(torch.equal, states(rows(pool, slot)), states(alone)))
    for slot in (1, 2, 4):
        assert all(map(torch.equal, states(rows(pool, slot)), states(rows(before, slot))))


def test_mixers_without_slots_say_so():
    lm = small("rwkv4")
    with pytest.raises(ValueError, match="LM: a step of RWKV4 takes no slots"):
        lm.step(torch.zeros(1, dtype=torch.int64), lm.initial_state(4), torch.tensor([1]))
    with pytest.raises(ValueError, match="Engine: RWKV4 does not step in slots; use LM.generate"):
        Engine(lm)


@pytest.mark.parametrize("name", SERVED)
def test_requests_that_come_and_go_write_what_each_writes_alone(name):
    lm, rng = small(name, eos_token_ids=tuple(range(0, 64, 16))), random.Random(1)
    engine = Engine(lm, slots=4, prefill_tokens=24)
    come, told = [], []
    for n in range(60):
        # More than there are slots for: some wait, prompts are longer than a chunk.
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2)) if n < 40 else 0):
            prompt = [rng.randrange(64) for _ in range(rng.choice((1, 2, 9, 24, 61)))]
            come.append(engine.submit(prompt, max_tokens=rng.randint(1, 12)))
        told += engine.step()
    engine.run()
    assert len(come) > 20 and len(engine.free) == 4 and not engine.busy
    early, seen = 0, set()
    for request in come:
        (want,) = lm.generate([request.prompt], max_tokens=request.max_tokens)
        assert request.tokens == want and request.done
        early += len(want) < request.max_tokens
        seen |= set(want)
    assert 0 < early < len(come) and len(seen) > 20  # end tokens came, and many others


def test_a_round_gives_a_request_one_token_at_most():
    """Who streams what a round returned sends every token, once."""
    lm, rng = small("hgrn", eos_token_ids=tuple(range(0, 64, 8))), random.Random(2)
    engine, ended = Engine(lm, slots=3, prefill_tokens=8), 0
    prompts = [[rng.randrange(64) for _ in range(rng.choice((1, 3, 20)))] for _ in range(30)]
    sent = {engine.submit(prompt, max_tokens=6): [] for prompt in prompts}
    while engine.busy:
        told = engine.step()
        assert len(set(told)) == len(told)
        for request in told:
            if len(request.tokens) == len(sent[request]):
                assert request.done  # by an end token, which is none of its tokens
                ended += 1
            else:
                sent[request].append(request.tokens[-1])
    assert all(request.tokens == tokens for request, tokens in sent.items())
    assert 0 < ended < len(sent)


def test_the_prompt_is_the_engines_own():
    lm = small("hgrn")
    engine, prompt = Engine(lm), torch.tensor([1, 2, 3])
    request = engine.submit(prompt, max_tokens=torch.tensor(3))
    (want,) = lm.generate([prompt.tolist()], max_tokens=3)
    prompt.fill_(1 << 40)
    engine.run()
    assert request.tokens == want
    for other in (
        torch.tensor([1, 2, 3], dtype=torch.uint8),
        (1, 2, 3),
        np.array([1, 2, 3]),
        np.array([1, 2, 3], "uint16"),
        np.array([1, 2, 3], "uint32"),
    ):
        request = engine.submit(other, max_tokens=3)
        engine.run()
        assert request.tokens == want


def test_a_request_waits_for_a_slot_and_may_leave():
    lm = small("hgrn")
    engine = Engine(lm, slots=2)
    first, second, third, fourth = (engine.submit([n], max_tokens=50) for n in range(4))
    engine.step()
    assert [r.slot is None for r in (first, second, third, fourth)] == [False, False, True, True]
    engine.cancel(first)
    engine.cancel(fourth)  # before its turn
    engine.step()
    assert first.done and fourth.done and not fourth.tokens and third.slot is not None
    engine.run()
    engine.cancel(third)  # nothing
    for request in (second, third):
        assert request.tokens == lm.generate([request.prompt], max_tokens=50)[0]


def test_nothing_is_made_anew_in_a_decoding_step():
    """What a CUDA graph needs: every round reads and writes the same memory in the same shapes."""
    engine = Engine(small("tiny"), slots=3)
    kept = [engine.last, engine.rows, engine.next, *states(engine.pool)]
    before = [(x.data_ptr(), x.shape) for x in kept]
    shapes = []
    step = engine.model.step
    engine.model.step = lambda tokens, pool, slots: (
        shapes.append((tokens.shape, slots.shape, slots.data_ptr())) or step(tokens, pool, slots)
    )
    for prompt in ([1, 2, 3], [4], [5, 6]):
        engine.submit(prompt, max_tokens=5)
        engine.step()
    engine.run()
    after = [engine.last, engine.rows, engine.next, *states(engine.pool)]
    assert [(x.data_ptr(), x.shape) for x in after] == before and len(set(shapes)) == 1


@pytest.mark.parametrize("name", SLOTTED)
def test_a_decoding_step_asks_the_device_for_nothing(name):
    """Tensors without numbers: what reads one on the way, as no CUDA graph may, fails."""
    engine = Engine(small(name).to("meta"), slots=3)
    with torch.inference_mode():
        engine.decode()
        with pytest.raises(RuntimeError, match="meta"):
            engine.next.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", SERVED)
def test_a_graph_decodes_the_same(name):
    lm, rng = small(name), random.Random(1)
    prompts = [[rng.randrange(64) for _ in range(rng.choice((1, 9, 61)))] for _ in range(9)]
    want = [lm.generate([prompt], max_tokens=20)[0] for prompt in prompts]
    engine = Engine(lm.cuda(), slots=4, prefill_tokens=24)
    come = []
    for prompt in prompts:
        come.append(engine.submit(prompt, max_tokens=20))
        engine.step()
    engine.run()
    assert [request.tokens for request in come] == want


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda e: e.submit([]), "the prompt must hold at least one token"),
        (
            lambda e: e.submit(torch.zeros(0, dtype=torch.int64)),
            "the prompt must hold at least one token",
        ),
        (
            lambda e: e.submit([1.7]),
            r"the prompt must be integers in a row, got shape \(1,\) and .*32",
        ),
        (lambda e: e.submit([True]), "the prompt must be integers in a row, got .* torch.bool"),
        (
            lambda e: e.submit([[1, 2]]),
            r"the prompt must be integers in a row, got shape \(1, 2\) .*",
        ),
        (lambda e: e.submit(5), r"the prompt must be integers in a row, got shape \(\) and .*"),
        (
            lambda e: e.submit("text"),
            r"the prompt must be integers in a row, got str; .*list\(b'text'\)",
        ),
        (lambda e: e.submit(b"text"), "the prompt must be integers in a row, got bytes; .*"),
        (lambda e: e.submit([1 << 70]), "the prompt must be integers in a row: .*"),
        (
            lambda e: e.submit(np.array([2**64 - 1], "uint64")),
            "the tokens of the prompt must be from 0 to 63",
        ),
        (lambda e: e.submit([64]), "the tokens of the prompt must be from 0 to 63"),
        (lambda e: e.submit([1], max_tokens=0), "max_tokens must be at least 1, got 0"),
        (lambda e: e.submit([1], max_tokens=1.5), "max_tokens must be an integer, got 1.5"),
        (lambda e: Engine(e.model, slots=2.0), "slots must be an integer, got 2.0"),
        (
            lambda e: e.submit([1] * 90, max_tokens=11),
            "the prompt and max_tokens must be at most 100 together, got 90 and 11",
        ),
        (lambda e: Engine(e.model, slots=0), "slots must be at least 1, got 0"),
        (lambda e: Engine(e.model, prefill_tokens=0), "prefill_tokens must be at least 1, got 0"),
    ],
)
def test_what_is_refused(call, sentence):
    engine = Engine(small("hgrn"), max_length=100)
    with pytest.raises(ValueError, match=f"^Engine: {sentence}$"):
        call(engine)
    assert not engine.busy


def test_states_that_do_not_fit_are_refused():
    lm = recurra.LM(LMConfig(d_model=16, n_layers=1, mixer=HGRNConfig()))
    with pytest.raises(ValueError, match="the state of a batch of 1000000000000 has .* GiB"):
        Engine(lm, slots=10**12)

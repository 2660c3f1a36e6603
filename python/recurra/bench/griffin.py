"""Griffin beside its matrix products, the bandwidth of memory, and transformers' RecurrentGemma."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import recurra
from recurra.bench import models
from recurra.bench.cases import BACKWARD, FORWARD, Built, Measured, case
from recurra.bench.timing import interleave
from recurra.lm import LMConfig
from recurra.nn import RGLRU, Attention, AttentionConfig, GLUConfig, RGLRUConfig

_CONFIG = LMConfig(
    vocab_size=32000,
    d_model=1024,
    n_layers=6,
    mixer=(RGLRUConfig(heads=8), AttentionConfig(heads=8)),
    pattern="RRA",
    ffn=GLUConfig(activation="gelu_tanh", bias=True),
    norm="gemma",
    norm_eps=1e-6,
    embed_scale=32.0,
    logits_soft_cap=30.0,
    residual_in_fp32=False,
)
_PROMPT = 2048
_BATCH, _LENGTH = 4, 512
_TOKENS = 16  # of a run of decoding
_ROUNDS = 5


def _products(
    model: recurra.LM, batch: int, length: int, last: int, backward: bool = False
) -> Callable[[], None]:
    """The matrix products of a model, by torch: of its blocks on ``batch`` texts of ``length``, of
    its head on ``last`` tokens."""
    rows = batch * length
    shapes = [(last, *model.lm_head.weight.shape[::-1])]
    for m in model.layers.modules():
        if isinstance(m, nn.Linear):
            shapes.append((rows, m.in_features, m.out_features))
        elif isinstance(m, RGLRU):
            heads, width, _ = m.recurrent_gate_weight.shape
            shapes += 2 * [(heads, rows, width, width)]
        elif isinstance(m, Attention):
            heads, block = m.config.heads, 128
            for end in range(block, length + 1, block):
                keys = min(end, m.config.window + block - 1)
                shapes += [(batch, heads * block, m.E, keys), (batch, heads * block, keys, m.E)]
    inputs = {s[:-1]: torch.randn(s[:-1]) for s in shapes}
    pairs = [(inputs[s[:-1]], torch.randn(*s[:-3], s[-1], s[-2]).mT) for s in shapes]

    def run() -> None:
        for a, b in pairs:
            c = a @ b
            if backward:
                c @ b.mT, a.mT @ c

    return run


def _ops(batch: int, length: int, kind: str) -> list[Built]:
    """The cases of the ops, one for each call."""
    D = _CONFIG.d_model
    ops = [
        case("linear_scan", (batch, length, D), kind).build(False),
        case("causal_conv1d", (batch, D, length), kind).build(False),
    ]
    return ops * sum(m.letter == "R" for m in _CONFIG.mixers())


def prefill(with_peers: bool) -> list[Measured]:
    """Reading a prompt of 2048 tokens; the logits of the last one."""
    model = recurra.LM(_CONFIG).eval()
    products = _products(model, 1, _PROMPT, 1)
    ops = _ops(1, _PROMPT, FORWARD)
    return models.read_prompt(
        model, _PROMPT, ops, with_peers, products=products, use_cache=False, rounds=_ROUNDS
    )


def train(with_peers: bool) -> list[Measured]:
    """A training step on 4 texts of 512 tokens."""
    model = recurra.LM(_CONFIG)
    tokens = torch.randint(0, _CONFIG.vocab_size, (_BATCH, _LENGTH + 1))
    products = _products(model, _BATCH, _LENGTH, _BATCH * _LENGTH, backward=True)
    runs = {
        "ours": models.training_step(model, lambda x: model(x)[0], tokens),
        "products": torch.no_grad()(products),
    }
    peer = models.transformers_model(model, torch.float32) if with_peers else ""
    if not isinstance(peer, str):
        with torch.no_grad():
            short = tokens[:, :32]
            models.check(model(short)[0], peer(short, use_cache=False).logits)
        runs["transformers"] = models.training_step(
            peer.train(), lambda x: peer(x, use_cache=False).logits, tokens
        )
    absent = peer if isinstance(peer, str) else ""
    return models.beside_products(
        runs, _ops(_BATCH, _LENGTH, BACKWARD), absent, with_peers, _ROUNDS
    )


def decode(with_peers: bool) -> list[Measured]:
    """One token after another, from past the window on."""
    model = recurra.LM(_CONFIG).eval()
    token = torch.tensor([11])
    state = model.initial_state(1)
    for part in state:
        part.seen.fill_(2 * _PROMPT)  # attention has all that it can see

    def ours() -> None:
        for _ in range(_TOKENS):
            model.step(token, state)

    runs = {"ours": ours}
    peer = models.transformers_model(model, torch.float32) if with_peers else ""
    if not isinstance(peer, str):
        runs["transformers"] = _decode_peer(peer, model)
    absent = peer if isinstance(peer, str) else ""
    probe = models.read_bandwidth()
    with torch.inference_mode():
        times, measured = interleave(runs, {"read": probe}, _ROUNDS)
    seconds = {name: t.median / _TOKENS for name, t in times.items()}
    size = 4 * _CONFIG.parameter_count()
    bound, rate = measured["read"] / size, 1 / seconds["ours"]
    out = Measured(
        rate / bound,
        "of weight bytes / read bandwidth",
        0.6,
        f"{rate:.1f} tokens/s of {bound:.1f}, {size / 1e6:.0f} MB at "
        f"{measured['read'] * 1e-9:.1f} GB/s",
        at_least=True,
    )
    return [out, *models.peer_row(seconds, absent, with_peers, None, "transformers")]


def _decode_peer(peer, model: recurra.LM) -> Callable[[], None]:
    """transformers' decoding after as many tokens as its window holds."""
    from transformers import DynamicCache

    prompt = torch.randint(0, _CONFIG.vocab_size, (1, _CONFIG.mixer[1].window + 1))
    token = prompt[:, -1:]
    with torch.inference_mode():
        cache = DynamicCache(config=peer.config)
        peer(prompt[:, :-1], cache=cache, use_cache=True, logits_to_keep=1)
        logits = peer(token, cache=cache, use_cache=True).logits
        models.check(model(prompt, last_only=True)[0], logits)

    def run() -> None:
        for _ in range(_TOKENS):
            peer(token, cache=cache, use_cache=True)

    return run


BUILDERS = {"prefill": prefill, "train": train, "decode": decode}

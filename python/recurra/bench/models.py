"""Whole models: a training step, reading a prompt, decoding, and the memory of a training step.

What a case is compared with runs in turn with it, in the same rounds: the parts that the time
should consist of, and transformers' model of the same configuration and weights where it is asked
for and installed.
"""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F

import recurra
from recurra.bench.cases import BACKWARD, FORWARD, Built, Measured, case
from recurra.bench.floors import module
from recurra.bench.timing import interleave
from recurra.lm import CONFIGS

_BATCH, _LENGTH = 4, 512
_PROMPT = 512
_TOKENS = 16  # of a run of decoding
_ROUNDS = 7


class _Identity:
    """The ops as if they cost nothing."""

    @staticmethod
    def causal_conv1d(x, weight, bias=None, h0=None, *, activation=None, cu_seqlens=None):
        return x, h0

    @staticmethod
    def selective_scan(u, *rest, delta_softplus=False, h0=None, cu_seqlens=None):
        return u, h0


def training_step(
    model: torch.nn.Module, logits: Callable, tokens: torch.Tensor
) -> Callable[[], None]:
    """Forward, backward and a step of the optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()

    def run() -> None:
        F.cross_entropy(logits(inputs).flatten(0, 1), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def check(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours.float() - theirs.float()).abs().max().item()
    size = theirs.abs().max().item()
    limit = 1e-4 if ours.dtype == torch.float32 else 0.1 * size
    # Not `error > limit`, which a NaN would pass.
    if not error <= limit:
        raise AssertionError(f"the logits are off by {error:.3g}, allowed are {limit:.3g}")


def transformers_model(model: recurra.LM, dtype: torch.dtype, **options):
    """transformers' model with the same weights, or why there is none."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def train(with_peers: bool) -> list[Measured]:
    """A training step of the tiny model."""
    config = CONFIGS["tiny"]
    model, bare = recurra.LM(config), recurra.LM(config)
    bare.use_ops(_Identity)
    tokens = torch.randint(0, config.vocab_size, (_BATCH, _LENGTH + 1))
    runs = {
        "ours": training_step(model, lambda x: model(x)[0], tokens),
        "identity": training_step(bare, lambda x: bare(x)[0], tokens),
    }
    D, _ = config.mixer.sizes(config.d_model)
    shape = (_BATCH, D, _LENGTH)
    for op, sizes in (("selective_scan", (*shape, config.mixer.d_state)), ("causal_conv1d", shape)):
        built = case(op, sizes, BACKWARD).build(False)
        built.verify()
        runs[op] = built.runs["recurra"]
    absent = ""
    if with_peers:
        peer = transformers_model(model, torch.float32, use_mambapy=True)
        if isinstance(peer, str):
            absent = peer
        elif importlib.util.find_spec("mambapy") is None:
            absent = "mambapy is not installed, without which transformers' loop is far slower"
        else:
            with torch.no_grad():
                check(model(tokens[:, :64])[0], peer(tokens[:, :64]).logits)
            runs["transformers"] = training_step(peer.train(), lambda x: peer(x).logits, tokens)
    times, _ = interleave(runs, {}, _ROUNDS)
    seconds = {name: t.median for name, t in times.items()}
    ops = config.n_layers * (seconds["selective_scan"] + seconds["causal_conv1d"])
    allowed = 1.5 * seconds["identity"] + ops
    rate = _BATCH * _LENGTH / seconds["ours"]
    out = [
        Measured(
            seconds["ours"] / allowed,
            "x (1.5 x the model with its ops as identity + the ops' own times)",
            1.0,
            f"{1e3 * seconds['ours']:.0f} ms, {rate:,.0f} tokens/s; identity "
            f"{1e3 * seconds['identity']:.0f} ms, ops {1e3 * ops:.0f} ms",
        )
    ]
    return out + peer_row(seconds, absent, with_peers, 10.0, "transformers with mambapy")


def peer_row(
    seconds: dict, absent: str, asked: bool, limit: float | None, name: str
) -> list[Measured]:
    if absent:
        return [Measured(float("nan"), f"x the tokens/s of {name}", None, absent)]
    if not asked:
        return []
    text = f"{1e3 * seconds['transformers']:.0f} ms"
    ratio = seconds["transformers"] / seconds["ours"]
    return [Measured(ratio, f"x the tokens/s of {name}", limit, text, at_least=True)]


def beside_products(
    runs: dict[str, Callable],
    ops: list[Built],
    absent: str,
    with_peers: bool,
    rounds: int = _ROUNDS,
) -> list[Measured]:
    """Times a model, ``runs["ours"]``, beside its matrix products, the floors of its ops, one for
    each call, and transformers, which is among the runs or ``absent`` for a reason."""
    probes = {k: v for b in ops for k, v in b.floor.probes().items()}
    times, measured = interleave(runs, probes, rounds)
    seconds = {name: t.median for name, t in times.items()}
    floors = sum(b.floor.seconds(measured) for b in ops)
    allowed = 1.25 * seconds["products"] + 1.5 * floors
    out = Measured(
        seconds["ours"] / allowed,
        "x (1.25 x the matrix products alone + 1.5 x the floors of the ops)",
        1.0,
        f"{1e3 * seconds['ours']:.0f} ms; products {1e3 * seconds['products']:.0f} ms, floors "
        f"{1e3 * floors:.0f} ms",
    )
    return [out, *peer_row(seconds, absent, with_peers, None, "transformers")]


def _products(model: recurra.LM, rows: int, last: int) -> Callable[[], None]:
    """The matrix products of a model, by torch: of its blocks on ``rows`` tokens, of its head on
    ``last``."""
    layers = [m for m in model.layers.modules() if isinstance(m, torch.nn.Linear)]
    weights = [torch.randn(m.out_features, m.in_features) for m in layers]
    inputs = {m.in_features: torch.randn(rows, m.in_features) for m in layers}
    x, head = torch.randn(last, model.config.d_model), torch.randn(model.lm_head.weight.shape)

    def run() -> None:
        for w in weights:
            F.linear(inputs[w.shape[1]], w)
        F.linear(x, head)

    return run


def read_prompt(
    model: recurra.LM,
    length: int,
    ops: list[Built],
    with_peers: bool,
    *,
    products: Callable[[], None] | None = None,
    use_cache: bool = True,
    rounds: int = _ROUNDS,
) -> list[Measured]:
    """Reading a prompt of one text; the logits of the last token.

    Args:
        model: the model.
        length: tokens of the prompt.
        ops: the cases of its ops, one for each call.
        with_peers: whether to compare with transformers' model of the same weights.
        products: the model's matrix products; those of its linear layers when None.
        use_cache: whether transformers' model keeps a state.
        rounds: how often each is timed.
    """
    tokens = torch.randint(0, model.config.vocab_size, (1, length))
    runs = {
        "ours": lambda: model(tokens, last_only=True),
        "products": products or _products(model, length, 1),
    }
    peer = transformers_model(model, torch.float32) if with_peers else ""
    with torch.inference_mode():
        if not isinstance(peer, str):
            runs["transformers"] = lambda: peer(tokens, logits_to_keep=1, use_cache=use_cache)
            check(runs["ours"]()[0], runs["transformers"]().logits)
        absent = peer if isinstance(peer, str) else ""
        return beside_products(runs, ops, absent, with_peers, rounds)


def prefill(with_peers: bool) -> list[Measured]:
    """Reading a prompt of 512 tokens; the logits of the last one."""
    config = CONFIGS["mamba-130m"]
    D, _ = config.mixer.sizes(config.d_model)
    shape = (1, D, _PROMPT)
    ops: list[Built] = [
        case("selective_scan", (*shape, config.mixer.d_state), FORWARD).build(False),
        case("causal_conv1d", shape, FORWARD).build(False),
    ]
    return read_prompt(recurra.LM(config).eval(), _PROMPT, ops * config.n_layers, with_peers)


def rwkv4_prefill(with_peers: bool) -> list[Measured]:
    """Reading a prompt of 2048 tokens with RWKV-4; the logits of the last one."""
    config, length = CONFIGS["rwkv4-169m"], 2048
    model = recurra.LM(config).eval()
    with torch.no_grad():  # most projections begin at zero
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    N = config.mixer.channels(config.d_model)
    ops: list[Built] = [case("softmax_scan", (1, length, N), FORWARD).build(False)]
    return read_prompt(model, length, ops * config.n_layers, with_peers)


def read_bandwidth() -> Callable[[], float]:
    """A probe of the bytes per second that can be read."""
    native = module()
    arrays = [torch.ones(32 << 20).numpy() for _ in range(3)]
    return lambda: 4 * arrays[0].size / native.stream("read", *arrays)


def decode(with_peers: bool) -> list[Measured]:
    """One token after another."""
    config = CONFIGS["mamba-130m"]
    model = recurra.LM(config).eval()
    half = recurra.LM(config).eval()
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    token = torch.tensor([11])

    def decoder(lm: recurra.LM) -> Callable[[], None]:
        state = lm.initial_state(1)

        def run() -> None:
            for _ in range(_TOKENS):
                lm.step(token, state)

        return run

    runs = {"ours": decoder(model), "bf16": decoder(half)}
    absent = ""
    if with_peers:
        for name, lm in (("transformers", model), ("transformers bf16", half)):
            peer = transformers_model(lm, next(lm.parameters()).dtype)
            if isinstance(peer, str):
                absent = peer
                break
            runs[name] = _decode_peer(peer, lm, token)
    probes = {"read": read_bandwidth()}
    with torch.inference_mode():
        times, measured = interleave(runs, probes, _ROUNDS)
    seconds = {name: t.median / _TOKENS for name, t in times.items()}
    size = 4 * config.parameter_count()
    bound = measured["read"] / size
    rate, rate16 = 1 / seconds["ours"], 1 / seconds["bf16"]
    out = [
        Measured(
            rate / bound,
            "of weight bytes / read bandwidth",
            0.6,
            f"{rate:.1f} tokens/s of {bound:.1f}, {size / 1e6:.0f} MB at "
            f"{measured['read'] * 1e-9:.1f} GB/s",
            at_least=True,
        ),
        Measured(
            rate16 / rate,
            "x the float32 rate in bfloat16",
            1.6,
            f"{rate16:.1f} tokens/s, {rate16 / (2 * bound):.0%} of its bound",
            at_least=True,
        ),
    ]
    out += peer_row(seconds, absent, with_peers, 1.15, "transformers")
    if "transformers bf16" in seconds:
        ratio = seconds["transformers bf16"] / seconds["bf16"]
        text = f"{1e3 * seconds['transformers bf16']:.0f} ms"
        out.append(
            Measured(ratio, "x the tokens/s of transformers in bfloat16", 1.15, text, at_least=True)
        )
    return out


def _decode_peer(peer, ours: recurra.LM, token: torch.Tensor) -> Callable[[], None]:
    with torch.inference_mode():
        first = peer(token[None], use_cache=True)
        check(ours.step(token, ours.initial_state(1)), first.logits[0])
    cache = first.cache_params

    def run() -> None:
        for _ in range(_TOKENS):
            peer(token[None], cache_params=cache, use_cache=True)

    return run


def memory(with_peers: bool) -> list[Measured]:
    """The peak of a training step of the tiny model, in a process of its own."""
    command = [sys.executable, "-m", "recurra.bench.memory", "lm", str(_BATCH), str(_LENGTH)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"the memory measurement failed: {out.stderr.strip()[-500:]}")
    taken = int(out.stdout)
    config = CONFIGS["tiny"]
    D, rank = config.mixer.sizes(config.d_model)
    width = config.d_model
    # What goes into the matrix products and what comes out of them.
    block = (width + 2 * D) + (D + rank + 2 * config.mixer.d_state) + (rank + D) + (D + width)
    activations = config.n_layers * block + width + config.vocab_size
    kept = 4 * config.parameter_count()  # numbers: parameters, gradients, two moments
    least = 4 * (kept + _BATCH * _LENGTH * activations)
    mebi = 1 / 2**20
    text = f"{taken * mebi:.0f} MiB at the peak, {least * mebi:.0f} MiB of those"
    what = "x (parameters, gradients, optimizer, activations of the matrix products)"
    return [Measured(taken / least, what, 1.3, text)]


BUILDERS = {"train": train, "prefill": prefill, "decode": decode, "memory": memory}
RWKV4_BUILDERS = {"prefill": rwkv4_prefill}

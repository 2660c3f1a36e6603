"""transformers' models as they come, with what ``recurra.install()`` puts under them, and without.

Every pair has the same weights and runs in turn in the same rounds. What a model costs above
itself with recurrence and convolution as identity is what kernels can change.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from recurra.bench.cases import Measured
from recurra.bench.models import training_step
from recurra.bench.timing import interleave

_ROUNDS = 7
_DECODE_ROUNDS = 15
_TOKENS = 16  # of a run of decoding


class _Shape(NamedTuple):
    family: str
    model: str
    config: dict


MAMBA = _Shape(
    "mamba",
    "MambaForCausalLM",
    {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280},
)
_WIDE = {"hidden_size": 1024, "vocab_size": 32000, "pad_token_id": 0, "num_hidden_layers": 8}
JAMBA = _Shape(
    "jamba",
    "JambaForCausalLM",
    {"intermediate_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 4}
    | {"mamba_dt_rank": 64, "num_experts": 2}
    | _WIDE,
)
FALCON = _Shape("falcon_mamba", "FalconMambaForCausalLM", _WIDE)
GEMMA = _Shape(
    "recurrent_gemma",
    "RecurrentGemmaForCausalLM",
    {"intermediate_size": 6144, "lru_width": 1024, "num_attention_heads": 4}
    | {"num_key_value_heads": 1, "head_dim": 256}
    | (_WIDE | {"num_hidden_layers": 6}),
)
RWKV = _Shape("rwkv", "RwkvForCausalLM", _WIDE | {"context_length": 2048})


class _Modes:
    """Switches a modelling file between its own functions, recurra's and none."""

    def __init__(self, shape: _Shape):
        import transformers

        from recurra.compat import _hooks, _recurrences, _transformers

        transformers.utils.logging.set_verbosity_error()
        name = f"transformers.models.{shape.family}.modeling_{shape.family}"
        self.module = importlib.import_module(name)
        ours = _hooks.BY_NAME
        self._hooks = [h for h in _transformers.hooks(self.module) if h.func_name in ours]
        self._recurrences = [r for r in _recurrences.ALL if r.module == name]
        self._ours = {
            h.func_name: ours[h.func_name](h.torch_function, h.torch_function) for h in self._hooks
        }

    @contextlib.contextmanager
    def __call__(self, mode: str):
        undo = []
        for hook in self._hooks:
            function = {"torch": hook.torch_function, "identity": _IDENTITY[hook.func_name]}
            hook.use(function.get(mode, self._ours[hook.func_name]))
        for recurrence in self._recurrences:
            if mode == "recurra":
                undo.append(recurrence.patch(self.module))
            elif mode == "identity" and recurrence.name in _IDENTITY:
                identity = recurrence._replace(make=lambda _, name=recurrence.name: _IDENTITY[name])
                undo.append(identity.patch(self.module))
        try:
            yield
        finally:
            for hook in self._hooks:
                hook.use(hook.torch_function)
            for put_back in undo:
                put_back()


def _no_scan(hidden_states, dt, A, B, C, D=None, z=None, return_last_state=False):
    last = hidden_states.new_zeros(hidden_states.shape[0], *A.shape)
    return (hidden_states, last) if return_last_state else hidden_states


_IDENTITY: dict[str, Callable] = {
    "causal_conv1d_fn": lambda hidden_states, *rest: hidden_states,
    "causal_conv1d_update": lambda hidden_states, *rest: hidden_states,
    "mamba_inner_fn": lambda *args: None,
    "selective_scan_fn": _no_scan,
    "selective_state_update": lambda state, hidden_states, *rest: hidden_states,
    "RecurrentGemmaRglru._rnn_scan": lambda self, hidden_states, **rest: (
        hidden_states,
        hidden_states[:, -1].float(),
    ),
    "rwkv_linear_attention_cpu": lambda decay, first, key, value, state=None, **rest: (
        value,
        state,
    ),
}


def _build(shape: _Shape, modes: _Modes, **options) -> nn.Module:
    cls = getattr(modes.module, shape.model)
    torch.manual_seed(0)
    return cls(cls.config_class(**(shape.config | options))).eval()


def _without_convolution(model: nn.Module) -> nn.Module:
    """RecurrentGemma's convolution is a module, not a hook."""
    bare = copy.deepcopy(model)
    for module in bare.modules():
        if hasattr(module, "conv_1d"):
            module.conv_1d = nn.Identity()
    return bare


def _variants(shape: _Shape, modes: _Modes) -> dict[str, tuple[str, nn.Module]]:
    """Name: mode and model. All share their weights but the one without the convolution."""
    model = _build(shape, modes)
    found = {
        "recurra": ("recurra", model),
        "identity": ("identity", _without_convolution(model)),
        "torch": ("torch", model),
    }
    if hasattr(model.config, "use_mambapy") and importlib.util.find_spec("mambapy") is not None:
        other = _build(shape, modes, use_mambapy=True)
        other.load_state_dict(model.state_dict())
        found["torch with mambapy"] = ("torch", other)
    return found


def _above_products(shape: _Shape, length: int, limit: float, train: bool) -> list[Measured]:
    modes = _Modes(shape)
    variants = _variants(shape, modes)
    tokens = torch.randint(1, shape.config["vocab_size"], (1, length + train))

    def run(mode: str, model: nn.Module) -> Callable[[], object]:
        if train:
            model.train()
            step = training_step(
                model, lambda x: model(input_ids=x, use_cache=False).logits, tokens
            )
        else:

            def step():
                with torch.inference_mode():
                    return model(input_ids=tokens, use_cache=True, **_last(model)).logits

        def timed():
            with modes(mode):
                return step()

        return timed

    with torch.no_grad():
        short = tokens[:, :64]
        logits = []
        for mode in ("recurra", "torch"):
            with modes(mode):
                logits.append(variants["recurra"][1](input_ids=short).logits)
        error = (logits[0] - logits[1]).abs().max().item()
        if not error <= 1e-3 * logits[1].abs().max().item():
            raise AssertionError(f"the logits are off by {error:.3g}")
    runs = {name: run(*variant) for name, variant in variants.items()}
    once = {name: _seconds(r) for name, r in runs.items() if name not in ("recurra", "identity")}
    best = min(once, key=once.get)
    times, _ = interleave({k: runs[k] for k in ("recurra", "identity", best)}, {}, _ROUNDS)
    ours, identity, theirs = (times[k].median for k in ("recurra", "identity", best))
    text = (
        f"{best} {1e3 * theirs:.0f} ms, recurra {1e3 * ours:.0f} ms, identity "
        f"{1e3 * identity:.0f} ms; whole ratio {theirs / ours:.2f}"
    )
    for name in once.keys() - {best}:
        text += f"; {name}, timed once, {1e3 * once[name]:.0f} ms"
    # What is left may be too little to tell from noise: 1 % of the time is counted at least.
    ratio = (theirs - identity) / max(ours - identity, 0.01 * identity)
    unit = "x less time above the model without recurrence and convolution"
    return [Measured(ratio, unit, limit, text, at_least=True)]


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _last(model: nn.Module) -> dict[str, int]:
    """Only the last logits, where the model can leave the others out."""
    parameters = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}


def _decode(shape: _Shape, limit: float) -> list[Measured]:
    modes = _Modes(shape)
    model = _build(shape, modes)
    tokens = torch.randint(1, shape.config["vocab_size"], (1, 32))

    def run(mode: str) -> Callable[[], object]:
        def generate():
            with modes(mode), torch.inference_mode():
                model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=_TOKENS,
                    min_new_tokens=_TOKENS,
                    do_sample=False,
                    pad_token_id=0,
                )

        return generate

    def prompt(mode: str) -> Callable[[], object]:
        def read():
            with modes(mode), torch.inference_mode():
                model(input_ids=tokens, use_cache=True, **_last(model))

        return read

    runs = {m: run(m) for m in ("recurra", "torch")}
    runs |= {f"{m} prompt": prompt(m) for m in ("recurra", "torch")}
    times, _ = interleave(runs, {}, _DECODE_ROUNDS)
    seconds = {
        m: [
            (whole - read) / (_TOKENS - 1)
            for whole, read in zip(times[m].runs, times[f"{m} prompt"].runs, strict=True)
        ]
        for m in ("recurra", "torch")
    }
    theirs, ours = (1e3 * statistics.median(seconds[m]) for m in ("torch", "recurra"))
    text = f"{theirs:.1f} ms a token, recurra {ours:.1f} ms"
    # Of the same round, so that a machine that is slow for a while is slow for both.
    ratio = statistics.median(
        a / b for a, b in zip(seconds["torch"], seconds["recurra"], strict=True)
    )
    return [Measured(ratio, "x the tokens/s while decoding", limit, text, at_least=True)]


def _install() -> list[Measured]:
    """In new processes, with transformers imported, and with the file of a model."""
    out = []
    for setup in ("import transformers", "import transformers.models.mamba.modeling_mamba"):
        code = (
            f"{setup}, recurra; from time import perf_counter as now; start = now(); "
            "recurra.install(); print(now() - start)"
        )
        runs = [
            float(
                subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
            )
            for _ in range(5)
        ]
        text = f"after {setup}"
        out.append(Measured(1e3 * statistics.median(runs), "ms for install()", 50.0, text))
    return out


def _builder(measure: Callable[..., list[Measured]], *args) -> Callable[[bool], list[Measured]]:
    def build(with_peers: bool) -> list[Measured]:
        if not with_peers:
            return [Measured(float("nan"), "x", None, "--peers compares with transformers")]
        if importlib.util.find_spec("transformers") is None:
            return [Measured(float("nan"), "x", None, "transformers is not installed")]
        return measure(*args)

    return build


BUILDERS = {
    "install": _builder(_install),
    "mamba-train-512": _builder(_above_products, MAMBA, 512, 10.0, True),
    "mamba-prefill-1024": _builder(_above_products, MAMBA, 1024, 10.0, False),
    "jamba-prefill-1024": _builder(_above_products, JAMBA, 1024, 8.0, False),
    "falcon_mamba-prefill-1024": _builder(_above_products, FALCON, 1024, 8.0, False),
    "recurrent_gemma-prefill-2048": _builder(_above_products, GEMMA, 2048, 10.0, False),
    "recurrent_gemma-train-512": _builder(_above_products, GEMMA, 512, 10.0, True),
    "rwkv-prefill-1024": _builder(_above_products, RWKV, 1024, None, False),
    "mamba-decode": _builder(_decode, MAMBA, 1.15),
    "jamba-decode": _builder(_decode, JAMBA, 1.0),
    "falcon_mamba-decode": _builder(_decode, FALCON, 1.0),
    "recurrent_gemma-decode": _builder(_decode, GEMMA, 1.0),
    "rwkv-decode": _builder(_decode, RWKV, 1.0),
}

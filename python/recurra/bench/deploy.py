"""Models outside of a training process: many requests together, and in onnxruntime."""

from __future__ import annotations

import functools
import random
import time

import torch

import recurra
from recurra.bench.problems import Measured
from recurra.bench.timing import interleave

_ROUNDS = 5
_PROMPTS = (16, 256)  # shortest and longest
_LENGTH = 512  # of a prompt in onnxruntime
_TOKENS = 16  # of a run of decoding there


def _served(name: str, requests: int, tokens: int, slots: int, with_peers: bool) -> list[Measured]:
    """Requests that come at once, through :class:`recurra.lm.serving.Engine` and one by one."""
    from recurra.lm.serving import Engine

    torch.manual_seed(0)
    lm, rng = recurra.LM(name).eval(), random.Random(0)
    vocab = lm.config.vocab_size
    prompts = [
        [rng.randrange(vocab) for _ in range(rng.randint(*_PROMPTS))] for _ in range(requests)
    ]
    engine = Engine(lm, slots=slots)
    waits: list[float] = []

    def together() -> None:
        start = time.perf_counter()
        given = [engine.submit(prompt, max_tokens=tokens) for prompt in prompts]
        first: dict[int, float] = {}
        while engine.busy:
            for request in engine.step():
                first.setdefault(id(request), time.perf_counter() - start)
        waits.append(sum(first.values()) / len(given))

    def alone() -> None:
        for prompt in prompts:
            lm.generate([prompt], max_tokens=tokens, stop_tokens=())

    times, _ = interleave({"together": together, "alone": alone}, {}, _ROUNDS)
    written = requests * tokens
    rates = {key: written / timing.median for key, timing in times.items()}
    return [
        Measured(
            rates["together"] / rates["alone"],
            "x the tokens/s of one request at a time",
            None,
            f"{rates['together']:.0f} and {rates['alone']:.0f} tokens/s; {requests} prompts of "
            f"{_PROMPTS[0]} to {_PROMPTS[1]} tokens, {tokens} new ones each, {slots} slots, first "
            f"token after {sorted(waits)[len(waits) // 2]:.2f} s on average",
            at_least=True,
        )
    ]


def _onnx(length: int, calls: int, with_peers: bool) -> list[Measured]:
    """The model ``tiny`` in onnxruntime, with a node an op and with standard operators alone."""
    try:
        import onnxruntime

        import recurra.onnx
    except ImportError as error:
        return [Measured(float("nan"), "x the time in torch", None, str(error))]
    torch.manual_seed(0)
    lm = recurra.LM("tiny").eval()
    tokens = torch.randint(0, lm.config.vocab_size, (1, length))
    state = lm.initial_state(1)
    carried = [x for part in state for x in part]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    runs = {}
    with torch.no_grad():
        want = lm(tokens, state)[0]
    for name, expand in (("functions", False), ("standard operators", True)):
        model = recurra.onnx.export_lm(lm, expand=expand, verbose=False).model_proto
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        names = [x.name for x in session.get_inputs()]
        given = dict(zip(names, [tokens.numpy(), *(x.numpy() for x in carried)], strict=True))
        got = torch.from_numpy(session.run(["logits"], given)[0])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        runs[name] = functools.partial(_repeat, calls, lambda s=session, g=given: s.run(None, g))
    step = (lambda: lm.step(tokens[:, 0], state)) if length == 1 else lambda: lm(tokens, state)
    runs["torch"] = torch.inference_mode()(functools.partial(_repeat, calls, step))
    times, _ = interleave(runs, {}, _ROUNDS)
    seconds = {name: timing.median / calls for name, timing in times.items()}
    return [
        Measured(
            seconds[name] / seconds["torch"],
            f"x the time in torch, {name}",
            None,
            f"{1e3 * seconds[name]:.2f} and {1e3 * seconds['torch']:.2f} ms, T = {length}",
        )
        for name in ("functions", "standard operators")
    ]


def _repeat(calls: int, run) -> None:
    for _ in range(calls):
        run()


SERVING_BUILDERS = {
    "tiny": functools.partial(_served, "tiny", 16, 32, 16),
    "mamba-130m": functools.partial(_served, "mamba-130m", 8, 16, 8),
}
ONNX_BUILDERS = {
    "prefill": functools.partial(_onnx, _LENGTH, 1),
    "decode": functools.partial(_onnx, 1, _TOKENS),
}

"""Models of equal size that train for equal time: what ``recurra compare`` runs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from recurra.lm import CONFIGS, LM, LMConfig, gemma_scale
from recurra.lm.config import _machine_memory
from recurra.train.data import Corpus
from recurra.train.options import TrainOptions
from recurra.train.trainer import NonFiniteLoss, Trainer

# The configuration "tiny" is that of its mixer.
ALIASES = {"mamba": "tiny"}
# A model may be so much larger or smaller than it was to be.
_TOLERANCE = 0.15
# Widths that are tried are multiples of this.
_WIDTH = 8
# A width beyond this is not tried.
_WIDEST = 1 << 16
_BYTES = 256  # in the vocabulary
# Of weight, gradient and the two moments of AdamW.
_BYTES_PER_PARAMETER = 16
_VALIDATIONS = 8
_DECODED = 512  # tokens at most, of at least _DECODED_LEAST
_DECODED_LEAST = 16
_DECODE_SECONDS = 2.0


@dataclasses.dataclass
class Result:
    """What became of one model.

    Attributes:
        name: that it was asked for by.
        parameters: numbers in it.
        d_model, n_layers: its sizes.
        steps: of the optimizer that the time sufficed for.
        bits_per_byte: on the held-out text in the end; NaN where training diverged.
        train_tokens_per_second: in training, validations not counted.
        decode_tokens_per_second: one sequence, one token after another.
        state_bytes: what one sequence's state takes.
        curve: pairs of seconds of training and bits per byte.
    """

    name: str
    parameters: int
    d_model: int
    n_layers: int
    steps: int
    bits_per_byte: float
    train_tokens_per_second: float
    decode_tokens_per_second: float
    state_bytes: int
    curve: list[tuple[float, float]]


def default_names() -> list[str]:
    """The first configuration of bytes for each kind of mixer, or mixture of them."""
    first: dict[tuple, str] = {}
    for name, config in CONFIGS.items():
        if config.vocab_size == 256:
            first.setdefault(tuple(sorted({m.kind for m in config.mixers()})), name)
    spoken = {name: alias for alias, name in ALIASES.items()}
    return [spoken.get(name, name) for name in first.values()]


def sized(name: str, parameters: int) -> LMConfig:
    """A named configuration over bytes, of the width that brings it closest to a size.

    Raises:
        ValueError: the name is unknown, the machine too small, or no width comes close.
    """
    known = CONFIGS.get(ALIASES.get(name, name))
    if known is None:
        raise ValueError(f"unknown mixer {name}; known are {', '.join([*ALIASES, *CONFIGS])}")
    needed, there = _BYTES_PER_PARAMETER * parameters, _machine_memory()
    if needed > there:
        raise ValueError(
            f"{name} with --parameters {parameters:.4g} needs {needed / 2**30:.4g} GiB of memory "
            f"to train, this machine has {there / 2**30:.4g} GiB"
        )
    scaled = known.embed_scale == gemma_scale(known.d_model)
    tried: list[tuple[int, LMConfig]] = []
    # The embedding alone ends the search, but heads or blocks may divide only a larger width.
    for width in range(_WIDTH, min(_WIDEST, parameters // _BYTES + 1024), _WIDTH):
        config = dataclasses.replace(
            known,
            vocab_size=_BYTES,
            d_model=width,
            embed_scale=gemma_scale(width) if scaled else known.embed_scale,
            eos_token_ids=(),
        )
        try:
            tried.append((config.parameter_count(), config))
        except ValueError:  # heads or blocks do not divide it
            continue
        if tried[-1][0] >= parameters:
            break
    if not tried:
        raise ValueError(f"{name} cannot have about {parameters:,} parameters: no width fits it")
    count, config = min(tried, key=lambda pair: abs(pair[0] - parameters))
    if abs(count - parameters) > _TOLERANCE * parameters:
        raise ValueError(
            f"{name} cannot have about {parameters:,} parameters; the closest is {count:,}"
        )
    return config


def train(
    name: str,
    config: LMConfig,
    options: TrainOptions,
    corpus: Corpus,
    seconds: float,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Trains a model for so many seconds, then measures it.

    Args:
        name: of the result.
        config: of the model.
        options: how it is trained; ``steps`` and ``warmup`` follow from the time.
        corpus: what it is trained on.
        seconds: of training steps; those of validations are not counted.
        say: is told what is going on.
    """
    # The first step finds cold memory and sleeping threads, which is not the model's fault. Nothing
    # of it stays: two models and their optimizers may be more than there is memory.
    with contextlib.suppress(NonFiniteLoss):  # comes again
        Trainer(config, options, corpus).train_step()
    trainer = Trainer(config, options, corpus)
    spent, due = 0.0, 1
    curve: list[tuple[float, float]] = []
    try:
        while spent < seconds:
            begin = time.perf_counter()
            trainer.train_step()
            spent += time.perf_counter() - begin
            # The learning rate falls to its last value as the time runs out.
            steps = max(trainer.step + 1, round(trainer.step * seconds / spent))
            trainer.options = dataclasses.replace(
                options, steps=steps, warmup=min(options.warmup, steps // 10)
            )
            if spent >= due * seconds / _VALIDATIONS:
                due = int(_VALIDATIONS * spent / seconds) + 1
                curve.append((spent, trainer.validate()))
                say(f"{name}: {curve[-1][1]:.3f} bits per byte after {spent:.3g} s")
    except NonFiniteLoss as error:
        say(f"{name}: {error}")
        curve.append((max(spent, 1e-9), math.nan))
    rate, state_bytes = _decode(trainer.model, corpus)
    return Result(
        name,
        config.parameter_count(),
        config.d_model,
        config.n_layers,
        trainer.step,
        curve[-1][1],
        trainer.step * options.batch * options.length / curve[-1][0],
        rate,
        state_bytes,
        curve,
    )


def _decode(model: LM, corpus: Corpus) -> tuple[float, int]:
    """Tokens per second of one sequence, and the bytes of its state."""
    model.eval()
    state = model.initial_state(1)
    text = torch.from_numpy(corpus.valid.read(0, min(_DECODED, len(corpus.valid))))
    times = []
    begin = time.perf_counter()
    for n in range(_DECODED):
        start = time.perf_counter()
        if n >= _DECODED_LEAST and start - begin > _DECODE_SECONDS:
            break
        model.step(text[n % len(text), None], state)
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times), sum(x.nbytes for part in state for x in part)


def table(results: Sequence[Result], failed: Mapping[str, str] | None = None) -> str:
    """The results, the best first, and below them what failed.

    Args:
        results: of the models that were trained.
        failed: a sentence by the name of a model.
    """
    failed = failed or {}
    head = ("model", "bits/byte", "train tokens/s", "decode tokens/s", "state bytes")
    rows = [(*head, "parameters", "width", "steps")]
    for r in ranked(results):
        rows.append(
            (
                r.name,
                "diverged" if math.isnan(r.bits_per_byte) else f"{r.bits_per_byte:.3f}",
                f"{r.train_tokens_per_second:,.0f}",
                f"{r.decode_tokens_per_second:,.0f}",
                f"{r.state_bytes:,}",
                f"{r.parameters:,}",
                str(r.d_model),
                str(r.steps),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(widths[0], *map(len, failed), 0)
    lines = []
    for name, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join((name.ljust(widths[0]), *cells)))
    lines += [f"{name.ljust(widths[0])}  failed: {sentence}" for name, sentence in failed.items()]
    return "\n".join(lines)


def ranked(results: Sequence[Result]) -> list[Result]:
    """Fewest bits per byte first, what diverged last."""
    return sorted(results, key=lambda r: (math.isnan(r.bits_per_byte), r.bits_per_byte))


def fill(axes: list, results: Sequence[Result]) -> None:
    """Draws bits per byte over the time of training, and over the speed of decoding."""
    over_time, over_speed = axes
    markers = "osD^v<>pPX*h"
    for n, r in enumerate(ranked(results)):
        # Ten colours come again with other markers.
        look = {"color": f"C{n % 10}", "marker": markers[n % len(markers)], "markersize": 4}
        over_time.plot(*zip(*r.curve, strict=True), label=r.name, **look)
        look["markersize"] = 7
        over_speed.plot(r.decode_tokens_per_second, r.bits_per_byte, **look)
        if not math.isnan(r.bits_per_byte):
            place = r.decode_tokens_per_second, r.bits_per_byte
            over_speed.annotate(r.name, place, (6, 4), textcoords="offset points", fontsize=8)
    over_time.set_xlabel("seconds of training")
    over_time.set_ylabel("bits per byte, held-out text")
    over_time.legend(fontsize=8)
    over_speed.set_xlabel("tokens/s of decoding, one sequence")
    over_speed.set_ylabel("bits per byte in the end")
    over_speed.margins(0.15)
    over_speed.set_xlim(left=0)

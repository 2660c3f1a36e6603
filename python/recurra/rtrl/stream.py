"""``recurra train --online``: one pass over bytes, each predicted before it is learned from."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recurra import _files
from recurra._files import CheckpointError
from recurra.rtrl.layer import Layer
from recurra.rtrl.learner import ABOUT, OnlineLearner, find
from recurra.train.options import TrainOptions

FOLDER = "online"  # of a run: its checkpoints
_VALUES = 256
_SAY = 2.0  # seconds between two lines


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """How a byte stream is learned.

    Attributes:
        cell: of the layers.
        channels: of each.
        layers: how many; more than one is exact for the top one alone.
        batch: parts that the bytes are cut into, read side by side.
        length: bytes of a chunk: what is read between two updates.
        lr: learning rate of Adam.
        clip: largest norm of the gradient, 0 for none.
        seed: of the parameters.
        save_every: chunks between two checkpoints.
        keep: checkpoints that stay.

    Raises:
        ValueError: a number is out of range.
    """

    cell: str = "elstm"
    channels: int = 256
    layers: int = 1
    batch: int = 16
    length: int = 32
    lr: float = 3e-3
    clip: float = 1.0
    seed: int = 0
    save_every: int = 2000
    keep: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = (int, float) if isinstance(field.default, float) else type(field.default)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{field.name} must be a {type(field.default).__name__}")
        for name in ("channels", "layers", "batch", "length", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.clip < math.inf:
            raise ValueError(f"clip must not be negative, got {self.clip}")


def make(options: StreamOptions) -> OnlineLearner:
    """The learner of a byte stream: one-hot bytes, the layers, a linear readout."""
    torch.manual_seed(options.seed)
    layers, inputs = [], _VALUES
    for _ in range(options.layers):
        layers.append(Layer(inputs, options.channels, options.cell))
        inputs = layers[-1].out_features
    return OnlineLearner(
        layers,
        nn.Linear(inputs, _VALUES),
        _nats,
        lambda parameters: torch.optim.Adam(parameters, lr=options.lr),
        clip=options.clip or None,
    )


def _nats(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


class Parts:
    """A text cut into ``batch`` parts that are read side by side, ``length`` bytes at a time."""

    def __init__(self, text: Any, batch: int, length: int):
        self._text, self._batch, self._length = text, batch, length
        self._stride = len(text) // batch
        self.chunks = (self._stride - 1) // length
        if self.chunks < 1:
            raise ValueError(
                f"the text has {len(text)} bytes, {batch} parts of it in chunks of {length} need "
                f"at least {batch * (length + 1)}"
            )

    def get(self, chunk: int) -> tuple[Tensor, Tensor]:
        """One-hot bytes (B, T, 256), and the bytes that follow them (B, T)."""
        at, count = chunk * self._length, self._length + 1
        rows = [self._text.read(row * self._stride + at, count) for row in range(self._batch)]
        both = torch.stack([torch.from_numpy(row) for row in rows])
        return nn.functional.one_hot(both[:, :-1], _VALUES).float(), both[:, 1:]


def saved(folder: Path) -> tuple[StreamOptions, list[str]] | None:
    """The options and the data of the newest checkpoint of a run; None where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        where = find(folder / FOLDER) / ABOUT
    except FileNotFoundError:
        return None
    notes = _files.read_json(where).get("notes")
    try:
        options, data = StreamOptions(**notes["options"]), notes["data"]
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error!r:.200}") from None
    if not isinstance(data, list) or not all(isinstance(name, str) for name in data):
        raise CheckpointError(f"{where}: data must be a list of names")
    return options, data


def train(
    folder: Path,
    options: StreamOptions,
    data: list[str],
    *,
    resume: bool,
    say: Callable[[str], None],
) -> int:
    """Learns one pass over the bytes, or what is left of it.

    Args:
        folder: of the run.
        options: those of the run where it goes on.
        data: files, folders or patterns; the embedded text where there are none.
        resume: go on from the newest checkpoint.
        say: is given a line about the progress.

    Returns:
        0, or the number of the signal that ended it, after saving.

    Raises:
        ValueError: the text is too short.
        CheckpointError: the checkpoint is damaged or of another text.
        RuntimeError: the loss is not a number.
    """
    from recurra.train.data import _sample, open_text
    from recurra.train.run import _catch_signals

    text = open_text(data)
    parts = Parts(text, options.batch, options.length)
    learner = make(options)
    progress = {"nats": 0.0, "seconds": 0.0}
    digest = _sample(text)
    if resume:
        notes = learner.load(folder / FOLDER)
        for group in learner.optimizer.param_groups:  # --lr may have changed
            group["lr"] = options.lr
        if notes.get("text") != digest:
            raise CheckpointError(
                f"{folder}: was learned from another text than this one; give the same --data"
            )
        progress = {k: float(notes[k]) for k in progress}
        say(f"goes on after {learner.chunks * options.batch * options.length:,} bytes")
    per_chunk = options.batch * options.length
    say(
        f"{learner!r}: {sum(p.numel() for p in learner.parameters):,} parameters, "
        f"{parts.chunks * per_chunk:,} bytes in {options.batch} streams"
    )

    def save() -> None:
        about = {"options": dataclasses.asdict(options), "data": data, "text": digest}
        learner.save(folder / FOLDER, keep=options.keep, **about, **progress)

    window, began = [0.0, 0], time.perf_counter()
    told = began
    with _catch_signals(True) as interrupt:
        while learner.chunks < parts.chunks and not interrupt.signal:
            loss = learner.feed(*parts.get(learner.chunks)).loss.item()
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"the loss is {loss} after {learner.chunks * per_chunk:,} bytes; a smaller "
                    "--lr may help"
                )
            progress["nats"] += loss
            window = [window[0] + loss, window[1] + 1]
            now = time.perf_counter()
            progress["seconds"] += now - began
            began = now
            last = learner.chunks == parts.chunks
            if now - told >= _SAY or last:
                say(_line(learner.chunks, parts.chunks, per_chunk, window, progress, now - told))
                window, told = [0.0, 0], now
            if learner.chunks % options.save_every == 0 and not last:
                save()
    save()
    return interrupt.signal


def _line(
    chunks: int, total: int, per_chunk: int, window: list[float], progress: dict, seconds: float
) -> str:
    bits = window[0] / window[1] / math.log(2)
    whole = progress["nats"] / chunks / math.log(2)
    speed = window[1] * per_chunk / max(seconds, 1e-9)
    return (
        f"{100 * chunks / total:5.1f} %  {chunks * per_chunk:>12,} bytes  {bits:6.3f} bits per "
        f"byte, {whole:6.3f} over all  {speed:>9,.0f} bytes/s"
    )


# What else `recurra train` has, and what it is when it was not given.
_OTHERS = {"config": None, "init": None, "tokenizer": None, "minutes": None, "device": None}
_OTHERS |= {"valid_data": [], "parallel": "ddp", "reference": False}


def _refuse_others(args: Any) -> None:
    """Options that would change nothing are an error."""
    mine = {f.name for f in dataclasses.fields(StreamOptions)}
    theirs = {f.name: None for f in dataclasses.fields(TrainOptions) if f.name not in mine}
    for name, default in (_OTHERS | theirs).items():
        if getattr(args, name, default) not in (default, None):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --online")


def command(args: Any) -> int:
    """What ``recurra train --online`` does."""
    import sys

    from recurra.train import checkpoint

    def say(line: str) -> None:
        print(f"recurra train: {line}", file=sys.stderr, flush=True)

    folder = Path(args.folder)
    given = {
        f.name: getattr(args, f.name)
        for f in dataclasses.fields(StreamOptions)
        if getattr(args, f.name, None) is not None
    }
    _refuse_others(args)
    with checkpoint.alone(folder):
        checkpoint.clean(folder / FOLDER)
        before = saved(folder) if args.resume else None
        if args.resume and before is None:
            say(f"{folder} has no checkpoint yet: begins anew")
        if not args.resume and checkpoint.exists(folder / FOLDER):
            raise ValueError(
                f"{folder} holds a run already: --resume goes on with it, another folder begins "
                "anew"
            )
        options, data = before or (StreamOptions(), [])
        changed = {k for k, v in given.items() if before and v != getattr(options, k)}
        if changed - {"lr", "clip", "save_every", "keep"}:
            raise ValueError(
                f"--{sorted(changed)[0].replace('_', '-')} cannot change while a stream is learned"
            )
        options = dataclasses.replace(options, **given)
        data = [os.path.abspath(os.path.expanduser(name)) for name in args.data] or data
        stopped = train(folder, options, data, resume=before is not None, say=say)
    if stopped:
        return 128 + stopped
    say(f"done; {find(folder / FOLDER)}")
    return 0

"""A training run from beginning to end: what is shown, saved and drawn on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from recurra.train import checkpoint, state
from recurra.train.log import Log
from recurra.train.progress import Progress
from recurra.train.trainer import NonFiniteLoss, Trainer


class Interrupt:
    """Whether Ctrl-C or a request to end came; a second Ctrl-C ends at once."""

    def __init__(self, show: bool) -> None:
        self.signal = 0
        self._show = show

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        if self._show:  # not through buffers that the interrupted code may hold
            os.write(2, b"\nfinishing this step, then saving; again ends at once\n")


@contextlib.contextmanager
def _catch_signals(show: bool) -> Iterator[Interrupt]:
    interrupt = Interrupt(show)
    # Python hands signals to the main thread alone.
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield interrupt
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run(
    trainer: Trainer,
    folder: Path,
    text: str,
    tokenizer: Path | None = None,
    notes: dict[str, Any] | None = None,
) -> int:
    """Trains until the last step, or until interrupted.

    Args:
        trainer: new, or resumed.
        folder: of the run: log.jsonl, loss.png, checkpoints, and tensorboard where it is installed.
        text: the fingerprint of the corpus.
        tokenizer: a tokenizer.json to keep with the checkpoints.
        notes: what else train.json of the checkpoints is to say.

    Returns:
        0, or the number of the signal that ended it; the run can be resumed.

    Raises:
        NonFiniteLoss: the loss is not a number; the last checkpoint is from before.
        OSError: a checkpoint could not be written; earlier ones are as they were.
    """
    options, world = trainer.options, trainer.world
    # Read now: it may lie in a checkpoint that is deleted on the way.
    vocabulary = tokenizer.read_bytes() if tokenizer else None
    log = Log(folder, trainer.step) if world.leads else None
    progress = Progress(trainer.step, options.steps, world.leads)
    saved = trainer.step if trainer.step else None

    def save() -> None:
        nonlocal saved
        if saved == trainer.step:
            return
        # A step may end with weights that no longer give a loss: the checkpoint before is better.
        trainer.check_loss()
        if log:
            log.sync()
        state.save(trainer, folder, text, vocabulary, **(notes or {}))
        saved = trainer.step

    def validate() -> None:
        bpb = trainer.validate()
        if log:
            log.add(trainer.step, valid_bpb=bpb)
            progress.say(f"step {trainer.step}: validation {bpb:.4f} bits per byte")
            log.draw()

    def validation_due() -> bool:
        last = trainer.step == options.steps
        if not (last or trainer.step % options.eval_every == 0):
            return False
        there = log and any(
            e["step"] == trainer.step and "valid_bpb" in e for e in reversed(log.entries[-4:])
        )
        return not world.largest(bool(there))

    stopped = 0
    try:
        with _catch_signals(world.leads) as interrupt:
            # At the beginning, and where a run was stopped between a step and its validation.
            if validation_due():
                validate()
            # All processes stop at the same step, whichever of them was told to.
            stopped = int(world.largest(interrupt.signal))
            while trainer.step < options.steps and not stopped:
                begin = time.perf_counter()
                done = trainer.train_step()
                seconds = time.perf_counter() - begin
                rate = options.batch * options.length / seconds
                if log:
                    log.add(
                        trainer.step,
                        loss=done.loss,
                        train_bpb=trainer.bits_per_byte(done.loss),
                        norm=done.norm,
                        lr=done.lr,
                        tokens_per_second=rate,
                    )
                progress.step(trainer.step, done.loss, rate)
                stopped = int(world.largest(interrupt.signal))
                last = trainer.step == options.steps
                if stopped or last or trainer.step % options.save_every == 0:
                    save()
                if not stopped and validation_due():
                    validate()
            if stopped:
                what = f"saved after step {trainer.step}" if trainer.step else "nothing to save yet"
                progress.say(f"stopped, {what}; --resume goes on from there")
                if log:
                    log.draw()
    except NonFiniteLoss as error:
        kept = checkpoint.newest(folder / state.FOLDER)
        where = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        raise NonFiniteLoss(f"{error}; {where}") from None
    finally:
        progress.close()
        if log:
            log.close()
    return stopped

"""What a run shows: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from recurra import _files


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """The state of a run, on standard error.

    Args:
        start: steps that were done before.
        steps: of the whole run.
        show: whether this process shows anything.
    """

    def __init__(self, start: int, steps: int, show: bool):
        self._show, self._start, self._steps = show, start, steps
        self._begin = self._said = time.monotonic()
        self._bar: Any = None
        if show and sys.stderr.isatty():
            rich = _files.extra("rich.progress", "the progress bar")
            console = _files.extra("rich.console", "the progress bar").Console(stderr=True)
            self._bar = rich.Progress(
                rich.TextColumn("{task.completed}/{task.total}"),
                rich.BarColumn(),
                rich.TextColumn("{task.fields[words]}"),
                console=console,
            )
            self._task = self._bar.add_task("", total=steps, completed=start, words="")
            self._bar.start()

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows a finished step."""
        if not self._show:
            return
        now = time.monotonic()
        left = (now - self._begin) / max(step - self._start, 1) * (self._steps - step)
        words = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {duration(left)} left"
        if self._bar:
            self._bar.update(self._task, completed=step, words=words)
        elif step == self._steps or step == self._start + 1 or now - self._said >= 5:
            self._said = now
            print(f"step {step}/{self._steps}  {words}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self._show:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

"""The record of a run: a line of JSON for every step, a picture of the loss, TensorBoard."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from pathlib import Path
from typing import Any

from recurra import _files

FILE = "log.jsonl"
PICTURE = "loss.png"


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; the last line of a run that was killed may be cut off, and is left
    out."""
    entries = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                entries.append(entry)
    return entries


class Log:
    """Writes the record of a run.

    Args:
        folder: the folder of the run.
        step: the step to go on from; what the log says of later ones is dropped.
    """

    def __init__(self, folder: Path, step: int):
        self._folder = folder
        path = folder / FILE
        # Nothing of a run that begins anew, which validates before its first step.
        self.entries = [entry for entry in read(path) if entry["step"] <= step] if step else []
        text = "".join(json.dumps(entry) + "\n" for entry in self.entries)
        _files.replace(path, lambda temporary: _files.write_bytes(temporary, text.encode()))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  (lives as long as the log)
        self._board = _tensorboard(folder / "tensorboard", step)

    def add(self, step: int, **values: float) -> None:
        """One entry; floats are written so that they read back as the same."""
        entry = {"step": step, **values}
        self.entries.append(entry)
        self._file.write(json.dumps(entry) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Forces what was added to the disk, so that a checkpoint never knows more."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def draw(self) -> Path | None:
        """Draws the loss; None where matplotlib is not installed."""
        if not importlib.util.find_spec("matplotlib"):
            return None
        path = self._folder / PICTURE
        _files.replace(path, lambda temporary: draw(self.entries, temporary))
        return path

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def _tensorboard(folder: Path, step: int) -> Any:
    if not importlib.util.find_spec("tensorboard"):
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # installed, and broken
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """A picture of the training loss of every step and the validation loss, in bits per byte."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    train = [(e["step"], e["train_bpb"]) for e in entries if "train_bpb" in e]
    valid = [(e["step"], e["valid_bpb"]) for e in entries if "valid_bpb" in e]
    if train:
        steps, values = zip(*train, strict=True)
        thin = max(1, len(values) // 20_000)
        axes.plot(steps[::thin], values[::thin], color="tab:blue", alpha=0.3, linewidth=0.8)
        window = max(1, len(values) // 50)
        sums = [0.0, *itertools.accumulate(values)]
        # No more points than the picture has columns.
        ends = range(window, len(values) + 1, max(1, len(values) // 2000))
        smooth = [(sums[end] - sums[end - window]) / window for end in ends]
        axes.plot(
            [steps[end - 1] for end in ends],
            smooth,
            color="tab:blue",
            label=f"training, mean of {window}",
        )
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", color="tab:orange", label="validation")
        axes.annotate(f"{valid[-1][1]:.3f}", valid[-1], xytext=(4, 6), textcoords="offset points")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    if train or valid:
        axes.legend()
    figure.savefig(path, format="png", dpi=120)

"""The state of a :class:`Trainer` in a checkpoint, and back."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurra import _files
from recurra._files import CheckpointError
from recurra.lm import pretrained
from recurra.lm.tokenizer import FILE as TOKENIZER
from recurra.train import checkpoint, parallel
from recurra.train.options import TrainOptions
from recurra.train.trainer import Trainer

TENSORS = "train.safetensors"
ABOUT = "train.json"
FOLDER = "checkpoints"  # of a run

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(
    trainer: Trainer, run: Path, text: str, tokenizer: bytes | None = None, **notes: Any
) -> None:
    """Writes a checkpoint that :func:`resume` and ``LM.from_pretrained`` read.

    Args:
        trainer: what is saved.
        run: the folder of the run.
        text: the fingerprint of the corpus.
        tokenizer: the bytes of a tokenizer.json to keep with the checkpoint.
        notes: anything for train.json.

    Raises:
        OSError: it could not be written; earlier checkpoints are as they were.
    """
    # Every process takes part in gathering what is sharded.
    model, world = trainer.model, trainer.world
    weights = {name: parallel.whole(p) for name, p in pretrained.state_to_save(model).items()}
    tensors = _tensors(trainer)
    about = {
        "options": dataclasses.asdict(trainer.options),
        "text": text,
        "tokens": trainer.step * trainer.options.batch * trainer.options.length,
        "processes": world.size,
        "random": _random_state(),
    } | notes

    def write(folder: Path) -> None:
        pretrained.write(model.config, weights, folder, lambda path, put: put(path))
        _files.write_tensors(folder / TENSORS, tensors, {})
        _files.write_json(folder / ABOUT, about)
        if tokenizer:
            _files.write_bytes(folder / TOKENIZER, tokenizer)

    keep = trainer.options.keep
    world.first(lambda: checkpoint.save(run / FOLDER, trainer.step, write, keep=keep))


def resume(trainer: Trainer, folder: Path, text: str) -> None:
    """Makes a new trainer go on from a checkpoint, with the bits of a run never interrupted.

    Args:
        trainer: a new one, with the configuration of the saved one.
        folder: the checkpoint.
        text: the fingerprint of the corpus.

    Raises:
        CheckpointError: it is damaged, of another model, or of another text.
    """
    manifest = checkpoint.verify(folder)
    about = _files.read_json(folder / ABOUT)
    if about.get("text") != text:
        raise CheckpointError(
            f"{folder}: was trained on another text than this one; give the same --data"
        )
    saved = pretrained.load(folder)
    if saved.config != trainer.model.config:
        raise CheckpointError(f"{folder}: holds a model of another configuration")
    try:
        with _files.open_tensors(folder / TENSORS) as file, torch.no_grad():
            _restore(trainer, folder, file, manifest["step"])
            trainer.load_weights(saved)
        _restore_random(about["random"])
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{folder}: cannot be resumed: {error!r:.200}") from None
    trainer.step = manifest["step"]


def options(folder: Path) -> TrainOptions:
    """The options that a checkpoint was trained with.

    Raises:
        CheckpointError: they are not there, or not valid.
    """
    path = folder / ABOUT
    values = _files.read_json(path).get("options")
    try:
        return TrainOptions(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def sources(folder: Path) -> tuple[list[str], list[str]]:
    """The files that a checkpoint was trained and validated on; none for the embedded text.

    Raises:
        CheckpointError: they are not lists of names.
    """
    about = _files.read_json(folder / ABOUT)
    found = []
    for key in ("data", "valid_data"):
        names = about.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{folder / ABOUT}: {key} must be a list of names")
        found.append(names)
    return found[0], found[1]


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Everything but the parameters, whole, by name."""
    world = trainer.world
    tensors = {"random.torch": torch.get_rng_state()}
    if world.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(world.device)
    for name, p in trainer.model.named_parameters():
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = parallel.whole(trainer.optimizer.state[p][moment])
    for key, x in _carried(trainer):
        tensors[key] = world.gather_rows(x)
    return tensors


def _carried(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    for micro, layers in enumerate(trainer.carried):
        for layer, s in enumerate(layers or ()):
            for field, x in zip(s._fields, s, strict=True):
                yield f"carried.{micro}.{layer}.{field}", x


def _restore(trainer: Trainer, folder: Path, file: Any, step: int) -> None:
    found = _files.tensor_shapes(file)
    parameters = dict(trainer.model.named_parameters())
    wanted = {f"{m}.{name}": tuple(p.shape) for name, p in parameters.items() for m in _MOMENTS}
    moments = {k: v for k, v in found.items() if not k.startswith(("random.", "carried."))}
    _files.compare(Path(TENSORS), wanted, moments)
    for name, p in parameters.items():
        trainer.optimizer.state[p] = {
            moment: parallel.like(p, file.get_tensor(f"{moment}.{name}").to(p.dtype, copy=True))
            for moment in _MOMENTS
        } | {"step": torch.tensor(float(step))}
    torch.set_rng_state(file.get_tensor("random.torch").clone())
    if trainer.world.device.type == "cuda" and "random.cuda" in found:
        torch.cuda.set_rng_state(file.get_tensor("random.cuda").clone(), trainer.world.device)
    if trainer.options.carry and not trainer.batches.begins(step + 1):
        before = options(folder)
        for name in ("carry", "length", "batch", "accumulate", "precision"):
            was, now = getattr(before, name), getattr(trainer.options, name)
            if was != now:
                raise CheckpointError(
                    f"{folder}: its sequences go on with their states, so that {name} must stay "
                    f"{was}, got {now}"
                )
        _restore_carried(trainer, file, found)


def _restore_carried(trainer: Trainer, file: Any, found: dict[str, Any]) -> None:
    count, world = trainer.options.accumulate, trainer.world
    rows = trainer.options.batch // count
    model = trainer.model
    carried = {k: v for k, v in found.items() if k.startswith("carried.")}
    initial = model.initial_state(1)
    states = count * sum(len(s) for s in initial)
    if len(carried) != states:  # before names are made of a number that the file may have invented
        raise CheckpointError(f"{TENSORS}: must have {states} carried states, got {len(carried)}")
    wanted = {
        f"carried.{micro}.{layer}.{field}": (rows, *x.shape[1:])
        for micro in range(count)
        for layer, s in enumerate(initial)
        for field, x in zip(s._fields, s, strict=True)
    }
    # Some states count, in integers.
    _files.compare(Path(TENSORS), wanted, carried, dtypes=(*_files.FLOATS, "I64"))
    mine = world.rows(rows)
    for micro in range(count):
        trainer.carried[micro] = [
            type(s)(
                *(
                    file.get_tensor(f"carried.{micro}.{layer}.{field}")[mine.start : mine.stop]
                    .clone()
                    .to(world.device, x.dtype)
                    for field, x in zip(s._fields, s, strict=True)
                )
            )
            for layer, s in enumerate(initial)
        ]


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
    }


def _restore_random(values: dict[str, Any]) -> None:
    version, keys, gauss = values["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, position, has_gauss, gauss = values["numpy"]
    if not 0 <= position <= len(keys):  # numpy would read beyond them
        raise ValueError(f"numpy's place in its random numbers is {position}")
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, gauss))

"""Checkpoints: config.json and safetensors, in the form of transformers where it has the model."""

from __future__ import annotations

import dataclasses
import errno
import functools
import re
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recurra import _files
from recurra._files import CheckpointError
from recurra.lm.config import LMConfig
from recurra.lm.formats import config_to_dict, format_of, format_of_dict
from recurra.lm.model import LM, Block

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
# What every layer has one of.
_LAYER = re.compile(r"layers\.\d+\.norm\.weight")


class Found(NamedTuple):
    """A checkpoint whose weights fit its configuration; ``format`` is of its words and names."""

    config: LMConfig
    files: list[Path]
    format: ModuleType


def read_config(folder: Path) -> LMConfig:
    """The configuration in a folder.

    Raises:
        FileNotFoundError: there is no such folder, or no config.json in it.
        ValueError: it is damaged, or of another architecture.
    """
    return _read_config(folder)[0]


def _read_config(folder: Path) -> tuple[LMConfig, ModuleType]:
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(folder))
    path = folder / "config.json"
    values = _files.read_json(path)
    # As in transformers, what is said there about generation comes first.
    if (folder / GENERATION).is_file():
        said = _files.read_json(folder / GENERATION)
        values = values | {k: said[k] for k in ("eos_token_id",) if said.get(k) is not None}
    try:
        form = format_of_dict(values)
        return form.from_dict(values), form
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        index = _files.read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{folder / INDEX}: must hold a weight_map")
        return list(dict.fromkeys(_files.inside(folder, name) for name in index.values()))
    legacy = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
    if legacy is not None:
        raise CheckpointError(
            f"{legacy}: is pickle, which recurra does not read; save it as safetensors with "
            "transformers' save_pretrained"
        )
    raise FileNotFoundError(errno.ENOENT, "no model.safetensors", str(folder))


def check(folder: Path) -> Found:
    """The configuration and the files of weights, whose tensors are those that it asks for. A file
    that promises more than it holds costs no memory.

    Raises:
        FileNotFoundError: there is no such folder, or no checkpoint in it.
        ValueError: a file is damaged, or is of another architecture.
    """
    config, form = _read_config(folder)
    try:
        # What the weights have is in the files; what is remembered is not.
        config.check_state_memory()
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    files = _weight_files(folder)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in files:
        with _files.open_tensors(path) as file:
            for name, what in _files.tensor_shapes(file).items():
                ours = form.our_name(name)
                if ours in found:
                    raise CheckpointError(f"{path}: holds {ours:.100} a second time")
                found[ours] = what
    layers = sum(bool(_LAYER.fullmatch(name)) for name in found)
    if layers != config.n_layers:
        raise CheckpointError(
            f"{folder}: config.json says {config.n_layers} layers, the weights have {layers}"
        )
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)
    _files.compare(folder, _shapes(config), found)
    return Found(config, files, form)


@functools.lru_cache(8)
def _shapes(config: LMConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters by name, the tied head left out."""
    mixers = config.mixers()
    with torch.device("meta"):
        # Thousands of layers would take long to make even without memory: one of each.
        blocks = {mixer: Block(config, mixer).state_dict() for mixer in set(mixers)}
        shared = config.make_shared().state_dict()
        ends = LM(dataclasses.replace(config, n_layers=1)).state_dict()
    shapes = {}
    for name, p in ends.items():
        if name.startswith("layers.") and "layers.0.norm.weight" not in shapes:
            for layer, mixer in enumerate(mixers):
                shapes |= {f"layers.{layer}.{k}": tuple(v.shape) for k, v in blocks[mixer].items()}
            shapes |= {f"shared.{k}": tuple(v.shape) for k, v in shared.items()}
        elif not name.startswith(("layers.", "shared.")):
            shapes[name] = tuple(p.shape)
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def load(folder: Path, dtype: torch.dtype | None = None) -> LM:
    """See :meth:`recurra.LM.from_pretrained`."""
    config, files, form = check(folder)
    with torch.device("meta"):
        model = LM(config)
    tensors: dict[str, Tensor] = {}
    for path in files:
        with _files.open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                ours = form.our_name(name)
                # A copy: what is mapped changes when the file does.
                tensor = file.get_tensor(name)
                tensors[ours] = tensor.to(dtype or tensor.dtype, copy=True)
    head = tensors.pop("lm_head.weight", None) if config.tie_embeddings else None
    if head is not None and not torch.equal(head, tensors["embeddings.weight"]):
        raise CheckpointError(
            f"{folder}: config.json says that the head is the embedding, and the weights have "
            "another head"
        )
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embeddings.weight
    return model.requires_grad_()


def state_to_save(model: LM) -> dict[str, Tensor]:
    """The parameters under the names of the file, the tied head left out."""
    tied = model.config.tie_embeddings
    form = format_of(model.config)
    return {
        form.stored_name(name, model.config): p.detach()
        for name, p in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def save(model: LM, folder: Path) -> None:
    """See :meth:`recurra.LM.save_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    write(model.config, state_to_save(model), folder, _files.replace)


def write(config: LMConfig, tensors: dict[str, Tensor], folder: Path, put: Any) -> None:
    """Writes both files, each with ``put(path, write)``; the configuration last."""
    dtype = next(iter(tensors.values())).dtype
    values = config_to_dict(config, dtype)
    put(
        folder / WEIGHTS,
        partial(_files.write_tensors, tensors=tensors, metadata={"format": "pt"}),
    )
    put(folder / "config.json", partial(_files.write_json, value=values))

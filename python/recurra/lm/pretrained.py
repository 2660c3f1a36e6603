"""Mamba checkpoints in the form of transformers: config.json and safetensors."""

from __future__ import annotations

import dataclasses
import errno
import functools
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurra import _files
from recurra._files import CheckpointError, shown
from recurra.lm.config import LMConfig
from recurra.lm.model import LM
from recurra.nn import MambaConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"

# Our names by those of transformers' MambaConfig, whose defaults a config.json may leave out.
_FIELDS = {
    "vocab_size": ("vocab_size", 50280),
    "hidden_size": ("d_model", 768),
    "num_hidden_layers": ("n_layers", 32),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "tie_word_embeddings": ("tie_embeddings", True),
    "residual_in_fp32": ("residual_in_fp32", True),
}
_MIXER_FIELDS = {
    "state_size": ("d_state", 16),
    "expand": ("expand", 2),
    "conv_kernel": ("d_conv", 4),
    "time_step_rank": ("dt_rank", None),
    "use_bias": ("bias", False),
    "use_conv_bias": ("conv_bias", True),
}


def config_from_dict(values: dict[str, Any]) -> LMConfig:
    """The configuration that a config.json of transformers' Mamba describes.

    Raises:
        ValueError: it is of another architecture, or a value is out of range.
    """
    kind = values.get("model_type")
    if kind != "mamba":
        raise ValueError(f"model_type must be mamba, got {shown(kind)}")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act must be silu, got {shown(values['hidden_act'])}")

    def take(table: dict[str, tuple[str, Any]]) -> dict[str, Any]:
        return {ours: values.get(theirs, default) for theirs, (ours, default) in table.items()}

    mixer = take(_MIXER_FIELDS)
    if mixer["dt_rank"] == "auto":
        mixer["dt_rank"] = None
    rest = take(_FIELDS)
    ends = _end_tokens(values.get("eos_token_id", 0), rest["vocab_size"])
    return LMConfig(mixer=MambaConfig(**mixer), eos_token_ids=ends, **rest)


def _end_tokens(given: Any, vocab: Any) -> tuple:
    tokens = given if isinstance(given, list) else [] if given is None else [given]
    # Generic files name a token that a small vocabulary does not have.
    return tuple(
        t for t in tokens if type(t) is not int or type(vocab) is not int or 0 <= t < vocab
    )


def config_to_dict(config: LMConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers calls this configuration."""
    values = {theirs: getattr(config, ours) for theirs, (ours, _) in _FIELDS.items()}
    values |= {theirs: getattr(config.mixer, ours) for theirs, (ours, _) in _MIXER_FIELDS.items()}
    values["time_step_rank"] = config.mixer.dt_rank or "auto"
    ends = config.eos_token_ids
    values["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0] if ends else None
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "bos_token_id": None,
        "pad_token_id": None,
    } | values


def _theirs(name: str) -> str:
    return name if name.startswith("lm_head.") else f"backbone.{name}"


def read_config(folder: Path) -> LMConfig:
    """The configuration in a folder.

    Raises:
        FileNotFoundError: there is no such folder, or no config.json in it.
        ValueError: it is damaged, or of another architecture.
    """
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(folder))
    path = folder / "config.json"
    values = _files.read_json(path)
    # As in transformers, what is said there about generation comes first.
    if (folder / GENERATION).is_file():
        said = _files.read_json(folder / GENERATION)
        values = values | {k: said[k] for k in ("eos_token_id",) if said.get(k) is not None}
    try:
        return config_from_dict(values)
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


def _our_name(name: str) -> str:
    # Early files say embedding, and a MambaModel saved without its head has no backbone.
    name = re.sub(r"^backbone\.", "", name)
    return re.sub(r"^embedding\.", "embeddings.", name)


def check(folder: Path) -> tuple[LMConfig, list[Path]]:
    """The configuration and the files of weights, whose tensors are those that it asks for. A file
    that promises more than it holds costs no memory.

    Raises:
        FileNotFoundError: there is no such folder, or no checkpoint in it.
        ValueError: a file is damaged, or is of another architecture.
    """
    config = read_config(folder)
    files = _weight_files(folder)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in files:
        with _files.open_tensors(path) as file:
            for name, what in _files.tensor_shapes(file).items():
                ours = _our_name(name)
                if ours in found:
                    raise CheckpointError(f"{path}: holds {ours:.100} a second time")
                found[ours] = what
    layers = sum(name.endswith(".mixer.A_log") for name in found)
    if layers != config.n_layers:
        raise CheckpointError(
            f"{folder}: config.json says {config.n_layers} layers, the weights have {layers}"
        )
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)
    _files.compare(folder, _shapes(config), found)
    return config, files


@functools.lru_cache(8)
def _shapes(config: LMConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters by name, the tied head left out."""
    with torch.device("meta"):
        # Thousands of layers would take long to make even without memory.
        one = LM(dataclasses.replace(config, n_layers=1))
    shapes = {}
    for name, p in one.state_dict().items():
        _, first, rest = name.rpartition("layers.0.")
        for layer in range(config.n_layers if first else 1):
            shapes[f"layers.{layer}.{rest}" if first else name] = tuple(p.shape)
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def load(folder: Path, dtype: torch.dtype | None = None) -> LM:
    """See :meth:`recurra.LM.from_pretrained`."""
    config, files = check(folder)
    with torch.device("meta"):
        model = LM(config)
    tensors: dict[str, Tensor] = {}
    for path in files:
        with _files.open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                ours = _our_name(name)
                if config.tie_embeddings and ours == "lm_head.weight":
                    continue
                # A copy: what is mapped changes when the file does.
                tensor = file.get_tensor(name)
                tensors[ours] = tensor.to(dtype or tensor.dtype, copy=True)
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embeddings.weight
    return model.requires_grad_()


def state_to_save(model: LM) -> dict[str, Tensor]:
    """The parameters under the names of transformers, the tied head left out."""
    tied = model.config.tie_embeddings
    return {
        _theirs(name): p.detach()
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

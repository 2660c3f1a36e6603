"""Which model a command is to use."""

from __future__ import annotations

import errno
from pathlib import Path


def find(name: str) -> Path:
    """The folder of a checkpoint: the name itself, or the newest checkpoint of a run.

    Raises:
        FileNotFoundError: it is neither.
        CheckpointError: no checkpoint of the run is whole, or this one is not.
    """
    from recurra.train import checkpoint, state

    folder = Path(name)
    if (folder / state.FOLDER).is_dir():
        newest = checkpoint.newest(folder / state.FOLDER)
        if newest is None:
            raise FileNotFoundError(errno.ENOENT, "the run has no checkpoint yet", name)
        return newest
    if (folder / checkpoint.MANIFEST).is_file():
        checkpoint.verify(folder)
    return folder


def load(name: str, dtype: str | None, tokenizer: str | None):
    """The model and its tokenizer."""
    import torch

    from recurra.lm import LM, load_tokenizer
    from recurra.lm.tokenizer import JsonTokenizer, check_vocabulary

    folder = find(name)
    kinds = {"float32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}
    model = LM.from_pretrained(folder, dtype=kinds[dtype] if dtype else None).eval()
    if tokenizer is None:
        return model, load_tokenizer(folder, model.config.vocab_size)
    given = JsonTokenizer(Path(tokenizer))
    check_vocabulary(given, model.config.vocab_size, tokenizer)
    return model, given


def add_model_options(parser) -> None:
    """MODEL, --tokenizer, --dtype and --threads."""
    parser.add_argument(
        "model", metavar="MODEL", help="a run of `recurra train`, or the folder of a checkpoint"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="a tokenizer.json; default: the checkpoint's, or bytes"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bf16", "float64"), help="default: as it is stored"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of this process")


def set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)

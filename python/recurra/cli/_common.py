"""What the commands share: their parsers, options and checks, and which model they are to use."""

from __future__ import annotations

import argparse
import errno
import textwrap
from collections.abc import Callable
from pathlib import Path


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    epilog: str = "",
    **words: str,
) -> argparse.ArgumentParser:
    """The parser of a command, whose epilog keeps its lines; ``words`` are help and description."""
    parser = commands.add_parser(
        name,
        epilog=textwrap.dedent(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **words,
    )
    parser.set_defaults(run=run)
    return parser


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """--data."""
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        default=[],
        help="text files, folders or patterns; default: the Python standard library",
    )


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for an option that was given and is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def check_can_be_written(name: str) -> None:
    """Raises OSError for a file whose folder is not there, or that is a folder: before the work,
    not when its result is to be kept."""
    path = Path(name).absolute()
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))


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
    add_threads_option(parser)


def add_threads_option(parser) -> None:
    """--threads."""
    parser.add_argument("--threads", type=int, metavar="N", help="threads of this process")


def set_threads(args: argparse.Namespace) -> None:
    """Does what --threads says."""
    import torch

    check_at_least_one(args, "threads")
    if args.threads is not None:
        torch.set_num_threads(args.threads)

"""``recurra compare``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

from recurra.cli import _common
from recurra.diag import _picture

_EPILOG = """\
    Every model has about the same number of parameters, by its width, and trains for the same time
    on the same text; validations are not counted. The table has the fewest bits per byte first,
    with the speed of training, the speed of decoding one sequence and the size of its state.
    A minute tells how quickly a model learns here, not how well it does in the end.

    Ctrl-C leaves with the table of the models that are done. A model that fails is told in the
    table, the others go on, and the exit status is 1.

    examples
      recurra compare                                       one of each kind, a minute each
      recurra compare --mixers mamba,hgrn,mingru --minutes 10
      recurra compare --mixers rwkv4,lru --parameters 5e6 --data notes/
      recurra compare --json compare.json --picture compare.png
"""
# Options of training that can be given here.
_TRAINING = {
    "length": "tokens of a sequence",
    "batch": "sequences of a step",
    "lr": "largest learning rate",
    "seed": "of the parameters and the places in the data",
}


def _number(text: str) -> int:
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"a number is required, got {text}") from None


def add_to(commands: argparse._SubParsersAction) -> None:
    from recurra.lm import CONFIGS
    from recurra.train.options import TrainOptions

    parser = _common.add_command(
        commands,
        "compare",
        run,
        _EPILOG,
        help="train several kinds of models for equal time and compare them",
        description="Trains models of equal size for equal time, and compares them.",
    )
    add = parser.add_argument
    add(
        "--mixers",
        metavar="A,B,...",
        help=f"mamba, {', '.join(CONFIGS)}; default: one of each kind of mixer",
    )
    add(
        "--minutes",
        type=float,
        default=1.0,
        metavar="M",
        help="of training for each model; default: %(default)s",
    )
    add(
        "--parameters",
        type=_number,
        default=CONFIGS["tiny"].parameter_count(),
        metavar="N",
        help="of each model, about; default: %(default)s",
    )
    _common.add_data_option(parser)
    defaults = {f.name: f.default for f in dataclasses.fields(TrainOptions)}
    for name, text in _TRAINING.items():
        add(
            f"--{name}",
            type=type(defaults[name]),
            default=defaults[name],
            metavar="N",
            help=f"{text}; default: %(default)s",
        )
    _common.add_threads_option(parser)
    _picture.add_option(parser, "compare.png")
    add("--json", metavar="FILE", help="write the results, with the curves, to a file")


def run(args: argparse.Namespace) -> int:
    import torch

    from recurra.lm.tokenizer import ByteTokenizer
    from recurra.train import TrainOptions, compare
    from recurra.train.data import Corpus, open_text

    if not 0 < args.minutes < 1e7:
        raise ValueError(f"--minutes must be positive and below 1e+07, got {args.minutes}")
    _common.check_at_least_one(args, "parameters", "length", "batch")
    _common.set_threads(args)
    for name in filter(None, (args.picture, args.json)):
        _common.check_can_be_written(name)
    names = compare.default_names() if args.mixers is None else _names(args.mixers)
    configs = {name: compare.sized(name, args.parameters) for name in names}
    options = TrainOptions(**{name: getattr(args, name) for name in _TRAINING})
    corpus = Corpus(open_text(args.data), ByteTokenizer())
    corpus.check(options.length)

    def say(text: str) -> None:
        print(f"recurra compare: {text}", file=sys.stderr, flush=True)

    say(
        f"{len(configs)} models of about {args.parameters:,} parameters, {args.minutes:g} minutes "
        f"each, {len(corpus.train):,} bytes to train on, {torch.get_num_threads()} threads"
    )
    results: list[compare.Result] = []
    failed: dict[str, str] = {}
    stopped = False
    try:
        for name, config in configs.items():
            seconds = 60 * args.minutes
            try:
                results.append(compare.train(name, config, options, corpus, seconds, say))
            except Exception as error:  # whatever it is, the others are not to be lost
                failed[name] = _sentence(error)
                say(f"{name} failed: {failed[name]}")
    except KeyboardInterrupt:
        stopped = True
        say(f"interrupted, {len(results)} of {len(configs)} models are done")
    if results or failed:
        print(compare.table(results, failed), flush=True)
        if args.json:
            _write(Path(args.json), results, failed)
    if results:
        print(_picture.draw(args.picture, 2, lambda axes: compare.fill(axes, results)))
    return 130 if stopped else int(bool(failed))


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not any(names):
        raise ValueError("--mixers must name at least one")
    for n, name in enumerate(names):
        if not name:
            raise ValueError(f"--mixers must have a name beside every comma, got {text!r:.200}")
        if name in names[:n]:
            raise ValueError(f"--mixers must name each once, got {name:.100} again")
    return names


def _write(path: Path, results: list, failed: dict[str, str]) -> None:
    from recurra import _files

    entries = [dataclasses.asdict(result) for result in results]
    for entry in entries:
        # JSON has no NaN, which a model that diverged ends with.
        entry["curve"] = [pair for pair in entry["curve"] if math.isfinite(pair[1])]
        if not math.isfinite(entry["bits_per_byte"]):
            entry["bits_per_byte"] = None
    about: dict[str, object] = {"results": entries}
    if failed:
        about["failed"] = failed
    _files.replace(path, lambda to: _files.write_json(to, about))

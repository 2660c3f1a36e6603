"""``recurra train``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from pathlib import Path

from recurra.cli import _common

_EPILOG = """\
    RUN is a folder. In it appear log.jsonl (a line for every step), loss.png, checkpoints/, each
    of them a folder that `recurra generate`, `recurra eval` and transformers load, and
    tensorboard/ where TensorBoard is installed.

    Ctrl-C saves and leaves; --resume goes on, with the bits of a run that was never interrupted.
    A power cut costs the steps since the last checkpoint and nothing else.

    examples
      recurra train runs/first                       bytes of the Python library, two cores, minutes
      recurra train runs/first --resume
      recurra train runs/mine --data book.txt notes/ 'corpus/**/*.md' --steps 5000
      recurra train runs/bpe --data corpus/ --tokenizer tokenizer.json --config small
      recurra train runs/long --carry --length 256   state carried from step to step
      recurra train runs/tuned --init mamba-130m-hf --data notes/ --lr 1e-4
      recurra train runs/stream --online --data book.txt
      torchrun --nproc-per-node 2 -m recurra train runs/both --batch 8
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    from recurra.lm import CONFIGS
    from recurra.train.options import PRECISIONS, TrainOptions
    from recurra.train.parallel import KINDS

    parser = _common.add_command(
        commands,
        "train",
        run,
        _EPILOG,
        help="train a language model on text, resume it",
        description="Trains a language model on text.",
    )
    add = parser.add_argument
    add("folder", metavar="RUN", help="the folder of the run")
    add(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in RUN; options "
        "that are not given again stay as they were",
    )
    add(
        "--config",
        metavar="NAME",
        help=f"{', '.join(CONFIGS)}, or a config.json; default: tiny",
    )
    add(
        "--init",
        metavar="FOLDER",
        help="begin with the weights, and the tokenizer, of this checkpoint or run",
    )
    _common.add_data_option(parser)
    add(
        "--valid-data",
        nargs="+",
        metavar="PATH",
        default=[],
        help="text to validate on; default: the last 5 %% of the data, at most 4 MiB",
    )
    add("--tokenizer", metavar="FILE", help="a tokenizer.json; default: that of --init, or bytes")
    add(
        "--minutes",
        type=float,
        metavar="M",
        help="choose --steps so that the run takes about so long on this machine",
    )
    group = parser.add_argument_group("how it is trained")
    defaults = {f.name: f.default for f in dataclasses.fields(TrainOptions)}
    words = {
        "steps": "optimizer steps",
        "batch": "sequences of a step, over all processes",
        "length": "tokens of a sequence",
        "accumulate": "micro-batches that a step is cut into",
        "lr": "largest learning rate",
        "min_lr": "last learning rate, as a fraction of the largest",
        "warmup": "steps to the largest learning rate, at most a tenth of all by default",
        "weight_decay": "of the matrices, by AdamW",
        "beta1": "of AdamW",
        "beta2": "of AdamW",
        "clip": "largest norm of the gradient, 0 for none",
        "precision": "float32; bf16 (bfloat16 arithmetic, float32 parameters); float64",
        "seed": "of the parameters and the places in the data",
        "eval_every": "steps between validations",
        "eval_batches": "batches of a validation",
        "save_every": "steps between checkpoints",
        "keep": "checkpoints that stay",
    }  # fmt: skip
    for name, text in words.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(
            flag,
            type=type(defaults[name]),
            default=argparse.SUPPRESS,
            metavar=None if name == "precision" else "N",
            choices=PRECISIONS if name == "precision" else None,
            help=f"{text}; default: {defaults[name]}",
        )
    group.add_argument(
        "--carry",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="sequences go on where they stopped, with their state; default: random places",
    )
    machine = parser.add_argument_group("where")
    _common.add_threads_option(machine)
    machine.add_argument("--device", help="cpu or cuda; default: cpu")
    machine.add_argument(
        "--parallel", choices=KINDS, default="ddp", help="under torchrun; default: %(default)s"
    )
    machine.add_argument(
        "--reference",
        action="store_true",
        help="compute with recurra.reference, in plain torch: far slower, to compare",
    )

    online = parser.add_argument_group(
        "a stream of bytes, learned while it goes by",
        "One pass, by exact real-time recurrent learning: every byte is predicted before it is "
        "learned from. Goes with --resume, --data, --batch (streams side by side), --length (bytes "
        "between two updates), --lr, --clip, --seed, --save-every, --keep and --threads, with "
        "defaults of its own.",
    )
    online.add_argument("--online", action="store_true", help="do that, in memory that stays flat")
    online.add_argument("--cell", help="of the layer; default: elstm")
    online.add_argument("--channels", type=int, metavar="N", help="default: 256")
    online.add_argument(
        "--layers", type=int, metavar="N", help="exact for the top one alone; default: 1"
    )


def run(args: argparse.Namespace) -> int:
    if args.online:
        from recurra.rtrl import stream

        _common.set_threads(args)
        return stream.command(args)
    for name in ("cell", "channels", "layers"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} goes with --online")
    from recurra.train import checkpoint
    from recurra.train.parallel import Shared, World

    _common.set_threads(args)
    folder = Path(args.folder)
    world = World(args.parallel, args.device)
    status = 1
    try:
        with checkpoint.alone(folder) if world.leads else contextlib.nullcontext():
            status = _run(args, folder, world)
    except Shared:
        if world.leads:
            raise
    except (OSError, RuntimeError, ValueError) as error:
        if world.leads:
            raise
        print(f"recurra train: process {world.rank}: {error}", file=sys.stderr, flush=True)
    finally:
        world.close()
    if world.size > 1 and args.own_process:
        # A thread of gloo lets go of a collective's tensors some time after the collective has
        # returned, and needs the interpreter for it: one that finds it shutting down aborts the
        # process. DDP and FSDP keep the group for ever, so that nothing waits for its threads.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(args: argparse.Namespace, folder: Path, world) -> int:
    import torch

    import recurra
    from recurra.lm.config import LMConfig
    from recurra.train import Trainer, TrainOptions, checkpoint, state
    from recurra.train.log import PICTURE
    from recurra.train.run import run as train

    def say(text: str) -> None:
        if world.leads:
            print(f"recurra train: {text}", file=sys.stderr, flush=True)

    root = folder / state.FOLDER
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainOptions)
             if hasattr(args, f.name)}  # fmt: skip
    if world.leads:
        checkpoint.clean(root)
    world.barrier()
    before = None
    if args.resume:
        before = checkpoint.newest(root, say)
        if before is None:
            say(f"{folder} has no checkpoint yet: begins anew")
    elif checkpoint.exists(root):
        raise ValueError(
            f"{folder} holds a run already: --resume goes on with it, another folder begins anew"
        )

    # Found once: a checkpoint is read whole to see that it is.
    source = _common.find(args.init) if args.init and before is None else None
    if before is not None:
        data, valid_data = state.sources(before)
        args.data, args.valid_data = args.data or data, args.valid_data or valid_data
    tokenizer_file = _tokenizer_file(args, before or source)
    tokenizer, end = _tokenizer(tokenizer_file)
    # All that can be wrong before the text is made into tokens, which may take long.
    if before is not None:
        from recurra.lm import pretrained

        options = dataclasses.replace(state.options(before), **given)
        config: LMConfig = pretrained.check(before)[0]
        if args.config and _config(args, None, tokenizer, end) != config:
            raise ValueError(f"{before} holds another model than --config {args.config}")
        if args.minutes is not None:
            say("--minutes counts at the beginning of a run; it is left alone now")
    else:
        config = _config(args, source, tokenizer, end)
        options = TrainOptions(**given)
        if args.minutes is not None:
            _check_minutes(args, world)
    corpus = _corpus(args, folder, world, tokenizer, end)
    if before is None:
        if args.minutes is not None:
            steps = _steps_in(args, config, options, corpus, world)
            options = dataclasses.replace(options, steps=steps)
        if "warmup" not in given:
            options = dataclasses.replace(options, warmup=min(options.warmup, options.steps // 10))

    trainer = Trainer(config, options, corpus, world)
    if args.reference:
        trainer.model.use_ops(recurra.reference)
    text = corpus.fingerprint()
    if before is not None:
        state.resume(trainer, before, text)
        say(f"goes on from {before}")
    elif source is not None:
        trainer.load_weights(recurra.LM.from_pretrained(source))
    say(
        f"{config.parameter_count():,} parameters, {len(corpus.train):,} tokens to train on, "
        f"{len(corpus.valid):,} to validate on, steps {trainer.step} to {options.steps}, "
        f"{torch.get_num_threads()} threads"
        + (f", {world.size} processes ({world.kind})" if world.size > 1 else "")
    )
    notes = {"data": _absolute(args.data), "valid_data": _absolute(args.valid_data)}
    stopped = train(trainer, folder, text, tokenizer_file, notes)
    if stopped:
        return 128 + stopped
    picture = folder / PICTURE
    say(
        f"done; {root / checkpoint.name(trainer.step)}"
        + (f", {picture}" if picture.is_file() else "")
    )
    return 0


def _absolute(names: list[str]) -> list[str]:
    paths = [os.path.abspath(os.path.expanduser(name)) for name in names]
    # They are kept with every checkpoint.
    if sum(map(len, paths)) > 1 << 20:
        raise ValueError(
            f"--data names {len(paths)} files; name their folder, or quote the pattern instead"
        )
    return paths


def _tokenizer_file(args: argparse.Namespace, checkpoint: Path | None) -> Path | None:
    from recurra.lm.tokenizer import FILE

    if args.tokenizer:
        return Path(args.tokenizer)
    if checkpoint is not None and (checkpoint / FILE).is_file():
        return checkpoint / FILE
    return None


def _tokenizer(file: Path | None):
    """The tokenizer, and its token between files, if it has one."""
    from recurra.lm.tokenizer import ByteTokenizer, JsonTokenizer

    if file is None:
        return ByteTokenizer(), None
    tokenizer = JsonTokenizer(file)
    names = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
    ends = (tokenizer.token_id(name) for name in names)
    return tokenizer, next((token for token in ends if token is not None), None)


def _corpus(args: argparse.Namespace, folder: Path, world, tokenizer, end: int | None):
    from recurra.lm.tokenizer import JsonTokenizer
    from recurra.train import checkpoint
    from recurra.train.data import Corpus, open_text

    text = open_text(args.data)
    held_out = open_text(args.valid_data) if args.valid_data else None
    tokens = folder / checkpoint.TOKENS
    if isinstance(tokenizer, JsonTokenizer):
        world.first(lambda: tokens.mkdir(parents=True, exist_ok=True))

    def corpus(make: bool) -> Corpus:
        return Corpus(text, tokenizer, end=end, held_out=held_out, folder=tokens, make=make)

    if world.size == 1:
        return corpus(True)
    world.first(lambda: corpus(True))
    return corpus(False)


def _config(args: argparse.Namespace, source: Path | None, tokenizer, end: int | None):
    from recurra import _files
    from recurra.lm import CONFIGS, formats, pretrained
    from recurra.lm.tokenizer import check_vocabulary

    name = args.config or "tiny"
    if source is not None:
        if args.config:
            raise ValueError("--init brings its own configuration; leave --config out")
        config = pretrained.read_config(source)
    elif name in CONFIGS:
        # The vocabulary is the tokenizer's, but for the few tokens that published models pad it by.
        config, size = CONFIGS[name], tokenizer.vocab_size
        padded = config.vocab_size if 0 <= config.vocab_size - size < 256 else size
        ends = () if end is None else (end,)
        return dataclasses.replace(config, vocab_size=padded, eos_token_ids=ends)
    elif name.endswith(".json"):
        config = formats.config_from_dict(_files.read_json(Path(name)))
    else:
        raise ValueError(
            f"unknown configuration {name}; known are {', '.join(CONFIGS)}, or a file config.json"
        )
    check_vocabulary(tokenizer, config.vocab_size, "the tokenizer")
    if tokenizer.vocab_size == 256 != config.vocab_size:
        raise ValueError(
            f"the model has {config.vocab_size} tokens, which are not bytes: give its --tokenizer"
        )
    return config


def _check_minutes(args: argparse.Namespace, world) -> None:
    if not 0 < args.minutes < 1e7:
        raise ValueError(f"--minutes must be positive and below 1e+07, got {args.minutes}")
    if hasattr(args, "steps"):
        raise ValueError("give --steps or --minutes, not both")
    if world.size > 1:
        raise ValueError("--minutes is for one process; give --steps")


def _steps_in(args: argparse.Namespace, config, options, corpus, world) -> int:
    """How many steps take so many minutes here."""
    import recurra
    from recurra.train import Trainer

    trial = Trainer(config, options, corpus, world)
    if args.reference:
        trial.model.use_ops(recurra.reference)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        trial.train_step()
        times.append(time.perf_counter() - begin)
    # The first ones find cold memory and sleeping threads.
    return max(10, int(60 * args.minutes / sorted(times[2:])[1]))

"""Diagnostics that train a small model to label sequences and tell its accuracy by length."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING

from recurra.diag import _picture, _schedule, check_ranges
from recurra.diag.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

    import recurra
    from recurra.lm import LMConfig


_BYTES_PER_PARAMETER = 16  # weight, gradient and the two moments of AdamW


class Diagnostic:
    """``recurra diag NAME`` of a task.

    Args:
        name: of the task.
        task: what it is.
    """

    def __init__(self, name: str, task: Task):
        self.name, self.task = name, task
        self.HELP, self.EPILOG = task.help, task.epilog

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        task, add = self.task, parser.add_argument
        add(
            "--mixer",
            default=task.mixer,
            metavar="M",
            help="the kind of a mixer, or a configuration of `recurra train`; default: %(default)s",
        )
        add("--min-acc", type=float, metavar="A", help="exit with 1 below this accuracy")
        add("--d-model", type=int, default=task.d_model, metavar="N", help="default: %(default)s")
        add("--layers", type=int, default=task.n_layers, metavar="N", help="default: %(default)s")
        add("--steps", type=int, default=task.steps, metavar="N", help="default: %(default)s")
        add("--batch", type=int, default=task.batch, metavar="B", help="default: %(default)s")
        add("--lr", type=float, default=task.lr, help="default: %(default)s")
        add("--minutes", type=float, default=3, metavar="M", help="at most; default: %(default)s")
        add("--seed", type=int, default=0)
        _picture.add_option(parser, f"{self.name}.png")

    def run(self, args: argparse.Namespace) -> int:
        import torch

        from recurra.cli import _common

        _common.check_at_least_one(args, "d_model", "layers", "steps", "batch")
        check_ranges(args)
        variants = _variants(args, self.task)
        if self.task.held_out is not None:
            self.task.held_out()  # says at once where it is missing
        _common.set_threads(args)
        for config in variants.values():
            check_memory(self.task, config, args.batch)
        if self.task.both_ranges and len(variants) == 1:
            print(f"{args.mixer} has no other range for its gates, so there is one curve")
        curves = {}
        for label, config in variants.items():
            torch.manual_seed(args.seed)
            print(
                f"{label}: {config.parameter_count():,} parameters, trained on lengths "
                f"{self.task.train[0]} to {self.task.train[1]}",
                flush=True,
            )
            model = train(self.task, config, args)
            curves[label] = accuracies(self.task, model, args.seed + 2)
        _print_table(curves)
        print(_picture.draw(args.picture, 1, lambda axes: self._fill(axes[0], curves)))
        asked = next(iter(curves.values()))[self.task.lengths[-1]]
        if args.min_acc is not None and not asked >= args.min_acc:
            raise ValueError(f"the accuracy is {asked:.4f}, --min-acc asks for {args.min_acc:g}")
        return 0

    def _fill(self, axis, curves: dict[str, dict[int, float]]) -> None:
        for label, curve in curves.items():
            axis.plot(list(curve), list(curve.values()), "o-", markersize=4, label=label)
        axis.axvspan(0, self.task.train[1], color="gray", alpha=0.15, label="lengths of training")
        axis.axhline(1 / self.task.classes, color="gray", linestyle="--", label="chance")
        axis.set_xlabel("length")
        axis.set_ylabel("accuracy")
        axis.set_ylim(0, 1.03)
        axis.legend(loc="lower left")


def _variants(args: argparse.Namespace, task: Task) -> dict[str, LMConfig]:
    """The model, or with gates in (-1, 1) and beside it with gates in (0, 1)."""
    from recurra.lm import CONFIGS, LMConfig
    from recurra.nn import MIXERS

    kinds = {mixer.kind: mixer for mixer in MIXERS}
    if args.mixer in CONFIGS:
        config = CONFIGS[args.mixer]
    elif args.mixer in kinds:
        config = LMConfig(mixer=kinds[args.mixer]())
    else:
        known = ", ".join(dict.fromkeys([*kinds, *CONFIGS]))
        raise ValueError(f"--mixer must be one of {known}, got {args.mixer}")
    if args.mixer in task.settings:
        mixer = dataclasses.replace(config.mixer, **task.settings[args.mixer])
        config = dataclasses.replace(config, mixer=mixer)
    config = dataclasses.replace(
        config,
        vocab_size=max(task.symbols, task.classes),
        d_model=args.d_model,
        n_layers=args.layers,
    )
    if not task.both_ranges or not hasattr(config.mixer, "eig_range"):
        return {args.mixer: config}

    def with_range(low: float) -> LMConfig:
        return dataclasses.replace(
            config, mixer=dataclasses.replace(config.mixer, eig_range=(low, 1))
        )

    try:
        signed = with_range(-1.0)
    except ValueError:  # a cell of `rnn` whose factors have no such range
        return {args.mixer: config}
    return {
        f"{args.mixer}, gates in (-1, 1)": signed,
        f"{args.mixer}, gates in (0, 1)": with_range(0.0),
    }


def _loss(task: Task, model: recurra.LM, tokens: Tensor, labels: Tensor) -> Tensor:
    import torch.nn.functional as F

    logits = model(tokens)[0][..., : task.classes]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)


def check_memory(task: Task, config: LMConfig, batch: int) -> None:
    """Raises ValueError where the parameters, or what a step of training keeps for its gradient,
    exceed the memory of this machine."""
    import torch

    import recurra
    from recurra.lm.config import check_fits

    config.check_memory(_BYTES_PER_PARAMETER)
    model = recurra.LM(config)
    kept = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

    def keep(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    longest = task.train[1]
    drawn = task.draw(1, longest, torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = _loss(task, model, *drawn)
    needed = batch * sum(kept.values())
    del loss  # what it keeps has its own addresses until now
    check_fits(
        needed,
        f"--batch {batch} with --d-model {config.d_model} needs {needed / 2**30:.4g} GiB for "
        f"sequences of {longest}",
    )


def train(task: Task, config: LMConfig, args: argparse.Namespace) -> recurra.LM:
    """A model of that configuration after --steps, or --minutes, whichever is less.

    Raises:
        RuntimeError: the loss or its gradient is not finite.
    """
    import torch

    import recurra

    generator = torch.Generator().manual_seed(args.seed + 1)
    model = recurra.LM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    start = told = time.monotonic()
    seconds, limit = 0.0, 60 * args.minutes
    low, high = task.train
    for step in range(1, args.steps + 1):
        done = _schedule.progress(step - 0.5, args.steps, seconds, limit)
        optimizer.param_groups[0]["lr"] = args.lr * _schedule.rate(done)
        length = int(torch.randint(low, high + 1, (), generator=generator))
        if task.growing:
            place = done + (1 - done) * torch.rand((), generator=generator).item()
            length = round(low * (high / low) ** place)
        loss = _loss(task, model, *task.draw(args.batch, length, generator))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        _schedule.check_finite(step, loss.item(), norm)
        optimizer.step()
        optimizer.zero_grad()
        now = time.monotonic()
        seconds = now - start
        late = seconds > limit and step < args.steps
        if now - told > 5 or late or step == args.steps:
            told = now
            print(f"  step {step:5}  loss {loss.item():.4f}  {seconds:6.1f} s", flush=True)
        if late:
            print(f"  stopped by --minutes after step {step} of {args.steps}", flush=True)
            break
    return model


def accuracies(task: Task, model: recurra.LM, seed: int, count: int = 512) -> dict[int, float]:
    """By length: the share of sequences, fresh or held out, whose last label is right.

    Raises:
        RuntimeError: the logits are not finite.
    """
    import torch

    out = {}
    generator = torch.Generator().manual_seed(seed)
    for length in task.lengths:
        tokens, labels = task.held_out() if task.held_out else task.draw(count, length, generator)
        with torch.inference_mode():
            logits = torch.cat([model(part)[0][..., : task.classes] for part in tokens.split(64)])
        if not logits.isfinite().all():
            raise RuntimeError("what the model says is not finite: a smaller --lr may help")
        said = logits.argmax(-1)
        asked = labels >= 0
        # The last one that is asked for in each sequence.
        last = asked.long().cumsum(1).eq(asked.sum(1, keepdim=True)) & asked
        out[length] = (said == labels)[last].double().mean().item()
    return out


def _print_table(curves: dict[str, dict[int, float]]) -> None:
    width = max(len(label) for label in curves)
    lengths = next(iter(curves.values()))
    print(f"\n{'accuracy at length':{width}}" + "".join(f"{n:>8}" for n in lengths))
    for label, curve in curves.items():
        print(f"{label:{width}}" + "".join(f"{a:8.3f}" for a in curve.values()))

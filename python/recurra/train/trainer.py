"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurra.lm import LM, LMConfig, LMState
from recurra.train import parallel
from recurra.train.data import Batches, Corpus
from recurra.train.options import TrainOptions


class NonFiniteLoss(parallel.Shared):
    """The loss or the gradient of a step is not a number."""


@dataclasses.dataclass
class Step:
    """What a step reports.

    Attributes:
        loss: mean over the tokens, in nats.
        norm: of the gradient, before it was clipped.
        lr: the learning rate.
    """

    loss: float
    norm: float
    lr: float


class Trainer:
    """A model, its optimizer and its place in the data.

    Bits do not depend on when a run was interrupted and resumed, nor on the number of threads.

    Args:
        config: of the model.
        options: how it is trained.
        corpus: what it is trained on.
        world: the processes that train together.

    Attributes:
        step: optimizer steps done.
        carried: with ``options.carry``, the state after the last step, for each micro-batch.

    Raises:
        ValueError: the text is too short, the model too large, or the batch not to be shared out.
    """

    def __init__(
        self,
        config: LMConfig,
        options: TrainOptions,
        corpus: Corpus,
        world: parallel.World | None = None,
    ):
        self.world = world or parallel.World()
        self.options, self.corpus = options, corpus
        if options.batch % (options.accumulate * self.world.size):
            raise ValueError(
                f"batch = {options.batch} cannot be shared out: it must be a multiple of "
                f"accumulate = {options.accumulate} times {self.world.size} processes"
            )
        corpus.check(options.length)
        self.batches = Batches(
            corpus.train, options.batch, options.length, options.seed, options.carry
        )
        torch.manual_seed(options.seed)
        random.seed(options.seed)
        np.random.seed(options.seed % (1 << 32))
        self.model = LM(config)
        if options.precision == "float64":
            self.model.double()
        self.model.to(self.world.device)
        self._call = self.world.wrap(self.model)
        self.optimizer = _optimizer(self.model, options)
        self.step = 0
        self.carried: list[LMState | None] = [None] * options.accumulate

    @torch.no_grad()
    def load_weights(self, model: LM) -> None:
        """Takes over the parameters of a model of the same configuration."""
        weights = dict(model.named_parameters())
        for name, p in self.model.named_parameters():
            p.copy_(parallel.like(p, weights[name]))

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.options.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.dtype.itemsize == 2:
            logits = logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def train_step(self) -> Step:
        """One step of the optimizer.

        Raises:
            NonFiniteLoss: the loss or the gradient is not finite; the parameters are as before.
        """
        options, step = self.options, self.step + 1
        lr = options.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._call.train()
        size = options.batch // options.accumulate
        total = 0.0
        for micro in range(options.accumulate):
            mine = [micro * size + row for row in self.world.rows(size)]
            inputs, targets = (x.to(self.world.device) for x in self.batches.get(step, mine))
            state = None if self.batches.begins(step) else self.carried[micro]
            self.world.set_sync(self._call, micro + 1 == options.accumulate)
            with self._autocast():
                logits, state = self._call(inputs, state)
                loss = self._loss(logits, targets) / options.accumulate
            if options.carry:
                self.carried[micro] = [type(s)(*(x.detach() for x in s)) for s in state]
            del logits, state
            loss.backward()
            total += loss.item()
        (total,) = self.world.mean(total)
        limit = options.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        norm = float(parallel.whole(norm))
        if not (math.isfinite(total) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise NonFiniteLoss(
                f"the loss of step {step} is {total} and the norm of its gradient {norm}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step = step
        return Step(total, norm, lr)

    def check_loss(self) -> None:
        """Raises NonFiniteLoss where the parameters no longer give a loss."""
        self._valid_loss(1)

    def validate(self) -> float:
        """Bits per byte on the held-out text: the same places every time.

        Raises:
            NonFiniteLoss: it is not finite.
        """
        return self.bits_per_byte(self._valid_loss(self.options.eval_batches))

    @torch.no_grad()
    def _valid_loss(self, batches: int) -> float:
        """Nats per token in the first batches of the validation."""
        options = self.options
        self._call.eval()
        valid = self.corpus.valid
        count = options.eval_batches * options.batch
        last = len(valid) - options.length - 1
        places = np.linspace(0, last, count).astype(int).tolist()
        total = 0.0
        for n in range(batches):
            mine = [places[n * options.batch + row] for row in self.world.rows(options.batch)]
            read = [valid.read(place, options.length + 1) for place in mine]
            both = torch.from_numpy(np.stack(read)).to(self.world.device)
            with self._autocast():
                logits, _ = self._call(both[:, :-1])
                total += self._loss(logits, both[:, 1:]).item()
        (mean,) = self.world.mean(total / batches)
        if not math.isfinite(mean):
            raise NonFiniteLoss(f"the validation loss after step {self.step} is {mean}")
        return mean

    def bits_per_byte(self, loss: float) -> float:
        """From nats per token."""
        return loss / math.log(2) / self.corpus.bytes_per_token


def _optimizer(model: LM, options: TrainOptions) -> torch.optim.Optimizer:
    decayed, rest = [], []
    for name, p in model.named_parameters():
        matrix = p.dim() == 2 and name.endswith(".weight")
        (decayed if matrix else rest).append(p)
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        fused=True,
    )

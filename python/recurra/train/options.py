"""How a model is trained."""

from __future__ import annotations

import dataclasses
import math

from recurra.nn._config import check_fields

PRECISIONS = ("float32", "bf16", "float64")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Everything that decides the numbers of a run, besides the model and the data.

    Attributes:
        steps: optimizer steps of the whole run.
        batch: sequences of a step, over all processes and micro-batches.
        length: tokens of a sequence.
        accumulate: micro-batches of a step; each has ``batch / accumulate`` sequences.
        lr: the largest learning rate, reached after ``warmup`` steps.
        min_lr: the last learning rate, as a fraction of ``lr``; in between it follows a cosine.
        warmup: steps in which the learning rate rises linearly.
        weight_decay, beta1, beta2: of AdamW (Loshchilov and Hutter, 2019). Norms, biases and the
            recurrences' own parameters are not decayed.
        clip: largest norm of the gradient; 0 does not clip.
        precision: float32; bf16, which computes in bfloat16 under autocast and keeps parameters,
            states and optimizer in float32; or float64.
        carry: whether each sequence goes on in the next step where it stopped, with its state:
            truncated backpropagation through time (Williams and Peng, 1990). Otherwise sequences
            begin at random places.
        seed: of the parameters and the places in the data.
        eval_every: steps between validations; the last step always has one.
        eval_batches: batches of a validation.
        save_every: steps between checkpoints; the last step always has one.
        keep: checkpoints that stay.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    steps: int = 1000
    batch: int = 4
    length: int = 512
    accumulate: int = 1
    lr: float = 3e-3
    min_lr: float = 0.1
    warmup: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    precision: str = "float32"
    carry: bool = False
    seed: int = 0
    eval_every: int = 100
    eval_batches: int = 8
    save_every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        many = (1, 1 << 40)
        check_fields(
            self,
            steps=many,
            batch=(1, 1 << 20),
            length=(1, 1 << 24),
            accumulate=(1, 1 << 20),
            lr=(0.0, 1e3),
            min_lr=(0.0, 1.0),
            warmup=(0, 1 << 40),
            weight_decay=(0.0, 1e3),
            beta1=(0.0, 1 - 1e-9),
            beta2=(0.0, 1 - 1e-9),
            clip=(0.0, 1e9),
            seed=(0, (1 << 63) - 1),
            eval_every=many,
            eval_batches=(1, 1 << 20),
            save_every=many,
            keep=(1, 1 << 20),
        )
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"TrainOptions: precision must be one of {', '.join(PRECISIONS)}, "
                f"got {self.precision:.40}"
            )
        if self.batch % self.accumulate:
            raise ValueError(
                f"TrainOptions: accumulate must divide batch = {self.batch}, got {self.accumulate}"
            )

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.lr * (self.min_lr + (1 - self.min_lr) * cosine)

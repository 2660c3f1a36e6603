"""Learning rates that end with the steps, or with the time where that runs out first."""

from __future__ import annotations

import math

_WARMUP = 0.1


def progress(step: float, steps: int, seconds: float, limit: float) -> float:
    """How much of training is done, from 0 to 1: by steps, or by time where that runs out first.

    It depends on the clock only where the pace so far would not do; in the first tenth of the
    time, which a cold start may take, that is not asked.

    Args:
        step: how many are done; half of one that is under way.
        steps: of the whole training.
        seconds: that they took.
        limit: seconds that all may take.
    """
    done = step / steps
    return min(1.0, max(done, seconds / limit)) if seconds > 0.1 * limit else done


def rate(done: float, warmup: float = _WARMUP) -> float:
    """The learning rate as a part of the largest: up a line, then down a cosine.

    Args:
        done: from 0 to 1, of :func:`progress`.
        warmup: where the line ends.
    """
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raises RuntimeError where the loss of a step, or the norm of its gradient, is not finite."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise RuntimeError(
            f"the loss of step {step} is {loss:.4g} and the norm of its gradient {norm:.4g}: "
            "a smaller --lr may help"
        )

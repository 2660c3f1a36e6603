"""What CUDA kernels met and nobody checked, since checking would have had to wait for them."""

from __future__ import annotations

import torch

from recurra import _library

_SENTENCES = {
    "cu_seqlens": "must ascend from 0 to T, but a call on {} had values that do not, which were "
    "clamped",
    "slots": "must be below the number of states, but a call on {} had one that is not, whose row "
    "was skipped",
}


def sentences(said: str, device: object) -> list[str]:
    """One for each line that the CUDA library has, such as "cu_seqlens of rnn"."""
    lines = said.splitlines()
    return [f"{line} {_SENTENCES[line.split()[0]].format(device)}" for line in lines]


def check_status(device: torch.device | str | int | None = None) -> None:
    """Raises where a kernel on a device was given values that it had to clamp.

    On a CUDA device the values of ``cu_seqlens`` and ``slots`` are not checked when an op is
    called, which would wait for the device: kernels clamp them and leave a mark. This function
    waits for all that was put on the device, by any stream, and then reads the marks and takes them
    away. It cannot be called while a CUDA graph is captured. On the CPU, where the ops themselves
    raise, it returns at once.

    Args:
        device: the current CUDA device when None, or the CPU where there is none.

    Raises:
        RuntimeError: an argument of an op had such values since this was last called; a sentence
            for each.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on = torch.device(device)
    if on.type != "cuda" or "cuda" not in _library.loaded():
        return
    if on.index is None:
        on = torch.device("cuda", torch.cuda.current_device())
    said = torch.ops.recurra._device_status(torch.empty(0, device=on))
    if said:
        raise RuntimeError("recurra: " + "; ".join(sentences(said, on)))

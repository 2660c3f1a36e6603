"""Training over several processes: which of them this is, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

KINDS = ("ddp", "fsdp")


class Shared(RuntimeError):
    """An error that every process meets, so that one of them need say it."""


class World:
    """The processes that train together; one, without torch.distributed, unless torchrun started
    this one.

    Attributes:
        rank: number of this process.
        size: how many there are.
        device: where this process computes.

    Raises:
        ValueError: the device is not there.
    """

    def __init__(self, kind: str = "ddp", device: str | None = None):
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.kind = kind
        local = int(os.environ.get("LOCAL_RANK", "0"))
        kind_of_device = (device or "cpu").split(":")[0]
        if kind_of_device not in ("cpu", "cuda"):
            raise ValueError(f"the device must be cpu or cuda, got {device}")
        if kind_of_device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"the device is {device}, but torch finds no GPU here")
        self.device = torch.device(device or "cpu")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", local)
        self._own_group = self.size > 1 and not dist.is_initialized()
        if self._own_group:
            # One process may tokenize for long while the others wait.
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(hours=6)
            )

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def rows(self, batch: int) -> range:
        """The sequences of a batch that this process trains on."""
        share = batch // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in training. With FSDP the parameters of ``model`` are sharded in
        place; its blocks become units of their own."""
        if self.size == 1:
            return model
        if self.kind == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def set_sync(self, module: nn.Module, on: bool) -> None:
        """Whether the next backward pass exchanges gradients; only the last micro-batch's must."""
        if self.size == 1:
            return
        if self.kind == "ddp":
            module.require_backward_grad_sync = on
        else:
            module.set_requires_gradient_sync(on)

    def mean(self, *values: float) -> list[float]:
        """The means over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return (total / self.size).tolist()

    def largest(self, value: float) -> float:
        """The largest over all processes."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def gather_rows(self, x: Tensor) -> Tensor:
        """The rows of all processes, in their order."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        """Waits for the others."""
        if self.size > 1:
            dist.barrier()

    def first(self, task: Callable[[], None]) -> None:
        """Runs ``task`` in the process that leads, the others wait; its failure is everyone's."""
        failed: Exception | None = None
        if self.leads:
            try:
                task()
            except (OSError, ValueError, RuntimeError) as error:
                failed = error
        (failures,) = self.mean(float(failed is not None))
        if failed is not None:
            raise failed
        if failures:
            raise Shared("the first process failed; it says why")

    def close(self) -> None:
        """Leaves the group that this object made."""
        if self._own_group and dist.is_initialized():
            dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, in one piece; every process must ask."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full else tensor


def like(tensor: Tensor, whole_tensor: Tensor) -> Tensor:
    """A tensor in one piece, sharded as ``tensor`` is."""
    if not hasattr(tensor, "full_tensor"):
        return whole_tensor.to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole_tensor.to(tensor.device), tensor.device_mesh, tensor.placements)

"""A DataLoader whose workers call the ops; test_process.py runs it with `fork` and `spawn`."""

from __future__ import annotations

import sys

import torch

from opdb import OPS
from support import Draw, assert_same, everything


class Items(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, n: int) -> list:
        B, packed = (2, False) if n % 2 else (1, True)
        return [everything(op, op.make(Draw(n), B, 9, 40, torch.float32, packed)) for op in OPS]


def main(start: str) -> None:
    torch.set_num_threads(2)
    items = Items()
    want = [items[n] for n in range(len(items))]  # the parent has used its threads
    loader = torch.utils.data.DataLoader(
        items, batch_size=None, num_workers=2, multiprocessing_context=start
    )
    count = 0
    for got, expected in zip(loader, want, strict=True):
        for one, other in zip(got, expected, strict=True):
            assert_same([tuple(pair) for pair in one], other, start)
        count += 1
    assert count == 10


if __name__ == "__main__":
    main(sys.argv[1])

"""recurra.check_status without a GPU: the sentences, and that the CPU has nothing to tell."""

from __future__ import annotations

import pytest
import torch

import recurra
from opdb import OPS
from recurra import _status
from support import ROOT


def test_the_cpu_is_always_well():
    assert recurra.check_status("cpu") is None
    with pytest.raises(RuntimeError, match="cu_seqlens"):  # told at once
        recurra.linear_scan(
            torch.ones(1, 3, 2), torch.ones(1, 3, 2), cu_seqlens=torch.tensor([0, 4])
        )
    assert recurra.check_status("cpu") is None


def test_the_sentences():
    device = torch.device("cuda:1")
    assert _status.sentences("", device) == []
    assert _status.sentences("cu_seqlens of rnn\nslots of rnn_step\n", device) == [
        "cu_seqlens of rnn must ascend from 0 to T, but a call on cuda:1 had values that do not, "
        "which were clamped",
        "slots of rnn_step must be below the number of states, but a call on cuda:1 had one that "
        "is not, whose row was skipped",
    ]


def test_every_op_has_a_word():
    text = (ROOT / "csrc/cuda/status.cu").read_text()
    for op in OPS:
        assert f'"{op.name}"' in text

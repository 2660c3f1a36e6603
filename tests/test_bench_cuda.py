"""The bench of a GPU, on a CPU: small shapes and a clock that is made up."""

from __future__ import annotations

import pytest
import torch

from recurra.bench import cuda


@pytest.fixture
def on_the_cpu(monkeypatch):
    def clock(call, repeat=1):
        call()
        return 1e-3

    small = {
        "_DEVICE": "cpu",
        "SCANS": ((2, 5, 3),),
        "SELECTIVE": (((1, 6, 4, 2), False), ((1, 9, 2, 2), True)),
        "CONV": (2, 5, 3),
        "SOFTMAX": (2, 5, 3),
        "BLOCKS": (((1, 6, 2, 3), False), ((1, 9, 2, 2), True)),
        "CHANNELS": (2, 2**15),
        "LENGTHS": (4, 2**15),
        "LARGEST": 2**19,
        "COPIED": 16,
        "exp_rate": lambda: 1e12,
        "seconds": clock,
    }
    for name, value in small.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")


def test_each_op_is_told_and_saved_as_it_is_known(on_the_cpu, capsys):
    saved = []
    results = cuda.run(lambda about, cases: saved.append(len(cases)))
    assert saved == list(range(1, len(results) + 1))
    text = capsys.readouterr().out
    for op in ("linear_scan", "selective_scan", "causal_conv1d", "softmax_scan", "block_scan"):
        of_op = [c for c in results if c["case"].startswith(op) and "seconds" in c]
        assert any("backward" in c["case"] for c in of_op) and all(c["ratio"] > 0 for c in of_op)
        assert all(c["case"] in text for c in of_op)
    ratios = {c["case"]: c["ratio"] for c in results if " / " in c["case"]}
    assert ratios["selective_scan/1x6x4x2/bfloat16/backward / forward"] == 1
    assert ratios["rnn/paragru/32768x4 auto / the better"] == 1
    assert ratios["rnn/paragru/2x32768 newton / sequential"] == 1
    assert "newton / sequential" in text and "left out: more than 524288 inputs" in text


def test_what_goes_wrong_leaves_the_other_ops(on_the_cpu, monkeypatch, capsys):
    def full(*shape, dtype=torch.float32):
        raise RuntimeError("out of memory")

    def graph():
        raise RuntimeError("no graph")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(cuda, "_normal", full)
    results = cuda.run()
    errors = {c["case"]: c["error"] for c in results if "error" in c}
    assert errors["linear_scan"] == "out of memory" and "steps" in errors
    assert any(c["case"].startswith("rnn/") for c in results)
    assert "softmax_scan: RuntimeError: out of memory" in capsys.readouterr().out

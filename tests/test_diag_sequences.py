"""recurra diag parity, flipflop, evenpair, s3, digits, recall: tasks, tables, exit statuses."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from recurra.cli import main
from recurra.diag import sequence, tasks
from recurra.diag.tasks import TASKS


def draw(name: str, count: int = 50, length: int = 40):
    return TASKS[name].draw(count, length, torch.Generator().manual_seed(0))


def test_labels_are_what_the_tasks_say():
    tokens, labels = draw("parity")
    assert torch.equal(labels, tokens.cumsum(1) % 2)
    tokens, labels = draw("evenpair")
    assert torch.equal(labels, (tokens == tokens[:, :1]).long())
    tokens, labels = draw("recall")
    assert torch.equal(labels[:, -1], tokens[:, 0]) and (labels[:, :-1] == -1).all()
    assert tokens[:, 0].max() < 8 and tokens[:, 1:].min() >= 8
    tokens, labels = draw("s3")
    assert len(labels.unique()) == 6 and torch.equal(labels[:, 0], tokens[:, 0])


@pytest.mark.parametrize("length", [40, 41])
def test_flip_flop_asks_for_what_was_written(length):
    tokens, labels = draw("flipflop", length=length)
    assert tokens.shape == labels.shape == (50, length)
    asked = 0
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        memory = None
        for t in range(0, length, 2):
            instruction = "wri01"[row[t]]
            if instruction == "r":
                assert answers[t] == memory
                asked += 1
            else:
                assert answers[t] == -1
            if instruction == "w" and t + 1 < length:
                memory = row[t + 1] - 3
            assert t + 1 == length or answers[t + 1] == -1
    assert asked > 100


def test_digits_are_held_out_and_moved_by_a_pixel():
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = TASKS["digits"].held_out()
    assert (
        pixels.shape == (360, 64)
        and pixels.max() == 16
        and set(labels[:, -1].tolist()) == {*range(10)}
    )
    moved, digits = draw("digits", 300, 64)
    images = torch.from_numpy(datasets.load_digits().images).long()
    held_out = {tuple(row) for row in pixels.tolist()}
    others = [image for image in images if tuple(image.flatten().tolist()) not in held_out]
    assert len(others) >= len(images) - 365
    known = torch.stack(others)
    padded = torch.nn.functional.pad(known, (1, 1, 1, 1))
    shifts = torch.stack([padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    for row in moved[:40]:
        assert (shifts.flatten(2) == row).all(2).any()
    assert (digits[:, :-1] == -1).all() and (digits[:, -1] >= 0).all()


SMALL = ["--d-model", "16", "--batch", "8", "--threads", "1"]


def test_parity_shows_both_ranges_and_exits_by_the_signed_one(tmp_path, capsys):
    picture = tmp_path / "parity.png"
    command = ["diag", "parity", "--mixer", "mingru", *SMALL, "--picture", str(picture)]
    assert main([*command, "--steps", "2", "--min-acc", "0.2"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^mingru, gates in \((-1|0), 1\) +((?:\d\.\d{3} *){5})$", out, re.MULTILINE)
    assert [low for low, _ in rows] == ["-1", "0"]
    assert picture.stat().st_size > 10_000
    assert main([*command, "--steps", "2", "--min-acc", "0.999"]) == 1
    err = capsys.readouterr().err
    assert "--min-acc asks for 0.999" in err and err.count("\n") == 1


@pytest.mark.parametrize("mixer", ["paragru", "lru"])
def test_parity_of_a_mixer_without_a_range_is_one_line(mixer, tmp_path, capsys):
    command = ["diag", "parity", "--mixer", mixer, *SMALL, "--steps", "1"]
    assert main([*command, "--picture", str(tmp_path / "x.png")]) == 0
    out = capsys.readouterr().out
    assert re.findall(rf"^({mixer}.*?) +(?:\d\.\d{{3}} *){{5}}$", out, re.MULTILINE) == [mixer]


def test_signed_gates_learn_parity_and_positive_ones_do_not(tmp_path, capsys):
    command = ["diag", "parity", "--mixer", "mingru", "--d-model", "32", "--steps", "300"]
    command += ["--batch", "32", "--threads", "1", "--picture", str(tmp_path / "parity.png")]
    assert main([*command, "--min-acc", "0.95"]) == 0
    (positive,) = re.findall(r"\(0, 1\).* (\d\.\d{3})$", capsys.readouterr().out, re.MULTILINE)
    assert float(positive) < 0.6


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("parity", "digits")])
def test_every_task_runs_with_its_mixer(name, tmp_path, capsys):
    command = ["diag", name, *SMALL, "--steps", "2", "--picture", str(tmp_path / "x.png")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert all(str(length) in out for length in TASKS[name].lengths)


def test_digits_run(tmp_path):
    pytest.importorskip("sklearn")
    command = ["diag", "digits", "--mixer", "s4d", *SMALL, "--steps", "2"]
    assert main([*command, "--picture", str(tmp_path / "x.png")]) == 0


def test_digits_without_scikit_learn(monkeypatch, capsys):
    tasks._digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["diag", "digits"]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "recurra diag: the digits come with scikit-learn, which is not installed: "
        "pip install scikit-learn\n"
    )
    assert not captured.out  # nothing was trained


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--mixer transformer", "--mixer must be one of mamba, rnn, "),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--d-model -4", "--d-model must be at least 1, got -4"),
        ("--minutes 0", "--minutes must be positive, got 0.0"),
        ("--lr nan", "--lr must be positive, got nan"),
        ("--min-acc nan", "--min-acc must be from 0 to 1, got nan"),
        ("--min-acc 99", "--min-acc must be from 0 to 1, got 99.0"),
        ("--picture nowhere/s3.png", "nowhere: no such folder"),
        ("--picture .", ": is a folder"),
    ],
)
def test_what_is_wrong_is_one_sentence(options, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sequence, "train", lambda *_: pytest.fail("trained"))
    assert main(["diag", "s3", *options.split()]) == 1
    err = capsys.readouterr().err
    assert err.startswith("recurra diag: ") and sentence in err and err.count("\n") == 1

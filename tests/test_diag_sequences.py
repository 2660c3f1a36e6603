"""recurra diag parity, flipflop, evenpair, s3, digits, recall: tasks, tables, exit statuses."""

from __future__ import annotations

import dataclasses
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import recurra
from recurra.cli import main
from recurra.diag import _schedule, sequence, tasks
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


def variants(name: str, mixer: str) -> list:
    task = TASKS[name]
    args = SimpleNamespace(mixer=mixer, d_model=64, layers=1)
    return list(sequence._variants(args, task).values())


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
    assert out.startswith(f"{mixer} has no other range for its gates, so there is one curve\n")


def test_signed_gates_learn_parity_and_positive_ones_do_not(tmp_path, capsys):
    command = ["diag", "parity", "--mixer", "mingru", "--d-model", "32", "--steps", "300"]
    command += ["--batch", "32", "--threads", "1", "--picture", str(tmp_path / "parity.png")]
    assert main([*command, "--min-acc", "0.95"]) == 0
    (positive,) = re.findall(r"\(0, 1\).* (\d\.\d{3})$", capsys.readouterr().out, re.MULTILINE)
    assert float(positive) < 0.6


def test_what_a_step_keeps_grows_with_what_it_should(monkeypatch):
    """The estimate is what the hooks of autograd count for the whole batch, within a tenth."""
    task, config = TASKS["s3"], variants("s3", "lrnn")[0]
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model = recurra.LM(config)
    drawn = task.draw(64, 40, torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = sequence._loss(task, model, *drawn)
    weights = sum(4 * p.numel() for p in model.parameters())
    needed = sum(kept.values()) - weights
    assert loss.isfinite()
    monkeypatch.setattr("recurra.lm.config._machine_memory", lambda: 1.1 * needed)
    sequence.check_memory(task, config, 64)
    monkeypatch.setattr("recurra.lm.config._machine_memory", lambda: 0.9 * needed)
    with pytest.raises(ValueError, match="--batch 64 with --d-model 64 needs "):
        sequence.check_memory(task, config, 64)


def test_progress_is_of_steps_until_the_time_is_too_short():
    # The pace does, and a cold start does not matter.
    assert _schedule.progress(1, 100, 9.0, 100.0) == 0.01
    assert _schedule.progress(50, 100, 49.0, 100.0) == 0.5
    # Half of the time is gone after a quarter of the steps: it ends with the time.
    assert _schedule.progress(25, 100, 50.0, 100.0) == 0.5
    assert _schedule.progress(49, 100, 101.0, 100.0) == 1.0


def test_the_rate_rises_falls_and_ends_at_zero():
    rates = [_schedule.rate(n / 1000) for n in range(1001)]
    assert rates[0] == 0 and rates[50] == pytest.approx(0.5) and max(rates) == rates[100] == 1
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[550] == pytest.approx(0.5) and rates[-1] == pytest.approx(0, abs=1e-12)


def trained_rates(monkeypatch, seconds_of_step: float, steps: int = 40) -> list[float]:
    """The learning rate of every step of two minutes in which a step takes so long."""
    now, rates, step = [0.0], [], torch.optim.AdamW.step

    def timed(self, *rest):
        now[0] += seconds_of_step
        rates.append(self.param_groups[0]["lr"])
        return step(self, *rest)

    monkeypatch.setattr(sequence, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", timed)
        args = SimpleNamespace(seed=0, lr=0.01, batch=2, steps=steps, minutes=2.0)
        sequence.train(TASKS["s3"], variants("s3", "lrnn")[0], args)
    return rates


def test_the_rate_ends_with_the_minutes(monkeypatch, capsys):
    quick = trained_rates(monkeypatch, 1e-3)
    assert "stopped" not in capsys.readouterr().out
    assert quick == trained_rates(monkeypatch, 2.9)
    assert "stopped" not in capsys.readouterr().out
    slow = trained_rates(monkeypatch, 8.0)
    assert "  stopped by --minutes after step 16 of 40\n" in capsys.readouterr().out
    for rates in (quick, slow):
        assert max(rates) > 0.0095 and rates[-1] < 0.0002
        top = rates.index(max(rates))
        assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:])[::-1]


def test_lengths_grow_to_their_end_with_the_minutes(monkeypatch):
    lengths, now = [], [0.0]
    draw = TASKS["recall"].draw

    def drawn(count, length, generator):
        lengths.append(length)
        now[0] += 10.0
        return draw(count, length, generator)

    task = dataclasses.replace(TASKS["recall"], draw=drawn)
    monkeypatch.setattr(sequence, "time", SimpleNamespace(monotonic=lambda: now[0]))
    args = SimpleNamespace(seed=0, lr=0.01, batch=2, steps=1000, minutes=2.0)
    sequence.train(task, variants("recall", "lru")[0], args)
    assert len(lengths) == 13 and lengths[-1] == task.train[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(value, tmp_path, monkeypatch, capsys):
    loss = sequence._loss
    monkeypatch.setattr(sequence, "_loss", lambda *given: loss(*given) * value)
    command = ["diag", "s3", *SMALL, "--steps", "3", "--picture", str(tmp_path / "x.png")]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"recurra diag: the loss of step 1 is {value} ") and err.count("\n") == 1


def test_parameters_that_the_last_step_broke_are_an_error(tmp_path, monkeypatch, capsys):
    step = torch.optim.AdamW.step

    def broken(self, *rest):
        step(self, *rest)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    command = ["diag", "s3", *SMALL, "--steps", "1", "--picture", str(tmp_path / "x.png")]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert (
        err.startswith("recurra diag: what the model says is not finite")
        and err[:-1].count("\n") == 0
    )


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
        ("--minutes 0", "--minutes must be positive and at most 1e+07, got 0.0"),
        ("--minutes nan", "--minutes must be positive and at most 1e+07, got nan"),
        ("--minutes inf", "--minutes must be positive and at most 1e+07, got inf"),
        ("--lr nan", "--lr must be positive and at most 1000, got nan"),
        ("--lr inf", "--lr must be positive and at most 1000, got inf"),
        ("--seed -1", "--seed must be from 0 to 2^63 - 1, got -1"),
        ("--seed 18446744073709551616", "--seed must be from 0 to 2^63 - 1, got "),
        ("--d-model 1048576", " GiB of parameters, this machine has "),
        ("--batch 1000000000", "--batch 1000000000 with --d-model 64 needs "),
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

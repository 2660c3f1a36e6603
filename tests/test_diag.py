"""recurra diag newton and adding: what they print, draw and refuse."""

from __future__ import annotations

import re

import pytest
import torch

from recurra.cli import main
from recurra.diag import adding


def test_newton_prints_passes_and_exponents(tmp_path, capsys):
    picture = tmp_path / "newton.png"
    command = ["diag", "newton", "--cell", "elstm", "--channels", "3", "--length", "512"]
    assert main([*command, "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^ +([\d.]+) +(\d+|-) +(\d+|-) +(-?\d+\.\d+)$", out, re.MULTILINE)
    assert [float(row[0]) for row in rows] == [0.1, 0.5, 0.9, 1, 2, 4, 8]
    # With weights this small the cell forgets, and Newton's method converges quickly.
    assert int(rows[0][1]) <= 2 and int(rows[0][2]) <= 5 and float(rows[0][3]) < -0.3
    assert float(rows[-1][3]) > float(rows[0][3])
    assert picture.stat().st_size > 10_000


def test_the_adding_problem_is_what_it_says():
    x, want = adding.samples(200, 30, torch.Generator().manual_seed(0))
    numbers, markers = x.unbind(2)
    assert x.shape == (200, 30, 2) and (markers.sum(1) == 2).all()
    assert (markers[:, :15].sum(1) == 1).all() and torch.allclose((numbers * markers).sum(1), want)
    assert want.var().item() == pytest.approx(adding.TRIVIAL, rel=0.3)


def test_adding_learns_a_short_one(tmp_path, capsys):
    command = ["diag", "adding", "--length", "6", "--channels", "32", "--steps", "400"]
    command += ["--picture", str(tmp_path / "adding.png")]
    assert main([*command, "--max-mse", "0.08"]) == 0
    assert "MSE" in capsys.readouterr().out and (tmp_path / "adding.png").stat().st_size > 5_000
    assert main([*command, "--steps", "1", "--max-mse", "0.08"]) == 1
    assert "the mean squared error must be at most 0.08" in capsys.readouterr().err


def test_adding_that_diverges_says_so(tmp_path, capsys):
    command = ["diag", "adding", "--length", "6", "--lr", "1000", "--steps", "50"]
    assert main([*command, "--picture", str(tmp_path / "adding.png")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("recurra diag: the loss of step ") and err.count("\n") == 1


def test_adding_says_where_its_minutes_ended(tmp_path, capsys):
    command = ["diag", "adding", "--length", "6", "--minutes", "1e-6", "--steps", "50"]
    assert main([*command, "--picture", str(tmp_path / "adding.png")]) == 0
    assert "stopped by --minutes after step 1 of 50\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("newton --cell gru", "--cell must be one of elstm, "),
        ("newton --length 0", "--length must be at least 1, got 0"),
        ("adding --cell gru", "--cell must be one of elstm, "),
        ("adding --length 1", "--length must be at least 2, got 1"),
        ("adding --batch 0", "--batch must be at least 1, got 0"),
        ("adding --minutes inf", "--minutes must be positive and at most 1e+07, got inf"),
        ("adding --lr nan", "--lr must be positive and at most 1000, got nan"),
        ("adding --max-mse nan", "--max-mse must be at least 0, got nan"),
        ("copy --seconds 0", "--seconds must be positive and at most 1e+07, got 0.0"),
        ("copy --min-acc 2", "--min-acc must be from 0 to 1, got 2.0"),
        ("bias --seed -1", "--seed must be from 0 to 2^63 - 1, got -1"),
        ("newton --seed 9223372036854775808", "--seed must be from 0 to 2^63 - 1, got "),
        ("copy --picture nowhere/copy.png", "nowhere: no such folder"),
    ],
)
def test_what_is_wrong_is_one_sentence(command, sentence, capsys):
    assert main(["diag", *command.split()]) == 1
    err = capsys.readouterr().err
    assert err.startswith("recurra diag: ") and sentence in err and err.count("\n") == 1

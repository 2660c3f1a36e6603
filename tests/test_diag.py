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


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("newton --cell gru", "--cell must be one of elstm, "),
        ("newton --length 0", "--length must be at least 1, got 0"),
        ("adding --cell gru", "--cell must be one of elstm, "),
        ("adding --length 1", "--length must be at least 2, got 1"),
        ("adding --batch 0", "--batch must be at least 1, got 0"),
        ("copy --picture nowhere/copy.png", "nowhere: no such folder"),
    ],
)
def test_what_is_wrong_is_one_sentence(command, sentence, capsys):
    assert main(["diag", *command.split()]) == 1
    err = capsys.readouterr().err
    assert err.startswith("recurra diag: ") and sentence in err and err.count("\n") == 1

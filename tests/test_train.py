"""Training: the schedule, what a step computes, that it learns, and several processes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import recurra
from recurra.lm import LMConfig
from recurra.lm.tokenizer import ByteTokenizer
from recurra.nn import MambaConfig
from recurra.train import Trainer, TrainOptions, log, state
from recurra.train.data import Bytes, Corpus
from recurra.train.run import run
from recurra.train.trainer import NonFiniteLoss
from support import threads

CONFIG = LMConfig(d_model=16, n_layers=2, mixer=MambaConfig(d_state=4))
TEXT = "".join(f"{i} squared is {i * i}.\n" for i in range(3000)).encode()
QUICK = {"steps": 6, "batch": 4, "length": 32, "warmup": 2, "eval_batches": 1, "lr": 1e-2}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small wait for threads more than they compute."""
    with threads(1):
        yield


def corpus() -> Corpus:
    return Corpus(Bytes([TEXT]), ByteTokenizer())


def trainer(**options) -> Trainer:
    return Trainer(CONFIG, TrainOptions(**(QUICK | options)), corpus())


def test_the_learning_rate():
    options = TrainOptions(steps=110, warmup=10, lr=2.0, min_lr=0.25)
    rates = [options.learning_rate(step) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[59] == pytest.approx(2.0 * (0.25 + 0.75 / 2))  # half-way
    assert rates[-1] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert TrainOptions(warmup=0, steps=1).learning_rate(1) == pytest.approx(3e-4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"steps": 0}, "steps must be from 1 to"),
        ({"lr": float("nan")}, "lr must be from 0.0 to 1000.0, got nan"),
        ({"batch": 4, "accumulate": 3}, "accumulate must divide batch = 4, got 3"),
        ({"precision": "int8"}, "precision must be one of float32, bf16, float64, got int8"),
        ({"length": 2.5}, r"length must be int, got 2.5 \(float\)"),
    ],
)
def test_options_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**wrong)


def test_a_step_is_adamw_on_the_clipped_mean_gradient():
    t = trainer(precision="float64", clip=0.5, weight_decay=0.3, accumulate=2)
    torch.manual_seed(0)
    plain = recurra.LM(CONFIG).double()
    plain.load_state_dict(t.model.state_dict())
    plain.use_ops(recurra.reference)
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in plain.named_parameters()}
    for step in range(1, 4):
        x, y = t.batches.get(step, range(4))
        done = t.train_step()
        loss = F.cross_entropy(plain(x)[0].flatten(0, 1), y.flatten())
        names, params = zip(*plain.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, params)
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        assert done.loss == pytest.approx(loss.item(), rel=1e-12)
        assert done.norm == pytest.approx(norm.item(), rel=1e-9) and norm > 0.5
        lr = t.options.learning_rate(step)
        with torch.no_grad():
            for name, p, g in zip(names, params, grads, strict=True):
                g = g * min(1.0, 0.5 / (norm + 1e-6))
                m, v = moments[name]
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.05)
                if p.dim() == 2 and "A_log" not in name:
                    p.mul_(1 - lr * 0.3)
                m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.95**step)
                p.sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))
    for (name, p), q in zip(t.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9, msg=name)


def test_micro_batches_change_nothing():
    curves = []
    for accumulate in (1, 2, 4):
        t = trainer(precision="float64", accumulate=accumulate)
        curves.append([t.train_step().loss for _ in range(5)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-10)
    assert curves[2] == pytest.approx(curves[0], rel=1e-10)


def test_carried_state_is_that_of_the_whole_sequence():
    """With a learning rate of zero the loss of each step is that of its part of one long pass."""
    t = trainer(carry=True, lr=0.0, precision="float64", weight_decay=0.0, accumulate=2)
    losses = [t.train_step().loss for _ in range(5)]
    parts = [t.batches.get(step, range(4)) for step in range(1, 6)]
    with torch.no_grad():
        logits, last = t.model(torch.cat([x for x, _ in parts], 1))
    wanted = [
        F.cross_entropy(piece.flatten(0, 1), y.flatten()).item()
        for piece, (_, y) in zip(logits.split(32, 1), parts, strict=True)
    ]
    assert losses == pytest.approx(wanted, rel=1e-12)
    carried = torch.cat([layers[1].ssm for layers in t.carried])
    torch.testing.assert_close(carried, last[1].ssm, rtol=1e-10, atol=1e-13)
    assert not carried.requires_grad


def test_validation_is_bits_per_byte():
    t = trainer(precision="float64", eval_batches=2)
    valid = t.corpus.valid
    places = np.linspace(0, len(valid) - 33, 8).astype(int)
    tokens = torch.from_numpy(np.stack([valid.read(p, 33) for p in places]))
    with torch.no_grad():
        loss = F.cross_entropy(t.model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
    assert t.validate() == pytest.approx(loss.item() / math.log(2), rel=1e-12)
    assert t.validate() == pytest.approx(8.0, abs=0.4)  # knows nothing yet


@pytest.mark.parametrize("options", [{}, {"carry": True}, {"precision": "bf16"}], ids=str)
def test_it_learns(options):
    t = trainer(steps=120, length=64, **options)
    before = t.validate()
    for _ in range(120):
        t.train_step()
    assert t.validate() < 0.5 * before
    dtype = next(t.model.parameters()).dtype
    assert dtype == torch.float32


def test_a_run_leaves_its_record(tmp_path):
    t = trainer(eval_every=3, save_every=2, keep=2)
    assert run(t, tmp_path, "text") == 0
    entries = log.read(tmp_path / "log.jsonl")
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in entries if "valid_bpb" in e] == [0, 3, 6]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / state.FOLDER).iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]
    lm = recurra.LM.from_pretrained(tmp_path / state.FOLDER / "step-00000006")
    for a, b in zip(lm.parameters(), t.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    t = trainer(save_every=2, eval_every=100, steps=4)
    run(t, tmp_path, "text")
    kept = [p.clone() for p in recurra.LM.from_pretrained(newest(tmp_path)).parameters()]
    longer = trainer(steps=8)
    state.resume(longer, newest(tmp_path), "text")
    with torch.no_grad():
        longer.model.layers[1].mixer.D[3] = float("nan")
    with pytest.raises(
        NonFiniteLoss, match="loss of step 5 is nan .* good checkpoint is .*-00000004"
    ):
        run(longer, tmp_path, "text")
    again = recurra.LM.from_pretrained(newest(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(kept, again.parameters(), strict=True))


def newest(folder: Path) -> Path:
    from recurra.train import checkpoint

    return checkpoint.newest(folder / state.FOLDER)


# ---- as a command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.txt").write_bytes(TEXT)
    recurra.LM(CONFIG).save_pretrained(folder / "model")
    return folder


def command(files: Path, run: Path, *arguments: str, processes: int = 1) -> list[str]:
    launch = ["-m", "recurra"]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launch += ["-m", "recurra"]
    options = [f"--{k.replace('_', '-')}={v}" for k, v in QUICK.items()]
    data = ["--data", str(files / "text.txt"), "--config", str(files / "model" / "config.json")]
    return [sys.executable, *launch, "train", str(run), *data, *options, *arguments]


def test_what_the_pieces_of_a_carried_run_must_share(files, tmp_path):
    first = command(files, tmp_path, "--carry", "--save-every=3", "--threads=1")
    subprocess.run(first, check=True, capture_output=True)
    for option, message in (
        ("--length=16", "length must stay 32, got 16"),
        ("--precision=float64", "precision must stay float32, got float64"),
        ("--no-carry", ""),
    ):
        again = [sys.executable, "-m", "recurra", "train", str(tmp_path), "--resume", "--steps=8"]
        done = subprocess.run([*again, option], capture_output=True, text=True)
        assert done.returncode == (1 if message else 0), done.stderr
        assert message in done.stderr and "Traceback" not in done.stderr


def test_options_that_contradict_each_other(files, tmp_path):
    subprocess.run(command(files, tmp_path, "--threads=1"), check=True, capture_output=True)
    again = [sys.executable, "-m", "recurra", "train", str(tmp_path), "--resume"]
    done = subprocess.run([*again, "--config=small"], capture_output=True, text=True)
    assert done.returncode == 1 and "holds another model than --config small" in done.stderr
    both = command(files, tmp_path / "new", "--minutes=1")
    done = subprocess.run(both, capture_output=True, text=True)
    assert done.returncode == 1 and "give --steps or --minutes, not both" in done.stderr


def test_a_validation_that_was_left_out_is_made_up_for(tmp_path):
    t = trainer(eval_every=3, save_every=3, steps=3)
    run(t, tmp_path, "text")
    path = tmp_path / "log.jsonl"
    lines = path.read_text().splitlines()
    assert "valid_bpb" in lines[-1]
    path.write_text("\n".join(lines[:-1]) + "\n")  # killed between the checkpoint and it
    again = trainer(eval_every=3, save_every=3, steps=3)
    state.resume(again, newest(tmp_path), "text")
    run(again, tmp_path, "text")
    assert path.read_text().splitlines() == lines


def test_a_checkpoint_gives_a_loss(tmp_path):
    """Weights that explode in the very step that is to be saved do not take the place of others."""
    t = trainer(save_every=1, keep=1, steps=2)
    run(t, tmp_path, "text")
    good = newest(tmp_path)
    wild = trainer(save_every=1, keep=1, steps=4)
    state.resume(wild, good, "text")
    step = wild.train_step

    def explode():
        done = step()
        with torch.no_grad():
            wild.model.norm_f.weight.fill_(float("inf"))
        return done

    wild.train_step = explode
    with pytest.raises(NonFiniteLoss, match="after step 3 is nan; the last good checkpoint is"):
        run(wild, tmp_path, "text")
    assert newest(tmp_path) == good


def curve(run: Path) -> list[tuple]:
    return [
        (e["step"], e.get("loss"), e.get("valid_bpb"), e.get("norm"))
        for e in log.read(run / "log.jsonl")
    ]


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory) -> dict[bool, list[tuple]]:
    curves = {}
    for carry in (False, True):
        folder = tmp_path_factory.mktemp("one")
        extra = ["--precision=float64", "--accumulate=2", "--eval-every=3"]
        extra += ["--carry"] if carry else []
        subprocess.run(command(files, folder, *extra), check=True, capture_output=True)
        curves[carry] = curve(folder)
    return curves


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("carry", [False, True], ids=["random", "carry"])
def test_two_processes_train_as_one(files, one_process, kind, carry, tmp_path):
    """The same curve up to rounding, in float64, across a save and a resume by one process."""
    extra = ["--precision=float64", "--accumulate=2", "--eval-every=3", f"--parallel={kind}"]
    extra += ["--carry"] if carry else []
    half = command(files, tmp_path, *extra, "--save-every=3", processes=2)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(half, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    wanted = one_process[carry]
    assert len(wanted) == 9

    def same(got: list[tuple]) -> None:
        for a, b in zip(got, wanted, strict=True):
            assert [x is None for x in a] == [x is None for x in b]
            assert [x for x in a if x is not None] == pytest.approx(
                [x for x in b if x is not None], rel=1e-9
            )

    same(curve(tmp_path))
    # One process goes on from the third step of the two.
    import shutil

    shutil.rmtree(tmp_path / state.FOLDER / "step-00000006")
    resumed = [sys.executable, "-m", "recurra", "train", str(tmp_path), "--resume"]
    done = subprocess.run(resumed, capture_output=True, text=True)
    assert done.returncode == 0 and "goes on from" in done.stderr, done.stderr
    same(curve(tmp_path))


def test_ctrl_c_saves_and_leaves(files, tmp_path):
    going = subprocess.Popen(
        command(files, tmp_path, "--steps=100000", "--eval-every=100000", "--save-every=100000"),
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in going.stderr:
        if line.startswith("step 1/"):
            break
    going.send_signal(signal.SIGINT)
    _, rest = going.communicate(timeout=60)
    assert going.returncode == 130
    assert "stopped, saved after step" in rest and "Traceback" not in rest
    last = max(e["step"] for e in log.read(tmp_path / "log.jsonl"))
    about = json.loads((newest(tmp_path) / "manifest.json").read_text())
    assert about["step"] == last >= 1


def test_weights_that_are_not_numbers(files, tmp_path):
    broken = recurra.LM(CONFIG)
    with torch.no_grad():
        broken.norm_f.weight[0] = float("inf")
    broken.save_pretrained(tmp_path / "broken")
    arguments = command(files, tmp_path / "run", f"--init={tmp_path / 'broken'}")
    where = arguments.index("--config")
    del arguments[where : where + 2]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = [x for x in done.stderr.splitlines() if "validation loss after step 0 is nan" in x]
    assert line.startswith("recurra train: ") and "there is no checkpoint yet" in line


def test_steps_for_a_number_of_minutes(files, tmp_path):
    arguments = [a for a in command(files, tmp_path, "--minutes=0.01") if "--steps" not in a]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([e for e in log.read(tmp_path / "log.jsonl") if "loss" in e]) >= 10

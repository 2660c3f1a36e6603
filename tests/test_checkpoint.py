"""Checkpoints: what is damaged is found, what does not fit is named, what is resumed goes on."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch

import crash
import recurra
from recurra._files import CheckpointError, write_tensors
from recurra.lm import CONFIGS, LMConfig
from recurra.nn import MambaConfig
from recurra.train import checkpoint, log, options, state
from recurra.train.run import run as train
from support import NIGHTLY, isa, isas, same_bits, threads

FOLDER = crash.FOLDER


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run with checkpoints of the steps 1 and 2."""
    run = tmp_path_factory.mktemp("saved")
    trainer = crash.trainer()
    for _ in range(2):
        trainer.train_step()
        state.save(trainer, run, "text")
    return run


@pytest.fixture
def root(saved, tmp_path) -> Path:
    """A copy of its folder of checkpoints."""
    return Path(shutil.copytree(saved / FOLDER, tmp_path / FOLDER))


def newest(root: Path) -> tuple[str, list[str]]:
    warnings: list[str] = []
    return checkpoint.newest(root, warnings.append).name, warnings


def seal(folder: Path, **changes) -> None:
    """Writes a manifest with changed fields, whose own digest holds."""
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_bytes()) | changes
    path.write_bytes(checkpoint._seal(manifest))


# ---- damage -------------------------------------------------------------------------------------


def test_a_flipped_bit(root):
    rng = random.Random(1)
    folder = root / checkpoint.name(2)
    files = sorted(folder.iterdir())
    assert {path.name for path in files} == {
        "config.json",
        "manifest.json",
        "model.safetensors",
        "train.json",
        "train.safetensors",
    }
    for n in range(20_000 if NIGHTLY else 200):
        path = files[n % len(files)]
        at, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        with open(path, "r+b", buffering=0) as file:
            byte = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
            with pytest.raises(CheckpointError):
                checkpoint.verify(folder)
            name, (warning,) = newest(root)
            assert name == checkpoint.name(1), (path, at, bit)
            assert "going back to step-00000001" in warning
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert newest(root) == (checkpoint.name(2), [])


def test_missing_longer_and_shorter_files(root):
    folder = root / checkpoint.name(2)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for damaged in (None, b"", whole[:-1], whole[: len(whole) // 2], whole + b"\0"):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            words = "is missing" if damaged is None else "must have [0-9]+ bytes, got"
            if path.name == checkpoint.MANIFEST:
                words = ""
            with pytest.raises(CheckpointError, match=f"{path.name}.*{words}"):
                checkpoint.verify(folder)
            assert newest(root)[0] == checkpoint.name(1)
            path.write_bytes(whole)
    assert newest(root) == (checkpoint.name(2), [])


def test_nothing_whole_is_said(root):
    assert checkpoint.newest(root / "nowhere") is None
    for path in root.iterdir():
        (path / "train.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole: .*train.json: is mis"):
        checkpoint.newest(root)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "a/b", "", "\0", "."])
def test_names_that_leave_the_folder(root, name):
    folder = root / checkpoint.name(2)
    (root / "x").write_bytes(b"")
    files = json.loads((folder / checkpoint.MANIFEST).read_bytes())["files"]
    seal(folder, files=files | {name: {"size": 0, "sha256": ""}})
    with pytest.raises(CheckpointError, match="is not the name of a file in this folder"):
        checkpoint.verify(folder)


def test_links_that_leave_the_folder(root, tmp_path):
    folder = root / checkpoint.name(2)
    for name in ("config.json", checkpoint.MANIFEST):
        shutil.copy(folder / name, tmp_path / name)
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}: is a link that leaves the folder"):
            checkpoint.verify(folder)
        (folder / name).unlink()
        shutil.copy(tmp_path / name, folder / name)
    (root / checkpoint.name(3)).symlink_to(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert newest(root) == (checkpoint.name(2), [])


def test_manifests_with_other_fields(root):
    folder = root / checkpoint.name(2)
    path = folder / checkpoint.MANIFEST
    good = path.read_bytes()
    entry = {"size": 1, "sha256": "x"}
    nested: list = []
    for _ in range(200):
        nested = [nested]
    for changes in (
        {"step": -1},
        {"step": True},
        {"step": 1.5},
        {"step": 10**30},
        {"format": "1"},
        {"format": 0},
        {"format": None},
        {"format": True},
        {"files": []},
        {"files": {"a": 1}},
        {"files": {"a": {"size": 1}}},
        {"files": {"a": entry | {"size": "1"}}},
        {"files": {"a": entry | {"more": nested}}},
        {"more": nested},
    ):
        seal(folder, **changes)
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint.verify(folder)
        path.write_bytes(good)
    for text in (b"", b"[]", b"null", b"[" * 100_000, b"{}", b'{"a":' * 900 + b"1" + b"}" * 900):
        path.write_bytes(text)
        with pytest.raises(CheckpointError):
            checkpoint.verify(folder)


def test_a_later_format_is_refused_by_name(root):
    seal(root / checkpoint.name(2), format=7)
    with pytest.raises(CheckpointError, match="has format 7, this version of recurra reads up to"):
        checkpoint.verify(root / checkpoint.name(2))
    assert newest(root)[0] == checkpoint.name(1)


# ---- saving -------------------------------------------------------------------------------------


def test_the_saved_step_stays_where_later_ones_are_damaged(root):
    """Otherwise the damaged one would count among those that are kept, in place of a whole one."""
    for later in (7, 9):
        damaged = shutil.copytree(root / checkpoint.name(2), root / checkpoint.name(later))
        (damaged / "train.json").unlink()
    trainer = crash.trainer(keep=1)
    state.resume(trainer, checkpoint.newest(root), "text")
    trainer.train_step()
    state.save(trainer, root.parent, "text")
    names = {path.name for path in root.iterdir()}
    assert names == {checkpoint.name(step) for step in (3, 7, 9)}
    assert newest(root)[0] == checkpoint.name(3)


def test_the_same_step_again(root, monkeypatch):
    """In place of the first, which is back where that fails."""
    trainer = crash.trainer(seed=5)
    trainer.train_step()
    folder = root / checkpoint.name(1)
    before = crash.contents(folder)
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        state.save(trainer, root.parent, "text")
    assert len(calls) == 4 and crash.contents(folder) == before
    state.save(trainer, root.parent, "text")
    assert crash.contents(folder) != before
    assert checkpoint.verify(folder)["step"] == 1
    assert not crash.temporary(root)


def test_what_is_kept(tmp_path):
    trainer = crash.trainer(keep=3)
    for _ in range(5):
        trainer.train_step()
        state.save(trainer, tmp_path, "text")
    names = {path.name for path in (tmp_path / FOLDER).iterdir()}
    assert names == {checkpoint.name(step) for step in (3, 4, 5)}


def test_what_an_interrupted_writer_left_is_cleared(root):
    run = root.parent
    for folder in (run, root):
        (folder / ".tmp-log.jsonl-1-2").write_bytes(b"x")
        (folder / ".tmp-2-3-4").mkdir()
        (folder / ".tmp-2-3-4" / "x").write_bytes(b"x")
        (folder / ".tmp-link").symlink_to(checkpoint.name(1))
    with checkpoint.alone(run):
        assert not crash.temporary(run)
    checkpoint.clean(root)
    assert {path.name for path in root.iterdir()} == {checkpoint.name(1), checkpoint.name(2)}
    assert newest(root) == (checkpoint.name(2), [])


def test_a_run_that_is_refused_leaves_nothing(tmp_path):
    def refused(run):
        with pytest.raises(ValueError, match="refused"), checkpoint.alone(run):
            (run / checkpoint.TOKENS).mkdir(exist_ok=True)
            (run / checkpoint.TOKENS / "train.bin").write_bytes(b"x")
            raise ValueError("refused")

    refused(tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())
    # What was there stays: a folder, others' files, tokens of before.
    run = tmp_path / "run"
    run.mkdir()
    refused(run)
    assert not list(run.iterdir())
    (run / "notes.txt").write_text("mine")
    refused(run)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    (run / checkpoint.TOKENS).mkdir()
    refused(run)
    assert {path.name for path in run.iterdir()} == {"notes.txt", "tokens"}
    # A run that has begun keeps all, and its lock, whatever ends it.
    with pytest.raises(RuntimeError, match="diverged"), checkpoint.alone(tmp_path / "begun"):
        (tmp_path / "begun" / "log.jsonl").write_text("{}\n")
        raise RuntimeError("diverged")
    refused(tmp_path / "begun")
    names = {path.name for path in (tmp_path / "begun").iterdir()}
    assert names == {".lock", "log.jsonl", "tokens"}


def test_a_lock_that_is_deleted_under_others(tmp_path, monkeypatch):
    """Who opened it before it was deleted does not take it for that of the folder."""
    held, flock = [], fcntl.flock

    def deleted_meanwhile(handle, how):
        held.append(handle)
        if len(held) == 1:
            (tmp_path / checkpoint.LOCK).unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", deleted_meanwhile)
    with checkpoint.alone(tmp_path):
        (tmp_path / "log.jsonl").touch()
        assert len(held) == 2
        with pytest.raises(OSError, match="another process"), checkpoint.alone(tmp_path):
            pass
    with checkpoint.alone(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "log.jsonl"}


def test_a_text_too_short_for_its_tokenizer_leaves_no_tokens(tmp_path):
    letters = {letter: n for n, letter in enumerate("abcdefgh \n?")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="?"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "short.txt").write_text("abc " * 9)
    run = tmp_path / "run"
    argv = ["train", str(run), "--data", str(tmp_path / "short.txt")]
    status, errors = crash.call([*argv, "--tokenizer", str(tmp_path / "tokenizer.json")])
    assert status == 1 and "sequences of 512 need at least 513" in errors, errors
    assert not run.exists()


def test_a_tokenizer_outlives_the_checkpoint_that_it_came_from(tmp_path):
    letters = {letter: n for n, letter in enumerate("abcdefgh \n?")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="?"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    run, steps = tmp_path / "run", dataclasses.replace(crash.OPTIONS, steps=1, keep=1)
    argv = crash.arguments(tmp_path, run, options=steps)
    status, errors = crash.call([*argv, "--tokenizer", str(tmp_path / "tokenizer.json")])
    assert status == 0, errors
    longer = dataclasses.replace(steps, steps=4)
    status, errors = crash.call(crash.arguments(tmp_path, run, "--resume", options=longer))
    assert status == 0, errors
    kept = checkpoint.newest(run / FOLDER) / "tokenizer.json"
    assert kept.read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_the_files_are_what_others_read(root, tmp_path):
    """Every dtype and shape comes back through the library, and files are as others of the user."""
    draw = torch.Generator().manual_seed(1)
    tensors = {
        "a": torch.randn(3, 5, generator=draw),
        "b": torch.randn(5, 3, generator=draw, dtype=torch.float64).T,
        "c": torch.randn((), generator=draw).bfloat16(),
        "d": torch.randn(7, generator=draw).half(),
        "e": torch.arange(5, dtype=torch.uint8),
        "f": torch.empty(0, 4),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    got = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert got.keys() == tensors.keys()
    assert all(same_bits(got[name], x) for name, x in tensors.items())
    modes = {path.stat().st_mode for path in (root / checkpoint.name(2)).iterdir()}
    assert len(modes) == 1


# ---- what does not fit --------------------------------------------------------------------------


def test_all_differences_are_listed(root):
    folder = root / checkpoint.name(2)
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    prefix = "backbone.layers.1.mixer."
    tensors[prefix + "A_log"] = tensors[prefix + "A_log"].int()
    tensors[prefix + "D"] = tensors[prefix + "D"][:3].bool()
    del tensors["backbone.norm_f.weight"], tensors[prefix + "conv1d.bias"]
    tensors |= {"extra": torch.zeros(1), "another": torch.ones(1)}
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError) as error:
        recurra.LM.from_pretrained(folder)
    dtypes = "must have dtype F32 or F64 or BF16 or F16"
    for words in (
        "norm_f.weight is missing",
        "layers.1.mixer.conv1d.bias is missing",
        "extra is not expected",
        "another is not expected",
        f"layers.1.mixer.A_log {dtypes}, got I32",
        "layers.1.mixer.D must have shape (16,), got (3,)",
        f"layers.1.mixer.D {dtypes}, got BOOL",
    ):
        assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_cannot_be_resumed_is_said(root, tmp_path):
    folder = root / checkpoint.name(2)
    with pytest.raises(CheckpointError, match="was trained on another text"):
        state.resume(crash.trainer(), folder, "another")
    wider = dataclasses.replace(crash.CONFIG, d_model=9)
    with pytest.raises(CheckpointError, match="holds a model of another configuration"):
        state.resume(crash.trainer(wider), folder, "text")
    with pytest.raises(CheckpointError, match="accumulate must stay 2, got 1"):
        state.resume(crash.trainer(accumulate=1), folder, "text")
    with pytest.raises(CheckpointError, match="batch must stay 4, got 8"):
        state.resume(crash.trainer(batch=8), folder, "text")


def test_a_run_that_begins_anew_has_a_new_log(tmp_path):
    """Killed before its first checkpoint, it validates before its first step once more."""
    for _ in range(2):
        trainer = crash.trainer(steps=1)
        assert train(trainer, tmp_path, "text") == 0
        assert [entry["step"] for entry in log.read(tmp_path / log.FILE)] == [0, 1, 1]
        shutil.rmtree(tmp_path / FOLDER)


# ---- the same bits ------------------------------------------------------------------------------


def _steps(trainer, folder: Path, until: int) -> tuple[list, dict[str, bytes]]:
    done = []
    while trainer.step < until:
        step = trainer.train_step()
        done.append((step.loss, step.norm, step.lr))
    state.save(trainer, folder, "text")
    return done, crash.contents(folder / FOLDER / checkpoint.name(until))


@pytest.mark.parametrize("carry, accumulate", [(False, 1), (True, 2)])
@pytest.mark.parametrize("precision", options.PRECISIONS)
def test_resumed_with_other_threads_and_instructions(carry, accumulate, precision, tmp_path):
    """From the middle of a run, on any number of threads and any instruction set, as on one."""
    text = crash.TEXT * 20
    config = LMConfig(d_model=64, n_layers=2, mixer=MambaConfig(d_state=4))

    def trainer():
        return crash.trainer(
            config, text, carry=carry, accumulate=accumulate, precision=precision, length=128
        )

    with threads(1):
        first = trainer()
        _steps(first, tmp_path, 2)
        want = _steps(first, tmp_path, 4)
    best = isas()[-1]
    for name, count in [(best, 1), (best, 2), (best, 3), *((name, 2) for name in isas()[:-1])]:
        with threads(count), isa(name):
            ours = trainer()
            state.resume(ours, tmp_path / FOLDER / checkpoint.name(2), "text")
            got = _steps(ours, tmp_path / f"{name}-{count}", 4)
        assert got[0] == want[0], (name, count)
        assert got[1] == want[1], (name, count)


@pytest.mark.slow
def test_the_tiny_model_on_other_threads(tmp_path):
    text, lengths = crash.TEXT * 100, {"length": 512, "accumulate": 1}
    want = None
    for count in (1, 2, 3):
        with threads(count):
            got = _steps(crash.trainer(CONFIGS["tiny"], text, **lengths), tmp_path / str(count), 3)
        want = want or got
        assert got == want, count

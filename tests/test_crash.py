"""Whatever happens during a save, what was saved before stays, and a run that goes on from there
gives the bits of one that was never interrupted."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import crash
from recurra.train import checkpoint
from support import NIGHTLY, TESTS, run_python

FOLDER = crash.FOLDER


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> str:
    """What LD_PRELOAD must be for the functions of faults.c."""
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    compiler = os.environ.get("CC", "cc")
    source = str(TESTS / "faults.c")
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], check=True
    )
    # A sanitizer's runtime has to come first.
    return f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()


def _run(code: str, timeout: float, **environment: str) -> str:
    return run_python(f"import crash\n{code}", timeout, **environment)


def test_killed_at_any_instant(tmp_path):
    _run(f"crash.kills({str(tmp_path)!r}, {2000 if NIGHTLY else 24})", 7200 if NIGHTLY else 600)


def test_every_call_of_a_save_fails(shim, tmp_path):
    printed = run_python(
        f"""
        import json, crash
        print(json.dumps(crash.faults({str(tmp_path)!r})))
        """,
        timeout=300,
        LD_PRELOAD=shim,
    )
    counts = json.loads(printed)
    # Five files, each of them opened, written, forced to the disk and read again.
    assert all(n >= (5 if kind == "short write" else 40) for kind, n in counts.items()), counts


def test_calls_of_the_command_fail(shim, tmp_path):
    places = 100 if NIGHTLY else 5
    _run(f"crash.faults_of_the_command({str(tmp_path)!r}, {places})", 1200, LD_PRELOAD=shim)


def _command(argv: list[str], **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, **options.pop("environment", {})}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-m", "recurra", *argv],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        **options,
    )


def test_a_disk_that_fills_up(shim, tmp_path):
    run = tmp_path / "run"
    options = dataclasses.replace(crash.OPTIONS, steps=2)
    assert crash.call(crash.arguments(tmp_path, run, options=options))[0] == 0
    before = crash.contents(run / FOLDER)
    size = sum(map(len, before.values())) // 2
    longer = dataclasses.replace(options, steps=9)
    argv = crash.arguments(tmp_path, run, "--resume", options=longer)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, size // 4))

    # The largest file has more than a quarter of a checkpoint.
    done = _command(argv, preexec_fn=limit)
    assert done.returncode == 1
    crash.assert_one_sentence(done.stderr, "File too large")
    assert crash.contents(run / FOLDER) == before

    # Room for two and a half checkpoints, which does not come back when older ones are deleted.
    room = {"LD_PRELOAD": shim, "FAULTS_FOLDER": str(run), "FAULTS_ROOM": str(size * 5 // 2)}
    done = _command(argv, environment=room)
    assert done.returncode == 1
    crash.assert_one_sentence(done.stderr, "No space left on device")
    assert not crash.temporary(run / FOLDER)
    assert checkpoint.newest(run / FOLDER).name == checkpoint.name(4)
    assert len([checkpoint.verify(path) for path in (run / FOLDER).iterdir()]) == 2

    assert crash.call(argv)[0] == 0
    whole = tmp_path / "whole"
    assert crash.call(crash.arguments(tmp_path, whole, options=longer))[0] == 0
    assert crash.contents(run / FOLDER) == crash.contents(whole / FOLDER)


def test_two_processes_save_into_one_folder(tmp_path):
    _run(f"crash.pairs({str(tmp_path)!r}, {500 if NIGHTLY else 20})", 3600 if NIGHTLY else 300)


def test_two_runs_in_one_folder(tmp_path):
    run = tmp_path / "run"
    options = dataclasses.replace(crash.OPTIONS, steps=10**9, save_every=10**9)
    argv = crash.arguments(tmp_path, run, options=options)
    first = subprocess.Popen(
        [sys.executable, "-m", "recurra", *argv],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    try:
        said = ""
        while "step 1/" not in said:
            line = first.stderr.readline()
            assert line, said
            said += line
        for more in ([], ["--resume"]):
            status, errors = crash.call([*argv, "--steps", "1", *more])
            assert status == 1
            crash.assert_one_sentence(errors, "another process is training here")
        first.terminate()
        first.stderr.read()
        assert first.wait() == 143
    finally:
        first.kill()
        first.wait()
    assert checkpoint.newest(run / FOLDER) is not None


def test_deleted_at_once(tmp_path):
    """A checkpoint that is deleted is gone as a whole, even where deleting its files fails."""
    ours = crash.trainer(keep=1)
    ours.train_step()
    crash.state.save(ours, tmp_path, "text")
    ours.train_step()
    real, shutil.rmtree = shutil.rmtree, lambda *args, **kwargs: None
    try:
        crash.state.save(ours, tmp_path, "text")
    finally:
        shutil.rmtree = real
    names = {path.name for path in Path(tmp_path / FOLDER).glob("step-*")}
    assert names == {checkpoint.name(2)}
    checkpoint.clean(tmp_path / FOLDER)
    assert not crash.temporary(tmp_path / FOLDER)

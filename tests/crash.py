"""A small training run, and what the tests of checkpoints do with it in processes of their own:
kill it at any instant, let the calls of a save fail, let two save into one folder."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from recurra.cli import main
from recurra.lm import ByteTokenizer, LMConfig, formats
from recurra.nn import MambaConfig
from recurra.train import Trainer, TrainOptions, checkpoint, log, state
from recurra.train.data import Bytes, Corpus
from support import same_bits

CONFIG = LMConfig(d_model=8, n_layers=2, mixer=MambaConfig(d_state=2))
# The text is passed over more than once, so that carried states begin anew on the way.
OPTIONS = TrainOptions(
    steps=50,
    batch=4,
    length=8,
    accumulate=2,
    carry=True,
    warmup=5,
    eval_every=20,
    eval_batches=1,
    save_every=1,
)
TEXT = bytes(random.Random(0).choices(b"abcdefgh \n", k=1200))
FOLDER = state.FOLDER


def trainer(config: LMConfig = CONFIG, text: bytes = TEXT, **changes) -> Trainer:
    corpus = Corpus(Bytes([text]), ByteTokenizer())
    return Trainer(config, dataclasses.replace(OPTIONS, **changes), corpus)


def arguments(folder: Path, run: Path, *more: str, options: TrainOptions = OPTIONS) -> list[str]:
    """The command line of a small run; its text and its config.json are written to the folder."""
    (folder / "text.txt").write_bytes(TEXT)
    values = formats.config_to_dict(CONFIG, torch.float32)
    (folder / "config.json").write_text(json.dumps(values))
    argv = ["train", str(run), "--data", str(folder / "text.txt"), "--threads", "1"]
    for name, value in dataclasses.asdict(options).items():
        flag = "--" + name.replace("_", "-")
        if name == "carry":
            argv.append(flag if value else "--no-carry")
        else:
            argv += [flag, str(value)]
    return [*argv, *(more or ("--config", str(folder / "config.json")))]


def curve(run: Path) -> list[dict]:
    """The log without what the clock says."""
    entries = log.read(run / log.FILE)
    return [{k: v for k, v in e.items() if k != "tokens_per_second"} for e in entries]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def everything(of: Trainer) -> dict[str, Tensor]:
    """Parameters, moments and carried states."""
    found = {name: p.detach().clone() for name, p in of.model.named_parameters()}
    return found | {k: v.clone() for k, v in state._tensors(of).items() if "random" not in k}


def temporary(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".tmp-")]


def call(argv: list[str]) -> tuple[int, str]:
    """Exit status and standard error of a command in this process."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(argv)
    return status, errors.getvalue()


def assert_one_sentence(errors: str, *words: str) -> None:
    """What a command said ends in one sentence with these words and is not a traceback."""
    last = errors.rstrip("\n").splitlines()[-1]
    assert last.startswith("recurra "), errors
    assert all(word in last for word in words), errors
    assert "Traceback" not in errors and "Error:" not in errors, errors


# ---- kill -9 ------------------------------------------------------------------------------------


class _SystemCalls:
    """A profile function that calls another at the beginning and the end of each system call."""

    def __init__(self, then: Callable[[], None]):
        self._then = then

    def __call__(self, frame, event: str, function) -> None:
        if event not in ("c_call", "c_return"):
            return
        owner = type(getattr(function, "__self__", None)).__module__
        if function.__module__ in ("posix", "_io", "io") or owner in ("_io", "posix"):
            self._then()


class _KillAt:
    """Ends this process at the n-th call."""

    def __init__(self, n: int):
        self.left = n

    def __call__(self) -> None:
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


@contextlib.contextmanager
def _each_save(before: Callable[[int], None]):
    """Calls a function with the number of each save of this process, counted from 1."""
    real, count = checkpoint.save, 0

    def save(*args, **kwargs):
        nonlocal count
        count += 1
        before(count)
        try:
            return real(*args, **kwargs)
        finally:
            sys.setprofile(None)

    checkpoint.save = save
    try:
        yield
    finally:
        checkpoint.save = real


def _fork(argv: list[str], errors: Path, before: Callable[[int], None]) -> int:
    """Runs a command in a forked child; calls ``before`` there with the number of each save."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        with _each_save(before):
            status = main(argv)
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def kills(root: str, count: int, seed: int = 0) -> None:
    """Kills a run so many times, at instants anywhere, after the beginning of a save, and before or
    after any of its system calls. Each time it is resumed, and what comes of it in the end is to
    the bit what an uninterrupted run leaves."""
    torch.set_num_threads(1)  # children of a process with more would wait for the others
    log._tensorboard = lambda folder, step: None
    top, rng = Path(root), random.Random(seed)
    whole, errors = top / "whole", top / "errors"
    begin = time.monotonic()
    status, said = call(arguments(top, whole))
    assert status == 0, said
    step_time = (time.monotonic() - begin) / OPTIONS.steps
    final = checkpoint.name(OPTIONS.steps)
    want = curve(whole), contents(whole / FOLDER / final)
    assert len(want[0]) == OPTIONS.steps + 4  # validations before, on the way and at the end

    events = 0

    def count_event() -> None:
        nonlocal events
        events += 1

    profile = _SystemCalls(count_event)
    with _each_save(lambda number: sys.setprofile(profile) if number == 3 else None):
        call(arguments(top, top / "counted", options=dataclasses.replace(OPTIONS, steps=4)))
    assert events > 100

    killed, inside, runs = 0, 0, 0
    while killed < count or runs == 0:
        run = top / f"run-{runs}"
        argv = arguments(top, run, "--resume", "--config", str(top / "config.json"))
        kind = rng.choice(("anywhere", "in a save", "at a call")) if killed < count else "not"
        nth, event = rng.randint(1, 2), rng.randrange(events)
        readable, writable = os.pipe()

        def before(number, kind=kind, nth=nth, event=event, writable=writable) -> None:
            os.write(writable, b"s")
            if kind == "at a call" and number == nth:
                sys.setprofile(_SystemCalls(_KillAt(event)))

        pid = _fork(argv, errors, before)
        os.close(writable)
        if kind == "anywhere":
            time.sleep(rng.uniform(0, 8 * step_time))
            os.kill(pid, signal.SIGKILL)
        elif kind == "in a save":
            while nth and os.read(readable, 1):  # nothing more comes when the child has ended
                nth -= 1
            time.sleep(rng.uniform(0, step_time))
            os.kill(pid, signal.SIGKILL)
        os.close(readable)
        _, status = os.waitpid(pid, 0)
        folder = run / FOLDER
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, (kind, status, errors.read_text()[-2000:])
            killed += 1
            if folder.is_dir():
                inside += bool(temporary(folder))
                for path in folder.glob("step-*"):
                    checkpoint.verify(path)
            continue
        assert status == 0, (kind, status, errors.read_text()[-2000:])
        assert curve(run) == want[0], f"run {runs}, {killed} kills"
        assert contents(folder / final) == want[1], f"run {runs}, {killed} kills"
        hidden = {path.name for path in run.rglob(".*")}
        assert hidden == {".lock"}, hidden
        shutil.rmtree(run)
        runs += 1
    assert inside >= count // 8, f"{inside} of {killed} kills were inside a save"


# ---- faults -------------------------------------------------------------------------------------

FAIL, SHORT, FULL = 1, 2, 3
KINDS = {
    "no space": (FAIL, errno.ENOSPC),
    "input/output error": (FAIL, errno.EIO),
    "short write": (SHORT, 0),
    "full disk": (FULL, errno.ENOSPC),
}


class _Shim:
    """The functions of faults.c, which this process was started with."""

    def __init__(self):
        self._library = ctypes.CDLL(None)
        self._library.faults_last.restype = ctypes.c_char_p

    def arm(self, folder: Path, kind: int = 0, n: int = 0, code: int = 0) -> None:
        self._library.faults_arm(
            str(folder).encode(), kind, ctypes.c_long(n), code, ctypes.c_long(-1)
        )

    def stop(self) -> tuple[int, int, str]:
        """Disarms; how many calls there were, how many of them failed, and the first of these."""
        library = self._library
        result = library.faults_count(), library.faults_fired(), library.faults_last().decode()
        self.arm(Path("/nowhere"))
        return result


class _Deleting:
    """Notes whether a fault hit while something was deleted, which may then stay."""

    def __init__(self, shim: _Shim):
        self.hit, self._shim, self._real = False, shim, shutil.rmtree

    def __enter__(self):
        def rmtree(*args, **kwargs):
            before = self._shim._library.faults_fired()
            try:
                self._real(*args, **kwargs)
            finally:
                self.hit |= self._shim._library.faults_fired() != before

        shutil.rmtree = rmtree
        return self

    def __exit__(self, *_):
        shutil.rmtree = self._real


def faults(root: str) -> dict[str, int]:
    """Lets every call of a save fail in turn; returns how many did, for each kind of fault."""
    torch.set_num_threads(1)
    top = Path(root)
    pristine, run = top / "pristine", top / "run"
    ours, reader = trainer(keep=2), trainer()
    want = {}
    for step in (1, 2, 3):
        ours.train_step()
        want[step] = everything(ours)
        if step < 3:
            state.save(ours, pristine, "text")
    earlier = {step: contents(pristine / FOLDER / checkpoint.name(step)) for step in (1, 2)}

    def check_newest(steps: tuple[int, ...], context: str) -> None:
        newest = checkpoint.newest(run / FOLDER)
        state.resume(reader, newest, "text")
        assert reader.step in steps, (context, newest)
        got = everything(reader)
        assert got.keys() == want[reader.step].keys()
        for name, x in got.items():
            assert same_bits(x, want[reader.step][name]), (context, name)

    shim, done = _Shim(), dict.fromkeys(KINDS, 0)
    shutil.copytree(pristine, run)
    shim.arm(run / FOLDER)
    state.save(ours, run, "text")
    all_calls, _, _ = shim.stop()
    descriptors = len(os.listdir("/proc/self/fd"))
    for kind, n in itertools.product(KINDS, range(1, all_calls + 1)):
        what, code = KINDS[kind]
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(pristine, run)
        failed: OSError | None = None
        with _Deleting(shim) as deleting:
            shim.arm(run / FOLDER, what, n, code)
            try:
                state.save(ours, run, "text")
            except OSError as error:
                failed = error
            _, fired, where = shim.stop()
        assert fired or what != FAIL, (kind, n)
        context = f"{kind}: {where}: {failed!r}"
        if not fired:  # not a write, or nothing came that needs room
            continue
        done[kind] += 1
        if what == SHORT:
            assert failed is None, context
        if failed is not None:
            # Closing what failed to close, when a folder is deleted, replaces the first error.
            assert failed.errno == code or deleting.hit, context
        elif what == FAIL:  # only making a folder that is there, and deleting an older checkpoint
            assert n == 1 or deleting.hit or where.startswith("rename"), context
        finished = (run / FOLDER / checkpoint.name(3)).exists()
        assert finished or failed is not None, context
        assert contents(run / FOLDER / checkpoint.name(2)) == earlier[2], context
        first = run / FOLDER / checkpoint.name(1)
        assert (finished and not first.exists()) or contents(first) == earlier[1], context
        assert deleting.hit or not temporary(run / FOLDER), context
        check_newest((3,) if finished else (2,), context)
        state.save(ours, run, "text")
        check_newest((3,), context)
        checkpoint.clean(run / FOLDER)
        assert not temporary(run / FOLDER), context
        assert len(os.listdir("/proc/self/fd")) == descriptors, context
    return done


def faults_of_the_command(root: str, places: int) -> None:
    """The same through `recurra train`, at some of all the calls on the folder of the run."""
    log._tensorboard = lambda folder, step: None
    shim, top = _Shim(), Path(root)
    pristine, run = top / "pristine", top / "run"
    assert call(arguments(top, pristine, options=dataclasses.replace(OPTIONS, steps=2)))[0] == 0
    more = arguments(top, run, "--resume", options=dataclasses.replace(OPTIONS, steps=4))

    def attempt(kind: int, n: int, code: int) -> tuple[int, str, int]:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(pristine, run)
        shim.arm(run, kind, n, code)
        status, errors = call(more)
        return status, errors, shim.stop()[0]

    status, errors, calls = attempt(0, 0, 0)
    assert status == 0, errors
    want = contents(run / FOLDER / checkpoint.name(4))
    failures = 0
    for kind, code in (KINDS["no space"], KINDS["input/output error"], KINDS["full disk"]):
        for n in {1 + i * calls // places for i in range(places)}:
            status, errors, _ = attempt(kind, n, code)
            if status:
                failures += 1
                assert status == 1, errors
                assert_one_sentence(errors, os.strerror(code))
            for path in (run / FOLDER).glob("step-*"):
                checkpoint.verify(path)
            assert checkpoint.newest(run / FOLDER) is not None
            status, errors = call(more)
            assert status == 0, errors
            assert contents(run / FOLDER / checkpoint.name(4)) == want
    assert failures >= places


# ---- two at once --------------------------------------------------------------------------------


def pairs(root: str, count: int) -> None:
    """Two processes save the same steps of two different runs into one folder, at the same time."""
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # the disk would only slow them down
    top = Path(root)
    ours = [trainer(seed=seed) for seed in (1, 2)]
    for one in ours:
        one.train_step()
    reader = trainer()
    for turn in range(count):
        run = top / str(turn)
        readable, writable = os.pipe()
        children = []
        for one in ours:
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    os.close(writable)
                    os.read(readable, 1)  # until the parent lets go of both
                    for step in (1, 1, 2, 3, 3, 4):
                        one.step = step
                        with contextlib.suppress(OSError):
                            state.save(one, run, "text")
                    status = 0
                except BaseException:
                    traceback.print_exc()
                os._exit(status)
            children.append(pid)
        os.close(writable)
        for pid in children:
            _, status = os.waitpid(pid, 0)
            assert status == 0, (turn, status)
        os.close(readable)
        newest = checkpoint.newest(run / FOLDER)
        assert newest is not None and newest.name == checkpoint.name(4)
        state.resume(reader, newest, "text")
        assert not temporary(run / FOLDER)
        shutil.rmtree(run)

"""A good guest in its process: fork, threads, import, floating-point state, environment.

What forks, or changes how the process computes, runs in a child of its own. No test measures time
except to give up on what hangs.
"""

from __future__ import annotations

import pytest
import torch

from opdb import OPS
from support import ISAS, run_python

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)

# The start of every child: the op, and one call of it, forward and backward, as bytes.
PROLOGUE = """
import os, sys, threading
import torch
import recurra
from opdb import OPS
from support import Draw, bits, cotangents, describe, everything, threads

op = next(op for op in OPS if op.name == NAME)
args = op.make(Draw(1), 3, 200, 300, torch.float32, False)

def result():
    return [bits(x) for _, x in everything(op, args)]

def equal(x, y):
    return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
"""


def _child(op, code: str, timeout: float = 120, **environment: str) -> str:
    import textwrap

    return run_python(
        f"NAME = {op.name!r}\n" + PROLOGUE + textwrap.dedent(code), timeout, **environment
    )


@every_op
def test_forked_children_compute_the_same(op):
    """The parent has used its threads, which a child does not inherit; an OpenMP region would wait
    for them for ever, and so would any torch op that splits its work."""
    _child(
        op,
        """
        torch.set_num_threads(2)
        calls = []
        for n in range(20):
            B, T, D, packed = ((3, 200, 300, False), (1, 300, 200, True))[n % 2]
            given = op.make(Draw(n), B, T, D, torch.float32, packed)
            cots = cotangents(op.function(**given))
            calls.append((given, cots, everything(op, given, cots)))
        assert torch.ops.recurra._threads() == 2
        for given, cots, want in calls:
            # A parallel torch op just before, so that its pool is warm.
            torch.zeros(1 << 20).add_(1)
            pid = os.fork()
            if pid == 0:
                good = torch.ops.recurra._threads() == 1
                got = everything(op, given, cots)
                torch.set_num_threads(1)  # torch's own ops hang here without it
                good = good and equal([bits(x) for _, x in got], [bits(x) for _, x in want])
                os._exit(0 if good else 1)
            _, status = os.waitpid(pid, 0)
            assert status == 0, (describe(given), status)
        """,
    )


@every_op
def test_children_of_forked_children_and_of_threads(op):
    _child(
        op,
        """
        torch.set_num_threads(2)
        want = result()

        def fork(depth):
            pid = os.fork()
            if pid == 0:
                got = everything(op, args)
                torch.set_num_threads(1)
                good = equal([bits(x) for _, x in got], want)
                if depth and good:
                    good = fork(depth - 1)
                os._exit(0 if good else 1)
            return os.waitpid(pid, 0)[1] == 0

        done = []
        worker = threading.Thread(target=lambda: done.append(fork(1)))
        worker.start()
        worker.join()
        assert done == [True]
        """,
    )


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start):
    # A file of its own, because spawn imports the main module again.
    run_python(
        f"""
        import runpy, sys
        sys.argv = ["loader.py", "{start}"]
        runpy.run_path("{__file__.replace("test_process.py", "loader.py")}", run_name="__main__")
        """
    )


def test_one_openmp_runtime():
    run_python(
        """
        import numpy, torch, recurra
        a, b = torch.rand(3, 64, 256), torch.rand(3, 64, 256)
        recurra.linear_scan(a, b)
        torch.mm(torch.rand(300, 300), torch.rand(300, 300))
        maps = open("/proc/self/maps").read().split()
        names = ("libgomp", "libiomp5", "libomp.", "libomp5")
        found = {p for p in maps if p.startswith("/") and any(n in p for n in names)}
        assert len(found) == 1, found
        """
    )


@every_op
def test_many_python_threads(op):
    _child(
        op,
        """
        args = op.make(Draw(1), 2, 17, 40, torch.float32, False)
        want, wrong = result(), []

        def work():
            for _ in range(200):
                if not equal(result(), want):
                    wrong.append(1)

        workers = [threading.Thread(target=work) for _ in range(8)]
        [w.start() for w in workers]
        [w.join() for w in workers]
        assert not wrong
        """,
        timeout=300,
    )


@every_op
def test_other_python_threads_run_during_a_call(op):
    """A counting thread advances while one call is under way, so the GIL is not held."""
    _child(
        op,
        """
        sys.setswitchinterval(1e-5)
        big = op.make(Draw(1), 8, 3000, 600, torch.float32, False)
        count, stop = [0], [False]

        def counting():
            while not stop[0]:
                count[0] += 1

        worker = threading.Thread(target=counting)
        worker.start()
        torch.set_num_threads(1)
        seen = 0
        for _ in range(20):
            before = count[0]
            y = op.function(**big)
            seen = max(seen, count[0] - before)
        stop[0] = True
        worker.join()
        # A held GIL leaves only what happens around the call, a few hundred at the most.
        assert seen >= 5000, seen
        """,
    )


@every_op
def test_thread_count_is_obeyed_at_once_and_nested_regions_are_serial(op):
    _child(
        op,
        """
        want = result()
        for count in (1, 8, 1, 3):
            torch.set_num_threads(count)
            assert torch.ops.recurra._threads() == count
            assert equal(result(), want)

        # A hook within a backward calls the op, forward and backward.
        seen = []
        def hook(gradient):
            with torch.enable_grad():
                seen.append(equal(result(), want))
        x = torch.rand(4, requires_grad=True)
        x.register_hook(hook)
        (x * 2).sum().backward()
        assert seen == [True]

        torch.set_num_threads(2)
        before = len(os.listdir("/proc/self/task"))
        small = op.make(Draw(1), 2, 3, 40, torch.float32, False)
        for _ in range(2000):
            op.function(**small)
        after = len(os.listdir("/proc/self/task"))
        assert after <= before + 1, (before, after)
        """,
    )


@every_op
def test_inside_an_openmp_region(op):
    """libgomp's own entry point runs a region of two threads; both call the op from inside it."""
    _child(
        op,
        """
        import ctypes, re
        want = result()
        maps = open("/proc/self/maps").read()
        path = re.search(r"/\\S*libgomp\\S*", maps)
        if path is None:
            sys.exit(0)  # another runtime has no such entry point
        gomp = ctypes.CDLL(path.group())
        good = []
        BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

        def body(_):
            # Autograd would move to a thread of its own, so the forward pass alone.
            outputs = op.function(**args)
            alone = torch.ops.recurra._threads() == 1
            good.append(alone and equal([bits(y) for y in outputs], want[: len(outputs)]))

        gomp.GOMP_parallel(BODY(body), None, ctypes.c_uint(2), ctypes.c_uint(0))
        assert good == [True, True], good
        """,
    )


def test_import_leaves_the_process_alone():
    run_python(
        """
        import os, sys, tempfile
        import torch
        before = {
            "threads": len(os.listdir("/proc/self/task")),
            "files": sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                            if os.path.exists(f"/proc/self/fd/{n}")),
            "environment": dict(os.environ),
            "num_threads": torch.get_num_threads(),
            "dtype": torch.get_default_dtype(),
            "cwd": os.getcwd(),
            "random": torch.random.get_rng_state().tolist(),
            "signals": [__import__("signal").getsignal(n) for n in (2, 11, 15)],
            "sockets": open("/proc/net/tcp").read().count("\\n"),
        }
        folder = tempfile.mkdtemp()
        os.chdir(folder)
        written = []
        def audit(event, arguments):
            if event == "open" and set(str(arguments[1])) & set("wax+"):
                if "__pycache__" not in str(arguments[0]):
                    written.append(arguments)
            if event.startswith(("socket.", "subprocess.", "os.exec", "os.fork")):
                written.append((event, arguments))
        sys.addaudithook(audit)
        import recurra
        assert not written, written
        assert not os.listdir(folder)
        os.chdir(before["cwd"])
        after = {
            "threads": len(os.listdir("/proc/self/task")),
            "files": sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                            if os.path.exists(f"/proc/self/fd/{n}")),
            "environment": dict(os.environ),
            "num_threads": torch.get_num_threads(),
            "dtype": torch.get_default_dtype(),
            "cwd": os.getcwd(),
            "random": torch.random.get_rng_state().tolist(),
            "signals": [__import__("signal").getsignal(n) for n in (2, 11, 15)],
            "sockets": before["sockets"],
        }
        for key in before:
            assert before[key] == after[key], (key, before[key], after[key])
        assert not torch.cuda.is_initialized()
        heavy = {"numba", "jax", "triton", "scipy", "hypothesis", "pytest", "matplotlib"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        """
    )


def test_import_leaves_the_compiler_of_torch_alone():
    """Which takes longer to import than recurra."""
    run_python(
        """
        import sys
        import torch
        before = "torch._dynamo" in sys.modules
        import recurra
        assert before or "torch._dynamo" not in sys.modules
        """
    )


@every_op
def test_floating_point_state(op):
    """Subnormals before, during and after; rounding mode and flush state as the process had it."""
    _child(
        op,
        """
        import ctypes, math
        libm = ctypes.CDLL("libm.so.6")
        half = lambda: float.fromhex("0x1p-1060") / 4
        assert half() == float.fromhex("0x1p-1062")
        assert libm.fegetround() == 0
        tiny = torch.finfo(torch.float32).tiny

        def subnormal_kept():
            a = torch.full((1, 3, 40), 0.5)
            b = torch.zeros(1, 3, 40)
            b[:, 0] = tiny
            h = torch.ops.recurra.linear_scan(a, b)[0]
            return h[0, 2, 0].item() == tiny / 4 and h[0, 2, 39].item() == tiny / 4

        assert subnormal_kept()
        result()
        assert half() == float.fromhex("0x1p-1062") and libm.fegetround() == 0
        # In torch's and our pool threads alike.
        torch.set_num_threads(2)
        result()
        quarter = torch.full((1 << 20,), tiny) * 0.25
        assert bool((quarter == tiny / 4).all())
        # A process that flushes keeps doing so: the ops change nothing for it either.
        if torch.set_flush_denormal(True):
            flushed = half()
            assert flushed == 0.0
            op.function(**args)
            assert half() == 0.0
            torch.set_flush_denormal(False)
        assert half() == float.fromhex("0x1p-1062")
        """,
    )


@pytest.mark.parametrize("name", ISAS)
def test_the_environment_caps_the_instruction_set(name):
    printed = run_python(
        """
        import torch, recurra
        print(torch.ops.recurra._isa())
        print(recurra.linear_scan(torch.ones(1, 4, 20), torch.ones(1, 4, 20))[1].sum().item())
        """,
        RECURRA_ISA=name,
    ).split()
    assert ISAS.index(printed[0]) <= ISAS.index(name)
    assert float(printed[1]) == 80


def test_an_unknown_instruction_set_is_refused_by_name():
    run_python(
        """
        import torch, recurra
        x = torch.ones(1, 4, 20)
        for _ in range(2):
            try:
                recurra.linear_scan(x, x)
            except RuntimeError as error:
                wanted = "RECURRA_ISA must be scalar, avx2 or avx512, got sse9"
                assert wanted in str(error), error
            else:
                raise SystemExit("no error")
        """,
        RECURRA_ISA="sse9",
    )
    before = torch.ops.recurra._isa()
    with pytest.raises(RuntimeError, match="must be scalar, avx2 or avx512, got AVX2"):
        torch.ops.recurra._isa("AVX2")
    assert torch.ops.recurra._isa() == before


@every_op
def test_calls_at_exit(op):
    printed = _child(
        op,
        """
        import atexit
        want = result()
        atexit.register(lambda: print("same" if equal(result(), want) else "different"))
        """,
    )
    assert printed.split()[-1] == "same"

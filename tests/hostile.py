"""Files that try to do harm, made from good ones, and what must come of reading them. That is done
in a process of its own, which may not survive it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

import crash
import recurra
from recurra import _files
from recurra.lm import ByteTokenizer, LMConfig, load_tokenizer, pretrained
from recurra.nn import MambaConfig
from recurra.train import Trainer, TrainOptions, checkpoint, state
from recurra.train.data import Bytes, Corpus

MEMORY = 64 << 20  # bytes beyond those of the files
SECONDS = 2.0  # of the processor, for one case

DEEP: list = []
for _ in range(500):
    DEEP = [DEEP]

# What a field of a JSON file may hold instead of what it should.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 10**12, 10**18, 2**31, 2**63, 2**64, -(10**30), 10**400,
    0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf, "", "silu", "auto", "1",
    "\0", "../x", "x" * 100_000, "\ud800", [], [1], [10**12], [0, 10**18], [None] * 1000, {},
    {"a": 1}, DEEP, "float32", "mamba", "llama", "gelu", 624, 625, 50280,
]  # fmt: skip
# And a whole file.
TEXTS: list[bytes] = [
    b"", b"\0", b"\xff\xfe", b"null", b"[]", b"1", b'""', b"{", b"{}", b"NaN", b"[" * 200_000,
    b'{"a":' * 100_000, b"[" * 900 + b"]" * 900,
    b'{"model_type":"mamba","vocab_size":1' + b"0" * 5000 + b"}",
    b'{"model_type": "mamba"}', b'{"model_type": "mamba", "model_type": "llama"}',
    b'{"step": 1e999}', b"\xef\xbb\xbf{}", "{}".encode("utf-16"),
]  # fmt: skip


class Judge:
    """Runs cases and holds each to the verdict: a result, or an error with a message; in time, and
    in memory."""

    def __init__(self) -> None:
        self.refused = self.accepted = 0
        # A sanitizer reserves more than any limit.
        self._limited = "libasan-" not in Path("/proc/self/maps").read_text()

    def __call__(self, case: Callable[[], Any], size: int, context: object) -> None:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if self._limited:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + size + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        begin = time.process_time()
        try:
            case()
            self.accepted += 1
        except (ValueError, RuntimeError, OSError) as error:
            assert str(error) and not isinstance(error, RecursionError), (context, error)
            self.refused += 1
        except BaseException as error:
            raise AssertionError(f"{context!r:.2000}: {error!r:.500}") from error
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        seconds = time.process_time() - begin
        assert seconds < SECONDS, (context, seconds)


# ---- damage -------------------------------------------------------------------------------------


def _damaged_bytes(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    kind = rng.randrange(6)
    at = rng.randrange(len(data))
    if kind == 0:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            # Headers are at the beginning.
            place = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 2000))
            changed[place] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data + rng.randbytes(rng.choice((1, 8, 1000)))
    other = rng.choice(others)
    start = rng.randrange(len(other))
    piece = other[start : start + rng.choice((1, 8, 100, 10_000))]
    if kind == 3:
        return data[:at] + piece + data[at + len(piece) :]
    if kind == 4:
        return data[:at] + piece + data[at:]
    return data[:at] + other[start:]


def _places(value: Any, found: list | None = None) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found = [] if found is None else found
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys)[:50]:
        found.append((value, key))
        if isinstance(value[key], (dict, list)) and value[key] is not DEEP:
            _places(value[key], found)
    return found


def _value(rng: random.Random) -> Any:
    value = rng.choice(VALUES)
    return value if value is DEEP else copy.copy(value)  # the copy may be damaged in turn


def _damaged_json(value: dict, rng: random.Random) -> dict:
    for _ in range(rng.choice((1, 1, 2, 3))):
        container, key = rng.choice(_places(value) or [(value, "a")])
        kind = rng.randrange(8)
        if kind == 0 and isinstance(container, dict):
            container.pop(key, None)
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(("a", "", "\ud800", "x" * 1000, "__class__"))] = _value(rng)
        else:
            container[key] = _value(rng)
    return value


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def _safetensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + data


def _damaged_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a bad header."""
    size = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(10)
    if kind == 0:
        length = rng.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**32, 2**63, 2**64 - 1))
        return _safetensors(text, rest, length)
    if kind == 1:  # the same name twice
        return _safetensors(text.rstrip()[:-1] + b"," + text.lstrip()[1:], rest)
    header = json.loads(text)
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.choice(names), rng.choice(names)
    if kind == 2:
        header[one]["data_offsets"] = header[other]["data_offsets"]
    elif kind == 3:
        header[one]["data_offsets"] = [
            rng.choice((0, 1, -1, 2**63, 2**64, len(rest))) for _ in "ab"
        ]
    elif kind == 4:
        big = rng.choice((2**20, 2**31, 2**32, 2**62, 2**63, 10**12))
        header[one]["shape"] = [rng.choice((0, 1, 2, big)) for _ in range(rng.randint(0, 5))]
    elif kind == 5:
        dtypes = ("F64", "F32", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "F4", "C64", "x", 1)
        header[one]["dtype"] = rng.choice(dtypes)
    elif kind == 6:
        header[one], header[other] = header[other], header[one]
    elif kind == 7:
        header[rng.choice(("a", "random.cuda", one + "x", "layers.0.mixer.A_log"))] = {
            "dtype": "F32",
            "shape": [0, rng.choice((0, 2**40))],
            "data_offsets": [len(rest), len(rest)],
        }
    elif kind == 8:
        header["__metadata__"] = _value(rng)
    else:
        header = _damaged_json(header, rng)
    return _safetensors(_encoded(header), rest)


def _bombs(config: dict) -> list[tuple]:
    """Files that are small for what they promise, or large for what they hold: a name, the bytes,
    and a config.json where it is not the good one."""

    def empty(name: str) -> str:
        return f'"{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'

    layers = [empty(f"x{n}.mixer.A_log") for n in range(4096)]
    names = [empty(f"{n:x}") for n in range(_files.MAX_HEADER // 64)]
    fill = _files.MAX_JSON - 1000
    lists = b"[" + b"[]," * (fill // 3) + b"1]"
    objects = b"[" + b"{}," * (fill // 3) + b"1]"
    return [
        ("model.safetensors", _safetensors(f"{{{','.join(layers)}}}".encode(), b"")),
        ("model.safetensors", _safetensors(f"{{{','.join(names)}}}".encode(), b"")),
        ("train.safetensors", _safetensors(f"{{{','.join(names)}}}".encode(), b"")),
        ("model.safetensors", _safetensors(b" " * (_files.MAX_HEADER + 1), b"")),
        ("model.safetensors", _safetensors(b"[" * _files.MAX_HEADER, b"")),
        ("model.safetensors", _safetensors(b'{"a":' * 100_000, b"")),
        *((name, b'{"a": ' + text + b"}") for name in ("config.json", "train.json", "manifest.json")
          for text in (lists, objects)),
        ("config.json", b" " * (_files.MAX_JSON + 1)),
        ("config.json", _encoded(config | {"num_hidden_layers": 4096})),
        # Both agree.
        (
            "model.safetensors",
            _safetensors(f"{{{','.join(layers)}}}".encode(), b""),
            _encoded(config | {"num_hidden_layers": 4096}),
        ),
        ("config.json", _encoded(config | {"hidden_size": 1 << 20, "vocab_size": 1 << 30})),
    ]  # fmt: skip


# ---- checkpoints --------------------------------------------------------------------------------


@functools.lru_cache(1)  # nearly always the same
def _trainer(config: LMConfig, options: TrainOptions) -> Trainer:
    return Trainer(config, options, Corpus(Bytes([crash.TEXT]), ByteTokenizer()))


def _resume(folder: Path) -> None:
    """As `recurra train --resume` does."""
    checkpoint.verify(folder)
    trainer = _trainer(pretrained.check(folder)[0], state.options(folder))
    state.resume(trainer, folder, "text")
    random.random(), torch.rand(1), np.random.rand()


def seal(folder: Path, step: int = 2) -> None:
    """Writes a manifest that fits what is there, so that no digest protects."""
    (folder / checkpoint.MANIFEST).unlink(missing_ok=True)
    files = {
        path.name: {"size": path.stat().st_size, "sha256": checkpoint._digest(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {"format": checkpoint.FORMAT, "step": step, "files": files}
    (folder / checkpoint.MANIFEST).write_bytes(checkpoint._seal(manifest))


def checkpoints(root: str, count: int, seed: int = 0) -> dict[str, int]:
    """Damaged checkpoints are loaded and resumed."""
    torch.set_num_threads(1)
    top, rng, judge = Path(root), random.Random(seed), Judge()
    trainer = crash.trainer()
    for _ in range(2):
        trainer.train_step()
    state.save(trainer, top, "text")
    folder = top / crash.FOLDER / checkpoint.name(2)
    _resume(folder)
    (folder / checkpoint.MANIFEST).unlink()
    good = crash.contents(folder)
    weights = [name for name in good if name.endswith(".safetensors")]
    texts = [name for name in good if name.endswith(".json")]

    def case(name: str, data: bytes, context: object, config: bytes = good["config.json"]) -> None:
        path = folder / name
        (folder / "config.json").write_bytes(config)
        path.write_bytes(data)
        if name != checkpoint.MANIFEST:
            seal(folder)
        size = len(data) + sum(map(len, good.values()))
        judge(lambda: _resume(folder), size, context)
        if name in ("model.safetensors", "config.json") and rng.random() < 0.5:
            judge(lambda: recurra.LM.from_pretrained(folder), size, context)
        (folder / checkpoint.MANIFEST).unlink()
        if name in good:
            path.write_bytes(good[name])
        (folder / "config.json").write_bytes(good["config.json"])

    case("config.json", good["config.json"], "good")
    good_ones = judge.accepted
    assert good_ones and not judge.refused
    for n, (name, data, *config) in enumerate(_bombs(json.loads(good["config.json"]))):
        case(name, data, ("bomb", n, name), *config)
    assert judge.accepted == good_ones
    for n in range(count):
        context = ("case", seed, n)
        if rng.random() < 0.7:
            name = rng.choice(weights)
            if rng.random() < 0.5:
                data = _damaged_tensors(good[name], rng)
            else:
                data = _damaged_bytes(good[name], rng, list(good.values()))
        elif rng.random() < 0.8:
            name = rng.choice(texts)
            if rng.random() < 0.7:
                data = _encoded(_damaged_json(json.loads(good[name]), rng))
            else:
                data = _damaged_bytes(good[name], rng, list(good.values()))
        else:
            name = checkpoint.MANIFEST
            seal(folder)
            manifest = json.loads((folder / name).read_bytes())
            manifest = _damaged_json(manifest, rng)
            data = checkpoint._seal(manifest) if rng.random() < 0.8 else _encoded(manifest)
        case(name, data, context)
    return {"accepted": judge.accepted, "refused": judge.refused}


# ---- configurations -----------------------------------------------------------------------------

# What a caller may pass besides.
OBJECTS = [*VALUES, 10**5000, -(10**5000), b"x", 1j, (), object(), int, torch.tensor(3), {1: DEEP}]


def configs(root: str, count: int, seed: int = 0) -> dict[str, int]:
    """Damaged config.json beside good weights, and fields of configurations with any value."""
    torch.set_num_threads(1)
    top, rng, judge = Path(root), random.Random(seed), Judge()
    torch.manual_seed(0)
    recurra.LM(crash.CONFIG).save_pretrained(top)
    good = json.loads((top / "config.json").read_bytes())
    size = sum(len(data) for data in crash.contents(top).values())
    recurra.LM.from_pretrained(top)

    def read(data: bytes, context: object) -> None:
        (top / "config.json").write_bytes(data)
        judge(lambda: recurra.LM.from_pretrained(top), size + len(data), context)

    def make(kind: type, fields: dict[str, Any], context: object) -> None:
        def case() -> None:
            config = kind(**fields)
            if isinstance(config, LMConfig):
                assert config.parameter_count() > 0
                if config.parameter_count() < 10**4:
                    recurra.LM(config)
                elif config.parameter_count() > 10**13:
                    try:
                        recurra.LM(config)
                    except ValueError:
                        raise
                    raise AssertionError("made a model larger than any machine")
            elif isinstance(config, MambaConfig):
                assert config.parameter_count(64) > 0
            else:
                for step in (1, config.steps // 2 + 1, config.steps):
                    assert math.isfinite(config.learning_rate(step))

        judge(case, 0, context)

    for text in TEXTS:
        read(text, text[:60])
    for n in range(count):
        kind = rng.randrange(6)
        if kind < 3:
            context = ("config.json", seed, n)
            values = _damaged_json(dict(good), rng)
            read(_encoded(values), context)
            continue
        of = (LMConfig, MambaConfig, TrainOptions)[kind - 3]
        names = [field.name for field in dataclasses.fields(of)]
        chosen = rng.sample(names, rng.choice((1, 1, 2, 4)))
        fields = {name: rng.choice(OBJECTS) for name in chosen}
        if rng.random() < 0.05:
            fields["unknown"] = 1
            fields.pop("mixer", None)
            judge(lambda of=of, fields=fields: _unknown(of, fields), 0, (of, seed, n))
            continue
        make(of, fields, (of.__name__, seed, n, chosen))
    return {"accepted": judge.accepted, "refused": judge.refused}


def _unknown(of: type, fields: dict[str, Any]) -> None:
    try:
        of(**fields)
    except TypeError as error:  # as of any call with an argument that there is not
        raise ValueError(str(error)) from None


# ---- tokenizers ---------------------------------------------------------------------------------


def tokenizer_files(root: str, count: int, seed: int = 0) -> dict[str, int]:
    """Damaged tokenizer.json, and text through those that load."""
    torch.set_num_threads(1)
    top, rng, judge = Path(root), random.Random(seed), Judge()
    path = top / "tokenizer.json"
    letters = {letter: n for n, letter in enumerate("abcdefgh \n?")}
    one = tokenizers.Tokenizer(tokenizers.models.BPE(letters | {"ab": 11}, [("a", "b")]))
    one.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    one.add_special_tokens(["<eos>"])
    one.save(str(path))
    good = path.read_bytes()

    def use() -> None:
        tokenizer = load_tokenizer(top, 64)
        tokens = tokenizer.encode("abc abc\nxyz <eos>")
        assert all(0 <= token < 64 for token in tokens), tokens
        tokenizer.decode(tokens)

    use()
    for text in [*TEXTS, b"x" * 1_000_000]:
        path.write_bytes(text)
        judge(use, len(text), text[:60])
    with open(path, "wb") as file:
        file.truncate(300 << 20)  # without a byte on the disk
    judge(use, 0, "large")
    for n in range(count):
        if rng.random() < 0.6:
            data = _encoded(_damaged_json(json.loads(good), rng))
        else:
            data = _damaged_bytes(good, rng, [good])
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        judge(use, len(data), ("tokenizer", seed, n))
    return {"accepted": judge.accepted, "refused": judge.refused}

"""Text to train on: files one behind the other, tokens, batches that depend on the step alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from recurra.lm.tokenizer import ByteTokenizer, JsonTokenizer
from recurra.train import data
from recurra.train.data import Batches, Bytes, Corpus, Part, find_files, open_text


def write(folder, **files: bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_files_read_as_one(tmp_path):
    write(tmp_path, a=b"hello", b=b"", c=b" wor", d=b"ld")
    text = Bytes([tmp_path / "a", tmp_path / "b", b"", tmp_path / "c", tmp_path / "d"])
    whole = b"hello world"
    assert len(text) == len(whole)
    for start in range(len(whole)):
        for count in range(len(whole) - start + 1):
            assert text.read(start, count).astype(np.uint8).tobytes() == whole[start:][:count]
    assert text.read(0, 3).dtype == np.int64
    assert Part(text, 3, 8).read(1, 4).astype(np.uint8).tobytes() == b"o wo"


def test_many_files_stay_closed(tmp_path):
    for i in range(200):
        (tmp_path / f"{i:03}").write_bytes(bytes([i + 1]) * 10)
    text = open_text([str(tmp_path)])
    before = len(os.listdir("/proc/self/fd"))
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    assert text.read(0, 2000).tolist() == [i + 1 for i in range(200) for _ in range(10)]
    # A map keeps its file open.
    assert len(os.listdir("/proc/self/fd")) <= before + data._OPEN_FILES + 1
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= maps + data._OPEN_FILES + 8


def test_a_file_that_changed_is_named(tmp_path):
    write(tmp_path, a=b"x" * 9000)
    text = Bytes([tmp_path / "a"])
    (tmp_path / "a").write_bytes(b"x" * 10)
    with pytest.raises(OSError, match="has changed from 9000 to 10 bytes"):
        text.read(8000, 10)


def test_finding_files(tmp_path):
    write(tmp_path, x__b=b"2", x__a=b"1", x__y__c=b"3", **{"x__.hidden": b"4"}, z=b"5")
    write(tmp_path, x__image=b"\0\1\2")
    folder = tmp_path / "x"
    assert find_files([str(folder)]) == [folder / "a", folder / "b", folder / "y" / "c"]
    assert find_files([str(tmp_path / "**" / "c")]) == [folder / "y" / "c"]
    assert find_files([str(tmp_path / "z"), str(folder / "[ab]")]) == [
        tmp_path / "z",
        folder / "a",
        folder / "b",
    ]
    for name in (str(tmp_path / "nothing"), str(tmp_path / "*.nothing")):
        with pytest.raises(FileNotFoundError) as error:
            find_files([name])
        assert error.value.filename == name
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no text files in the folder"):
        find_files([str(tmp_path / "empty")])
    write(tmp_path, nothing=b"")
    with pytest.raises(ValueError, match="is empty"):
        open_text([str(tmp_path / "nothing")])


def test_the_embedded_text_is_large_and_readable():
    text = data.embedded()
    assert len(text) > 4_000_000
    beginning = text.read(0, 20_000).astype(np.uint8).tobytes().decode()
    assert "statement" in beginning
    assert b"import " in text.read(len(text) - 100_000, 100_000).astype(np.uint8).tobytes()


def test_a_file_of_any_size(tmp_path):
    """Four TiB, of which nothing is read but what is asked for."""
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 42)
        file.seek(1 << 41)
        file.write(b"here")
    text = Bytes([path, b"end"])
    assert len(text) == (1 << 42) + 3
    assert text.read(1 << 41, 4).astype(np.uint8).tobytes() == b"here"
    assert text.read((1 << 42) - 1, 4).astype(np.uint8).tobytes() == b"\0end"
    corpus = Corpus(text, ByteTokenizer())
    assert len(corpus.valid) == 4 << 20 and len(corpus.fingerprint()) == 128
    x, y = Batches(corpus.train, 4, 16, 0, False).get(1, range(4))
    assert x.shape == y.shape == (4, 16)


def test_the_split():
    text = Bytes([bytes(range(256)) * 4])
    corpus = Corpus(text, ByteTokenizer(), fraction=0.1)
    assert (len(corpus.train), len(corpus.valid)) == (922, 102)
    assert corpus.bytes_per_token == 1
    held = Corpus(text, ByteTokenizer(), held_out=Bytes([b"other"]))
    assert (len(held.train), len(held.valid)) == (1024, 5)
    with pytest.raises(ValueError, match="to validate on has 5 tokens, sequences of 5 need at lea"):
        held.check(5)
    held.check(4)
    with pytest.raises(ValueError, match="to train on has 922 tokens"):
        corpus.check(1000)


def test_fingerprints_differ_where_the_text_does():
    text = bytes(range(256)) * 4
    prints = {
        Corpus(Bytes([t]), ByteTokenizer(), fraction=f).fingerprint()
        for t, f in (
            (text, 0.1),
            (text, 0.2),
            (text[:-1], 0.1),
            (text[:500] + b"!" + text[501:], 0.1),
        )
    }
    assert len(prints) == 4
    again = Corpus(Bytes([text[:100], text[100:]]), ByteTokenizer(), fraction=0.1)
    assert again.fingerprint() in prints


def test_random_places_depend_on_seed_and_step_alone():
    text = Bytes([np.random.default_rng(0).bytes(5000)])
    batches = Batches(text, 6, 50, 7, False)
    x, y = batches.get(3, range(6))
    assert torch.equal(x[:, 1:], y[:, :-1])
    rows = [Batches(text, 6, 50, 7, False).get(3, range(r, r + 2)) for r in (0, 2, 4)]
    assert torch.equal(torch.cat([r[0] for r in rows]), x)
    assert not torch.equal(batches.get(4, range(6))[0], x)
    assert not torch.equal(Batches(text, 6, 50, 8, False).get(3, range(6))[0], x)
    # Every place occurs, the last one too.
    short = Batches(Bytes([bytes(range(8))]), 200, 5, 0, False)
    assert set(short.get(1, range(200))[0][:, 0].tolist()) == {0, 1, 2}


def test_carried_sequences_go_on_where_they_stopped():
    text = Bytes([bytes(range(100))])
    batches = Batches(text, 2, 7, 0, True)
    starts = [batches.get(step, range(2))[0][:, 0].tolist() for step in range(1, 10)]
    assert starts == [[7 * i, 50 + 7 * i] for i in range(7)] + [[0, 50], [7, 57]]
    assert [s for s in range(1, 16) if batches.begins(s)] == [1, 8, 15]
    with pytest.raises(ValueError, match="100 tokens, 20 parts of it with sequences of 5 need at"):
        Batches(text, 20, 5, 0, True)


def test_a_tokenizer_file_makes_token_files(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<end>": 0, "[UNK]": 1} | {w: i + 2 for i, w in enumerate("abcdefgh")}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    write(tmp_path, one=b"a b c\n" * 50, two="é d".encode() + b"\xff e " * 10)
    text = Bytes([tmp_path / "one", tmp_path / "two"])
    corpus = Corpus(text, tokenizer, end=0, fraction=0.1, folder=tmp_path)
    tokens = corpus.train.read(0, len(corpus.train)).tolist()
    assert tokens[:151] == [2, 3, 4] * 50 + [0] and tokens[151:154] == [1, 1, 6]
    assert tokens[-1] == 0 and len(corpus.valid) > 5
    assert corpus.bytes_per_token == corpus.valid_bytes / len(corpus.valid)
    again = Corpus(text, tokenizer, fraction=0.1, folder=tmp_path, make=False)
    assert again.fingerprint() == corpus.fingerprint()

    # Tokenized again only where something has changed.
    stamp = (tmp_path / "train.bin").stat().st_mtime_ns
    Corpus(text, tokenizer, end=0, fraction=0.1, folder=tmp_path)
    assert (tmp_path / "train.bin").stat().st_mtime_ns == stamp
    other = Corpus(text, tokenizer, end=1, fraction=0.1, folder=tmp_path)
    assert other.fingerprint() != again.fingerprint()
    shifted = Corpus(text, tokenizer, end=1, fraction=0.2, folder=tmp_path)
    assert len(shifted.valid) > len(other.valid)


def test_pieces_are_cut_at_lines_and_never_within_a_character(monkeypatch):
    monkeypatch.setattr(data, "_PIECE", 10)
    for content in ("ab\ncd\nefghij\nklm" * 5, "é漢🙂" * 40, "\n" * 50, "x" * 95):
        text = Bytes([content.encode()])
        pieces = list(data._pieces(text, 0, len(text)))
        assert b"".join(pieces) == content.encode()
        for piece in pieces:
            assert 0 < len(piece) <= 10
            piece.decode()
    broken = Bytes([b"\x80" * 35])
    assert b"".join(data._pieces(broken, 0, 35)) == b"\x80" * 35

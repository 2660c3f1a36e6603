"""recurra compare: its table, its picture, equal sizes, what it refuses, and how it is stopped."""

from __future__ import annotations

import dataclasses
import json
import re
import weakref
from types import SimpleNamespace

import pytest

from recurra.cli import main
from recurra.lm import CONFIGS, LM, LMConfig
from recurra.lm.tokenizer import ByteTokenizer
from recurra.nn import AarenConfig
from recurra.train import TrainOptions, compare
from recurra.train.data import Corpus, open_text
from recurra.train.trainer import NonFiniteLoss, Trainer

COLUMNS = [
    "model",
    "bits/byte",
    "train tokens/s",
    "decode tokens/s",
    "state bytes",
    "parameters",
    "width",
    "steps",
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n} of a text to learn\n" for n in range(3000)))
    return path


@pytest.fixture
def command(text, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_DECODE_SECONDS", 0.1)
    options = "--mixers mamba,mingru --minutes 0.01 --parameters 3e4 --batch 2 --length 32"
    files = ["--data", str(text), "--picture", str(tmp_path / "compare.png")]
    return ["compare", *options.split(), *files, "--json", str(tmp_path / "compare.json")]


def rows(out: str) -> dict[str, list[str]]:
    """The cells of the table by the name of the model, below those of the head."""
    lines = [re.split(r" {2,}", line.strip()) for line in out.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if len(cells) == len(COLUMNS)}


def test_the_table_the_picture_and_the_file(command, tmp_path, capsys):
    assert main(command) == 0
    found = rows(capsys.readouterr().out)
    assert found.pop("model") == COLUMNS[1:] and set(found) == {"mamba", "mingru"}
    bits = [float(row[0]) for row in found.values()]
    assert bits == sorted(bits) and all(0 < b < 8 for b in bits)
    sizes = [int(row[4].replace(",", "")) for row in found.values()]
    assert max(sizes) < 1.15 * min(sizes)
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    for result in json.loads((tmp_path / "compare.json").read_text())["results"]:
        row = found[result["name"]]
        assert row[0] == f"{result['bits_per_byte']:.3f}" and row[6] == str(result["steps"])
        seconds, curve = zip(*result["curve"], strict=True)
        assert list(seconds) == sorted(seconds) and seconds[-1] >= 0.6
        assert curve[-1] == result["bits_per_byte"]
        rate = result["steps"] * 2 * 32 / seconds[-1]
        assert result["train_tokens_per_second"] == pytest.approx(rate)


def test_time_counts_in_steps_alone_and_the_learning_rate_falls_with_it(text, monkeypatch):
    now, rates, take_step = [0.0], [], Trainer.train_step

    def step(self):
        now[0] += 0.125
        done = take_step(self)
        rates.append(done.lr)
        return done

    def validate(self):
        now[0] += 100.0
        return 8.0 - self.step / 10

    monkeypatch.setattr(Trainer, "train_step", step)
    monkeypatch.setattr(Trainer, "validate", validate)
    monkeypatch.setattr(compare, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(compare, "_decode", lambda model, corpus: (1.0, 1))
    corpus = Corpus(open_text([str(text)]), ByteTokenizer())
    options = TrainOptions(batch=2, length=16)
    config = compare.sized("hgrn", 100_000)
    result = compare.train("hgrn", config, options, corpus, 5.0)
    assert result.steps == 40 and result.train_tokens_per_second == 2 * 16 / 0.125
    assert result.curve == [(n * 0.625, 8.0 - n / 2) for n in range(1, 9)]
    # The first is thrown away, the next does not know yet how many there will be.
    assert len(rates) == 41 and rates[0] == rates[1] == options.lr / options.warmup
    assert max(rates) == pytest.approx(options.lr, rel=0.01)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(options.min_lr * options.lr, rel=0.05)


def test_the_state_is_that_of_one_sequence(text, monkeypatch):
    monkeypatch.setattr(compare, "_DECODE_SECONDS", 0.0)
    model = LM(compare.sized("hgrn", 100_000))
    corpus = Corpus(open_text([str(text)]), ByteTokenizer())
    speed, size = compare._decode(model, corpus)
    assert speed > 0 and size == sum(4 * x.numel() for part in model.initial_state(1) for x in part)


@pytest.mark.parametrize("parameters", [200_000, 1_817_856])
def test_all_have_about_the_same_size(parameters):
    for name in compare.default_names():
        config = compare.sized(name, parameters)
        assert config.parameter_count() == pytest.approx(parameters, rel=0.15), name
        assert config.vocab_size == 256


def test_what_follows_from_the_width_follows_it(monkeypatch):
    heads = LMConfig(d_model=144, mixer=AarenConfig(heads=9), embed_scale=12.0, vocab_size=999)
    monkeypatch.setitem(CONFIGS, "heads", heads)
    config = compare.sized("heads", 80_000)
    # Widths are multiples of 8, here of heads too.
    assert config.d_model == 72 and config.embed_scale == 8.5 and config.vocab_size == 256
    monkeypatch.setitem(CONFIGS, "heads", dataclasses.replace(heads, embed_scale=3.0))
    assert compare.sized("heads", 80_000).embed_scale == 3.0


def test_every_kind_of_mixer_is_compared_once():
    names = compare.default_names()
    assert names[0] == "mamba" and "small" not in names and "rwkv4-169m" not in names
    configs = [CONFIGS[compare.ALIASES.get(name, name)] for name in names]
    kinds = [frozenset(m.kind for m in config.mixers()) for config in configs]
    assert len(set(kinds)) == len(kinds)
    assert set(kinds) == {frozenset(m.kind for m in c.mixers()) for c in CONFIGS.values()}


def test_ctrl_c_leaves_with_what_is_done(command, monkeypatch, capsys):
    train = compare.train

    def interrupted(name, *rest):
        if name == "mingru":
            raise KeyboardInterrupt
        return train(name, *rest)

    monkeypatch.setattr(compare, "train", interrupted)
    assert main(command) == 130
    captured = capsys.readouterr()
    assert set(rows(captured.out)) == {"model", "mamba"}
    assert captured.err.endswith("recurra compare: interrupted, 1 of 2 models are done\n")


def test_one_that_diverges_is_last(command, tmp_path, monkeypatch, capsys):
    step = Trainer.train_step

    def diverge(self):
        if self.model.config.mixer.kind == "mamba" and self.step == 2:
            raise NonFiniteLoss("the loss of step 3 is nan")
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", diverge)
    assert main(command) == 0
    captured = capsys.readouterr()
    found = rows(captured.out)
    assert list(found) == ["model", "mingru", "mamba"] and found["mamba"][0] == "diverged"
    assert "mamba: the loss of step 3 is nan" in captured.err
    results = json.loads((tmp_path / "compare.json").read_text())["results"]
    assert results[0]["bits_per_byte"] is None and results[1]["bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("no such kernel\nat line 3"), "no such kernel"),
        (MemoryError(), "not enough memory"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_one_that_fails_does_not_lose_the_others(
    error, sentence, command, tmp_path, monkeypatch, capsys
):
    step = Trainer.train_step

    def fail(self):
        if self.model.config.mixer.kind == "mamba":
            raise error
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", fail)
    assert main(command) == 1
    captured = capsys.readouterr()
    assert set(rows(captured.out)) == {"model", "mingru"}
    assert f"\nmamba   failed: {sentence}\n" in captured.out
    assert f"recurra compare: mamba failed: {sentence}\n" in captured.err
    written = json.loads((tmp_path / "compare.json").read_text())
    assert [result["name"] for result in written["results"]] == ["mingru"]
    assert written["failed"] == {"mamba": sentence}


def test_when_all_fail_there_is_a_table_still(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "train", lambda *_: 1 / 0)
    assert main(command) == 1
    assert capsys.readouterr().out.count("failed: division by zero") == 2
    assert not (tmp_path / "compare.png").exists()


def test_one_trainer_is_held_at_a_time(text, monkeypatch):
    monkeypatch.setattr(compare, "_DECODE_SECONDS", 0.0)
    made: list[weakref.ref] = []

    class Counted(Trainer):
        def __init__(self, *given):
            assert not any(ref() for ref in made)
            super().__init__(*given)
            made.append(weakref.ref(self.model))

    monkeypatch.setattr(compare, "Trainer", Counted)
    corpus = Corpus(open_text([str(text)]), ByteTokenizer())
    config = compare.sized("hgrn", 100_000)
    compare.train("hgrn", config, TrainOptions(batch=2, length=16), corpus, 0.01)
    assert len(made) == 2


def test_the_search_for_a_width_ends(monkeypatch):
    heads = LMConfig(d_model=65_521, mixer=AarenConfig(heads=65_521))
    monkeypatch.setitem(CONFIGS, "heads", heads)
    sentence = "heads cannot have about 80,000 parameters: no width fits it"
    with pytest.raises(ValueError, match=sentence):
        compare.sized("heads", 80_000)
    monkeypatch.setattr(LMConfig, "parameter_count", lambda self: 7)
    with pytest.raises(ValueError, match="mamba cannot have about 80,000 .* the closest is 7"):
        compare.sized("mamba", 80_000)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--mixers mamba,gru", "unknown mixer gru; known are mamba, tiny, small, "),
        ("--mixers ,", "--mixers must name at least one"),
        ("--mixers=", "--mixers must name at least one"),
        ("--mixers mamba,,hgrn", "must have a name beside every comma, got 'mamba,,hgrn'"),
        ("--mixers mamba,hgrn,", "must have a name beside every comma, got 'mamba,hgrn,'"),
        ("--mixers mamba,hgrn,mamba", "--mixers must name each once, got mamba again"),
        ("--minutes 0", "--minutes must be positive and below 1e+07, got 0.0"),
        ("--minutes nan", "--minutes must be positive and below 1e+07, got nan"),
        ("--minutes inf", "--minutes must be positive and below 1e+07, got inf"),
        ("--parameters 0", "--parameters must be at least 1, got 0"),
        ("--parameters 500", "mamba cannot have about 500 parameters; the closest is "),
        (
            "--parameters 1e15",
            "mamba with --parameters 1e+15 needs 1.49e+07 GiB of memory to train",
        ),
        ("--parameters 1e300", "mamba with --parameters 1e+300 needs "),
        ("--length 0", "--length must be at least 1, got 0"),
        ("--length 100000", "sequences of 100000 need at least 100001"),
        ("--batch 0", "--batch must be at least 1, got 0"),
        ("--lr -1", "lr must be from 0.0 to 1000.0, got -1.0"),
        ("--threads 0", "--threads must be at least 1, got 0"),
        ("--picture nowhere/compare.png", "nowhere: no such folder"),
        ("--json .", ": is a folder"),
        ("--data nothing.txt", "nothing.txt: no such file"),
    ],
)
def test_what_is_wrong_is_one_sentence(command, options, sentence, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("trained"))
    assert main([*command, *options.split()]) == 1
    err = capsys.readouterr().err
    assert err.startswith("recurra compare: ") and sentence in err and err.count("\n") == 1

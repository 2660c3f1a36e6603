"""The command line: what it prints, and one sentence for whatever is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import recurra
from recurra.cli import main
from recurra.lm import LMConfig
from recurra.nn import MambaConfig

COMMANDS = ("info", "bench", "train", "compare", "generate", "eval", "diag")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LMConfig(d_model=16, n_layers=2, mixer=MambaConfig(d_state=4))
    recurra.LM(config).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("some text to read\n" * 40)
    (folder / "empty.txt").write_text("")
    (folder / "notes.json").write_text("{}")
    return folder


def _held(folder: Path) -> dict[Path, bytes | None]:
    """All that is in a folder, None for folders."""
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith(f"usage: recurra {command}")
    if command not in ("info", "bench"):
        assert "examples" in text and f"recurra {command} " in text.split("examples")[1]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {command} ", text, re.MULTILINE) for command in COMMANDS)


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", out, re.MULTILINE)
    assert "instruction set" in out and "_ops_cpu.so" in out


def test_bench_lists_its_cases(capsys):
    assert main(["bench", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert {"lm/train", "lm/prefill", "lm/decode", "lm/memory", "import"} <= set(names)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("generate {}/nothing", "{}/nothing: no such folder"),
        ("generate {}", "{}/config.json: no such file"),
        ("generate {}/model --temperature -1", "temperature must be from 0.0 to 1000.0, got -1.0"),
        ("generate {}/model --top-p 0", "top_p must be from 1e-06 to 1.0, got 0.0"),
        ("generate {}/model --max-tokens 0", "--max-tokens must be at least 1, got 0"),
        ("generate {}/model --threads 0", "--threads must be at least 1, got 0"),
        ("generate {}/model --prompt=", "prompt 0 must hold at least one token"),
        ("generate {}/model --tokenizer {}/notes.json", "{}/notes.json: is not a tokenizer"),
        ("generate {}/model --prompt-file {}/none", "{}/none: No such file or directory"),
        ("eval {}/model --data {}/nothing.txt", "{}/nothing.txt: no such file"),
        ("eval {}/model --data {}/empty.txt", "{}/empty.txt: is empty"),
        ("eval {}/model --data {}/text.txt --max-tokens 1", "1 tokens, at least 2 are needed"),
        ("eval {}/model --chunk 0", "--chunk must be at least 1, got 0"),
        ("train {}/run --config huge", "unknown configuration huge; known are tiny, small"),
        ("train {}/run --config {}/nothing.json", "{}/nothing.json: no such file"),
        ("train {}/run --config {}/notes.json", " or recurra, got None"),
        ("train {}/run --data {}/nothing", "{}/nothing: no such file"),
        ("train {}/run --data {}/empty.txt", "{}/empty.txt: is empty"),
        ("train {}/run --data {}/text.txt", "on has 36 tokens, sequences of 512 need at least 513"),
        ("train {}/run --data {}/text.txt --length 1000", "720 bytes"),
        ("train {}/run --batch 5 --accumulate 2", "accumulate must divide batch = 5, got 2"),
        ("train {}/run --minutes -1", "--minutes must be positive and below 1e+07, got -1.0"),
        ("train {}/run --init {}/model --config tiny", "--init brings its own configuration"),
        ("train {}/run --init {}/nothing", "{}/nothing: no such folder"),
        ("train {}/empty.txt", "File exists"),
        ("train {}/run --device tpu", "the device must be cpu or cuda, got tpu"),
        ("bench --shape 1x2x3", "--shape needs exactly one --op"),
    ],
)
def test_what_is_wrong_is_one_sentence(model, arguments, message, capsys):
    if message == "720 bytes":
        message = "has 684 tokens, sequences of 1000 need at least 1001"
    argv = [a.replace("{}", str(model)) for a in arguments.split()]
    before = _held(model)
    assert main(argv) == 1
    assert _held(model) == before
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[-1].startswith(f"recurra {argv[0]}: ")
    assert message.replace("{}", str(model)) in lines[-1]
    assert "Traceback" not in captured.err and len(lines) <= 2


def test_a_wrong_option_is_argparse_s(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "run", "--precision", "int4"])
    assert stop.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_generate_repeats_with_a_seed(model, capsys):
    argv = [
        "generate",
        str(model / "model"),
        "--prompt",
        "abc",
        "--max-tokens",
        "20",
        "--seed",
        "3",
    ]
    texts = []
    for extra in ([], [], ["--seed", "4"], ["--temperature", "0"]):
        assert main([*argv, *extra]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(set(texts)) == 3
    assert all(text.startswith("abc") and text.endswith("\n") for text in texts)


def test_generate_several_prompts(model, capsys):
    path = str(model / "model")
    prompts = ["--prompt", "ab", "--prompt", "longer one", "--prompt-file", str(model / "text.txt")]
    assert main(["generate", path, *prompts, "--max-tokens", "5", "--tokens-per-second"]) == 0
    captured = capsys.readouterr()
    assert re.search(r"== 1\nab[\s\S]*\n== 2\nlonger one[\s\S]*\n== 3\nsome text", captured.out)
    assert re.search(r"^15 tokens, [\d.]+ tokens/s", captured.err)


def test_eval_does_not_depend_on_the_chunk(model, capsys):
    path, text = str(model / "model"), str(model / "text.txt")
    figures = []
    for chunk in ("4096", "7", "1"):
        assert main(["eval", path, "--data", text, "--chunk", chunk, "--dtype", "float64"]) == 0
        out = capsys.readouterr().out
        figures.append(out[: out.index(" bytes,") + 6])
    assert len(set(figures)) == 1
    assert re.fullmatch(
        r"\d\.\d{4} bits per byte, perplexity [\d.]+ per token, 719 tokens, 719 bytes", figures[0]
    )


def test_a_closed_pipe_ends_quietly(model):
    code = (
        "import sys; from recurra.cli import main; "
        f"sys.exit(main(['generate', {str(model / 'model')!r}, '--max-tokens', '5000']))"
    )
    going = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    going.stdout.read(3)
    going.stdout.close()
    errors = going.stderr.read().decode()
    going.wait()
    assert "Traceback" not in errors, errors

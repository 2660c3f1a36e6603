"""Files of others may hold anything: what comes of them is a result or an error with a message, in
time and in little memory, never the end of the process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch

import crash
import hostile
import recurra
from recurra._files import CheckpointError
from recurra.lm import LMConfig, load_tokenizer
from recurra.lm import config as lm_config
from recurra.lm.tokenizer import JsonTokenizer
from recurra.nn import AttentionConfig, MambaConfig
from recurra.train import TrainOptions, checkpoint, state
from support import NIGHTLY, run_python, same_bits

UNTIED = LMConfig(
    vocab_size=20, d_model=8, n_layers=2, mixer=MambaConfig(d_state=2), tie_embeddings=False
)


@pytest.mark.parametrize(
    "what, quick, nightly",
    [("checkpoints", 2000, 100_000), ("configs", 2000, 50_000), ("tokenizer_files", 500, 20_000)],
)
def test_damaged_files(what, quick, nightly, tmp_path):
    printed = run_python(
        f"""
        import json, hostile
        print(json.dumps(hostile.{what}({str(tmp_path)!r}, {nightly if NIGHTLY else quick})))
        """,
        timeout=7200 if NIGHTLY else 300,
        RUST_BACKTRACE="0",  # reads debugging information, into memory that there is not
    )
    counts = json.loads(printed)
    # Damage does not always matter, and not everything is damage.
    assert counts["refused"] > quick / 2 and counts["accepted"] > quick / 100, counts


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good checkpoint."""
    torch.manual_seed(1)
    recurra.LM(UNTIED).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def sharded(folder: Path, names: dict[str, object]) -> None:
    """Moves the weights into a shard; ``names`` replaces what the index says of some."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors") | names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_no_model_is_made_for_weights_that_are_not_there(tmp_path, monkeypatch):
    """A small config.json may ask for all memory of the machine."""
    run = tmp_path / "run"
    argv = crash.arguments(tmp_path, run, options=TrainOptions(steps=1, length=8, eval_batches=1))
    assert crash.call(argv)[0] == 0
    path = run / crash.FOLDER / checkpoint.name(1) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 10_000}))
    hostile.seal(path.parent, 1)
    monkeypatch.setattr(recurra.train, "Trainer", None)
    status, errors = crash.call(["train", str(run), "--resume", "--data", argv[3]])
    assert status == 1
    crash.assert_one_sentence(errors, "must have shape (256, 10000), got (256, 8)")


@pytest.mark.parametrize("position", [-1, 10**6, 10**30, "1"])
def test_a_place_outside_of_the_random_numbers(position, tmp_path):
    """numpy would read what is in memory there."""
    trainer = crash.trainer()
    trainer.train_step()
    state.save(trainer, tmp_path, "text")
    path = tmp_path / crash.FOLDER / checkpoint.name(1) / state.ABOUT
    about = json.loads(path.read_text())
    about["random"]["numpy"][2] = position
    path.write_text(json.dumps(about))
    hostile.seal(path.parent, 1)
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        state.resume(trainer, path.parent, "text")


def test_an_index_within_the_folder(folder):
    want = recurra.LM.from_pretrained(folder).state_dict()
    sharded(folder, {})
    got = recurra.LM.from_pretrained(folder).state_dict()
    assert all(same_bits(got[name], x) for name, x in want.items())


@pytest.mark.parametrize("name", ["../model/x", "/etc/passwd", "..", "a/b", "", 5, None, [[]], {}])
def test_an_index_that_leaves_the_folder(folder, name):
    sharded(folder, {"backbone.norm_f.weight": name})
    with pytest.raises(CheckpointError, match="is not the name of a file in this folder"):
        recurra.LM.from_pretrained(folder)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "x"])
def test_an_index_without_files(folder, text):
    sharded(folder, {})
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index.json: (must hold|is not JSON)"):
        recurra.LM.from_pretrained(folder)


def test_a_shard_that_is_not_there(folder):
    sharded(folder, {"backbone.norm_f.weight": "model-2.safetensors"})
    with pytest.raises(FileNotFoundError, match="no such file.*model-2.safetensors"):
        recurra.LM.from_pretrained(folder)


def test_links_to_files_elsewhere(folder):
    """A folder that was downloaded is often made of links into a store."""
    store = folder.parent / "store"
    shutil.move(folder, store)
    folder.mkdir()
    for path in store.iterdir():
        (folder / path.name).symlink_to(f"../store/{path.name}")
    recurra.LM.from_pretrained(folder)


def test_what_is_not_a_file(folder):
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/null")
        with pytest.raises(FileNotFoundError):
            recurra.LM.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        recurra.LM.from_pretrained(folder / "nowhere")


def test_pickle_is_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is pickle, which recurra does not read"):
        recurra.LM.from_pretrained(folder)


def test_other_architectures(folder):
    llama = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "hidden_act": "silu"}
    gelu = json.loads((folder / "config.json").read_text()) | {"hidden_act": "gelu"}
    for values, words in (
        (llama, "model_type must be mamba.* or recurra, got 'llama'"),
        (llama | {"model_type": "mamba2"}, "model_type must be mamba.* or recurra, got 'mamba2'"),
        ({}, "model_type must be mamba.* or recurra, got None"),
        (gelu, "hidden_act must be silu, got 'gelu'"),
    ):
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=f"config.json: {words}"):
            recurra.LM.from_pretrained(folder)


def test_weights_of_another_architecture(folder):
    layers = {f"model.layers.{n}.self_attn.q_proj.weight": torch.zeros(2, 2) for n in range(3)}
    safetensors.torch.save_file(layers, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="config.json says 2 layers, the weights have 0"):
        recurra.LM.from_pretrained(folder)


def test_a_head_that_is_missing(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="lm_head.weight is missing"):
        recurra.LM.from_pretrained(folder)


def test_a_tensor_under_two_names(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["embedding.weight"] = torch.ones(3)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds embeddings.weight a second time"):
        recurra.LM.from_pretrained(folder)


def test_numbers_out_of_range():
    for fields, words in (
        ({"d_model": -1}, "d_model must be from 1 to 1048576, got -1"),
        ({"d_model": 10**12}, "d_model must be from 1 to 1048576, got 1000000000000"),
        ({"vocab_size": 10**5000}, "vocab_size must be from 1 to .*, got a value too long to"),
        ({"norm_eps": float("nan")}, "norm_eps must be from 0.0 to 1.0, got nan"),
        ({"n_layers": True}, r"n_layers must be int, got True \(bool\)"),
        ({"eos_token_ids": (256,)}, "eos_token_ids must be from 0 to 255, got 256"),
    ):
        with pytest.raises(ValueError, match=f"LMConfig: {words}"):
            LMConfig(**fields)
    with pytest.raises(ValueError, match="has .* GiB of parameters, this machine has"):
        recurra.LM(LMConfig(vocab_size=1 << 31, d_model=1 << 20))


def test_states_larger_than_the_machine(tmp_path, monkeypatch):
    """The weights are in the files; what is remembered costs its author nothing."""
    monkeypatch.setattr(lm_config, "_machine_memory", lambda: 2.0**30)
    small = {"vocab_size": 20, "d_model": 16, "n_layers": 2}
    lm = recurra.LM(LMConfig(mixer=AttentionConfig(window=8), **small))
    lm.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["mixer"]["window"] = 1 << 24
    path.write_text(json.dumps(values))
    # Two layers of 2^24 keys and values of 4 numbers.
    words = "the state of a batch of 1 has 1 GiB, this machine has 0.9999"
    monkeypatch.setattr(lm_config, "_machine_memory", lambda: 2.0**30 - 2**16)
    with pytest.raises(CheckpointError, match=f"config.json: LMConfig: {words}"):
        recurra.LM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        recurra.LM(LMConfig(mixer=AttentionConfig(window=1 << 24), **small))
    batch = 1 << 50  # a row of tokens that takes no memory itself
    for make in (
        lambda: lm.initial_state(batch),
        lambda: lm(torch.zeros(1, 1, dtype=torch.int64).expand(batch, 1)),
        lambda: lm(inputs_embeds=torch.zeros(1, 1, 16).expand(batch, 1, 16)),
        lambda: lm(
            torch.zeros(1, 1, dtype=torch.int64),
            cu_seqlens=torch.zeros(1, dtype=torch.int64).expand(batch + 1),
        ),
    ):
        with pytest.raises(ValueError, match=f"the state of a batch of {batch} has .* GiB, this"):
            make()


def test_weights_larger_than_64_bits_count(folder):
    values = {"model_type": "recurra", "d_model": 1 << 20, "vocab_size": 20, "n_layers": 2}
    mixer = {"kind": "qrnn", "expand": 1024, "window": 1024}
    (folder / "config.json").write_text(json.dumps(values | {"mixer": mixer}))
    with pytest.raises(CheckpointError, match="config.json: QRNNConfig: a parameter at d_model"):
        recurra.LM.from_pretrained(folder)


def test_vocabularies_that_do_not_fit(folder, tmp_path):
    def save(vocabulary: dict[str, int]) -> None:
        model = tokenizers.models.WordLevel(vocabulary, unk_token="?")
        tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))

    save({letter: n for n, letter in enumerate("abcdefghijklmnopqrst?")})
    with pytest.raises(CheckpointError, match="tokenizer.json: has 21 tokens, the model has 20"):
        load_tokenizer(folder, 20)
    save({"a": 0, "?": 70_000})  # what counts is the largest number
    with pytest.raises(CheckpointError, match="tokenizer.json: has 70001 tokens, the model has 20"):
        load_tokenizer(folder, 20)
    argv = crash.arguments(tmp_path, tmp_path / "run")
    status, errors = crash.call([*argv, "--tokenizer", str(folder / "tokenizer.json")])
    assert status == 1
    crash.assert_one_sentence(errors, "has 70001 tokens, the model has 256")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json: is not a tokenizer"):
        load_tokenizer(folder, 20)
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        JsonTokenizer(folder / "model.safetensors")

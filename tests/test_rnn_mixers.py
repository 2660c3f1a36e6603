"""Models on nonlinear recurrences: whole = in chunks = step by step, training, checkpoints."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import recurra
from mixers import (
    assert_gradients_are_those_of_the_reference,
    assert_packed_is_apart,
    assert_whole_is_chunked_is_stepped,
    learn_a_cycle,
    next_token_loss,
)
from recurra.lm import CONFIGS, LMConfig
from recurra.nn import RNN, RNNConfig

CELLS = list(recurra.cells())
NAMED = [name for name, config in CONFIGS.items() if isinstance(config.mixer, RNNConfig)]
VARIANTS = {cell: RNNConfig(cell, expand=1.5) for cell in CELLS} | {
    "no convolution": RNNConfig("elstm", d_conv=1),
    "no gate": RNNConfig("sru", gate=False),
    "signed": RNNConfig("mingru", eig_range=(-1, 1)),
}


def model(mixer: RNNConfig, dtype: torch.dtype = torch.float64, layers: int = 2) -> recurra.LM:
    torch.manual_seed(1)
    lm = recurra.LM(LMConfig(vocab_size=31, d_model=12, n_layers=layers, mixer=mixer)).to(dtype)
    with torch.no_grad():  # large enough weights for every part to matter
        for name, p in lm.named_parameters():
            if name.endswith(("in_proj.weight", "cell_proj.weight", "embeddings.weight")):
                p.mul_(3)
            if name.endswith("recurrent"):
                p.add_(0.3 * torch.randn_like(p))
    return lm


@pytest.mark.parametrize("mixer", VARIANTS.values(), ids=VARIANTS)
def test_whole_is_chunked_is_stepped(mixer):
    assert_whole_is_chunked_is_stepped(model(mixer), [1, 9, 13])


@pytest.mark.parametrize("mixer", VARIANTS.values(), ids=VARIANTS)
def test_packed_sequences_do_not_meet(mixer):
    assert_packed_is_apart(model(mixer), [7, 13])


@pytest.mark.parametrize("mixer", VARIANTS.values(), ids=VARIANTS)
def test_gradients_are_those_of_the_reference(mixer):
    tokens = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(3))
    assert_gradients_are_those_of_the_reference(lambda: model(mixer), next_token_loss(tokens))


@pytest.mark.parametrize("name", NAMED)
def test_a_named_configuration_learns(name):
    config = dataclasses.replace(CONFIGS[name], d_model=32, n_layers=2, vocab_size=16)
    lm, tokens, losses = learn_a_cycle(config)
    assert losses[0] > 2.5 and losses[-1] < 0.3
    (said,) = lm.generate([tokens[0, :20]], max_tokens=12)
    assert said == tokens[0, 20:32].tolist()


def test_sizes_and_counts():
    assert {
        "paragru",
        "paralstm",
        "elstm",
        "indrnn",
        "sru",
        "lem",
        "slstm",
        "mingru",
        "minlstm",
    } == set(NAMED)
    for mixer in VARIANTS.values():
        made = mixer.make(10)
        assert mixer.parameter_count(10) == sum(p.numel() for p in made.parameters())
        assert all(x.shape[0] == 3 and not x.any() for x in made.initial_state(3))


def test_initial_weights():
    torch.manual_seed(0)
    rnn = RNN(256, RNNConfig("paragru"))
    assert rnn.recurrent.std().item() == pytest.approx(2 / 1280**0.5, rel=0.1)
    update, *rest = rnn.cell_proj.bias.detach().view(3, -1)
    assert update[0] == 0 and update[-1] == -1 and not any(b.any() for b in rest)
    forget = RNN(256, RNNConfig("slstm")).cell_proj.bias.detach().view(4, -1)[1]
    assert forget.min() == 3 and forget.max() == 6
    u = RNN(256, RNNConfig("indrnn")).recurrent
    assert 0 <= u.min() < 0.05 and 0.95 < u.max() <= 1
    dt = RNN(256, RNNConfig("lem")).recurrent[4]
    assert (dt == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saves_and_loads_itself(dtype, tmp_path):
    lm = model(RNNConfig("paralstm", expand=1.5, d_conv=3, gate=False), dtype)
    lm.save_pretrained(tmp_path)
    again = recurra.LM.from_pretrained(tmp_path)
    assert again.config == lm.config
    tokens = torch.randint(0, 31, (1, 9))
    assert torch.equal(again(tokens)[0], lm(tokens)[0])


def test_what_is_wrong_with_a_configuration_is_named(tmp_path):
    lm = model(RNNConfig("elstm"))
    lm.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())

    def refused(sentence: str, **changes) -> None:
        values = whole | {k: v for k, v in changes.items() if k != "mixer"}
        mixer = changes.get("mixer", {})
        values["mixer"] = whole["mixer"] | mixer if isinstance(mixer, dict) else mixer
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError) as error:
            recurra.LM.from_pretrained(tmp_path)
        assert sentence in str(error.value)

    refused("cell must be one of elstm, indrnn", mixer={"cell": "gru"})
    refused("cell must be str, got 3 (int)", mixer={"cell": 3})
    refused("the kind of mixer must be mamba, rnn", mixer={"kind": "transformer"})
    refused("got ['rnn']", mixer={"kind": ["rnn"]})
    refused("mixer must be an object, got 'rnn'", mixer="rnn")
    refused("has cell, expand, d_conv, gate, eig_range, got 'depth'", mixer={"depth": 3})
    refused("expand must be from 0.001 to 1024.0, got -1", mixer={"expand": -1})
    refused("d_conv must be from 1 to 1024, got 0", mixer={"d_conv": 0})
    refused("d_model must be int, got '12' (str)", d_model="12")
    refused("config.json says 5 layers, the weights have 2", n_layers=5)
    refused("the weights have 2", n_layers=4096)
    refused("recurrent", mixer={"cell": "paragru"})


def test_the_range_of_minimal_cells():
    """Half of the factors are negative at the beginning where they may be from -1 to 1, none
    otherwise; the scale that makes them is no parameter, but is saved."""
    for low, share in ((0, 0.0), (-0.5, 0.33), (-1, 0.5)):
        torch.manual_seed(0)
        config = RNNConfig("minlstm", eig_range=(low, 1), d_conv=1, gate=False)
        rnn = config.make(64)
        assert "recurrent" in rnn.state_dict() and (rnn.recurrent == 1 - low).all()
        assert config.parameter_count(64) == sum(p.numel() for p in rnn.parameters())
        x = torch.zeros(1, 1, 3, 4000)
        x[0, 0, :2] = 5 * torch.randn(2, 4000)
        params, h0 = torch.full((1, 4000), 1.0 - low), torch.ones(1, 1, 4000)
        kept = (
            recurra.rnn(x, params, h0, cell="minlstm")[0]
            - recurra.rnn(x, params, 0 * h0, cell="minlstm")[0]
        )
        assert kept.min() >= low - 1e-6 and kept.max() <= 1
        assert (kept < 0).float().mean().item() == pytest.approx(share, abs=0.1)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"eig_range must be \(0, 1\) for the cell elstm, got"):
        RNNConfig("elstm", eig_range=(-1, 1))
    for bad in ((-2, 1), (0.5, 1), (-1, 2), (0, 1, 2), [0, 1], "01", (float("nan"), 1)):
        with pytest.raises(ValueError, match=r"RNNConfig: eig_range must be"):
            RNNConfig("mingru", eig_range=bad)
    with pytest.raises(ValueError, match="RNNConfig: cell must be one of elstm, .*, got gru"):
        RNNConfig("gru")
    with pytest.raises(ValueError, match=r"expand \* d_model must be at least 1, got 0"):
        RNNConfig(expand=0.01).make(10)

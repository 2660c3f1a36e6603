"""RWKV-4: whole = in chunks = step by step, training, transformers' checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

import recurra
from mixers import (
    assert_gradients_are_those_of_the_reference,
    assert_packed_is_apart,
    assert_whole_is_chunked_is_stepped,
    close,
    learn_a_cycle,
    states,
)
from recurra.lm import CONFIGS, LMConfig
from recurra.nn import RWKV4, RWKV4Channel, RWKV4ChannelConfig, RWKV4Config

VARIANTS = {
    "default": dataclasses.replace(CONFIGS["rwkv4"], vocab_size=31, d_model=12, n_layers=2),
    "other widths": LMConfig(
        vocab_size=31, d_model=12, n_layers=2, mixer=RWKV4Config(1.5), ffn=RWKV4ChannelConfig(2.3)
    ),
}


def model(config: LMConfig, dtype: torch.dtype = torch.float64) -> recurra.LM:
    torch.manual_seed(1)
    lm = recurra.LM(config).to(dtype)
    with torch.no_grad():  # projections begin at zero, norms at one
        for p in lm.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return lm


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_whole_is_chunked_is_stepped(config):
    assert_whole_is_chunked_is_stepped(model(config), [1, 0, 9, 13])


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_packed_sequences_do_not_meet(config):
    lm = model(config)
    _, before = lm(torch.randint(0, 31, (4, 3)))
    assert_packed_is_apart(lm, [7, 0, 1, 12], before)


@pytest.mark.parametrize("packed", [None, [0, 4, 4, 22]], ids=["whole", "packed"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_gradients_are_those_of_the_reference(config, packed):
    shape = (2, 12) if packed is None else (1, 23)
    tokens = torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(3))
    cu_seqlens = None if packed is None else torch.tensor(packed)

    def loss(lm):
        logits, state = lm(tokens[:, :-1], cu_seqlens=cu_seqlens)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return loss + sum(x[-1].sin().sum() for x in states(state))

    assert_gradients_are_those_of_the_reference(lambda: model(config), loss)


def test_the_mixer_is_the_formulas():
    """The equations of the paper, sums written out."""
    torch.manual_seed(0)
    mixer, channel = RWKV4(6, RWKV4Config(2)).double(), RWKV4Channel(6).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    before = torch.cat([torch.zeros(1, 6, dtype=torch.float64), x[:-1]])
    with torch.no_grad():
        for p in (*mixer.parameters(), *channel.parameters()):
            p.copy_(torch.randn_like(p))

        def mixed(layer: torch.nn.Module, name: str) -> torch.Tensor:
            mu = getattr(layer, f"time_mix_{name}")[0]
            return (mu * x + (1 - mu) * before) @ getattr(layer, name).weight.T

        k, v, r = (mixed(mixer, name) for name in ("key", "value", "receptance"))
        w, u = mixer.time_decay.exp(), mixer.time_first
        rows = []
        for t in range(5):
            weights = [torch.exp(-(t - 1 - i) * w + k[i]) for i in range(t)]
            weights.append(torch.exp(u + k[t]))
            total = sum(p * value for p, value in zip(weights, v, strict=False))
            rows.append(torch.sigmoid(r[t]) * total / sum(weights))
        close(mixer(x[None])[0][0], torch.stack(rows) @ mixer.out_proj.weight.T)
        inner = mixed(channel, "key").relu() ** 2 @ channel.out_proj.weight.T
        close(channel(x[None])[0][0], torch.sigmoid(mixed(channel, "receptance")) * inner)


def test_learns():
    config = dataclasses.replace(CONFIGS["rwkv4"], d_model=32, n_layers=2, vocab_size=16)
    lm, tokens, losses = learn_a_cycle(config)
    assert losses[0] > 2.5 and losses[-1] < 0.3
    (said,) = lm.generate([tokens[0, :20]], max_tokens=12)
    assert said == tokens[0, 20:32].tolist()


def test_initial_weights():
    lm = recurra.LM(dataclasses.replace(CONFIGS["rwkv4"], d_model=30, n_layers=3))
    first, middle, last = (block.mixer for block in lm.layers)
    channels = torch.arange(30) / 30
    torch.testing.assert_close(first.time_mix_key.detach()[0, 0], channels)
    torch.testing.assert_close(last.time_mix_key.detach()[0, 0], channels ** (1 / 3))
    torch.testing.assert_close(last.time_mix_value.detach()[0, 0], channels ** (1 / 3) + 0.3)
    torch.testing.assert_close(first.time_mix_receptance.detach()[0, 0], channels**0.5)
    torch.testing.assert_close(
        lm.layers[2].ffn.time_mix_receptance.detach()[0, 0], channels ** (1 / 3)
    )
    for mixer in (first, middle, last):
        assert mixer.time_decay[0] == -5 and mixer.time_decay[-1] == 3
        assert mixer.time_decay.diff().min() > 0
    assert first.time_decay[15] > last.time_decay[15]
    zigzag = (middle.time_first[:4] - middle.time_first[0]).tolist()
    assert zigzag == pytest.approx([0, 0.5, -0.5, 0], abs=1e-6)
    alone = RWKV4(30)
    assert torch.equal(alone.time_mix_key, middle.time_mix_key)  # the middle of three
    assert not alone.key.weight.any() and alone.value.weight.any()


def test_sizes_and_states():
    for config in (RWKV4Config(), RWKV4Config(1.5), RWKV4ChannelConfig(), RWKV4ChannelConfig(2.3)):
        made = config.make(10)
        assert config.parameter_count(10) == sum(p.numel() for p in made.parameters())
        assert made.initial_state(3)[0].shape == (3, 10)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        state = RWKV4(10).to(dtype).initial_state(2)
        assert [x.dtype for x in state] == [torch.float32] * 2
    with pytest.raises(ValueError, match=r"RWKV4: expand \* d_model must be at least 1, got 0"):
        RWKV4Config(0.01).make(10)
    with pytest.raises(ValueError, match="RWKV4ChannelConfig: expand must be from"):
        RWKV4ChannelConfig(-1)


def test_16_bit_models_follow_their_float32_twins():
    tokens = torch.randint(0, 31, (2, 40))
    half = model(VARIANTS["default"], torch.bfloat16)
    lm = copy.deepcopy(half).float()
    got, state = half(tokens)
    assert got.dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in states(state))
    want = lm(tokens)[0]
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()
    stepped = half.initial_state(2)
    steps = torch.stack([half.step(token, stepped) for token in tokens.unbind(1)], 1)
    assert (steps - got).abs().max() < 0.05 * want.abs().max()


# Checkpoints --------------------------------------------------------------------------------------


def theirs(**sizes):
    """transformers' model with random weights, large enough for every part to matter."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "context_length": 16}
    made = transformers.RwkvForCausalLM(transformers.RwkvConfig(**config | sizes))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made.eval()


SIZES = {
    "plain": {},
    "rescaled": {"num_hidden_layers": 5, "rescale_every": 2},
    "rescaled at the end": {"num_hidden_layers": 4, "rescale_every": 2},
    "large epsilon": {"num_hidden_layers": 4, "rescale_every": 1, "layer_norm_epsilon": 1e-2},
    "not rescaled": {"num_hidden_layers": 8, "rescale_every": -1},
    "other widths": {"attention_hidden_size": 48, "intermediate_size": 83},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_logits_are_those_of_transformers(sizes, tmp_path):
    peer = theirs(**sizes)
    peer.save_pretrained(tmp_path / "theirs")
    lm = recurra.LM.from_pretrained(tmp_path / "theirs")
    tokens = torch.randint(0, 50, (2, 300))
    with torch.no_grad():
        want, got = peer(tokens, use_cache=False).logits, lm(tokens)[0]
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    # And back: what we write, transformers reads.
    lm.save_pretrained(tmp_path / "ours")
    again = type(peer).from_pretrained(tmp_path / "ours")
    for name, value in type(peer).from_pretrained(tmp_path / "theirs").state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(again(tokens, use_cache=False).logits, want)
    assert recurra.LM.from_pretrained(tmp_path / "ours").config == lm.config


def test_another_head_than_the_embedding_is_not_dropped(tmp_path):
    peer = theirs()
    config = tmp_path / "config.json"
    for equal in (False, True):
        if equal:
            peer.head.weight.data.copy_(peer.rwkv.embeddings.weight)
        peer.save_pretrained(tmp_path)
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True})
        )
        if not equal:
            with pytest.raises(ValueError, match="that the head is the embedding, and the weights"):
                recurra.LM.from_pretrained(tmp_path)
    lm = recurra.LM.from_pretrained(tmp_path)
    assert torch.equal(lm.lm_head.weight, peer.head.weight)


@pytest.mark.parametrize("name", ["plain", "rescaled"])
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    peer = theirs(**SIZES[name])
    peer.save_pretrained(tmp_path)
    lm = recurra.LM.from_pretrained(tmp_path)
    prompt = torch.randint(0, 50, (1, 40))
    want = peer.generate(prompt, max_new_tokens=100, do_sample=False, eos_token_id=None)
    (got,) = lm.generate([prompt[0]], max_tokens=100, stop_tokens=())
    assert got == want[0, 40:].tolist() and len(set(got)) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_saves_and_loads_itself(config, dtype, tmp_path):
    lm = model(config, dtype)
    lm.save_pretrained(tmp_path)
    again = recurra.LM.from_pretrained(tmp_path)
    assert again.config == lm.config
    kind = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert kind == ("rwkv" if config is VARIANTS["default"] else "recurra")
    tokens = torch.randint(0, 31, (1, 9))
    assert torch.equal(again(tokens)[0], lm(tokens)[0])


def test_what_is_wrong_with_a_checkpoint_is_named(tmp_path):
    model(VARIANTS["default"], torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())

    def refused(sentence: str, **changes) -> None:
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(ValueError) as error:
            recurra.LM.from_pretrained(tmp_path)
        assert sentence in str(error.value) and "\n" not in str(error.value)

    refused("model_type must be", model_type="rwkv7")
    refused(
        "attention_hidden_size must be an integer from 1 to 2147483648, got 0",
        attention_hidden_size=0,
    )
    refused(
        "intermediate_size must be an integer from 1 to 2147483648, got '48'",
        intermediate_size="48",
    )
    refused("d_model must be int, got '12' (str)", hidden_size="12")
    refused("rescale_every must be int, got 1.5 (float)", rescale_every=1.5)
    refused("rescale_every must halve at most 60 times", rescale_every=1, num_hidden_layers=61)
    refused("config.json says 3 layers, the weights have 2", num_hidden_layers=3)
    refused("layers.0.ffn.key.weight", intermediate_size=36)
    refused("", model_type="mamba")  # its weights have other names

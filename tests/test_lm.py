"""The language model: whole = in chunks = step by step, gradients, transformers' checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
import transformers

import recurra
from mixers import assert_whole_is_chunked_is_stepped
from recurra.lm import CONFIGS, LMConfig, formats
from recurra.nn import (
    FFNS,
    MIXERS,
    HGRNConfig,
    Mamba,
    MambaConfig,
    MixerConfig,
    RGLRUConfig,
    RWKV4ChannelConfig,
)

TINY = LMConfig(vocab_size=50, d_model=24, n_layers=3, mixer=MambaConfig(d_state=5))
VARIANTS = {
    "plain": TINY,
    "biases, untied": LMConfig(
        vocab_size=33,
        d_model=20,
        n_layers=2,
        mixer=MambaConfig(d_state=3, expand=3, d_conv=3, dt_rank=7, bias=True, conv_bias=False),
        tie_embeddings=False,
        norm_eps=1e-3,
        eos_token_ids=(2, 5),
    ),
    "no convolution": LMConfig(
        vocab_size=17, d_model=9, n_layers=1, mixer=MambaConfig(d_conv=1, expand=1.5)
    ),
}


def model(config: LMConfig = TINY, dtype: torch.dtype = torch.float64) -> recurra.LM:
    torch.manual_seed(1)
    lm = recurra.LM(config).to(dtype)
    with torch.no_grad():  # large enough weights for every part to matter
        for name, p in lm.named_parameters():
            if name.endswith(("in_proj.weight", "x_proj.weight", "embeddings.weight")):
                p.mul_(3)
    return lm


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_parameter_count(config):
    assert config.parameter_count() == sum(p.numel() for p in recurra.LM(config).parameters())


def test_named_configurations():
    tiny = CONFIGS["tiny"]
    assert (tiny.vocab_size, tiny.d_model, tiny.n_layers, tiny.mixer.d_state) == (256, 256, 4, 16)
    # The published model has 129,135,360 parameters.
    assert CONFIGS["mamba-130m"].parameter_count() == 129_135_360
    with pytest.raises(ValueError, match="unknown configuration huge; known are tiny, small"):
        recurra.LM("huge")


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_whole_is_chunked_is_stepped(config, dtype):
    lm = model(config, dtype).eval()
    tokens = torch.randint(0, config.vocab_size, (3, 41), generator=torch.manual_seed(2))
    # Float rounding differs with the number of rows of a matrix product; about 40 operations deep.
    bound = 200 * torch.finfo(dtype).eps
    with torch.no_grad():
        whole, last = lm(tokens)
        scale = whole.abs().max()
        state, parts = None, []
        for piece in tokens.split([1, 2, 17, 20, 1], dim=1):
            logits, state = lm(piece, state)
            parts.append(logits)
        assert (torch.cat(parts, 1) - whole).abs().max() <= bound * scale
        stepped = lm.initial_state(3)
        steps = torch.stack([lm.step(tokens[:, t], stepped) for t in range(41)], 1)
        assert (steps - whole).abs().max() <= bound * scale
        for a, b, c in zip(last, state, stepped, strict=True):
            for x, y, z in zip(a, b, c, strict=True):
                assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert (x - y).abs().max() <= bound * x.abs().max()
                assert (x - z).abs().max() <= bound * x.abs().max()


def test_steps_follow_a_parameter_that_changes():
    lm = model().eval()
    tokens = torch.randint(0, 50, (2, 3), generator=torch.manual_seed(6))

    def agree():
        with torch.no_grad():
            state = lm.initial_state(2)
            steps = torch.stack([lm.step(tokens[:, t], state) for t in range(3)], 1)
            torch.testing.assert_close(steps, lm(tokens)[0], rtol=1e-11, atol=1e-12)

    agree()
    with torch.no_grad():
        lm.layers[0].mixer.A_log.add_(0.5)
    agree()
    lm.layers[1].mixer.A_log.data.mul_(1.5)
    agree()
    lm.load_state_dict(model().state_dict(), assign=True)
    agree()
    lm.load_state_dict({k: v + 0.25 for k, v in model().state_dict().items()})
    agree()
    for fused in (True, False):
        optimizer = torch.optim.AdamW(lm.parameters(), lr=0.1, fused=fused)
        lm(tokens)[0].square().mean().backward()
        optimizer.step()
        agree()
    with torch.no_grad():
        lm.float()
        single = lm.step(tokens[:, 0], lm.initial_state(2))
        lm.double()
        assert (lm.step(tokens[:, 0], lm.initial_state(2)) - single).abs().max() < 1e-4
    agree()
    with torch.inference_mode():
        state = lm.initial_state(2)
        assert torch.equal(lm.step(tokens[:, 0], state), lm.step(tokens[:, 0], lm.initial_state(2)))


def test_a_model_with_other_ops_can_be_copied():
    lm = model().eval()
    lm.use_ops(recurra.reference)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(copy.deepcopy(lm)(tokens)[0], lm(tokens)[0])


def test_packed_sequences_do_not_meet():
    lm = model().eval()
    pieces = [torch.randint(0, 50, (n,), generator=torch.manual_seed(n)) for n in (5, 1, 30)]
    ends = torch.tensor([0, 5, 6, 36])
    with torch.no_grad():
        alone = [lm(piece[None]) for piece in pieces]
        packed, state = lm(torch.cat(pieces)[None], cu_seqlens=ends)
        last, _ = lm(torch.cat(pieces)[None], cu_seqlens=ends, last_only=True)
    expected = torch.cat([logits[0] for logits, _ in alone])
    torch.testing.assert_close(packed[0], expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(last[:, 0], packed[0, ends[1:] - 1], rtol=1e-12, atol=1e-13)
    for i, (_, states) in enumerate(alone):
        for mine, theirs in zip(state, states, strict=True):
            torch.testing.assert_close(mine.ssm[i], theirs.ssm[0], rtol=1e-12, atol=1e-13)


def test_inputs_embeds_and_hidden_states():
    lm = model().eval()
    tokens = torch.randint(0, 50, (2, 7))
    logits, _, hidden = lm(tokens, return_hidden=True)
    again, _ = lm(inputs_embeds=lm.embeddings(tokens))
    assert torch.equal(logits, again)
    assert [h.shape for h in hidden] == [(2, 7, 24)] * 4
    assert torch.equal(F.linear(hidden[-1], lm.lm_head.weight), logits)
    with pytest.raises(ValueError, match="either tokens or inputs_embeds"):
        lm()
    with pytest.raises(ValueError, match="either tokens or inputs_embeds"):
        lm(tokens, inputs_embeds=lm.embeddings(tokens))


def test_states_of_other_models_are_refused():
    lm = recurra.LM(LMConfig(d_model=16, n_layers=3, pattern="RRA", ffn=RWKV4ChannelConfig()))
    tokens = torch.zeros(2, 1, dtype=torch.int64)
    own = lm.initial_state(2)
    for state, words in (
        (own[:5], "must have 6 layers, got 5"),
        ([], "must have 6 layers, got 0"),
        (own[2:] + own[:2], "of layer 2 must be RGLRUState, got AttentionState"),
        ([*own[:5], None], "of layer 5 must be RWKV4ChannelState, got NoneType"),
        ([*own[:5], tuple(own[5])], "of layer 5 must be RWKV4ChannelState, got tuple"),
        (model().initial_state(2) * 2, "of layer 0 must be RGLRUState, got MambaState"),
        (own[0].h, "must be a list, got Tensor"),
        (5, "must be a list, got int"),
    ):
        with pytest.raises(ValueError, match=f"LM: the state {words}"):
            lm(tokens, state)
        with pytest.raises(ValueError, match=f"LM: the state {words}"):
            lm.step(tokens[:, 0], state)
    lm(tokens, tuple(own))


def test_mixers_that_the_pattern_does_not_name_are_refused():
    for mixer, pattern, words in (
        (HGRNConfig(), "R", r"H \(hgrn\), got 'R'"),
        ((RGLRUConfig(), HGRNConfig()), "RA", r"H \(hgrn\), got 'RA'"),
        (MambaConfig(d_state=4), "RA", r"M \(mamba\), got 'RA'"),
        ((MambaConfig(),), "RA", r"M \(mamba\), got 'RA'"),
    ):
        with pytest.raises(ValueError, match=f"letter of every mixer, {words}"):
            LMConfig(mixer=mixer, pattern=pattern)
    # The default stands for no mixer, in old files too.
    config = LMConfig(pattern="RRA")
    assert [m.letter for m in config.mixers()] == list("RRAR")
    assert dataclasses.replace(CONFIGS["tiny"], pattern="RRA") == config
    assert formats.config_from_dict(formats.config_to_dict(config, torch.float32)) == config


def test_a_pattern_without_a_mixer_means_the_defaults(tmp_path):
    values = {"model_type": "recurra", "pattern": "RRA", "d_model": 32, "n_layers": 3}
    for given in (values, values | {"mixer": None}):
        config = formats.config_from_dict(given)
        assert config == LMConfig(pattern="RRA", d_model=32, n_layers=3)
    for pattern, words in (
        ("", "mixer must be an object, got None"),
        ("RZ", "pattern must be of the letters .*, got 'Z'"),
        (5, r"pattern must be str, got 5 \(int\)"),
    ):
        with pytest.raises(ValueError, match=words):
            formats.config_from_dict(values | {"pattern": pattern})
    lm = recurra.LM(config)
    lm.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    del about["mixer"]
    (tmp_path / "config.json").write_text(json.dumps(about))
    tokens = torch.arange(5)[None]
    assert torch.equal(recurra.LM.from_pretrained(tmp_path)(tokens)[0], lm(tokens)[0])


# ---- every named configuration of bytes, made small ----------------------------------------------


SMALL = {
    name: dataclasses.replace(config, d_model=64, n_layers=len(config.pattern) or 2)
    for name, config in CONFIGS.items()
    if config.vocab_size == 256
}


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_named_configurations_whole_is_chunked_is_stepped(config):
    lm = model(config).eval()
    with torch.no_grad():
        assert_whole_is_chunked_is_stepped(lm, [1, 12, 7])
        made = lm.generate([[1, 2, 3], [200]], max_tokens=6)
        for prompt, new in zip(([1, 2, 3], [200]), made, strict=True):
            logits, _ = lm(torch.tensor([prompt + new]))
            assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == new


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_named_configurations_of_bfloat16(config, tmp_path):
    lm = model(config, torch.bfloat16)
    tokens = torch.randint(0, 256, (2, 20))
    logits, _ = lm(tokens)
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
    assert logits.isfinite().all()
    for name, p in lm.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    assert len(lm.generate([[1, 2, 3]], max_tokens=4)[0]) == 4
    lm.save_pretrained(tmp_path)
    again = recurra.LM.from_pretrained(tmp_path)
    assert again.config == config and torch.equal(again(tokens)[0], logits)


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_bytes_of_a_state_are_counted_before_it_is_made(config, dtype):
    state = recurra.LM(config).to(dtype).initial_state(3)
    assert 3 * config.state_bytes(dtype) == sum(x.nbytes for part in state for x in part)


def largest(kind: type[MixerConfig]) -> MixerConfig:
    """With every number as large as it may be."""
    fields = {}
    for field in dataclasses.fields(kind):
        try:
            kind(**{field.name: 10**30})
        except ValueError as error:
            if said := re.search(r"must be from \S+ to (\S+), got", str(error)):
                fields[field.name] = json.loads(said[1])
    assert fields
    return kind(**fields)


@pytest.mark.parametrize("kind", [*MIXERS, *FFNS], ids=lambda kind: kind.__name__)
def test_the_largest_sizes_are_counted_or_refused(kind):
    made, width = largest(kind), 1 << 20
    part = {"ffn": made} if kind in FFNS else {"mixer": made}
    config = LMConfig(d_model=width, n_layers=4096, **part)
    try:
        assert config.parameter_count() > 4096 * width**2
    except ValueError as error:
        assert re.fullmatch(
            f"{kind.__name__}: a parameter at d_model = {width} has more bytes than 64 bits count",
            str(error),
        )
    with pytest.raises(ValueError, match="GiB|64 bits count"):
        config.check_memory()
    with pytest.raises(ValueError, match="GiB|64 bits count"):
        recurra.LM(config)


def test_gradients_are_those_of_the_reference():
    lm, plain = model(), model()
    plain.use_ops(recurra.reference)
    tokens = torch.randint(0, 50, (2, 19), generator=torch.manual_seed(3))
    gradients = []
    for m in (lm, plain):
        logits, state = m(tokens[:, :9])
        more, _ = m(tokens[:, 9:], state)  # through the carried state too
        loss = torch.cat([logits, more], 1).square().mean() + state[1].ssm.sum()
        gradients.append(torch.autograd.grad(loss, list(m.parameters())))
    for (name, _), ours, theirs in zip(lm.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=name)


def test_initial_weights():
    torch.manual_seed(0)
    mixer = Mamba(64)
    dt = F.softplus(mixer.dt_proj.bias)
    assert dt.min() >= 0.001 and dt.max() <= 0.1 and dt.log().std() > 0.5
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    assert torch.equal(mixer.D, torch.ones(128))
    loss = recurra.LM("tiny")(torch.randint(0, 256, (1, 64)))[0]
    assert abs(F.cross_entropy(loss[0], torch.randint(0, 256, (64,))) - math.log(256)) < 0.3


def test_compiles_without_graph_breaks():
    lm = model(dtype=torch.float32).eval()
    tokens = torch.randint(0, 50, (2, 12))
    compiled = torch.compile(lm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens)[0], lm(tokens)[0], rtol=1e-5, atol=1e-6)


# ---- the files of transformers ------------------------------------------------------------------


def theirs(seed: int = 0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 3}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**(sizes | options))).eval()


FOREIGN = {
    "default": {},
    "biases": {"use_bias": True},
    "no convolution bias": {"use_conv_bias": False},
    "untied": {"tie_word_embeddings": False},
    "sizes": {
        "expand": 3,
        "state_size": 7,
        "conv_kernel": 3,
        "time_step_rank": 5,
        "layer_norm_epsilon": 1e-3,
        "residual_in_fp32": False,
        "vocab_size": 13,
        "hidden_size": 20,
    },
    "one of everything": {
        "num_hidden_layers": 1,
        "state_size": 1,
        "hidden_size": 1,
        "vocab_size": 1,
        "expand": 1,
    },
}


@pytest.mark.parametrize("options", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_loads_what_transformers_saves(options, sharded, tmp_path):
    peer = theirs(**options)
    peer.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    if sharded and options.get("hidden_size", 48) > 1:
        assert (tmp_path / "model.safetensors.index.json").is_file()
    lm = recurra.LM.from_pretrained(tmp_path)
    vocab = peer.config.vocab_size
    tokens = torch.randint(0, vocab, (2, 37), generator=torch.manual_seed(4))
    with torch.no_grad():
        wanted = peer(tokens, output_hidden_states=True)
        logits, _, hidden = lm(tokens, return_hidden=True)
    assert (logits - wanted.logits).abs().max() <= 1e-4
    for a, b in zip(hidden, wanted.hidden_states, strict=True):
        assert (a - b).abs().max() <= 1e-4
    greedy = peer.generate(tokens, max_new_tokens=25, do_sample=False, eos_token_id=None)
    ours = lm.generate(tokens, max_tokens=25, stop_tokens=())
    assert greedy[:, 37:].tolist() == ours


@pytest.mark.parametrize("in_config", [True, False])
def test_every_token_that_ends_a_text_does(in_config, tmp_path):
    peer = theirs(eos_token_id=None)
    tokens = torch.randint(0, 101, (1, 5), generator=torch.manual_seed(7))
    free = peer.generate(tokens, max_new_tokens=25, do_sample=False, eos_token_id=None)[0, 5:]
    ends = [100, free[6].item()]
    for said in (
        (peer.config, peer.generation_config)[:1] if in_config else (peer.generation_config,)
    ):
        said.eos_token_id = ends
    peer.save_pretrained(tmp_path)
    if in_config:
        (tmp_path / "generation_config.json").unlink()
    lm = recurra.LM.from_pretrained(tmp_path)
    assert lm.config.eos_token_ids == tuple(ends)
    stop = free.tolist().index(ends[1])
    assert lm.generate(tokens, max_tokens=25) == [free[:stop].tolist()]
    lm.save_pretrained(tmp_path / "ours")
    assert recurra.LM.from_pretrained(tmp_path / "ours").config == lm.config
    assert transformers.MambaConfig.from_pretrained(tmp_path / "ours").eos_token_id == ends


@pytest.mark.parametrize("options", FOREIGN.values(), ids=FOREIGN)
def test_transformers_loads_what_we_save(options, tmp_path):
    peer = theirs(**options)
    peer.save_pretrained(tmp_path / "theirs")
    recurra.LM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    back, info = transformers.MambaForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for (name, a), (other, b) in zip(
        peer.state_dict().items(), back.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b), name
    tokens = torch.randint(0, peer.config.vocab_size, (1, 9))
    with torch.no_grad():
        assert torch.equal(peer(tokens).logits, back(tokens).logits)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saves_and_loads_itself(config, dtype, tmp_path):
    lm = model(config, dtype)
    lm.save_pretrained(tmp_path)
    lm.save_pretrained(tmp_path)  # over what is there
    back = recurra.LM.from_pretrained(tmp_path)
    assert back.config == config
    for (name, a), b in zip(lm.state_dict().items(), back.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert all(p.requires_grad for p in back.parameters())
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    wide = recurra.LM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in wide.parameters())


def test_a_16_bit_model_rounds_as_transformers_does(tmp_path):
    """The error beside float32 is not larger than theirs by more than a half."""
    theirs().save_pretrained(tmp_path)
    tokens = torch.randint(0, 101, (2, 30), generator=torch.manual_seed(5))
    with torch.no_grad():
        exact = recurra.LM.from_pretrained(tmp_path, dtype=torch.float64)(tokens)[0]
        half = recurra.LM.from_pretrained(tmp_path, dtype=torch.bfloat16)(tokens)[0]
        peer = transformers.MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        allowed = 1.5 * (peer(tokens).logits - exact).abs().max()
        assert 0 < (half - exact).abs().max() <= allowed


def test_loads_a_model_saved_without_its_head(tmp_path):
    peer = theirs()
    peer.backbone.save_pretrained(tmp_path)
    tokens = torch.randint(0, 101, (1, 9))
    with torch.no_grad():
        logits, _ = recurra.LM.from_pretrained(tmp_path)(tokens)
        assert (logits - peer(tokens).logits).abs().max() <= 1e-4


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        recurra.LM.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        recurra.LM.from_pretrained(tmp_path)
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())

    def refused(match: str, **changes):
        path.write_text(json.dumps(good | changes))
        with pytest.raises(ValueError, match=match):
            recurra.LM.from_pretrained(tmp_path)

    refused("model_type must be mamba.* or recurra, got 'llama'", model_type="llama")
    refused("hidden_act must be silu, got 'gelu'", hidden_act="gelu")
    refused("d_model must be from 1 to", hidden_size=-1)
    refused("n_layers must be int, got '3'", num_hidden_layers="3")
    refused("says 4 layers, the weights have 3", num_hidden_layers=4)
    refused(r"embeddings.weight must have shape \(102, 48\), got \(101, 48\)", vocab_size=102)
    refused("lm_head.weight is missing", tie_word_embeddings=False)
    refused(r"embeddings.weight must have .*; layers.0.mixer.A_log .* and 22 more", hidden_size=49)
    weights = tmp_path / "model.safetensors"
    path.write_text(json.dumps(good))
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        recurra.LM.from_pretrained(tmp_path)
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is pickle, which recurra does not read"):
        recurra.LM.from_pretrained(tmp_path)


def test_a_model_too_large_for_the_machine_is_refused_before_it_is_made():
    with pytest.raises(ValueError, match="GiB of parameters, this machine has"):
        recurra.LM(LMConfig(vocab_size=1 << 31, d_model=1 << 20))

"""Griffin: the RG-LRU block, local attention, and RecurrentGemma's checkpoints."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

import crash
import recurra
from mixers import (
    assert_gradients_are_those_of_the_reference,
    assert_packed_is_apart,
    assert_whole_is_chunked_is_stepped,
    close,
    learn_a_cycle,
    states,
)
from recurra.lm import CONFIGS, LMConfig, gemma_scale
from recurra.nn import RGLRU, Attention, AttentionConfig, GLUConfig, RGLRUConfig, attention
from recurra.nn.rg_lru import _input_factor
from recurra.train import checkpoint, state
from support import threads
from transformers_models import build, modelling_file

WINDOW = 5
MIXERS = {
    "rg_lru": RGLRUConfig(expand=1.5, heads=3, d_conv=3),
    "attention": AttentionConfig(window=WINDOW),
    "attention, grouped": AttentionConfig(
        heads=6, kv_heads=3, head_dim=5, window=WINDOW, rotary=0.4, bias=True, out_bias=False
    ),
    "attention, window of 1": AttentionConfig(window=1, rotary=0.0),
    "attention, window unfilled": AttentionConfig(heads=2, kv_heads=2, window=40, rotary=1.0),
    "griffin": (RGLRUConfig(), AttentionConfig(window=WINDOW)),
}


def model(mixer, dtype: torch.dtype = torch.float64) -> recurra.LM:
    torch.manual_seed(1)
    if isinstance(mixer, tuple):
        sizes = {"vocab_size": 31, "d_model": 16, "n_layers": 3, "embed_scale": 4.0}
        config = dataclasses.replace(CONFIGS["griffin"], mixer=mixer, **sizes)
    else:
        config = LMConfig(vocab_size=31, d_model=16, n_layers=2, mixer=mixer)
    lm = recurra.LM(config).to(dtype)
    with torch.no_grad():  # large enough weights for every part to matter
        for name, p in lm.named_parameters():
            if name.endswith(("_proj.weight", "embeddings.weight", "linear_x.weight")):
                p.mul_(3)
            if name.endswith("bias"):
                p.add_(0.2 * torch.randn_like(p))
    return lm


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 8)


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_whole_is_chunked_is_stepped(mixer):
    last = assert_whole_is_chunked_is_stepped(model(mixer), [1, 3, 12, 2, 11])
    assert all(s.seen.tolist() == [29, 29] for s in last)


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_packed_sequences_do_not_meet(mixer):
    """Some begin, one goes on, one is empty; rows of a batch may have seen different numbers."""
    lm = model(mixer)
    before = lm.initial_state(4)
    _, begun = lm(torch.randint(0, 31, (1, 7)))
    for whole, part in zip(states(before), states(begun), strict=True):
        whole[2:3] = part
    last = assert_packed_is_apart(lm, [9, 0, 18, 13], before)
    # On from there, all rows at once.
    more = torch.randint(0, 31, (4, 6))
    whole, _ = lm(more, last)
    steps = torch.stack([lm.step(token, last) for token in more.unbind(1)], 1)
    close(steps, whole)


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_gradients_are_those_of_the_reference(mixer):
    tokens = torch.randint(0, 31, (2, 14), generator=torch.Generator().manual_seed(3))

    def loss(lm):
        _, state = lm(tokens[:, :5])
        logits, _ = lm(tokens[:, 5:-1], state)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 6:].flatten())

    def unused(name: str) -> bool:
        # An input that sees itself alone does so whatever the scores are.
        return getattr(mixer, "window", 0) == 1 and ("q_proj" in name or "k_proj" in name)

    assert_gradients_are_those_of_the_reference(lambda: model(mixer), loss, unused)


def test_attention_is_that_of_a_mask():
    torch.manual_seed(0)
    mixer = Attention(16, AttentionConfig(heads=4, kv_heads=2, window=WINDOW, rotary=0.0)).double()
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    q, k, v = (
        m(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        for m in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    k, v = (z.repeat_interleave(2, 1) for z in (k, v))
    scores = q @ k.transpose(2, 3) / 2
    ago = torch.arange(23)[:, None] - torch.arange(23)
    scores = scores.masked_fill((ago < 0) | (ago >= WINDOW), -torch.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    close(mixer(x)[0], mixer.out_proj(y))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_input_factor_is_exact_and_its_slope_is_bounded(compiled):
    torch.compiler.reset()
    options = {"backend": "aot_eager", "fullgraph": True, "disable": not compiled}
    input_factor = torch.compile(_input_factor, **options)
    log_a = torch.tensor([0.0, -1e-9, -1e-4, -0.5, -30.0, -torch.inf], requires_grad=True)
    factor = input_factor(log_a)
    factor.sum().backward()
    exact = (-torch.expm1(2 * log_a.detach().double())).sqrt()
    torch.testing.assert_close(factor.double(), exact, rtol=1e-6, atol=0)
    slope = -torch.exp(2 * log_a.detach().double()) / exact
    assert log_a.grad[:2].tolist() == pytest.approx([-2000.0, -2000.0])
    torch.testing.assert_close(log_a.grad[2:].double(), slope[2:], rtol=1e-5, atol=0)
    inner = torch.tensor([-0.3, -2.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(input_factor, (inner,))


def test_a_slot_that_there_is_not_is_skipped():
    """As the ops do on CUDA; those of the CPU refuse it, so here they are given one below 0."""

    class SkipBeyond:
        def __getattr__(self, name):
            op = getattr(recurra, name)
            return lambda h, *args, slots, **more: op(
                h, *args, slots=slots.where(slots < len(h), -1), **more
            )

    torch.manual_seed(0)
    mixer = RGLRU(8, RGLRUConfig(heads=2)).double()
    with torch.no_grad():
        _, state = mixer(torch.randn(3, 4, 8).double())
    x, after = torch.randn(4, 8).double(), []
    for slots, ops in (([1, -1, -1, 2], recurra), ([1, 3, -1, 2], SkipBeyond())):
        mixer.ops, pool = ops, type(state)(*(part.clone() for part in state))
        y = mixer.step(x, pool, torch.tensor(slots))
        after.append((y[[0, 3]], *pool))
    assert all(map(torch.equal, *after))
    assert after[1][-1].tolist() == [4, 5, 5]


def test_the_first_input_of_a_sequence_is_not_scaled():
    torch.manual_seed(0)
    mixer = RGLRU(8, RGLRUConfig(heads=2)).double()
    with torch.no_grad():
        mixer.recurrent_gate_bias.fill_(-30)  # gates of 1, which let nothing else in
    _, (_, h, seen) = mixer(torch.randn(3, 2, 8, dtype=torch.float64))
    assert h.abs().min() > 1e-4 and seen.tolist() == [2, 2, 2]
    _, after = mixer(
        torch.randn(3, 4, 8, dtype=torch.float64), mixer.initial_state(3)._replace(seen=seen)
    )
    assert after.h.abs().max() < 1e-4


def test_initial_decays_lie_in_the_ring():
    torch.manual_seed(0)
    mixer = RGLRU(4096)
    radius = torch.exp(-F.softplus(mixer.recurrent_param))
    assert 0.9 <= radius.min() < 0.901 and 0.998 < radius.max() <= 0.999
    assert radius.square().mean().item() == pytest.approx((0.81 + 0.998) / 2, abs=2e-3)


@pytest.mark.parametrize("name", ["griffin", "hawk"])
def test_a_named_configuration_learns(name):
    small = {"d_model": 32, "n_layers": 3, "vocab_size": 16, "embed_scale": 32**0.5}
    config = dataclasses.replace(CONFIGS[name], **small)
    lm, tokens, losses = learn_a_cycle(config)
    assert losses[0] > 2 and losses[-1] < 0.3
    said = lm.generate([tokens[0, :20], tokens[0, 3:7]], max_tokens=12)
    assert said == [tokens[0, 20:32].tolist(), tokens[0, 7:19].tolist()]


def test_prompts_of_any_lengths_are_read_together():
    lm = model(MIXERS["griffin"])
    prompts = [torch.randint(0, 31, (n,)).tolist() for n in (1, 23, 4, 11)]
    alone = [lm.generate([prompt], max_tokens=20)[0] for prompt in prompts]
    assert lm.generate(prompts, max_tokens=20) == alone
    from recurra.lm.generation import prefill

    logits, _ = prefill(lm, [torch.tensor(p) for p in prompts], budget=12)
    for got, prompt in zip(logits, prompts, strict=True):
        close(got, lm(torch.tensor([prompt]))[0][0, -1])


def test_memory_is_that_of_a_block(monkeypatch):
    sizes = []
    attend = Attention._attend

    def watched(self, q, k, v, mask):
        sizes.append((k.shape[1], mask.numel()))
        return attend(self, q, k, v, mask)

    monkeypatch.setattr(Attention, "_attend", watched)
    mixer = Attention(16, AttentionConfig(window=20))
    with torch.no_grad():
        _, after = mixer(torch.randn(1, 300, 16))
        mixer(torch.randn(1, 30, 16), after)
        mixer.step(torch.randn(1, 16), after)
    assert len(sizes) == 38 + 4 + 1
    assert all(keys <= 27 and numbers <= 8 * 27 for keys, numbers in sizes)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_with_carried_states_is_resumed_with_the_same_bits(precision, tmp_path):
    sizes = {"d_model": 16, "n_layers": 3, "embed_scale": 4.0}
    mixer = (RGLRUConfig(), AttentionConfig(window=20))
    config = dataclasses.replace(CONFIGS["griffin"], mixer=mixer, **sizes)

    def trainer():
        return crash.trainer(config, carry=True, precision=precision)

    def steps(run, until):
        losses = []
        while run.step < until:
            losses.append(run.train_step().loss)
        return losses

    with threads(1):
        first, second = trainer(), trainer()
        steps(first, 2)
        state.save(first, tmp_path, "text")
        state.resume(second, tmp_path / state.FOLDER / checkpoint.name(2), "text")
        assert steps(first, 4) == steps(second, 4)
    for one, other in zip(first.carried, second.carried, strict=True):
        for a, b in zip(states(one), states(other), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    assert first.carried[0][2].seen.dtype == torch.int64
    assert first.carried[0][2].seen.unique().tolist() == [4 * first.options.length]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_recur_in_float32(dtype):
    lm, exact = model(MIXERS["griffin"], dtype), model(MIXERS["griffin"], dtype).double()
    tokens = torch.randint(0, 31, (2, 40))
    with torch.no_grad():
        logits, state = lm(tokens)
        want, _ = exact(tokens)
        stepped = lm.initial_state(2)
        steps = torch.stack([lm.step(token, stepped) for token in tokens.unbind(1)], 1)
    assert state[0].h.dtype == torch.float32 and state[2].k.dtype == dtype
    for got in (logits, steps):
        assert (got - want).abs().max() < 12 * torch.finfo(dtype).eps * want.abs().max()


def test_autocast():
    lm = model(MIXERS["griffin"], torch.float32)
    tokens = torch.randint(0, 31, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        first, state = lm(tokens[:, :9])
        second, state = lm(tokens[:, 9:], state)
    second.float().square().mean().backward()
    want, _ = lm(tokens)
    got = torch.cat([first, second], 1).float()
    assert (got - want).abs().max() < 0.1 * want.abs().max()
    assert {x.dtype for x in states(state)} == {torch.float32, torch.int64}


# RecurrentGemma ----------------------------------------------------------------------------------

FOLDERS = {
    "as published": {"num_hidden_layers": 5, "block_types": ["recurrent"] * 2 + ["attention"]},
    "grouped heads": {"num_key_value_heads": 2, "attention_window_size": 9, "eos_token_id": [3, 5]},
    "own sizes": {
        "lru_width": 48,
        "head_dim": 12,
        "conv1d_width": 3,
        "attention_bias": True,
        "num_key_value_heads": None,
        "tie_word_embeddings": False,
        "hidden_size": 40,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.34,
        },
    },
    "hawk": {"block_types": ["recurrent"]},
}


@pytest.fixture(params=FOLDERS, scope="module")
def theirs(request):
    peer = build("recurrent_gemma", **FOLDERS[request.param])
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if p.dim() == 1 and "recurrent_param" not in name:
                p.normal_(0, 0.3)
    return peer


@torch.no_grad()
def test_logits_and_tokens_are_those_of_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    lm = recurra.LM.from_pretrained(tmp_path)
    tokens = torch.randint(0, 64, (2, 61), generator=torch.manual_seed(4))
    want = theirs(tokens, use_cache=False).logits
    assert (lm(tokens)[0] - want).abs().max() < 1e-4
    state = lm.initial_state(2)
    steps = torch.stack([lm.step(token, state) for token in tokens.unbind(1)], 1)
    assert (steps - want).abs().max() < 1e-4
    # Greedy, past the window; without their cache, which some of these models cannot have.
    said = tokens[:, :7]
    while said.shape[1] < 50:
        said = torch.cat([said, theirs(said, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert lm.generate(tokens[:, :7], max_tokens=43, stop_tokens=()) == said[:, 7:].tolist()


@torch.no_grad()
def test_greedy_tokens_are_those_of_their_generate(tmp_path):
    peer = build("recurrent_gemma", **FOLDERS["as published"])
    peer.save_pretrained(tmp_path)
    tokens = torch.randint(0, 64, (2, 30), generator=torch.manual_seed(4))
    for length in (30, 5):
        said = peer.generate(tokens[:, :length], max_new_tokens=40, do_sample=False)
        ours = recurra.LM.from_pretrained(tmp_path).generate(tokens[:, :length], max_tokens=40)
        assert ours == said[:, length:].tolist()


@torch.no_grad()
def test_transformers_loads_what_we_save(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    lm = recurra.LM.from_pretrained(tmp_path / "theirs")
    lm.save_pretrained(tmp_path / "ours")
    cls = modelling_file("recurrent_gemma").RecurrentGemmaForCausalLM
    again = cls.from_pretrained(tmp_path / "ours").eval()
    tokens = torch.randint(0, 64, (1, 40))
    assert torch.equal(
        again(tokens, use_cache=False).logits, theirs(tokens, use_cache=False).logits
    )
    assert recurra.LM.from_pretrained(tmp_path / "ours").config == lm.config
    assert again.config.eos_token_id == theirs.config.eos_token_id


# The roots of the last two are rounded.
@pytest.mark.parametrize("width", [256, 80, 208])
@pytest.mark.parametrize("name", ["griffin", "hawk"])
def test_named_configurations_are_recurrent_gemma(name, width, tmp_path):
    sizes = {"d_model": width, "embed_scale": gemma_scale(width), "n_layers": 3}
    config = dataclasses.replace(CONFIGS[name], eos_token_ids=(7,), **sizes)
    assert width != 256 or config.embed_scale == CONFIGS[name].embed_scale
    lm = recurra.LM(config)
    lm.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "recurrent_gemma"
    cls = modelling_file("recurrent_gemma").RecurrentGemmaForCausalLM
    tokens = torch.randint(0, 256, (1, 12))
    with torch.no_grad():
        peer = cls.from_pretrained(tmp_path).eval()
        assert peer.model.normalizer.item() == config.embed_scale
        want = peer(tokens, use_cache=False).logits
        assert (lm(tokens)[0] - want).abs().max() < 1e-4
    again = recurra.LM.from_pretrained(tmp_path)
    assert again.config == config and again.config.parameter_count() == config.parameter_count()


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "rms"},
        {"ffn": GLUConfig(activation="gelu_tanh")},
        {"ffn": None},
        {"logits_soft_cap": 0.0},
        {"embed_scale": 3.0},
        {"mixer": (RGLRUConfig(heads=8), AttentionConfig())},
        {"mixer": (RGLRUConfig(), AttentionConfig(out_bias=False))},
        {"mixer": AttentionConfig(), "pattern": "A"},
        {"pattern": "RM", "mixer": RGLRUConfig()},
        {"residual_in_fp32": True},
    ],
    ids=str,
)
def test_other_models_keep_our_words(changes, tmp_path):
    small = {"d_model": 16, "n_layers": 3, "embed_scale": 4.0}
    config = dataclasses.replace(CONFIGS["griffin"], **small | changes)
    lm = recurra.LM(config)
    lm.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "recurra"
    again = recurra.LM.from_pretrained(tmp_path)
    assert again.config == config
    tokens = torch.randint(0, 256, (1, 9))
    assert torch.equal(again(tokens)[0], lm(tokens)[0])


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    build("recurrent_gemma").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())

    def refused(sentence: str, **changes):
        path.write_text(json.dumps(good | changes))
        with pytest.raises(ValueError) as error:
            recurra.LM.from_pretrained(tmp_path)
        assert sentence in str(error.value)

    refused("or recurra, got 'gemma'", model_type="gemma")
    refused("hidden_activation must be gelu_pytorch_tanh, got 'silu'", hidden_activation="silu")
    refused("block_types must list recurrent and attention, got ['mamba']", block_types=["mamba"])
    refused(
        "block_types must list recurrent and attention, got 'recurrent'", block_types="recurrent"
    )
    refused("block_types must list recurrent and attention, got []", block_types=[])
    refused("hidden_size must be a positive integer, got '32'", hidden_size="32")
    refused("lru_width must be a positive integer, got -1", lru_width=-1)
    refused("intermediate_size must be a positive integer, got None", intermediate_size=None)
    refused("heads must be int, got 'x'", num_attention_heads="x")
    refused("heads must be from 1 to", num_attention_heads=0)
    refused("heads must divide expand * d_model = 32, got 5", num_attention_heads=5)
    refused("kv_heads must divide heads = 4, got 3", num_key_value_heads=3)
    refused("window must be from 1 to 16777216, got 0", attention_window_size=0)
    refused("rope_type must be default, got 'linear'", rope_parameters={"rope_type": "linear"})
    refused("type must be default, got 'linear'", rope_scaling={"type": "linear", "factor": 2.0})
    refused("rope_parameters must be an object, got 'x'", rope_parameters="x")
    refused("n_layers must be int, got None", num_hidden_layers=None)
    refused("config.json says 3 layers, the weights have 2", num_hidden_layers=3)
    refused("layers.1.mixer.k_proj.weight must have shape (16, 32)", num_key_value_heads=2)
    refused("linear_x.weight is missing", block_types=["recurrent"])
    refused("ffn.gate_proj.bias must have shape (20,), got (24,)", intermediate_size=40)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="AttentionConfig: window must be from 1 to .*, got 0"):
        AttentionConfig(window=0)
    with pytest.raises(ValueError, match="kv_heads must divide heads = 4, got 3"):
        AttentionConfig(kv_heads=3)
    with pytest.raises(ValueError, match=r"rotary \* head_dim must be even, got 3"):
        Attention(24, AttentionConfig(heads=4))
    with pytest.raises(ValueError, match="heads must be at most d_model = 3, got 4"):
        Attention(3, AttentionConfig(heads=4))
    with pytest.raises(ValueError, match=r"heads must divide expand \* d_model = 10, got 4"):
        RGLRU(10)
    with pytest.raises(ValueError, match="cu_seqlens must ascend, got 3 after 5"):
        Attention(8, AttentionConfig(heads=2))(
            torch.zeros(1, 9, 8), cu_seqlens=torch.tensor([0, 5, 3, 9])
        )


def test_a_model_is_compiled_for_any_length():
    lm = model(MIXERS["griffin"])
    torch.compiler.reset()
    compiled = torch.compile(lm, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (7, 12, 30):
        tokens = torch.randint(0, 31, (2, T))
        (y, after), (want, wanted) = compiled(tokens), lm(tokens)
        torch.testing.assert_close(y, want)
        got, want = (
            torch.autograd.grad(f.square().sum(), list(lm.parameters())) for f in (y, want)
        )
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(compiled(tokens, after)[0], lm(tokens, wanted)[0])


def test_attention_is_compiled_for_any_length():
    # A loop over blocks would be compiled for every length, until the compiler gives up.
    mixer = AttentionConfig(heads=2, window=40).make(8).double()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend=counter)
    for T in (50, 51, 127, 128, 129, 200, 300, 301, 450, 511, 600):
        x = torch.randn(2, T, 8, dtype=torch.float64)
        y, state = mixer(x)
        torch.testing.assert_close(compiled(x)[0], y)
        torch.testing.assert_close(compiled(x[:, 45:], mixer(x[:, :45])[1])[0], y[:, 45:])
        if T == 300:
            count = counter.frame_count
    assert counter.frame_count == count

"""Models on linear recurrences: whole = in chunks = step by step, training, checkpoints."""

from __future__ import annotations

import copy
import dataclasses

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
    next_token_loss,
)
from recurra.lm import CONFIGS, LMConfig
from recurra.nn import (
    HGRN,
    LRNN,
    LRU,
    LSSL,
    QRNN,
    S4D,
    S5,
    SCRN,
    Aaren,
    AarenConfig,
    HGRNConfig,
    LRNNConfig,
    LRUConfig,
    LSSLConfig,
    MixerConfig,
    QRNNConfig,
    S4DConfig,
    S5Config,
    SCRNConfig,
)
from recurra.nn.s4 import (
    exp_and_phi,
    hippo_frequencies,
    hippo_legs,
    powers,
    sums_of_powers,
    weighted_by_powers,
)

NAMED = ["lrnn", "lru", "hgrn", "qrnn", "scrn", "s4d", "s5", "lssl", "aaren"]
VARIANTS: dict[str, MixerConfig] = {
    "lrnn": LRNNConfig(expand=1.5),
    "lrnn of odd blocks": LRNNConfig(block=5, p=1.0),
    "lru": LRUConfig(expand=1.5),
    "lru of long memories": LRUConfig(r_min=0.9, r_max=0.999, max_phase=0.3),
    "hgrn": HGRNConfig(expand=1.5),
    "hgrn of signed gates": HGRNConfig(eig_range=(-1, 1)),
    "complex hgrn": HGRNConfig(complex=True),
    "complex hgrn of signed gates": HGRNConfig(complex=True, eig_range=(-0.5, 1)),
    "qrnn": QRNNConfig(expand=1.5, window=3),
    "qrnn of signed gates": QRNNConfig(window=1, eig_range=(-1, 1)),
    "scrn": SCRNConfig(expand=1.5, alpha=0.8),
    "s4d": S4DConfig(d_state=6),
    "s4d as convolution": S4DConfig(d_state=6, view="convolution"),
    "s5": S5Config(d_state=18),
    "s5 as convolution": S5Config(d_state=18, view="convolution"),
    "lssl": LSSLConfig(d_state=5),
    "lssl as convolution": LSSLConfig(d_state=5, view="convolution"),
    "aaren": AarenConfig(heads=2),
}


def model(mixer: MixerConfig, dtype: torch.dtype = torch.float64, layers: int = 2) -> recurra.LM:
    torch.manual_seed(1)
    lm = recurra.LM(LMConfig(vocab_size=31, d_model=12, n_layers=layers, mixer=mixer)).to(dtype)
    with torch.no_grad():  # large enough weights for every part to matter
        for name, p in lm.named_parameters():
            if name.endswith(("_proj.weight", "embeddings.weight")):
                p.mul_(3)
            if name.endswith("_proj.bias"):
                p.add_(0.3 * torch.randn_like(p))
    return lm


@pytest.mark.parametrize("mixer", VARIANTS.values(), ids=VARIANTS)
def test_whole_is_chunked_is_stepped(mixer):
    assert_whole_is_chunked_is_stepped(model(mixer), [1, 9, 13])


@pytest.mark.parametrize("mixer", VARIANTS.values(), ids=VARIANTS)
def test_packed_sequences_do_not_meet(mixer):
    lm = model(mixer)
    before = lm(torch.randint(0, 31, (3, 4)))[1]  # each begins with a state of its own
    assert_packed_is_apart(lm, [7, 1, 12], before)


@pytest.mark.parametrize("mixer", VARIANTS.values(), ids=VARIANTS)
def test_gradients_are_those_of_the_reference(mixer):
    tokens = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(3))
    assert_gradients_are_those_of_the_reference(lambda: model(mixer), next_token_loss(tokens))


@pytest.mark.parametrize("mixer", VARIANTS.values(), ids=VARIANTS)
def test_bfloat16_arithmetic_is_close(mixer):
    lm = model(mixer, torch.bfloat16).float()  # so that what is rounded is not the weights
    tokens = torch.randint(0, 31, (2, 23), generator=torch.Generator().manual_seed(3))
    want = lm(tokens)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        first, state = lm(tokens[:, :9])
        got = torch.cat([first, lm(tokens[:, 9:], state)[0]], 1)
    assert (got - want).norm() < 0.05 * want.norm()
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in lm.parameters())
    lm = lm.bfloat16()
    stepped = lm.initial_state(2)
    steps = torch.stack([lm.step(token, stepped) for token in tokens.unbind(1)], 1)
    assert (steps - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize(
    ("config", "wide"),
    [
        (S4DConfig(), ("log_dt", "A_imag")),
        (S5Config(), ("log_dt", "A_imag")),
        (LRUConfig(), ("theta_log",)),
    ],
    ids=["s4d", "s5", "lru"],
)
@torch.no_grad()
def test_frequencies_in_float32_keep_bfloat16_close(config, wide):
    torch.manual_seed(0)
    mixer = config.make(32)
    x = torch.randn(1, 1024, 32).bfloat16()
    want = mixer(x.float())[0]
    half = copy.deepcopy(mixer).bfloat16()
    for name in wide:
        getattr(half, name).data = getattr(mixer, name).data.clone()
    got, _ = half(x)
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() < 0.01 * want.norm()
    state = half.initial_state(1)
    steps = torch.stack([half.step(one, state) for one in x.unbind(1)], 1)
    assert (steps - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("name", NAMED)
def test_a_named_configuration_learns(name):
    config = dataclasses.replace(CONFIGS[name], d_model=32, n_layers=2, vocab_size=16)
    lm, tokens, losses = learn_a_cycle(config)
    assert losses[0] > 2.5 and losses[-1] < 0.3
    (said,) = lm.generate([tokens[0, :20]], max_tokens=12)
    assert said == tokens[0, 20:32].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mixer", VARIANTS.values(), ids=VARIANTS)
def test_saves_and_loads_itself(mixer, dtype, tmp_path):
    lm = model(mixer, dtype)
    lm.save_pretrained(tmp_path)
    again = recurra.LM.from_pretrained(tmp_path)
    assert again.config == lm.config
    tokens = torch.randint(0, 31, (1, 9))
    assert torch.equal(again(tokens)[0], lm(tokens)[0])


@pytest.mark.parametrize("mixer", VARIANTS.values(), ids=VARIANTS)
def test_sizes_and_counts(mixer):
    made = mixer.make(10)
    assert mixer.parameter_count(10) == sum(p.numel() for p in made.parameters())
    state = made.to(torch.bfloat16).initial_state(3)
    assert all(x.shape[0] == 3 and x.dtype == torch.float32 for x in state)


def test_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="LRNNConfig: block must be from 1 to 16, got 17"):
        LRNNConfig(block=17)
    with pytest.raises(ValueError, match="LRUConfig: r_min must be at most r_max, 0.5, got 0.9"):
        LRUConfig(r_min=0.9, r_max=0.5)
    with pytest.raises(ValueError, match=r"LRU: expand \* d_model must be at least 1, got 0"):
        LRUConfig(expand=0.01).make(10)
    with pytest.raises(ValueError, match="S5Config: d_state must be even, got 5"):
        S5Config(d_state=5)
    with pytest.raises(ValueError, match="S5Config: d_state must be from 1 to 2048, got 2050"):
        S5Config(d_state=2050)
    with pytest.raises(ValueError, match="LSSLConfig: d_state must be from 1 to 16, got 17"):
        LSSLConfig(d_state=17)
    with pytest.raises(ValueError, match="S4DConfig: view must be one of auto, recurrent, conv"):
        S4DConfig(view="fft")
    with pytest.raises(ValueError, match="S4DConfig: dt_max must be from 0.1 to"):
        S4DConfig(dt_min=0.1, dt_max=0.01)
    with pytest.raises(ValueError, match="Aaren: heads must divide d_model, 10, got 3"):
        AarenConfig(heads=3).make(10)


@pytest.mark.parametrize("config", [HGRNConfig, QRNNConfig], ids=lambda c: c.kind)
def test_ranges_of_gates_are_checked(config):
    for bad in [(-1.5, 1), (0.1, 1), (-1, 0.9), (-1,), -1, (False, 1)]:
        with pytest.raises(ValueError, match=f"{config.__name__}: eig_range must be"):
            config(eig_range=bad)


def test_lrnn_columns_have_norm_1_and_zeros_stay():
    lrnn = LRNN(8, LRNNConfig(block=3)).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    (A, _), _ = lrnn._before(x, lambda layer, x: layer(x))
    close(A.abs().pow(1.2).sum(-2), torch.ones(2, 5, 3, 3, dtype=torch.float64))
    torch.nn.init.zeros_(lrnn.matrix_proj.weight)
    torch.nn.init.zeros_(lrnn.matrix_proj.bias)
    y, _ = lrnn(x)
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in lrnn.parameters())


def test_lrnn_permutations_are_followed_for_ever():
    lrnn = LRNN(6, LRNNConfig(block=6, expand=1)).double()
    orders = torch.stack([torch.randperm(6) for _ in range(6)])
    with torch.no_grad():  # input n permutes the one block by the n-th order
        lrnn.in_proj.weight.zero_()
        lrnn.matrix_proj.bias.zero_()
        lrnn.matrix_proj.weight.copy_(7 * torch.eye(6)[orders].flatten(1).T)
    tokens = torch.randint(0, 6, (1000,))
    _, state = lrnn(torch.eye(6, dtype=torch.float64)[tokens][None])
    want = lrnn.h0[0].detach()
    for n in tokens:
        want = want[orders[n]]
    close(state.h[0, 0], want)


def test_lru_begins_on_its_ring():
    torch.manual_seed(0)
    lru = LRU(512, LRUConfig(r_min=0.6, r_max=0.9, max_phase=1.5))
    lam = lru.eigenvalues()
    assert 0.6 <= lam.abs().min() < 0.62 and 0.89 < lam.abs().max() <= 0.9
    assert 0 <= lam.angle().min() < 0.02 and 1.45 < lam.angle().max() <= 1.5
    # Uniform in area: half of them are beyond the radius that halves the ring.
    outer = (lam.abs().square() > (0.6**2 + 0.9**2) / 2).float().mean()
    assert outer == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(lru.gamma_log.exp().square(), 1 - lam.abs().square())
    whole = LRU(512).eigenvalues().abs()
    assert 0 < whole.min() < 0.2 and 0.99 < whole.max() < 1


@pytest.mark.parametrize("low", [0, -1])
def test_hgrn_bounds_ascend(low):
    mixer = HGRNConfig(eig_range=(low, 1))
    lm = model(mixer, layers=3)
    torch.nn.init.normal_(lm.shared["hgrn"].Gamma)
    assert sum("Gamma" in name for name in lm.state_dict()) == 1
    assert lm.config.parameter_count() == sum(p.numel() for p in lm.parameters())
    # Gates that are shut are at their bound: what is left of a state of ones after one step.
    bounds = []
    for block in lm.layers:
        hgrn = block.mixer
        torch.nn.init.zeros_(hgrn.in_proj.weight)
        shut, rest = hgrn._gates(torch.full((12,), -1e3, dtype=torch.float64))
        bounds.append(shut.exp() if low == 0 else shut)
        close(rest, 1 - bounds[-1])
        wide, rest = hgrn._gates(torch.full((12,), 50.0, dtype=torch.float64))
        assert (rest > 0).all() and (rest < 1e-20).all()  # no bit is lost close to 1
        assert low < 0 or torch.allclose(wide, -rest, rtol=1e-14, atol=0)
    assert (bounds[0] == low).all()
    assert (bounds[1] > bounds[0]).all() and (bounds[2] > bounds[1]).all() and (bounds[2] < 1).all()
    share = lm.shared["hgrn"].Gamma.softmax(0)
    # As in the authors' code and in fla: what the first layer gets is left out of all sums.
    for bound, sum_of_shares in zip(bounds, share.cumsum(0) - share[0], strict=True):
        close(bound, low + (1 - low) * sum_of_shares)


def test_hgrn_alone_is_the_formula():
    hgrn = HGRN(5, HGRNConfig(complex=True)).double()
    x = torch.randn(1, 6, 5, dtype=torch.float64)
    f, c, g = hgrn.in_proj(x).split((5, 10, 10), -1)
    c, f = F.silu(c).unflatten(-1, (5, 2)), f.sigmoid()
    h, rows = torch.zeros(1, 5, dtype=torch.complex128), []
    for t in range(6):
        h = f[:, t] * torch.exp(1j * hgrn.theta) * h
        h = h + (1 - f[:, t]) * torch.complex(c[:, t, :, 0], c[:, t, :, 1])
        rows.append(torch.view_as_real(h).flatten(1))
    close(hgrn(x)[0], hgrn.out_proj(hgrn.norm(torch.stack(rows, 1)) * F.silu(g)))


@pytest.mark.parametrize("mixer", [S4D, S5, LSSL])
def test_recurrent_is_convolution(mixer):
    torch.manual_seed(0)
    layer = mixer(8).double()
    x = torch.randn(2, 1000, 8, dtype=torch.float64)
    first = layer(x[:, :300])[1]

    def run(view):
        layer.view = view
        y, state = layer(x[:, 300:], first)
        leaves = [first.h, *layer.parameters()]
        return y, state.h, *torch.autograd.grad((y * x[:, 300:]).sum(), leaves, retain_graph=True)

    for got, want in zip(run("convolution"), run("recurrent"), strict=True):
        assert (got - want).abs().max() <= 1e-8 * max(1, want.abs().max())


@pytest.mark.parametrize(("mixer", "first"), [(S4D, 64), (S5, None), (LSSL, None)])
def test_the_view_by_default_is_the_faster(mixer, first):
    torch.manual_seed(0)
    layer = mixer(8)
    assert layer.view == "auto"

    def run(view, x):
        layer.view = view
        return layer(x)[0]

    for T in (63, 64, 1000):
        x = torch.randn(1, T, 8)
        faster = "convolution" if first and first <= T else "recurrent"
        assert torch.equal(run("auto", x), run(faster, x))


def test_powers_are_those_of_every_step():
    torch.manual_seed(0)
    z = torch.complex(-torch.rand(3, 2).double(), 9 * torch.rand(3, 2).double())
    w, u = torch.randn(2, 3, 2, dtype=z.dtype), torch.randn(2, 3, 50, dtype=torch.float64)
    for T in (1, 2, 3, 4, 8, 9, 10, 50):
        near, far = powers(z, T)
        exact = torch.exp(z[..., None] * torch.arange(T))
        close((far[..., None] * near[..., None, :]).flatten(-2)[..., :T], exact)
        want = torch.einsum("bdn,dnt->bdt", w, exact).real
        close(sums_of_powers(w, near, far)[..., :T], want)
        want = torch.einsum("bdt,dnt->bdn", u[..., :T].to(z.dtype), exact)
        close(weighted_by_powers(u[..., :T], near, far), want)


def test_lssl_keeps_legendre_coefficients():
    # HiPPO's A h + B u stands still at the coefficients of a constant: 1, 0, 0 ...
    A, B = hippo_legs(16)
    close(-torch.linalg.solve(A, B), F.one_hot(torch.tensor(0), 16).double())
    # Its normal part is A and a matrix of rank one.
    root = (torch.arange(16, dtype=torch.float64) + 0.5).sqrt()
    roots = torch.linalg.eigvals(A + root[:, None] * root)
    close(roots.imag.sort().values[8:], torch.tensor(hippo_frequencies(16)))
    close(roots.real, torch.full((16,), -0.5, dtype=torch.float64))


def test_exponentials_close_to_1_keep_their_bits():
    z = torch.tensor([1e-9 + 2e-9j, -1e-12 + 3e-5j, -2 + 3j], dtype=torch.complex128)
    e, less = exp_and_phi(z)
    close(e, z.exp())
    series = z * (1 + z / 2 * (1 + z / 3))
    torch.testing.assert_close(less[:2], series[:2], rtol=1e-14, atol=0)
    close(less[2], z[2].exp() - 1)


def test_gradients_of_negative_complex_gates():
    hgrn = HGRN(4, HGRNConfig(complex=True, eig_range=(-1, 1))).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    given, _ = hgrn._before(x, lambda layer, x: layer(x))
    turn = torch.exp(-1j * hgrn.theta) * given[0]
    assert (turn.real < 0).any() and (turn.real > 0).any()
    assert torch.autograd.gradcheck(lambda x: hgrn(x)[0], x)


def test_qrnn_is_the_formula():
    qrnn = QRNN(4, QRNNConfig(window=2)).double()
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    c, rows, before = x.new_zeros(1, 4), [], x.new_zeros(1, 4)
    for now in x.unbind(1):
        z, f, o = qrnn.in_proj(torch.cat([before, now], -1)).chunk(3, -1)
        c, before = f.sigmoid() * c + (1 - f.sigmoid()) * z.tanh(), now
        rows.append(o.sigmoid() * c)
    close(qrnn(x)[0], qrnn.out_proj(torch.stack(rows, 1)))


def test_scrn_is_the_formula():
    scrn = SCRN(4, SCRNConfig(alpha=0.7)).double()
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    s, h, rows = x.new_zeros(1, 2), x.new_zeros(1, 4), []
    for now in x.unbind(1):
        b, a = scrn.in_proj(now).split((2, 4), -1)
        s = 0.7 * s + 0.3 * b
        h = torch.tanh(scrn.context_proj(s) + a + scrn.recurrent * h)
        rows.append(torch.cat([s, h], -1))
    close(scrn(x)[0], scrn.out_proj(torch.stack(rows, 1)))


def test_aaren_is_attention_with_one_query():
    aaren = Aaren(12, AarenConfig(heads=3)).double()
    x = torch.randn(2, 40, 12, dtype=torch.float64)
    k, v = (p.unflatten(-1, (3, 4)).transpose(1, 2) for p in aaren.in_proj(x).chunk(2, -1))
    q = aaren.query[:, None].expand(2, 3, 40, 4)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(aaren(x)[0], aaren.out_proj(o.transpose(1, 2).flatten(2)))

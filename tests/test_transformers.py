"""transformers' models after recurra.install(): the same results from other kernels."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import recurra
from recurra.compat import _hooks, _recurrences, _transformers
from transformers_models import FAMILIES, VOCABULARY, build, modelling_file

# The hooks of each family that recurra serves; what is left runs on torch as before.
SERVED = set(_hooks.BY_NAME)
RECURRENCES = {r.module.split(".")[2]: r for r in reversed(_recurrences.ALL)}
HOOKED = {
    file.parent.name
    for folder in importlib.import_module("transformers.models").__path__
    for file in Path(folder).glob("*/modeling_*.py")
    if re.search(rf"^@{_transformers._DECORATOR}\(", file.read_text("utf-8"), re.M)
}


@pytest.fixture(autouse=True)
def quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)
    recurra.uninstall()


def tokens(batch: int = 2, length: int = 21) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their mask, the second row padded on the left."""
    x = tokens()
    mask = torch.ones_like(x)
    mask[1, :6] = 0
    return x.masked_fill(mask == 0, 0), mask


def observe(family: str, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """Everything that a user sees of a model."""
    seen: dict[str, object] = {}
    model = build(family).to(dtype)
    x, mask = padded()
    plain, keys = {"input_ids": tokens()}, {"input_ids": x, "attention_mask": mask}

    def output(**inputs) -> torch.Tensor:
        out = model(**inputs)
        return out.logits if "logits" in out else out.last_hidden_state

    with torch.no_grad():
        seen["logits"] = output(**plain)
        seen["padded logits"] = output(**keys)[mask.bool()]
    model.train()
    for name, inputs, weight in (
        ("loss", plain, torch.ones_like(mask)),
        ("padded loss", keys, mask),
    ):
        torch.manual_seed(5)  # dropout, where a family has it
        model.zero_grad()
        rows = output(**inputs).float()
        target = torch.linspace(-1, 1, rows.shape[2])
        loss = ((rows - target).square().mean(-1) * weight).mean()
        loss.backward()
        seen[name] = loss.detach()
        for key, p in model.named_parameters():
            if p.grad is not None:
                seen[f"{name}: gradient of {key}"] = p.grad.clone()
    model.eval()
    if hasattr(model, "generate"):
        options = {"max_new_tokens": 12, "use_cache": True, "pad_token_id": 0}
        for name, inputs in (("", plain), ("padded ", keys)):
            seen[name + "greedy"] = model.generate(**inputs, do_sample=False, **options)
        torch.manual_seed(7)
        seen["sampled"] = model.generate(**plain, do_sample=True, **options)
    return seen


def compare(after: dict[str, object], before: dict[str, object], rtol: float) -> None:
    """Each within ``rtol`` of its largest entry; tokens equal."""
    assert after.keys() == before.keys()
    for name, want in before.items():
        got = after[name]
        assert got.shape == want.shape and got.dtype == want.dtype, name
        if want.is_floating_point():
            scale = max(want.abs().max().item(), 1e-3)
            error = (got.float() - want.float()).abs().max().item() / scale
            assert error <= rtol, f"{name}: {error}"
        else:
            assert torch.equal(got, want), name


def uses_recurra(family: str) -> list[str]:
    module = modelling_file(family)
    return [
        h.func_name for h in _transformers.hooks(module) if "recurra" in h.implementation.__module__
    ]


def test_table_names_every_family_with_the_hook():
    assert HOOKED | RECURRENCES.keys() <= FAMILIES.keys()
    assert len(HOOKED) >= 22  # of transformers 5.23; later ones have more


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in HOOKED | RECURRENCES.keys()])
def test_same_results(family):
    before = observe(family)
    recurra.install()
    wanted = {h.func_name for h in _transformers.hooks(modelling_file(family))} & SERVED
    assert set(uses_recurra(family)) == wanted
    assert wanted or family in RECURRENCES
    calls = count_calls(family)
    after = observe(family)
    assert all(calls.values()), calls
    compare(after, before, 2e-4)


def count_calls(family: str) -> dict[str, int]:
    """Counts the calls of what install() put into a family's file; mamba_inner_fn is never there
    to compute, and decoding steps need generate()."""
    module, calls = modelling_file(family), {}

    def counted(name, implementation):
        calls[name] = 0

        def call(*args, **kwargs):
            calls[name] += 1
            return implementation(*args, **kwargs)

        return call

    for hook in _transformers.hooks(module):
        steps = hook.func_name in ("causal_conv1d_update", "selective_state_update")
        if hook.func_name == "mamba_inner_fn" or (steps and family == "glm5_next"):
            continue
        if hook.func_name in SERVED:
            cell = hook._cells["implementation"]
            cell.cell_contents = counted(hook.func_name, cell.cell_contents)
    if family in RECURRENCES:
        *owner, name = RECURRENCES[family].name.split(".")
        place = getattr(module, owner[0]) if owner else module
        setattr(place, name, counted(name, getattr(place, name)))
    return calls


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba", "zamba", "mamba2", "lfm2",
                                    "recurrent_gemma", "rwkv"])  # fmt: skip
def test_same_results_in_bfloat16(family):
    """As near to float32 as the untouched model is."""
    exact = observe(family)
    before = observe(family, torch.bfloat16)
    recurra.install()
    after = observe(family, torch.bfloat16)
    assert after.keys() == before.keys() == exact.keys()
    errors: dict[str, list[float]] = {}
    for name, want in exact.items():
        if not want.is_floating_point():
            assert after[name].shape == want.shape
            continue
        # Rounding falls now here, now there: all gradients of a loss are taken together.
        totals = errors.setdefault(name.partition(" of ")[0], [0.0, 0.0])
        size = want.square().sum().clamp(min=1e-12)
        for i, got in enumerate((after, before)):
            totals[i] += ((got[name].float() - want).square().sum() / size).item()
    for name, (ours, own) in errors.items():
        assert ours**0.5 <= 1.3 * own**0.5 + 2**-9, f"{name}: {ours} beside {own}"


def test_steps_with_gradients_enabled():
    """As outside of torch.no_grad(), where transformers' own steps run, too, up to a backward."""
    x = tokens()
    model = build("mamba")

    def last_logits() -> torch.Tensor:
        cache = model(input_ids=x[:, :-1], use_cache=True).cache_params
        return model(input_ids=x[:, -1:], cache_params=cache, use_cache=True).logits[:, -1]

    before = last_logits()
    recurra.install()
    after = last_logits()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    after.square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(input_ids=x).logits[:, -1].square().sum().backward()
    for gradient, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-4)


def test_other_activations_stay_with_torch(capsys):
    """recurra's convolution has SiLU only; a model with another activation goes on as it was."""
    x = tokens()
    with torch.no_grad():
        before = build("mamba", hidden_act="gelu")(input_ids=x).logits
        recurra.install()
        model = build("mamba", hidden_act="gelu")
        torch.testing.assert_close(model(input_ids=x).logits, before, rtol=1e-4, atol=1e-4)
    assert "no such activation" in recurra.report(model)


def test_packed_sequences_are_kept_apart():
    """What the untouched model refuses without a kernel package."""
    x = tokens(1, 20)
    ends = torch.tensor([0, 8, 20], dtype=torch.int32)
    seq_idx = torch.tensor([[0] * 8 + [1] * 12], dtype=torch.int32)
    recurra.install()
    model = build("lfm2", layer_types=["conv", "conv"])

    def run(x: torch.Tensor, **packed: torch.Tensor) -> torch.Tensor:
        return model(input_ids=x, use_cache=False, **packed).logits

    with torch.no_grad():
        apart = torch.cat([run(x[:, :8]), run(x[:, 8:])], 1)
        for packed in ({"seq_idx": seq_idx}, {"cu_seqlens": ends}):
            got = run(x, **packed)
            torch.testing.assert_close(got, apart, rtol=1e-4, atol=1e-4)
    recurra.uninstall()
    with pytest.raises(ValueError, match="packed"):
        run(x, seq_idx=seq_idx)


def test_compiles():
    x = tokens()
    recurra.install()
    model = build("mamba")
    with torch.no_grad():
        want = model(input_ids=x, use_cache=False).logits
        got = torch.compile(model, backend="aot_eager")(input_ids=x, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_uninstall_puts_everything_back():
    module = modelling_file("mamba")
    gemma, rwkv = modelling_file("recurrent_gemma"), modelling_file("rwkv")

    def state():
        cells = [
            (h.func_name, h.implementation, h.applicable_params, h.is_new_implementation)
            for h in _transformers.hooks(module)
        ]
        scan = gemma.RecurrentGemmaRglru._rnn_scan
        scan = scan, gemma.RecurrentGemmaRecurrentBlock.forward
        return cells, scan, rwkv.rwkv_linear_attention_cpu, list(sys.meta_path), set(sys.modules)

    importlib.import_module("recurra.compat.fla.modules.conv")
    recurra.install()
    recurra.uninstall()
    before = state()
    with recurra.install():
        assert state()[0] != before[0] and state()[1] != before[1]
        recurra.install()  # a second one
        assert state()[2] is not before[2]
    recurra.uninstall()
    assert state() == before


@pytest.mark.parametrize("family", ["mamba", "recurrent_gemma", "rwkv"])
def test_checkpoints_load_after_install(family, tmp_path):
    before = build(family)
    before.save_pretrained(tmp_path)
    recurra.install()
    after = type(before).from_pretrained(tmp_path)
    with torch.no_grad():
        want, got = (m(input_ids=tokens()).logits for m in (before, after))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    name = next(n for n, _ in after.named_parameters())
    assert after.get_parameter(name) is not None


def test_wrapped_convolution_is_left_to_its_wrapper():
    """As adapters and offloading replace what a convolution does."""
    model = build("recurrent_gemma")
    conv = model.model.layers[0].temporal_block.conv_1d
    plain = conv.forward
    conv.forward = lambda x: 2 * plain(x)
    with torch.no_grad():
        want = model(input_ids=tokens(), use_cache=False).logits
        recurra.install()
        torch.testing.assert_close(model(input_ids=tokens(), use_cache=False).logits, want)


REMOTE = """
import importlib.util, sys
import recurra
from recurra.compat._transformers import hooks
from transformers.models.mamba import configuration_mamba  # the package, not the modelling file
import transformers.models.mamba as package
done = recurra.install(transformers={serve})
path = package.__path__[0] + "/modeling_mamba.py"
name = "transformers.models.mamba.modeling_remote"
spec = importlib.util.spec_from_file_location(name, path)
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
found = {{h.func_name: h.implementation.__module__ for h in hooks(module)}}
assert set(found.values()) == {{{where}}}, found
done.uninstall()
assert all(h.implementation is h.torch_function for h in hooks(module))
"""


@pytest.mark.parametrize("serve", [True, False])
def test_files_that_are_loaded_by_hand(serve):
    """As remote code is, past every finder; and with transformers=False not even what stands in
    for a package comes under a model, whose padding mamba_inner_fn would not see."""
    where = "'recurra.compat._hooks'" if serve else "name"
    run(REMOTE.format(serve=serve, where=where))


def test_hooks_within_modules():
    """The package kernels makes a module of each decorated function."""
    module = modelling_file("mamba")
    function = module.causal_conv1d_fn

    class Func(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    try:
        module.causal_conv1d_fn = Func()
        recurra.install()
        assert "causal_conv1d_fn" in uses_recurra("mamba")
        assert "causal_conv1d_fn: recurra" in recurra.report(build("mamba"))
    finally:
        module.causal_conv1d_fn = function


def test_packed_sequences_that_a_scan_would_mix_are_refused():
    recurra.install()
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        build("zamba")(input_ids=tokens(), seq_idx=torch.zeros(2, 21, dtype=torch.int32))


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_installed_before_transformers_is_imported():
    out = run(
        "import recurra, sys\n"
        "assert not {'transformers', 'mamba_ssm', 'causal_conv1d', 'fla'} & set(sys.modules)\n"
        "done = recurra.install(report=True)\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers.models.mamba import modeling_mamba as m\n"
        "from transformers.models.recurrent_gemma import modeling_recurrent_gemma as g\n"
        "from recurra.compat._transformers import hooks\n"
        "names = [h.implementation.__module__ for h in hooks(m)]\n"
        "assert names == ['recurra.compat._hooks'] * 5, names\n"
        "assert 'recurra' in g.RecurrentGemmaRglru._rnn_scan.__module__\n"
        "done.uninstall()\n"
        "assert all(h.implementation is h.torch_function for h in hooks(m))\n"
        "assert 'transformers' in g.RecurrentGemmaRglru._rnn_scan.__module__\n"
        "assert 'mamba_ssm' not in sys.modules\n"
    )
    assert "mamba_ssm: recurra stands in for it" in out


def test_report_tells_layers_and_kernels(capsys):
    model = build("jamba")
    before = recurra.report(model)
    assert "JambaMambaMixer x 1" in before and "recurra" not in before
    done = recurra.install(report=True)
    assert "jamba: " in capsys.readouterr().out
    after = recurra.report(model)
    assert capsys.readouterr().out == after + "\n"
    assert "selective_scan_fn: recurra" in after
    assert "recurrent_gemma" in str(done)
    assert "RecurrentGemmaRglru._rnn_scan: recurra" in recurra.report(build("recurrent_gemma"))
    qwen = recurra.report(build("qwen3_next"))
    assert "causal_conv1d_fn: recurra" in qwen and "chunk_gated_delta_rule: torch" in qwen
    assert "no layer" in recurra.report(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "file, text, replacement, missing",
    [
        ("integrations/hub_kernels.py", "is_new_implementation", "fresh", "hub_kernels.py"),
        ("models/rwkv/modeling_rwkv.py", "time_first, key", "key, time_first", "rwkv_linear"),
        ("models/recurrent_gemma/modeling_recurrent_gemma.py", "_rnn_scan", "_scan", "_rnn_scan"),
        (
            "models/recurrent_gemma/modeling_recurrent_gemma.py",
            "use_cache: bool",
            "cache: bool",
            "Block",
        ),
    ],
)
def test_unknown_transformers_is_left_alone(monkeypatch, file, text, replacement, missing):
    read = _transformers._read

    def changed(path):
        source = read(path)
        return source.replace(text, replacement) if str(path).endswith(file) else source

    monkeypatch.setattr(_transformers, "_read", changed)
    before = list(sys.meta_path), set(sys.modules)
    with pytest.raises(RuntimeError, match=rf"(?s)transformers 5.*{missing}.*nothing was changed"):
        recurra.install()
    assert (list(sys.meta_path), set(sys.modules)) == before
    assert not uses_recurra("mamba")
    done = recurra.install(transformers=False)
    assert "transformers: its own functions" in str(done) and "mamba_ssm" in sys.modules


def test_wrappers_of_another_kind_change_nothing():
    """A modelling file whose wrappers changed under the same decorator."""
    module = modelling_file("mamba")
    wrapper = module.causal_conv1d_fn
    originals = {n: v for n, v in vars(module).items() if hasattr(v, "__wrapped__")}
    try:
        for name, value in originals.items():
            if getattr(value, "__module__", None) == module.__name__ and callable(value):
                setattr(
                    module, name, lambda *args, wrapped=value, **kwargs: wrapped(*args, **kwargs)
                )
        before = list(sys.meta_path)
        with pytest.raises(RuntimeError, match="modeling_mamba uses .* does not know"):
            recurra.install()
        assert list(sys.meta_path) == before and "mamba_ssm" not in sys.modules
        assert not uses_recurra("jamba")
    finally:
        for name, value in originals.items():
            setattr(module, name, value)
    assert module.causal_conv1d_fn is wrapper

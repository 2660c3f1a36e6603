"""recurra.onnx: what each op becomes, and whole models, against torch in onnxruntime."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import pytest
import torch
from torch import Tensor

import recurra
from bounds import double
from mixers import states
from opdb import CELLS, OPS
from recurra.lm import CONFIGS
from recurra.nn import AttentionConfig, RGLRUConfig
from support import ROOT, Draw, describe, step_arguments, with_state

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

import onnx_ir as ir  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

import recurra.onnx  # noqa: E402

DTYPES = {
    torch.float64: TensorProto.DOUBLE,
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float16: TensorProto.FLOAT16,
    torch.bool: TensorProto.BOOL,
    torch.int32: TensorProto.INT32,
}
# Relative to the largest number of an output: elementary functions of onnxruntime have errors of a
# few roundings, which the recurrence carries along, and 16-bit outputs one more.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


def info(name: str, dtype: int, shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def one_node(op: str, tensors: dict, attributes: dict, dynamic: dict | None = None) -> ir.Model:
    """A model of one node of the domain; ``dynamic`` names sizes of inputs that are not said."""
    schema = getattr(torch.ops.recurra, op).default._schema
    names = [a.name for a in schema.arguments if "Tensor" in str(a.type) and a.name != "cu_seqlens"]
    inputs = [
        info(n, DTYPES[x.dtype], (dynamic or {}).get(n, list(x.shape)))
        for n, x in tensors.items()
        if x is not None
    ]
    given = [n if tensors.get(n) is not None else "" for n in names]
    outputs = [f"out{i}" for i in range(len(schema.returns))]
    chosen = {n: int(x) if isinstance(x, bool) else x for n, x in attributes.items()}
    node = helper.make_node(
        op.removeprefix("_"), given, outputs, domain=recurra.onnx.DOMAIN, **chosen
    )
    graph = helper.make_graph(
        [node], op, inputs, [helper.make_empty_tensor_value_info(name) for name in outputs]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(recurra.onnx.DOMAIN, 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def array(x: Tensor) -> onnxruntime.OrtValue:
    x = x.detach().contiguous()
    if x.dtype == torch.bfloat16:  # which NumPy has not
        bits = x.view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())


def session(model: ir.Model | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    data = model if isinstance(model, bytes) else ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: ir.Model, inputs: dict[str, Tensor]) -> list[Tensor]:
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True)
    results = session(model).run_with_ort_values(None, {n: array(x) for n, x in inputs.items()})
    outputs = [torch.from_dlpack(result._ortvalue.to_dlpack()).clone() for result in results]
    types = [value.type.tensor_type.elem_type for value in proto.graph.output]
    assert types == [DTYPES[x.dtype] for x in outputs]
    return outputs


def close(got: Tensor, want: Tensor, context: str) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape, context
    if not want.is_floating_point():
        assert torch.equal(got, want), context
        return
    got, exact = double(got), double(want)
    scale = exact.abs().max().item() if exact.numel() else 0
    error = (got - exact).abs().max().item() if exact.numel() else 0
    assert error <= TOLERANCE[want.dtype] * (1 + scale), f"{context}: {error} beside {scale}"


def check_op(op: str, args: dict, expand: bool, dynamic: dict | None = None) -> None:
    names = {a.name for a in getattr(torch.ops.recurra, op).default._schema.arguments}
    tensors = {n: x for n, x in args.items() if isinstance(x, Tensor)}
    attributes = {n: x for n, x in args.items() if n in names - set(tensors) and x is not None}
    model = one_node(op, tensors, attributes, dynamic)
    (recurra.onnx.expand if expand else recurra.onnx.define)(model)
    assert [n.domain for n in model.graph].count("recurra") == (not expand)
    got = run(model, tensors)
    want = getattr(torch.ops.recurra, op).default(**args)
    want = want if isinstance(want, tuple) else (want,)
    for n, (x, y) in enumerate(zip(got, want, strict=True)):
        close(x, y, f"{op}({describe(args)}): output {n}")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_an_op_computes_the_same(op, dtype):
    for n, args in enumerate(op.samples(dtype, "small", packed=False)):
        if not any(isinstance(x, Tensor) and x.is_complex() for x in args.values()):
            check_op(op.name, args, expand=n % 2 == 1)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_every_cell_computes_the_same(cell):
    info = recurra.cells()[cell.name]
    G, P, K, N = len(info.inputs), len(info.params), len(info.states), 5
    torch.manual_seed(0)
    args = {
        "x": torch.randn(2, 30, G, N),
        "params": torch.rand(P, N),
        "h0": torch.rand(2, K, N) + 0.5,
        "cell": cell.name,
        "return_states": True,
        "reset": torch.rand(2, 30) < 0.1,
    }
    check_op("rnn", args, expand=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norms_and_linear_steps_compute_the_same(dtype):
    torch.manual_seed(0)
    for x in (torch.randn(2, 5, 8), torch.randn(3, 8)):
        check_op("_rms_norm", {"x": x.to(dtype), "weight": torch.randn(8), "eps": 1e-3}, True)
    weight = torch.randn(4, 8).to(dtype)
    for bias in (torch.randn(4), None):
        x = torch.randn(3, 8).to(dtype)
        check_op("_linear_step", {"x": x, "weight": weight, "bias": bias}, False)


DYNAMIC = {
    "linear_scan": {"a": "BTD", "b": "BTD"},
    "block_scan": {"A": "BTNkk", "b": "BTNk"},
    "causal_conv1d": {"x": "BTD", "weight": "D3"},
    "selective_scan": {"u": "BTD", "delta": "BTD", "A": "DN", "B": "BT2N", "C": "BT2N"},
    "softmax_scan": {"s": "BTD", "v": "BTD"},
    "rnn": {"x": "BT3N", "params": "3N"},
    "_rms_norm": {"x": "BTD", "weight": "D"},
    "_linear_step": {"x": "BK", "weight": "NK"},
}
OPTIONS = {
    "linear_scan": {"log_a": False, "reverse": True},
    "block_scan": {"reverse": True},
    "causal_conv1d": {"activation": "silu"},
    "selective_scan": {"delta_softplus": True},
    "rnn": {"cell": "paragru"},
    "_rms_norm": {"eps": 1e-5},
}


@pytest.mark.parametrize("op", DYNAMIC)
def test_sizes_may_be_unknown(op):
    """All but those that the function depends on, which "B", "T" and the like do not name."""
    torch.manual_seed(0)
    sizes = {"B": 2, "T": 7, "D": 6, "N": 4, "k": 3, "K": 5}
    letters = DYNAMIC[op]
    args = {
        name: 0.5 * torch.rand([sizes.get(c) or int(c) for c in text])
        for name, text in letters.items()
    }
    unknown = {name: [c if c in sizes else int(c) for c in t] for name, t in letters.items()}
    for expand in (False, True):
        check_op(op, args | OPTIONS.get(op, {}), expand, unknown)


def test_one_model_may_call_an_op_in_several_ways():
    torch.manual_seed(0)
    first = {"a": torch.rand(2, 5, 3), "b": torch.rand(2, 5, 3), "h0": torch.rand(2, 3)}
    proto = ir.to_proto(one_node("linear_scan", first, {}))
    ways = [(first, 0, 0)]
    for dtype, given, log_a, reverse in (
        (torch.float32, "a b h0", 1, 0),
        (torch.float32, "a b h0", 0, 1),
        (torch.float32, "a b h0", 1, 0),  # the same again
        (torch.float64, "a b h0", 0, 0),
        (torch.float32, "a b", 0, 0),
    ):
        n = len(ways)
        args = {name: first[name].to(dtype) for name in given.split()}
        inputs, outputs = [f"{name}{n}" for name in args], [f"y{n}", f"last{n}"]
        options = {"domain": "recurra", "log_a": log_a, "reverse": reverse}
        proto.graph.node.append(helper.make_node("linear_scan", inputs, outputs, **options))
        proto.graph.input.extend(
            info(name, DTYPES[dtype], list(x.shape))
            for name, x in zip(inputs, args.values(), strict=True)
        )
        proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
        ways.append((args, log_a, reverse))
    model = ir.from_proto(proto)
    recurra.onnx.define(model)
    assert len(model.functions) == len(ways) - 1
    fed = {name + str(n or ""): x for n, (args, *_) in enumerate(ways) for name, x in args.items()}
    got = run(model, fed)
    for n, (args, log_a, reverse) in enumerate(ways):
        want = recurra.linear_scan(**args, log_a=bool(log_a), reverse=bool(reverse))
        for x, y in zip(got[2 * n :], want, strict=False):
            close(x, y, f"call {n}")


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("left", [["h"], ["h", ""], ["", "h_last"]], ids=str)
@pytest.mark.parametrize("expand", [False, True], ids=["node", "expanded"])
def test_outputs_may_be_left_out(left, expand):
    args = {"a": torch.rand(2, 5, 3), "b": torch.rand(2, 5, 3)}
    proto = ir.to_proto(one_node("linear_scan", args, {}))
    for outputs, names in (
        (proto.graph.node[0].output, left),
        (proto.graph.output, [helper.make_empty_tensor_value_info(n) for n in left if n]),
    ):
        del outputs[:]
        outputs.extend(names)
    model = ir.from_proto(proto)
    (recurra.onnx.expand if expand else recurra.onnx.define)(model)
    (got,) = run(model, args)
    h, h_last = recurra.linear_scan(*args.values())
    close(got, h if "h" in left else h_last, str(left))


def test_a_runtime_that_has_only_the_node_says_so():
    args = {"a": torch.rand(2, 5, 3), "b": torch.rand(2, 5, 3)}
    model = one_node("linear_scan", args, {})
    with pytest.raises(Exception, match="recurra:linear_scan.* is not a registered function/op"):
        session(model)
    recurra.onnx.define(model)
    session(model)


def refused(model: ir.Model, sentence: str) -> None:
    for call in (recurra.onnx.define, recurra.onnx.expand):
        with pytest.raises(ValueError, match=f"^recurra.onnx: {sentence}"):
            call(model)


def test_what_a_model_must_say():
    args = {"a": torch.rand(2, 5, 3), "b": torch.rand(2, 5, 3)}
    model = one_node("linear_scan", args, {})
    model.graph.inputs[0].shape = None
    refused(model, "the model must say the type and shape of a of linear_scan; export it again")
    model = one_node("linear_scan", args, {})
    next(iter(model.graph)).op_type = "linear_skan"
    refused(model, "the domain recurra has no operator linear_skan")
    x, weight = torch.rand(2, 5, 3), torch.rand(3, 4)
    given = {"x": x, "weight": weight}
    model = one_node("causal_conv1d", given, {}, {"weight": [3, "W"]})
    refused(model, "dimension 1 of weight of causal_conv1d must be fixed, got a dynamic one")


REFUSED = {  # op: attributes that it runs with, and what is changed of them with what is said
    "causal_conv1d": (
        {},
        (
            {"activation": "gelu"},
            'activation of causal_conv1d must be one of silu or be left out, got "gelu"',
        ),
        ({"activation": 1}, "the attribute activation of causal_conv1d must be a string, got 1"),
    ),
    "linear_scan": (
        {},
        ({"log_a": "yes"}, "the attribute log_a of linear_scan must be 0 or 1, got 'yes'"),
        ({"log_a": 2}, "the attribute log_a of linear_scan must be 0 or 1, got 2"),
        ({"reverse": 1.0}, "the attribute reverse of linear_scan must be 0 or 1, got 1.0"),
        ({"loga": 1}, "linear_scan has no attribute loga; it has log_a, reverse"),
    ),
    "rnn": (
        {"cell": "paragru"},
        ({"cell": None}, "rnn must have the attribute cell"),
        ({"cell": "gru2"}, 'cell of rnn must be one of .*paragru.*, got "gru2"'),
        ({"algorithm": "fast"}, "algorithm of rnn must be one of auto, sequential, .* got .fast"),
        ({"on_fail": "hope"}, "on_fail of rnn must be one of .* got .hope"),
        ({"chunk": 0}, "chunk of rnn must be at least 1, got 0"),
        ({"chunk": 1.5}, "the attribute chunk of rnn must be an integer, got 1.5"),
    ),
    "_rms_norm": (
        {"eps": 1e-5},
        ({"eps": None}, "rms_norm must have the attribute eps"),
        ({"eps": 1}, "the attribute eps of rms_norm must be a float, got 1"),
    ),
}


@pytest.mark.parametrize("op", REFUSED)
def test_attributes_that_are_refused(op):
    runs, *wrong = REFUSED[op]
    sizes = {"B": 2, "T": 7, "D": 6, "N": 4}
    args = {
        name: torch.rand([sizes.get(c) or int(c) for c in text])
        for name, text in DYNAMIC[op].items()
    }
    recurra.onnx.define(one_node(op, args, runs))
    for change, sentence in wrong:
        chosen = {n: x for n, x in (runs | change).items() if x is not None}
        refused(one_node(op, args, chosen), sentence)


def test_inputs_that_are_refused():
    a, b, h0 = torch.rand(2, 5, 3), torch.rand(2, 5, 3), torch.rand(2, 3)
    refused(one_node("linear_scan", {"a": a}, {}), "linear_scan must have the input b")
    refused(one_node("linear_scan", {"b": b}, {}), "linear_scan must have the input a")
    whole = {"a": a.to(torch.int32), "b": b, "h0": h0}
    sentence = "a of linear_scan must be bfloat16, double, float, float16, got int32"
    refused(one_node("linear_scan", whole, {}), sentence)
    given = {"x": torch.rand(2, 5, 3, 4), "params": torch.rand(3, 4), "reset": torch.rand(2, 5)}
    refused(one_node("rnn", given, {"cell": "paragru"}), "reset of rnn must be bool, got float")
    proto = ir.to_proto(one_node("linear_scan", {"a": a, "b": b, "h0": h0}, {}))
    proto.graph.node[0].input.append("h0")
    refused(ir.from_proto(proto), "linear_scan takes at most 3 inputs, got 4")
    proto = ir.to_proto(one_node("linear_scan", {"a": a, "b": b}, {}))
    proto.graph.node[0].output.append("more")
    refused(ir.from_proto(proto), "linear_scan has at most 2 outputs, got 3")


def test_what_is_no_model_is_refused():
    proto = ir.to_proto(one_node("linear_scan", {"a": torch.rand(2, 5, 3)}, {}))
    refused(proto, "a model must be an onnx_ir.Model, got ModelProto: onnx_ir.load")
    with pytest.raises(ValueError, match="takes a recurra.LM, got Linear"):
        recurra.onnx.export_lm(torch.nn.Linear(2, 2))
    for shape in ((0, 1), (1,), (1, 2, 3), (1.0, 1)):
        with pytest.raises(ValueError, match="shape must be two sizes of at least 1"):
            recurra.onnx.export_lm(recurra.LM("tiny"), shape=shape)


def test_versions_that_are_refused():
    args = {"x": torch.rand(2, 3), "weight": torch.rand(3)}
    for version, sentence in (
        (17, "the model must be of opset 18 of ai.onnx or a later one, got 17; export it again"),
        (None, "the model must be of opset 18 of ai.onnx or a later one, got none"),
    ):
        model = one_node("_rms_norm", args, {"eps": 1e-5})
        model.opset_imports.pop("")
        if version is not None:
            model.opset_imports[""] = version
        refused(model, sentence)
    model = one_node("_rms_norm", args, {"eps": 1e-5})
    model.opset_imports["recurra"] = 2
    refused(model, "the domain recurra must be of version 1, got 2")
    model = one_node("_rms_norm", args, {"eps": 1e-5})
    model.opset_imports[""] = 18
    recurra.onnx.define(model)
    x, weight = args.values()
    want = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight
    close(run(model, args)[0], want, "opset 18")


def calls_a_function(body: str) -> ir.Model:
    """Of x and y: ``outer``, which calls ``inner``, which holds a node of the domain."""
    text = f"""
        <ir_version: 10, opset_import: ["": 20, "local": 1, "recurra": 1]>
        agraph (float[2, 5, 3] x, float[2, 5, 3] y) => (float[2, 5, 3] h)
        {{ z = local.outer <reverse = 1> (x, y)
           h = Neg(z) }}
        <domain: "local", opset_import: ["": 20, "local": 1]>
        outer <reverse> (x, y) => (h)
        {{ h = local.inner <reverse: int = @reverse> (x, y) }}
        <domain: "local", opset_import: ["": 20, "recurra": 1]>
        inner <reverse> (x, y) => (h)
        {{ {body} }}
        <domain: "local", opset_import: ["": 20, "recurra": 1]>
        unused (x, y) => (h)
        {{ h, last = recurra.linear_scan(x, y) }}
        <domain: "local", opset_import: ["": 20]>
        other (x) => (h)
        {{ h = Abs(x) }}
    """
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize("expand", [False, True])
def test_nodes_in_functions_of_a_model(expand):
    model = calls_a_function(
        "a = Sigmoid(x) h, last = recurra.linear_scan <reverse: int = @reverse> (a, y)"
    )
    (recurra.onnx.expand if expand else recurra.onnx.define)(model)
    names = {(domain, name) for domain, name, _ in model.functions}
    assert names == {("local", "other")} | ({("recurra", "linear_scan")} if not expand else set())
    x, y = torch.randn(2, 2, 5, 3)
    (got,) = run(model, {"x": x, "y": y})
    close(got, -recurra.linear_scan(torch.sigmoid(x), y, reverse=True)[0], "in a function")
    model = calls_a_function(
        "g, t = recurra.linear_scan(x, y) h, last = recurra.linear_scan <log_a = 1> (g, y)"
    )
    (recurra.onnx.expand if expand else recurra.onnx.define)(model)
    (got,) = run(model, {"x": x, "y": y})
    want = recurra.linear_scan(recurra.linear_scan(x, y)[0], y, log_a=True)[0]
    close(got, -want, "one after the other")
    refused(
        calls_a_function("h, last = recurra.linear_scan <revers = 1> (x, y)"),
        "linear_scan has no attribute revers",
    )


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "recurra.onnx")
    sentence = "recurra.onnx needs .*, of which onnxscript is missing: pip install 'recurra.onnx.'"
    with pytest.raises(ImportError, match=sentence):
        importlib.import_module("recurra.onnx")


class Packed(torch.nn.Module):
    def forward(self, a, b, cu_seqlens):
        return recurra.linear_scan(a, b, cu_seqlens=cu_seqlens)


def test_packed_sequences_have_no_form():
    a, b = torch.rand(2, 1, 5, 3)
    with pytest.raises(ValueError, match="^recurra.onnx: cu_seqlens of linear_scan has no form in"):
        recurra.onnx.export(Packed().eval(), (a, b, torch.tensor([0, 2, 5])), verbose=False)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_steps_in_place_have_no_form(op):
    args = with_state(op, op.make(Draw(3), 2, 1, 4, torch.float32, False))
    given = step_arguments(op, args, 0)
    names = [name for name, x in given.items() if isinstance(x, Tensor)]

    class Step(torch.nn.Module):
        def forward(self, h, *tensors):
            return op.step(h, **(given | dict(zip(names, tensors, strict=True)))) * 2, h

    inputs = args[op.state], *(given[name] for name in names)
    said = f"{op.name}_step writes its state in place, .*; call {op.name} with T = 1, which takes"
    if args[op.state].is_complex():  # nor has the op that it would name
        said = "torch's exporter has no complex numbers"
    with pytest.raises(ValueError, match=f"^recurra.onnx: {said}"):
        recurra.onnx.export(Step().eval(), inputs, verbose=False)


@pytest.mark.slow
def test_complex_models_have_no_form():
    with pytest.raises(ValueError, match="^recurra.onnx: torch's exporter has no complex numbers"):
        recurra.onnx.export_lm(small_lm("lru"), verbose=False)


# ---- models -----------------------------------------------------------------------------------


def small_lm(name: str, **more) -> recurra.LM:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIGS[name], d_model=32, n_layers=2, vocab_size=64, **more)
    return recurra.LM(config).eval()


def assert_runs_as_in_torch(lm: recurra.LM, model: ir.Model, lengths, batch: int) -> None:
    """Chunk after chunk, with the state carried by each."""
    there = session(model)
    names = [x.name for x in there.get_inputs()]
    state = lm.initial_state(batch)
    carried = [x.detach().numpy() for part in state for x in part]
    for T in lengths:
        tokens = torch.randint(0, 64, (batch, T))
        with torch.no_grad():
            logits, state = lm(tokens, state)
        got, *carried = there.run(None, dict(zip(names, [tokens.numpy(), *carried], strict=True)))
        close(torch.from_numpy(got), logits, f"logits of {T}")
        for name, x, y in zip(names[1:], carried, states(state), strict=True):
            close(torch.from_numpy(x), y, name)


MODELS = ("tiny", "paragru", "hgrn", "mingru", "hawk", "rwkv4", "aaren", "lrnn")
QUICK = ("tiny", "paragru")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_a_model_writes_the_same_in_onnxruntime(name, tmp_path):
    lm = small_lm(name)
    path = tmp_path / "model.onnx"
    recurra.onnx.export_lm(lm, path, verbose=False)
    onnx.checker.check_model(path, full_check=True)
    model = ir.load(path)
    assert any(node.domain == "recurra" for node in model.graph)
    assert_runs_as_in_torch(lm, model, (1, 9, 40, 1), batch=3)
    recurra.onnx.expand(model)
    assert not model.functions
    assert {node.domain for node in model.graph.all_nodes()} == {""}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_runs_as_in_torch(lm, model, (1, 9, 40, 1), batch=3)


@pytest.mark.slow
def test_a_model_with_attention_has_any_sizes_or_fixed_ones():
    mixers = RGLRUConfig(), AttentionConfig(window=16)
    lm = small_lm("griffin", mixer=mixers, pattern="RA")
    model = recurra.onnx.export_lm(lm, verbose=False).model
    for B in (1, 3):
        assert_runs_as_in_torch(lm, model, (1, 9, 300, 1, 24, 1), batch=B)
    for B, T in ((1, 1), (2, 24)):
        model = recurra.onnx.export_lm(lm, shape=(B, T), verbose=False).model
        assert_runs_as_in_torch(lm, model, [T] * 30, batch=B)


@pytest.mark.slow
def test_torch_exports_with_the_table():
    """As those call it who have an export of their own."""
    lm = small_lm("hgrn").norm_f
    program = torch.onnx.export(
        lm,
        (torch.randn(1, 3, 32),),
        dynamo=True,
        verbose=False,
        custom_translation_table=recurra.onnx.translation_table(),
    )
    (node,) = (node for node in program.model.graph if node.domain == "recurra")
    assert node.op_type == "rms_norm" and node.attributes["eps"].value == lm.eps
    recurra.onnx.define(program.model)
    x = torch.randn(1, 3, 32)
    (got,) = run(program.model, {program.model.graph.inputs[0].name: x})
    close(got, lm(x), "norm")


# ---- documentation ----------------------------------------------------------------------------


def test_the_page_has_every_operator_with_its_arguments():
    text = (ROOT / "docs/onnx.md").read_text()
    for op in recurra.onnx._functions.BODIES:
        inputs, attributes = recurra.onnx.signature(op)
        row = next(r for r in text.splitlines() if r.startswith(f"| `{op.removeprefix('_')}` |"))
        missing = [name for name in [*inputs, *attributes] if f"`{name}`" not in row]
        assert not missing, f"{op}: {missing}"

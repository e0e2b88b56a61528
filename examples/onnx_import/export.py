"""Writes attention_block.onnx and golden.json: `pip install onnx numpy`, then `python export.py`.

The block is that of a small Llama as an exporter for opset 23 writes it: four projections, rotate-half
RoPE, and grouped-query attention as one causal `Attention` node. Its weights are drawn, not trained;
heads look for what is like themselves, as trained heads do, so that there are blocks worth selecting.
golden.json holds what ONNX's own evaluator makes of a short prompt.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, THETA = 64, 4, 2, 32, 10_000.0
HERE = Path(__file__).parent


def weights():
    """Projections as [in, out], which is how exporters store them for MatMul."""
    draw = np.random.default_rng(0).standard_normal
    k = draw((KV_HEADS, HIDDEN, HEAD_DIM))
    q = np.repeat(k, HEADS // KV_HEADS, axis=0) + 0.5 * draw((HEADS, HIDDEN, HEAD_DIM))
    joined = lambda heads: heads.transpose(1, 0, 2).reshape(HIDDEN, -1)
    drawn = {
        "q_proj": joined(q) * HIDDEN**-0.5,
        "k_proj": joined(k) * HIDDEN**-0.5,
        "v_proj": draw((HIDDEN, KV_HEADS * HEAD_DIM)) * HIDDEN**-0.5,
        "o_proj": draw((HEADS * HEAD_DIM, HIDDEN)) * (HEADS * HEAD_DIM) ** -0.5,
    }
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def block():
    """The graph: hidden_states [batch, sequence, hidden] to output, of the same shape."""
    nodes, constants = [], {}

    def node(op, *inputs, **attributes):
        output = f"{op.lower()}_{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(name, values, dtype=np.int64):
        constants[name] = np.asarray(values, dtype)
        return name

    for name, value in weights().items():
        constant(name, value, np.float32)

    # Angles of every position: [1, 1, sequence, head_dim].
    length = node("Gather", node("Shape", "hidden_states"), constant("sequence_axis", 1), axis=0)
    positions = node("Range", constant("zero", 0), length, constant("one", 1))
    positions = node("Unsqueeze", node("Cast", positions, to=TensorProto.FLOAT), constant("last", [1]))
    inv_freq = THETA ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = node("Mul", positions, constant("inv_freq", inv_freq[None], np.float32))
    angles = node("Concat", angles, angles, axis=1)
    angles = node("Unsqueeze", angles, constant("leading", [0, 1]))
    cos, sin = node("Cos", angles), node("Sin", angles)

    def heads(projection, count):
        y = node("MatMul", "hidden_states", projection)
        y = node("Reshape", y, constant(f"{projection}_heads", [0, 0, count, HEAD_DIM]))
        return node("Transpose", y, perm=[0, 2, 1, 3])

    def rotated(x):
        part = lambda name, to: [constant(f"{name}_from", [to - HEAD_DIM // 2]), constant(f"{name}_to", [to])]
        a = node("Slice", x, *part("first", HEAD_DIM // 2), constant("dims", [3]))
        b = node("Slice", x, *part("second", HEAD_DIM), constant("dims", [3]))
        half = node("Concat", node("Neg", b), a, axis=3)
        return node("Add", node("Mul", x, cos), node("Mul", half, sin))

    q, k = rotated(heads("q_proj", HEADS)), rotated(heads("k_proj", KV_HEADS))
    y = node("Attention", q, k, heads("v_proj", KV_HEADS), is_causal=1)
    y = node("Transpose", y, perm=[0, 2, 1, 3])
    y = node("Reshape", y, constant("joined", [0, 0, HEADS * HEAD_DIM]))
    nodes.append(helper.make_node("MatMul", [y, "o_proj"], ["output"]))

    shape = ["batch", "sequence", HIDDEN]
    return helper.make_graph(
        nodes,
        "attention_block",
        [helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )


def by_hand(x):
    """The same in numpy, to check the graph by."""
    w, n = weights(), x.shape[1]
    heads = lambda y, count: y.reshape(n, count, HEAD_DIM).transpose(1, 0, 2).astype(np.float64)
    angles = np.arange(n)[:, None] * THETA ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    turn = np.exp(1j * angles)

    def rotated(x):
        pairs = (x[..., : HEAD_DIM // 2] + 1j * x[..., HEAD_DIM // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], -1)

    q, k = rotated(heads(x[0] @ w["q_proj"], HEADS)), rotated(heads(x[0] @ w["k_proj"], KV_HEADS))
    v = heads(x[0] @ w["v_proj"], KV_HEADS)
    k, v = (np.repeat(t, HEADS // KV_HEADS, axis=0) for t in (k, v))
    scores = q @ k.transpose(0, 2, 1) * HEAD_DIM**-0.5
    scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    y = (p / p.sum(-1, keepdims=True)) @ v
    return y.transpose(1, 0, 2).reshape(1, n, -1) @ w["o_proj"]


def main():
    model = helper.make_model(
        block(), producer_name="burn-prism", opset_imports=[helper.make_opsetid("", 23)], ir_version=11
    )
    onnx.checker.check_model(model, full_check=True)
    path = HERE / "attention_block.onnx"
    onnx.save(model, path)
    x = np.random.default_rng(1).standard_normal((1, 12, HIDDEN)).astype(np.float32)
    (y,) = ReferenceEvaluator(model).run(None, {"hidden_states": x})
    assert np.abs(y - by_hand(x)).max() < 1e-5, np.abs(y - by_hand(x)).max()
    golden = {"input": x.ravel().tolist(), "output": y.ravel().tolist(), "shape": list(x.shape)}
    rounded = json.loads(json.dumps(golden), parse_float=lambda text: float(f"{float(text):.8g}"))
    (HERE / "golden.json").write_text(json.dumps(rounded) + "\n")
    print(f"{path.name}: {path.stat().st_size} bytes, {len(model.graph.node)} nodes")


if __name__ == "__main__":
    main()

"""One run of OpenVINO on the linears of all blocks alone (no attention, norms or head), 4-bit weights in
groups of 128 (64 where the width asks for it) with int8 activations. Prints JSON."""

import argparse
import json
import statistics
import time

import numpy as np
import openvino as ov
from openvino import opset13 as op

from shapes import SHAPES


# OpenVINO reads packed constants where they are.
KEPT = [np.array([0x88], dtype=np.uint8)]


def linear(rng: np.random.Generator, x, rows: int, columns: int):
    """x [M, columns] times random u4 weights [rows, columns]."""
    group = 128 if columns % 128 == 0 else 64
    groups = columns // group
    packed = rng.integers(0, 256, rows * columns // 2, dtype=np.uint8)
    KEPT.append(packed)
    codes = op.constant(ov.Tensor(packed, ov.Shape([rows, groups, group]), ov.Type.u4))
    zero = op.constant(ov.Tensor(KEPT[0], ov.Shape([1]), ov.Type.u4))
    scale = op.constant(np.full((rows, groups, 1), 0.8 / 4.6 / columns**0.5, dtype=np.float16))
    weight = op.multiply(op.subtract(op.convert(codes, "f16"), op.convert(zero, "f16")), scale)
    weight = op.reshape(weight, op.constant(np.array([rows, columns])), special_zero=False)
    return op.matmul(x, op.convert(weight, "f32"), False, True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--new", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    args = parser.parse_args()
    s, rng = SHAPES[args.shape], np.random.default_rng(0)
    x = op.parameter([-1, s.hidden], np.float32, name="x")
    h, axis = x, op.constant(np.array([1]))
    for _ in range(s.layers):
        q = linear(rng, h, s.hidden, s.hidden)
        # Their means keep keys and values in the graph at the price of a sum.
        k = op.reduce_mean(linear(rng, h, s.kv_width, s.hidden), axis, keep_dims=True)
        v = op.reduce_mean(linear(rng, h, s.kv_width, s.hidden), axis, keep_dims=True)
        h = op.add(op.add(linear(rng, q, s.hidden, s.hidden), k), v)
        gate = linear(rng, h, s.intermediate, s.hidden)
        up = linear(rng, h, s.intermediate, s.hidden)
        h = linear(rng, op.multiply(op.swish(gate), up), s.hidden, s.intermediate)
    config = {
        "INFERENCE_NUM_THREADS": args.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128",
    }
    request = ov.Core().compile_model(ov.Model([h], [x]), "CPU", config).create_infer_request()

    def rate(rows: int, count: int) -> float:
        data = rng.standard_normal((rows, s.hidden), dtype=np.float32)
        seconds = []
        for _ in range(count + 1):
            start = time.perf_counter()
            request.infer({0: data})
            seconds.append(time.perf_counter() - start)
        return rows / statistics.median(seconds[1:])

    print(json.dumps({
        "prefill": rate(args.prompt, 2),
        "decode": rate(1, args.new),
        "batch": rate(args.batch, args.new),
    }))


main()

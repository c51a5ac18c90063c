"""Writes a Llama of random weights as GGUF, with the types that llama.cpp's own quantizer chooses."""

from pathlib import Path

import gguf
import numpy as np

from shapes import Shape

Q = gguf.GGMLQuantizationType


def random_rows(rng: np.random.Generator, rows: int, columns: int, kind: Q, deviation: float) -> np.ndarray:
    """Random codes with one scale, as bytes [rows, bytes of a row]."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    # Standard deviation of the codes, and where the f16 scale lies in a block.
    spread, at = {Q.Q4_0: (4.6, 0), Q.Q8_0: (73.9, 0), Q.Q6_K: (18.5 * 74, 208)}[kind]
    scale = np.array([deviation / spread], dtype=np.float16).view(np.uint8)
    data[:, :, at : at + 2] = scale
    return data.reshape(rows, -1)


def write(path: Path, shape: Shape, kind: Q) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, columns: int, kind: Q) -> None:
        writer.add_tensor(name, random_rows(rng, rows, columns, kind, 0.8 / columns**0.5), raw_dtype=kind)

    # Q6_K has blocks of 256 columns; narrower models get Q8_0, as from llama.cpp's quantizer.
    large = kind if kind == Q.Q8_0 else Q.Q6_K if shape.hidden % 256 == 0 else Q.Q8_0
    ones = np.ones(shape.hidden, dtype=np.float32)
    add("token_embd.weight", shape.vocab, shape.hidden, large if shape.tied else kind)
    if not shape.tied:
        add("output.weight", shape.vocab, shape.hidden, large)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(shape.layers):
        for name, rows, columns in [
            ("attn_q", shape.hidden, shape.hidden),
            ("attn_k", shape.kv_width, shape.hidden),
            ("attn_v", shape.kv_width, shape.hidden),
            ("attn_output", shape.hidden, shape.hidden),
            ("ffn_gate", shape.intermediate, shape.hidden),
            ("ffn_up", shape.intermediate, shape.hidden),
            ("ffn_down", shape.hidden, shape.intermediate),
        ]:
            add(f"blk.{layer}.{name}.weight", rows, columns, kind)
        for name in ["attn_norm", "ffn_norm"]:
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

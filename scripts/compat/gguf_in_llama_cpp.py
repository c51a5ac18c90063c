"""`gptq convert --to gguf` opens in llama.cpp, holds our weights to the bit, and has our perplexity.

The perplexity is the protocol `gptq` of `gptq eval`: windows side by side, every token of a window but its first.
llama.cpp rounds activations to 8 bits per 32 values for its integer dot products, we do not: hence a tolerance, and the
same difference on a file that we did not write (the original) as its yardstick.
"""

import json
import math
import subprocess

import numpy as np
from gguf import GGUFReader, dequantize
from llama_cpp import Llama
from safetensors.torch import load_file
from tools import ROOT, WORK, Row, gptq

HEAD = ["setting", "opens", "weights bit-equal", "our perplexity", "llama.cpp's perplexity"]

SEQLEN, WINDOWS = 256, 8
PERPLEXITY_TOLERANCE = 0.005
SETTINGS = {
    "4 bits, sym, group 64 (Q4_0)": (4, 64),
    "4 bits, sym, group 32 (Q4_0)": (4, 32),
    "8 bits, sym, group 32 (Q8_0)": (8, 32),
}

LINEARS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def text():
    """The first part of WikiText-2 where it lies beside the checkout, else of this project's documents."""
    found = ROOT.parent / "shared" / "text" / "wikitext2-test.txt"
    if found.exists():
        content = found.read_text()
    else:
        content = "\n".join(path.read_text() for path in sorted(ROOT.glob("docs/**/*.md")))
    excerpt = WORK / "text.txt"
    excerpt.write_text(content[:40_000])
    return excerpt


def llama_cpp_perplexity(path, content):
    """Perplexity of the same windows by llama.cpp."""
    model = Llama(str(path), n_ctx=SEQLEN, n_batch=SEQLEN, logits_all=True, verbose=False, n_threads=2)
    ids = model.tokenize(content.encode(), add_bos=False, special=False)
    total = 0.0
    for start in range(0, SEQLEN * WINDOWS, SEQLEN):
        window = ids[start : start + SEQLEN]
        model.reset()
        model.eval(window)
        logits = model.scores[: SEQLEN - 1].astype(np.float64)
        highest = logits.max(axis=1)
        normalizer = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
        total += (normalizer - logits[np.arange(SEQLEN - 1), window[1:]]).sum()
    return math.exp(total / (WINDOWS * (SEQLEN - 1)))


def our_perplexity(model, excerpt):
    report = gptq("eval", model, "--perplexity", excerpt, "--seqlen", SEQLEN, "--max-windows", WINDOWS, "--json")
    return json.loads(report)["perplexity"]


def same_weights(path, checkpoint):
    """Whether the blocks of the GGUF, dequantized by the `gguf` package, are the weights of the checkpoint."""
    plain = WORK / "dequantized"
    gptq("convert", checkpoint, "--to", "hf", "--output", plain, "--overwrite")
    ours = load_file(plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    compared = 0
    for tensor in GGUFReader(path).tensors:
        parts = tensor.name.split(".")
        if parts[0] != "blk" or parts[2] not in LINEARS:
            continue
        theirs = dequantize(tensor.data, tensor.tensor_type)
        if count := heads.get(parts[2]):
            # llama.cpp has the two halves of a head, which rotate together, interleaved.
            theirs = theirs.reshape(count, -1, 2, theirs.shape[1]).swapaxes(1, 2).reshape(theirs.shape)
        name = f"model.layers.{parts[1]}.{LINEARS[parts[2]]}.weight"
        if not np.array_equal(theirs.astype(np.float16), ours[name].numpy()):
            return False
        compared += 1
    return compared == 7 * config["num_hidden_layers"]


def rows():
    fetched = subprocess.run([ROOT / "scripts" / "fetch-smollm2.sh"], capture_output=True, text=True)
    if fetched.returncode != 0:
        yield Row("SKIPPED: SmolLM2 could not be downloaded", [""] * 4, True, [])
        return
    original = ROOT / fetched.stdout.strip()
    excerpt = text()
    content = excerpt.read_text()

    ours, theirs = our_perplexity(original, excerpt), llama_cpp_perplexity(original, content)
    yield Row("the original, Q4_1, not ours", ["yes", "", *shown(ours, theirs)], True, [])

    for setting, (bits, group) in SETTINGS.items():
        checkpoint, exported = WORK / "smollm2", WORK / "smollm2.gguf"
        options = ["--bits", bits, "--group-size", group, "--nsamples", 4, "--seqlen", 128, "--overwrite"]
        try:
            gptq("quantize", original, "--output", checkpoint, *options)
            gptq("convert", checkpoint, "--to", "gguf", "--output", exported, "--overwrite")
            equal = same_weights(exported, checkpoint)
            ours, theirs = our_perplexity(checkpoint, excerpt), llama_cpp_perplexity(exported, content)
        except Exception as error:  # a finding, and the other settings go on
            yield Row(setting, ["no", "", "", ""], False, [f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"])
            continue
        ok = equal and abs(theirs / ours - 1) <= PERPLEXITY_TOLERANCE
        yield Row(setting, ["yes", "yes" if equal else "no", *shown(ours, theirs)], ok, [])


def shown(ours, theirs):
    return [f"{ours:.3f}", f"{theirs:.3f} ({theirs / ours - 1:+.2%})"]

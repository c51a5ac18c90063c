"""What `gptq quantize` writes opens in GPTQModel itself, with overrides for single modules."""

import json

import torch
from gptqmodel import BACKEND, GPTQModel
from tools import WORK, compare_exactly, difference, gptq, our_logits, row, tiny_llama, tokens

HEAD = ["setting", "opens", "weights bit-equal", "logits, f32 arithmetic", "logits, their kernel"]

DYNAMIC = {r"+:.*\.v_proj": {"bits": 8, "group_size": 64}, r"+:.*\.down_proj": {"bits": 3, "sym": False}}
SETTINGS = {
    "4 bits, sym, group 128, `gptq`": (["--bits", 4], {}),
    "4 bits, asym, group 32, desc_act, `gptq_v2`": (
        ["--bits", 4, "--group-size", 32, "--no-sym", "--desc-act", "--format", "gptq_v2"],
        {},
    ),
    "4 bits, sym, group 32, `gptq_v2`, dynamic: v_proj 8 bits, group 64; down_proj 3 bits, asym": (
        ["--bits", 4, "--group-size", 32, "--format", "gptq_v2"],
        DYNAMIC,
    ),
    "`--target-bpw 4.5`, sym, group 32, `gptq_v2`": (["--target-bpw", 4.5, "--group-size", 32, "--format", "gptq_v2"], {}),
}


def check(source, options, dynamic):
    """Quantizes, opens, compares; returns (weights equal, f32 difference, kernel difference)."""
    quantized, rules = WORK / "quantized", WORK / "dynamic.json"
    rules.write_text(json.dumps(dynamic))
    overrides = ["--dynamic", rules] if dynamic else []
    small = ["--nsamples", 4, "--seqlen", 32]
    gptq("quantize", source, "--output", quantized, "--overwrite", *small, *options, *overrides)
    model = GPTQModel.load(str(quantized), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    with torch.no_grad():
        kernel = difference(our_logits(quantized), model(tokens()).logits)
    return *compare_exactly(model, quantized, source), kernel


def rows():
    source = tiny_llama(torch.float16)
    for setting, (options, dynamic) in SETTINGS.items():
        yield row(setting, check, source, options, dynamic)

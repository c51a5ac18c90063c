"""What GPTQModel writes opens in gptq and gives GPTQModel's logits."""

import shutil

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from tools import WORK, compare_exactly, difference, our_logits, row, tiny_llama, tokens

HEAD = ["setting", "opens", "weights bit-equal", "logits, f32 arithmetic", "logits, their kernel"]

SETTINGS = {
    "4 bits, sym, group 32, `gptq`, defaults (GAR)": dict(bits=4, group_size=32),
    "4 bits, asym, group 128, desc_act, `gptq_v2`": dict(
        bits=4, group_size=128, sym=False, desc_act=True, act_group_aware=False, format="gptq_v2"
    ),
    "4 bits, asym, group 32, `gptq`": dict(bits=4, group_size=32, sym=False),
    "3 bits, asym, group 32, `gptq`": dict(bits=3, group_size=32, sym=False),
    "2 bits, sym, group 32, desc_act, `gptq`": dict(bits=2, group_size=32, desc_act=True, act_group_aware=False),
    "8 bits, sym, group -1, `gptq`": dict(bits=8, group_size=-1, act_group_aware=False),
    "4 bits, sym, group 32, dynamic: v_proj 8 bits, group 64": dict(
        bits=4, group_size=32, dynamic={r"+:.*\.v_proj": {"bits": 8, "group_size": 64}}
    ),
    "4 bits, asym, group 32, AWQ (`gemm`)": dict(
        bits=4, group_size=32, sym=False, quant_method="awq", format="gemm"
    ),
}


def check(source, options):
    """Quantizes by GPTQModel, opens the result in both; returns (weights equal, f32 difference, kernel difference)."""
    written = WORK / "gptqmodel"
    shutil.rmtree(written, ignore_errors=True)
    noise = torch.Generator().manual_seed(2)
    calibration = [torch.randint(3, 256, (64,), generator=noise).tolist() for _ in range(16)]
    model = GPTQModel.load(str(source), QuantizeConfig(**options), device="cpu", dtype=torch.float16)
    model.quantize(calibration, batch_size=1)
    model.save(str(written))

    backend = BACKEND.TORCH_AWQ if options.get("quant_method") == "awq" else BACKEND.TORCH
    model = GPTQModel.load(str(written), device="cpu", backend=backend, dtype=torch.float16).model
    with torch.no_grad():
        kernel = difference(our_logits(written), model(tokens()).logits)
    return *compare_exactly(model, written, source), kernel


def rows():
    source = tiny_llama(torch.float16)
    for setting, options in SETTINGS.items():
        yield row(setting, check, source, options)

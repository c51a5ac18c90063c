"""What GPTQModel writes opens in gptq and gives GPTQModel's logits."""

import shutil

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from tools import EXACT_TOLERANCE, KERNEL_TOLERANCE, WORK, Row, compare_exactly, difference, our_logits, tiny_llama, tokens

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
}


def check(source, options):
    """Quantizes by GPTQModel, opens the result in both; returns (weights equal, f32 difference, kernel difference)."""
    written = WORK / "gptqmodel"
    shutil.rmtree(written, ignore_errors=True)
    noise = torch.Generator().manual_seed(2)
    calibration = [torch.randint(3, 256, (64,), generator=noise).tolist() for _ in range(16)]
    model = GPTQModel.load(str(source), QuantizeConfig(**options), device="cpu")
    model.quantize(calibration, batch_size=1)
    model.save(str(written))

    model = GPTQModel.load(str(written), device="cpu", backend=BACKEND.TORCH).model
    with torch.no_grad():
        kernel = difference(our_logits(written), model(tokens()).logits)
    return *compare_exactly(model, written, source), kernel


def rows():
    source = tiny_llama(torch.float16)
    for setting, options in SETTINGS.items():
        try:
            equal, exact, kernel = check(source, options)
        except Exception as error:  # a finding, and the other settings go on
            failure = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            yield Row(setting, ["no", "", "", ""], False, [failure])
            continue
        ok = equal and exact <= EXACT_TOLERANCE and kernel <= KERNEL_TOLERANCE[torch.float16]
        yield Row(setting, ["yes", "yes" if equal else "no", f"{exact:.1e}", f"{kernel:.1e}"], ok, [])

"""What `gptq quantize` writes opens in transformers (by optimum and GPTQModel's kernels) and gives our logits."""

import torch
from tools import EXACT_TOLERANCE, KERNEL_TOLERANCE, WORK, Row, compare_exactly, difference, gptq, our_logits, tiny_llama, tokens
from transformers import AutoModelForCausalLM, GPTQConfig

HEAD = ["setting", "opens", "weights bit-equal", "logits, f32 arithmetic", "logits, their kernel", "kernel chosen"]

ORDERS = {
    "left to right": ["--no-act-group-aware"],
    "GAR": ["--act-group-aware"],
    "desc_act": ["--desc-act"],
    "desc_act static": ["--desc-act", "--static-groups"],
}
EVERY_LAYOUT = [
    *((32, order) for order in ORDERS),
    *((128, order) for order in ("left to right", "GAR", "desc_act")),
    *((-1, order) for order in ("left to right", "desc_act")),
]
# v2 differs in the zero points alone.
SOME_LAYOUTS = [(32, "GAR"), (32, "desc_act"), (-1, "left to right")]


def settings():
    """(source dtype, bits, symmetric, format, layouts)"""
    for bits in (4, 8, 3, 2):
        for sym in (True, False):
            yield torch.float16, bits, sym, "gptq", EVERY_LAYOUT
            yield torch.float16, bits, sym, "gptq_v2", SOME_LAYOUTS
    yield torch.bfloat16, 4, True, "gptq", SOME_LAYOUTS
    yield torch.bfloat16, 3, False, "gptq_v2", SOME_LAYOUTS


def load(quantized, dtype, backend):
    config = GPTQConfig(bits=4, backend=backend)  # all but the backend is taken from the checkpoint
    return AutoModelForCausalLM.from_pretrained(quantized, dtype=dtype, device_map="cpu", quantization_config=config)


def check(source, dtype, bits, sym, group, options):
    """Quantizes, opens, compares; returns (kernels, weights equal, f32 difference, kernel difference)."""
    quantized = WORK / "quantized"
    layout = ["--bits", bits, "--group-size", group, "--sym" if sym else "--no-sym"]
    small = ["--nsamples", 4, "--seqlen", 32]
    gptq("quantize", source, "--output", quantized, "--overwrite", *small, *layout, *options)
    # GPTQModel chooses the kernel, as for a user, but where its choice (TorchFusedLinear) takes every zero point for 8.
    model = load(quantized, dtype, "torch" if (bits, sym, group) == (4, False, -1) else "auto")
    with torch.no_grad():
        kernel = difference(our_logits(quantized), model(tokens()).logits)
    kernels = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}
    model = load(quantized, torch.float16, "torch")
    return kernels, *compare_exactly(model, quantized, source), kernel


def rows():
    sources = {dtype: tiny_llama(dtype) for dtype in (torch.float16, torch.bfloat16)}
    for dtype, bits, sym, format, layouts in settings():
        opened, same, worst_exact, worst_kernel, chosen, failures = 0, 0, 0.0, 0.0, set(), []
        for group, order in layouts:
            options = ["--format", format, *ORDERS[order]]
            try:
                kernels, equal, exact, kernel = check(sources[dtype], dtype, bits, sym, group, options)
            except Exception as error:  # any failure of any of the tools is a finding, and the other settings go on
                failures.append(f"group {group}, {order}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
                continue
            opened, same, chosen = opened + 1, same + equal, chosen | kernels
            worst_exact, worst_kernel = max(worst_exact, exact), max(worst_kernel, kernel)
            if not equal or exact > EXACT_TOLERANCE or kernel > KERNEL_TOLERANCE[dtype]:
                failures.append(f"group {group}, {order}: equal {equal}, f32 {exact:.1e}, kernel {kernel:.1e}")
        source = str(dtype).removeprefix("torch.")
        setting = f"{bits} bits, {'sym' if sym else 'asym'}, `{format}`, {source}"
        of = len(layouts)
        found = [f"{opened}/{of}", f"{same}/{of}", f"{worst_exact:.1e}", f"{worst_kernel:.1e}", ", ".join(sorted(chosen))]
        yield Row(setting, found, not failures, failures)

"""A tiny random model of every family: what `gptq quantize` writes opens in transformers and gives our logits.

The other tool's dequantized weights, put into the float model, have to give what `gptq logits` gives of the quantized one,
so that a name, a transposition or a bias that the two understand differently shows.
"""

import json

import torch
import transformers
from families import FAMILIES
from safetensors import safe_open
from tools import EXACT_TOLERANCE, WORK, Row, byte_tokenizer, gptq, our_weights, tokens
from transformers import GPTQConfig
from variants import build, compare

HEAD = ["modules", "weights bit-equal", "logits, f32 arithmetic", "reload equal"]
OPTIONS = ["--bits", 4, "--group-size", 32, "--seqlen", 32, "--nsamples", 8]
# Groups of 32 have to divide every input: experts and heads wider than those of variants.py.
WIDER = {
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {"moe_intermediate_size": 64},
}


def calibration():
    """Rows of token ids, which decoders join and encoders take one by one."""
    noise = torch.Generator().manual_seed(3)
    rows = (torch.randint(3, 256, (32,), generator=noise).tolist() for _ in range(16))
    path = WORK / "every-family.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def logits_of(directory, name, found):
    """What `gptq logits` gives, compared with `found`."""
    error, message = compare(directory, {"input_ids": tokens()}, {name: found})
    if error is None:
        raise RuntimeError(message)
    return error


def check(model_type, texts):
    source, quantized = WORK / "every-family", WORK / "every-family-quantized"
    model = build(model_type, WIDER.get(model_type, {}), 0)
    model.save_pretrained(source)
    byte_tokenizer(source)
    gptq("quantize", source, "--output", quantized, "--overwrite", "--calibration", texts, *OPTIONS)
    with safe_open(quantized / "model.safetensors", "pt") as file:
        asked = {name.removesuffix(".qweight") for name in file.keys() if name.endswith(".qweight")}

    # What we read is what was saved: our dequantized copy, in f16, gives nearly the same logits.
    plain = WORK / "dequantized"
    gptq("convert", quantized, "--to", "hf", "--output", plain, "--overwrite")
    task = getattr(transformers, FAMILIES[model_type].get("class", "AutoModelForCausalLM"))
    reference = task.from_pretrained(plain, dtype=torch.float32, attn_implementation=model.config._attn_implementation)
    with torch.no_grad():
        reload = logits_of(quantized, "logits", reference(tokens()).logits)

    config = GPTQConfig(bits=4, backend="torch")
    opened = task.from_pretrained(quantized, dtype=torch.float16, device_map="cpu", quantization_config=config)
    linears = {name: module for name, module in opened.named_modules() if hasattr(module, "qweight")}
    if set(linears) != asked:
        odd = sorted(set(linears) ^ asked)
        raise RuntimeError(f"{len(linears)} of {len(asked)} modules are quantized there; {odd[0]} differs")
    ours, equal, state = our_weights(quantized), True, dict(reference.state_dict())
    for name, linear in linears.items():
        linear.scales = linear.scales.float()
        exact = linear.dequantize_weight().T.contiguous()
        exact = exact.T.contiguous() if state[f"{name}.weight"].shape != exact.shape or is_conv1d(reference, name) else exact
        equal &= torch.equal(ours[f"{name}.weight"], exact.half())
        state[f"{name}.weight"] = exact
    reference.load_state_dict(state)
    with torch.no_grad():
        exact = logits_of(quantized, "logits", reference(tokens()).logits)
    return len(linears), equal, exact, reload


def is_conv1d(model, name):
    return type(model.get_submodule(name)).__name__ == "Conv1D"


def rows():
    texts = calibration()
    for model_type in FAMILIES:
        try:
            count, equal, exact, reload = check(model_type, texts)
        except Exception as error:  # whatever a tool raises is a finding, and the other families go on
            line = (str(error).splitlines() or [""])[0][:240]
            yield Row(model_type, ["", "", "", ""], False, [f"{type(error).__name__}: {line}"])
            continue
        ok = equal and exact <= EXACT_TOLERANCE and reload <= 1e-2
        yield Row(model_type, [str(count), "yes" if equal else "no", f"{exact:.1e}", f"{reload:.1e}"], ok, [])

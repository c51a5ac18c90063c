"""A tiny random model of every family, both ways: what `gptq quantize` writes opens in transformers and in GPTQModel, what
GPTQModel writes of the same model opens in gptq, and the logits are equal.

A family fails unless ours opens in at least one of the tools (or NOWHERE says why not), and in both where GPTQModel's own
checkpoint does; the messages of what does not open are listed below the table. `every_family.py TOOL FAMILY DIR` opens one
checkpoint in a process of its own.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import torch
import transformers
from families import FAMILIES
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.models import MODEL_MAP
from safetensors import safe_open
from tools import EXACT_TOLERANCE, WORK, Row, byte_tokenizer, difference, gptq, our_logits, our_weights, tokens
from transformers import GPTQConfig
from variants import build

HEAD = [
    "family", "modules", "reload equal", "ours in transformers", "ours in GPTQModel", "GPTQModel's in transformers",
    "GPTQModel's in gptq",
]  # fmt: skip
OPTIONS = ["--bits", 4, "--group-size", 32, "--seqlen", 32, "--nsamples", 8]
# Of a model whose weights were rounded to f16.
RELOAD_TOLERANCE = 1e-2
# GPTQModel makes the table of sines in f16.
SINES_IN_F16 = {"gptj": 1e-3, "codegen": 1e-3}
# Groups of 32 have to divide every input: experts wider than those of families.py.
WIDER = {
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {"moe_intermediate_size": 64},
}
# What opens in neither tool, and why that is not mended here.
NOWHERE = {
    "mixtral": (
        "The names that the model was published with (`block_sparse_moe.experts.0.w1`), which engines and transformers 4 read, "
        "are kept; GPTQModel 7 reads and writes `mlp.experts.0.gate_proj` alone, transformers 5 neither."
    ),
    "modernbert": "transformers initialises the weights of its linears, which GPTQModel's kernels do not have, before it reads any.",
}


# Families whose code is with their authors: transformers cannot build them, GPTQModel only names their linears.
NAMES_ONLY = ["qwen", "baichuan", "internlm2", "chatglm"]


class Quoted(Exception):
    """What a tool said in another process, with the kind of its error."""


def first_line(error):
    """A tool's message in one line of a table."""
    lines = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, Quoted) else f"{type(error).__name__}: "
    # No path of this machine.
    return re.sub(r"'/[^']*/", "'", f"{kind}{lines[0]}")[:240].replace("|", "/")


def token_rows(count):
    """Rows of 32 token ids."""
    noise = torch.Generator().manual_seed(3)
    return [torch.randint(3, 256, (32,), generator=noise).tolist() for _ in range(count)]


def calibration():
    """Rows of token ids, which decoders join and encoders take one by one."""
    path = WORK / "every-family.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in token_rows(16)))
    return path


def class_of(model_type):
    return getattr(transformers, FAMILIES[model_type].get("class", "AutoModelForCausalLM"))


def attention_of(model_type):
    return FAMILIES[model_type].get("attention", "eager")


def by_transformers(model_type, directory):
    config = GPTQConfig(bits=4, backend="torch")  # all but the backend is taken from the checkpoint
    return class_of(model_type).from_pretrained(
        directory, dtype=torch.float32, device_map="cpu", quantization_config=config, attn_implementation=attention_of(model_type)
    )


def by_gptqmodel(model_type, directory):
    opened = GPTQModel.load(
        str(directory), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16, attn_implementation=attention_of(model_type)
    )
    return opened.model.float()


TOOLS = {"transformers": by_transformers, "GPTQModel": by_gptqmodel}


def quantized_modules(directory):
    """The modules of a checkpoint that have a qweight."""
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name.removesuffix(".qweight") for name in file.keys() if name.endswith(".qweight")}


def opened(tool, model_type, directory):
    """Difference of the logits in f32 arithmetic, after the modules and their dequantized weights proved to be ours."""
    expected, weights, asked = our_logits(directory), our_weights(directory), quantized_modules(directory)
    model = TOOLS[tool](model_type, directory)
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    if set(linears) != asked:
        odd = sorted(set(linears) ^ asked)[0]
        raise RuntimeError(f"{len(set(linears) & asked)} of {len(asked)} modules are quantized there, not {odd}")
    for name, linear in linears.items():
        linear.scales = linear.scales.float()  # else the product is rounded to f16
        exact, ours = linear.dequantize_weight().half(), weights[f"{name}.weight"]
        # Conv1D stores [in, out], the others [out, in].
        if not any(ours.shape == weight.shape and torch.equal(ours, weight) for weight in (exact, exact.T)):
            raise RuntimeError(f"the weights of {name} differ")
    with torch.no_grad():
        error = difference(expected, model(tokens()).logits)
    limit = SINES_IN_F16.get(model_type, EXACT_TOLERANCE) if tool == "GPTQModel" else EXACT_TOLERANCE
    if not error <= limit:
        raise RuntimeError(f"the logits differ by {error:.1e}")
    return error


def attempt(open_one, *arguments):
    """(cell, "") or ("no", message)"""
    try:
        return f"{open_one(*arguments):.1e}", ""
    except Exception as error:  # whatever a tool raises is a finding, and the other families go on
        return "no", first_line(error)


def afresh(tool, model_type, directory):
    """`opened` in another process."""
    command = [sys.executable, __file__, tool, model_type, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    answer = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode != 0:
        raise Quoted((done.stderr.strip().splitlines() or [""])[-1])
    return float(answer)


def theirs(model_type, source):
    """GPTQModel's own checkpoint of the same model."""
    written = WORK / "every-family-gptqmodel"
    shutil.rmtree(written, ignore_errors=True)
    model = GPTQModel.load(str(source), QuantizeConfig(bits=4, group_size=32), device="cpu", dtype=torch.float16)
    model.quantize(token_rows(16), batch_size=1)
    model.save(str(written))
    return written


def reloaded(model_type, quantized):
    """Difference from the f32 model of our dequantized weights, which are rounded to f16 there."""
    expected = our_logits(quantized)
    our_weights(quantized)
    plain = class_of(model_type).from_pretrained(
        WORK / "dequantized", dtype=torch.float32, attn_implementation=attention_of(model_type)
    )
    with torch.no_grad():
        return difference(expected, plain(tokens()).logits)


def check(model_type, texts):
    """The row of one family."""
    source, quantized = WORK / "every-family", WORK / "every-family-quantized"
    shutil.rmtree(source, ignore_errors=True)
    build(model_type, WIDER.get(model_type, {}), 0).half().save_pretrained(source)
    byte_tokenizer(source)
    gptq("quantize", source, "--output", quantized, "--overwrite", "--calibration", texts, *OPTIONS)
    reload = reloaded(model_type, quantized)
    ours = {tool: attempt(opened, tool, model_type, quantized) for tool in TOOLS}
    found = [str(len(quantized_modules(quantized))), f"{reload:.1e}", *(cell for cell, _ in ours.values())]
    refused = {tool: message for tool, (_, message) in ours.items() if message}
    ok = reload <= RELOAD_TOLERANCE and (len(refused) < len(TOOLS) or model_type in NOWHERE)
    notes = [f"not in {tool}: {message}" for tool, message in refused.items()]
    if len(refused) == len(TOOLS):
        notes.append(NOWHERE.get(model_type, "nothing opens it"))
    try:
        written = theirs(model_type, source)
    except Exception as error:
        return Row(model_type, [*found, "none", "none"], ok, [*notes, f"GPTQModel makes no checkpoint of it: {first_line(error)}"])
    # GPTQModel has changed transformers' classes of this family by now, if they have experts.
    changed = "num_experts_per_tok" in FAMILIES[model_type]["base"]
    there, their_message = attempt(afresh if changed else opened, "transformers", model_type, written)
    here, our_message = attempt(opened, "GPTQModel", model_type, written)
    if our_message:
        notes.append(f"GPTQModel's not in gptq: {our_message}")
    if their_message:
        notes.append(f"GPTQModel's not in transformers: {their_message}")
    # What GPTQModel writes and transformers opens, both have to open of ours.
    ok &= not our_message and (bool(their_message) or not refused)
    return Row(model_type, [*found, there, here], ok, notes)


def check_names(model_type):
    """The row of a family that neither tool can build: its linears are those that GPTQModel's definition names."""
    table = tomllib.loads(gptq("families", model_type))
    stages = table["stages"].values()
    flat = [name for stage in stages for name in (stage if isinstance(stage, list) else [stage]) if isinstance(name, str)]
    blocks = f"{table['modules']['prefix']}{table['modules']['blocks']}"
    *path, _, block = MODEL_MAP[model_type].module_tree
    there = {f"{parent}.{child.split(':')[0]}" for parent, children in block.items() for child in children if ":!" not in child}
    note = "transformers does not contain the family; its blocks and linears have the names of GPTQModel's definition"
    if (set(flat), blocks) != (there, ".".join(path)):
        return Row(model_type, [""] * (len(HEAD) - 1), False, [f"{sorted(set(flat) ^ there)}, {blocks} and {path} differ"])
    return Row(model_type, ["names alone", *[""] * (len(HEAD) - 2)], True, [note])


def rows():
    texts = calibration()
    for model_type in FAMILIES:
        if model_type in NAMES_ONLY:
            continue
        try:
            yield check(model_type, texts)
        except Exception as error:  # ours, or transformers without any quantization
            yield Row(model_type, [""] * (len(HEAD) - 1), False, [first_line(error)])
    yield from map(check_names, NAMES_ONLY)


if __name__ == "__main__":
    tool, model_type, directory = sys.argv[1:]
    print(opened(tool, model_type, pathlib.Path(directory)))

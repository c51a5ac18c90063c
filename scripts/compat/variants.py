"""Random tiny models over the variants of every family: what `gptq logits` computes against transformers in f32.

Needs no GPTQModel. Arguments name families, all by default: `variants.py [--seed N] [--count N] [FAMILY ...]`. Of each
family every listed variant is tried by itself and then random combinations, with three config.json: as transformers 5
writes it, as transformers 4 did where it has rope parameters, and without the keys that have their default value. Prints a table; fails if a logit deviates by more than 2e-4 of
the largest one or a variant that transformers runs is refused without being listed in REFUSED.
"""

import argparse
import json
import math
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from families import FAMILIES, REFUSED
from safetensors.torch import load_file, save_file

transformers.utils.logging.disable_progress_bar()
ROOT = pathlib.Path(__file__).resolve().parents[2]
GPTQ = pathlib.Path(os.environ.get("GPTQ_BINARY", ROOT / "target" / "release" / "gptq")).resolve()
TOLERANCE = 2e-4
ROWS, LENGTH = 2, 40
# Where each family's transformers-4 config had the rope base and the rotated share.
OLD_ROPE = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
}


def randomize(model, generator):
    """Weights that make every part of the model matter: norms near their neutral value, biases away from zero."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            kind = type(module).__name__
            if "Embedding" in kind:
                value = 0.5 * noise
            elif parameter.ndim >= 2:
                fan_in = parameter.shape[0] if "Conv1D" in kind else parameter.shape[-1]
                value = 0.2 * math.sqrt(64 / max(fan_in, 64)) * noise
            elif name == "weight" or name.endswith(".weight"):
                neutral = 0.0 if kind.startswith("Gemma") else 1.0
                value = neutral + 0.1 * noise
            else:
                value = 0.1 * noise
            parameter.data.copy_(value)


def old_spelling(config):
    """The config as transformers 4 wrote it: the rope's keys beside the others."""
    config = dict(config)
    rope = config.pop("rope_parameters", None)
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return None
    base, share = OLD_ROPE.get(config["model_type"], ("rope_theta", "partial_rotary_factor"))
    rope = dict(rope)
    config[base] = rope.pop("rope_theta", 10000.0)
    if "partial_rotary_factor" in rope:
        config[share] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type", "default")
    config["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None
    config["torch_dtype"] = config.pop("dtype", "float32")
    return config


def build(model_type, changes, seed):
    """A random model; None where transformers cannot build it."""
    entry = FAMILIES[model_type]
    arguments = {**entry["base"], **changes}
    task = arguments.pop("__class", entry.get("class", "AutoModelForCausalLM"))
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(entry.get("source", model_type), **arguments)
    config._attn_implementation = entry.get("attention", "eager")
    model = getattr(transformers, task).from_config(config, attn_implementation=config._attn_implementation)
    randomize(model, torch.Generator().manual_seed(seed))
    return model.eval().float()


def save(model_type, model, directory):
    """Writes the checkpoint."""
    model.save_pretrained(directory)
    if layout := FAMILIES[model_type].get("layout"):
        layout.rewrite(directory)


def ask(model, masked, seed):
    """Inputs, and what transformers makes of them."""
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.vocab_size
    ids = torch.randint(3, vocab, (ROWS, LENGTH), generator=generator)
    inputs = {"input_ids": ids}
    if masked:
        mask = torch.ones_like(ids)
        mask[1, LENGTH - 11 :] = 0
        if seed % 2 and FAMILIES[model.config.model_type].get("masked"):  # decoders differ in how they count padding
            mask[0, :7] = 0
        ids[mask == 0] = getattr(model.config, "pad_token_id", None) or 0
        inputs["attention_mask"] = mask
        if getattr(model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = (torch.arange(LENGTH) >= 15).long().expand(ROWS, -1).contiguous()
    with torch.no_grad():
        answer = model(**inputs)
    found = {name: answer[name] for name in ("logits", "last_hidden_state", "pooler_output") if answer.get(name) is not None}
    if "attention_mask" in inputs and not inputs["attention_mask"][:, 0].all():
        found.pop("pooler_output", None)  # of a padding token there, of the first real one here
    return inputs, found


def compare(directory, inputs, expected):
    """Largest difference relative to the largest expected value; the message where ours refuses."""
    asked, answered = directory / "asked.safetensors", directory / "answered.safetensors"
    save_file(inputs, asked)
    command = [GPTQ, "logits", directory, "--input", asked, "--output", answered, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return None, done.stderr.strip()
    ours = load_file(answered)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    worst = 0.0
    for name, theirs in expected.items():
        if name not in ours:
            return None, f"no {name}"
        a, b = (ours[name], theirs) if name == "pooler_output" else (ours[name][real], theirs[real])
        difference = ((a - b).abs().max() / b.abs().max()).item()
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst, ""


def variants(entry, count, noise):
    """Each axis' values by themselves, then random combinations."""
    axes = entry["axes"]
    yield {}
    for axis in axes:
        yield from axis[1:]
    for _ in range(count):
        combined = {}
        for axis in axes:
            combined.update(noise.choice(axis))
        yield combined


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--keep", action="store_true", help="keep models that fail")
    options = parser.parse_args()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, seed {options.seed}\n")
    print("| family | models | configs | refused as documented | not valid in transformers | largest error | verdict |")
    print("|---|---|---|---|---|---|---|")
    work = pathlib.Path(tempfile.mkdtemp(prefix="gptq-variants-"))
    failed = False
    for model_type in options.families or FAMILIES:
        entry, noise = FAMILIES[model_type], random.Random(options.seed)
        models = configs = refused = invalid = 0
        worst, complaints = 0.0, []
        for index, changes in enumerate(variants(entry, options.count, noise)):
            directory = work / f"{model_type}-{index}"
            try:
                model = build(model_type, changes, options.seed + index)
                # Scaling that depends on the length depends on the padded length in transformers, on each sequence's own here.
                padded = index % 4 == 3 and not any(name in str(changes) for name in ("dynamic", "longrope"))
                inputs, expected = ask(model, entry.get("masked", padded), options.seed + index)
                save(model_type, model, directory)
            except Exception as error:  # the combination is not one that transformers runs
                invalid += 1
                if os.environ.get("VERBOSE"):
                    print(changes, type(error).__name__, str(error).splitlines()[:1], file=sys.stderr)
                continue
            models += 1
            new = json.loads((directory / "config.json").read_text())
            short = {**model.config.to_diff_dict(), "model_type": model_type}
            short.pop("_attn_implementation", None)
            if "layout" in entry:
                short = entry["layout"].short(new)
            for spelling, config in (("5", new), ("4", old_spelling(new)), ("short", short)):
                if config is None:
                    continue
                configs += 1
                (directory / "config.json").write_text(json.dumps(config, default=str))
                error, message = compare(directory, inputs, expected)
                if error is None and any(part in message for part in REFUSED.get(model_type, ())):
                    refused += 1
                elif error is None:
                    complaints.append(f"{changes} (spelling {spelling}): {message}")
                else:
                    worst = max(worst, error)
                    if error > TOLERANCE:
                        complaints.append(f"{changes} (spelling {spelling}): {error:.1e}")
            if not (complaints and options.keep):
                shutil.rmtree(directory)
        verdict = "FAILS" if complaints else "ok"
        failed |= bool(complaints)
        print(f"| {model_type} | {models} | {configs} | {refused} | {invalid} | {worst:.1e} | {verdict} |", flush=True)
        for complaint in complaints:
            print(f"    {complaint}", flush=True)
    if not options.keep:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

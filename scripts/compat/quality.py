"""`scripts/quality.sh`: GPTQModel and gptq on the same model and the same calibration tokens.

Both quantize in a process of its own, each with its defaults (groups of 64, sym); `gptq eval` measures what both wrote.
Times: GPTQModel's from the call of `quantize` to the end of `save`, gptq's from start to end of the process.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

from tokenizers import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORK = ROOT / ".demo" / "quality"
GPTQ = pathlib.Path(os.environ.get("GPTQ_BINARY", ROOT / "target" / "release" / "gptq")).resolve()
GROUP_SIZE = 64


def windows(tokenizer, text, nsamples, seqlen):
    """The windows that `gptq quantize --seed 0` draws from `text`: offsets from SplitMix64, the high half of a product."""
    ids = Tokenizer.from_file(str(tokenizer)).encode(text.read_text(), add_special_tokens=False).ids
    state, bound, drawn = 0, len(ids) - seqlen, []
    for _ in range(nsamples):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        offset = (mixed ^ mixed >> 31) * bound >> 64
        drawn.append(ids[offset : offset + seqlen])
    return drawn


def fingerprint(drawn):
    """FNV-1a of the windows, as in `calibration.fingerprint` of our report."""
    hashed = 0xCBF29CE484222325
    for window in drawn:
        for word in [len(window), *window]:
            for byte in word.to_bytes(4, "little"):
                hashed = (hashed ^ byte) * 0x100000001B3 % 2**64
    return f"{hashed:016x}"


def by_gptqmodel(source, bits, drawn, output):
    """Runs in a process of its own; prints seconds and peak bytes as JSON."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=bits, group_size=GROUP_SIZE)
    model = GPTQModel.load(str(source), config, device="cpu", dtype=torch.float16)
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in drawn]
    start = time.monotonic()
    model.quantize(rows, batch_size=1)
    model.save(str(output))
    seconds = time.monotonic() - start
    return {"seconds": seconds, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def gptq(*arguments):
    done = subprocess.run([str(GPTQ), *map(str, arguments), "--quiet", "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def measured_on(options, model, text):
    """Perplexity and divergence from the original."""
    cut = ["--max-windows", options.max_windows]
    measured = gptq("eval", model, "--perplexity", text, "--reference", options.model, *cut)
    return f"{measured['perplexity']:.3f} / {measured['kl_mean']:.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / ".demo" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--calibration", type=pathlib.Path, required=True, help="a text")
    parser.add_argument("--eval", type=pathlib.Path, nargs="+", required=True, help="texts")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=12)
    parser.add_argument("--only-gptqmodel", type=int, metavar="BITS", help=argparse.SUPPRESS)
    options = parser.parse_args()

    source = WORK / "float"
    if not options.only_gptqmodel:
        WORK.mkdir(parents=True, exist_ok=True)
        gptq("convert", options.model, "--to", "hf", "--output", source, "--overwrite")
    drawn = windows(source / "tokenizer.json", options.calibration, options.nsamples, options.seqlen)
    if options.only_gptqmodel:
        os.chdir(WORK)  # GPTQModel leaves a folder of logs
        measured = by_gptqmodel(source, options.only_gptqmodel, drawn, WORK / "gptqmodel")
        (WORK / "gptqmodel.json").write_text(json.dumps(measured))
        return

    print("| bits | tool |", " | ".join(text.stem for text in options.eval), "| seconds | MiB |")
    print("|---" * (len(options.eval) + 4) + "|")

    def row(bits, tool, model, run):
        values = " | ".join(measured_on(options, model, text) for text in options.eval)
        cost = f"{run['seconds']:.1f} | {run['peak_rss_bytes'] / 2**20:.0f}" if run else "|"
        print(f"| {bits} | {tool} | {values} | {cost} |", flush=True)

    row("", "original", options.model, None)
    for bits in options.bits:
        subprocess.run([sys.executable, *sys.argv, "--only-gptqmodel", str(bits)], stdout=sys.stderr, check=True)
        row(bits, "GPTQModel", WORK / "gptqmodel", json.loads((WORK / "gptqmodel.json").read_text()))
        tokens = ["--calibration", options.calibration, "--nsamples", options.nsamples, "--seqlen", options.seqlen]
        start = time.monotonic()
        ours = gptq(
            "quantize", options.model, "--output", WORK / "gptq", "--overwrite",
            "--bits", bits, "--group-size", GROUP_SIZE, *tokens,
        )  # fmt: skip
        seconds = time.monotonic() - start
        assert ours["calibration"]["fingerprint"] == fingerprint(drawn), "the tools were given different tokens"
        row(bits, "gptq", WORK / "gptq", {**ours, "seconds": seconds})


main()

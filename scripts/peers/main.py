"""Runs gptq, llama.cpp and OpenVINO in turn on the same shapes and prints medians side by side."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import gguf

import random_gguf
from shapes import SHAPES

HERE = Path(__file__).parent
FIGURES = {"prefill": "prefill tok/s", "decode": "decode tok/s", "batch": "decode tok/s, batch"}


def run(command: list[str]) -> dict | None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"FAILED: {' '.join(command)}\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1] if command[0] == sys.executable else done.stdout)


def gptq(shape: str, bits: int, args: argparse.Namespace, more: list[str]) -> dict | None:
    group = 128 if SHAPES[shape].hidden % 128 == 0 else 64
    base = [os.environ["GPTQ_BINARY"], "bench", "--quiet", "--json", "--threads", str(args.threads)]
    base += ["--synthetic", shape, "--bits", str(bits), "--group-size", str(group), *more]
    one = run([*base, "--prompt-tokens", str(args.prompt), "--new-tokens", str(args.new)])
    many = run([*base, "--prompt-tokens", "64", "--new-tokens", str(args.new), "--batch", str(args.batch)])
    if one is None or many is None:
        return None
    return {
        "prefill": one["prefill_tokens_per_second"],
        "decode": 1e3 / one["per_token_ms_p50"],
        "batch": args.batch * 1e3 / many["per_token_ms_p50"],
        "of bandwidth": one["bandwidth_fraction"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--engines", nargs="+", default=None, help="only engines whose name contains one of these")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    common = [f"--{name}={getattr(args, name)}" for name in ["threads", "prompt", "new", "batch"]]
    folder = HERE.parent.parent / ".demo" / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for shape in args.shapes:
        files = {}
        for kind in ["Q4_0", "Q8_0"]:
            files[kind] = folder / f"{shape}.{kind}.gguf"
            if not files[kind].exists():
                part = files[kind].with_suffix(".part")
                random_gguf.write(part, SHAPES[shape], gguf.GGMLQuantizationType[kind])
                part.rename(files[kind])
        llama = lambda kind: run([sys.executable, str(HERE / "llama.py"), str(files[kind]), *common])  # noqa: E731
        engines = {
            "gptq 4 bits": lambda: gptq(shape, 4, args, []),
            "gptq 4 bits, f32 activations": lambda: gptq(shape, 4, args, ["--activations", "f32"]),
            "gptq 4 bits, bf16 activations": lambda: gptq(shape, 4, args, ["--activations", "bf16"]),
            "llama.cpp Q4_0": lambda: llama("Q4_0"),
            "OpenVINO u4, linears alone": lambda: run(
                [sys.executable, str(HERE / "openvino_linears.py"), shape, *common]
            ),
            "gptq 8 bits": lambda: gptq(shape, 8, args, []),
            "llama.cpp Q8_0": lambda: llama("Q8_0"),
        }
        if args.engines:
            engines = {name: e for name, e in engines.items() if any(part in name for part in args.engines)}
        rounds = {name: [] for name in engines}
        # In turn, so that what else the machine does meets all of them.
        for number in range(args.rounds):
            for name, engine in engines.items():
                print(f"{shape}, round {number + 1}/{args.rounds}: {name}", file=sys.stderr)
                if (figures := engine()) is not None:
                    rounds[name].append(figures)
        results[shape] = {
            name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
            for name, runs in rounds.items()
            if runs
        }
    if args.json:
        print(json.dumps(results, indent=2))
        return
    for shape, engines in results.items():
        print(f"\n{shape}, {args.threads} threads, prompt {args.prompt}, batch {args.batch}, medians of {args.rounds}")
        width = max(map(len, engines), default=0)
        print(" " * width + "".join(f"{text:>22}" for text in FIGURES.values()))
        for name, figures in engines.items():
            print(f"{name:<{width}}" + "".join(f"{figures[key]:>22.1f}" for key in FIGURES))


main()

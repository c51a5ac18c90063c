#!/usr/bin/env sh
# From a downloaded GGUF to a 4-bit GPTQ checkpoint that was measured and talks. Needs a Rust
# toolchain, a C compiler and python3 with pip; takes some minutes, most of them for the build.
set -eu
cd "$(dirname "$0")/.."

bits=4
group=64
quantized=.demo/SmolLM2-135M-4bit-gptq
rounded=.demo/SmolLM2-135M-4bit-rtn
prompt="Why is the sky blue?"

# Shows a command before it runs; what it prints on stdout goes where the caller sends it.
run() {
    printf '\n$ gptq' >&2
    for word in "$@"; do
        case $word in
        *[!A-Za-z0-9_=./@,:+-]*) printf " '%s'" "$word" >&2 ;;
        *) printf ' %s' "$word" >&2 ;;
        esac
    done
    echo >&2
    target/release/gptq "$@"
}

now() {
    python3 -c 'import time; print(time.time())'
}

model=$(scripts/fetch-smollm2.sh)
echo "building (release)" >&2
cargo build --release --quiet --locked
rm -rf "$quantized" "$rounded"

run inspect "$model"
started=$(now)
run quantize "$model" --output "$quantized" --bits $bits --group-size $group \
    --calibration self --nsamples 32 --seqlen 512 --json >.demo/gptq.json
between=$(now)
run quantize "$model" --output "$rounded" --bits $bits --group-size $group --method rtn --json >.demo/rtn.json
ended=$(now)

# Text that neither run has seen: WikiText where it lies beside the checkout, else this project's own documents.
text=../shared/text/wikitext2-test.txt
if [ ! -f "$text" ]; then
    text=.demo/documents.txt
    cat README.md ARCHITECTURE.md CONTRIBUTING.md docs/*/*.md >"$text"
fi
evaluate() {
    run eval "$1" --perplexity "$text" --seqlen 512 --max-windows 16 --reference "$model" --json
}
evaluate "$quantized" >.demo/gptq-eval.json
evaluate "$rounded" >.demo/rtn-eval.json

for path in "$model" "$quantized"; do
    run generate "$path" --chat "$prompt" --temperature 0 --max-new-tokens 60
    echo
done

python3 - "$model" "$quantized" "$rounded" "$text" "$started" "$between" "$ended" <<'PYTHON'
import json, pathlib, sys

model, quantized, rounded, text = map(pathlib.Path, sys.argv[1:5])
started, between, ended = map(float, sys.argv[5:])
read = lambda name: json.loads(pathlib.Path(".demo", name).read_text())
size = lambda path: sum(f.stat().st_size for f in path.glob("*.safetensors")) / 2**20
run, evals = read("gptq.json"), [read("gptq-eval.json"), read("rtn-eval.json")]

print(f"\n4-bit GPTQ of {model.name}: {between - started:.1f} s, peak memory {run['peak_rss_bytes'] / 2**20:.0f} MiB, "
      f"{run['bits_per_weight']:.2f} bits per weight")
print(f"measured against the original on {text.name}, {evals[0]['windows']} windows of 512 tokens:\n")
print(f"{'':10}{'size MiB':>10}{'seconds':>10}{'perplexity':>13}{'KL mean':>10}{'top-1 same':>12}")
if (original := evals[0].get("reference_perplexity")) is not None:
    print(f"{'original':10}{model.stat().st_size / 2**20:>10.1f}{'':10}{original:>13.3f}")
for name, path, seconds, found in (
    ("GPTQ", quantized, between - started, evals[0]),
    ("RTN", rounded, ended - between, evals[1]),
):
    print(f"{name:10}{size(path):>10.1f}{seconds:>10.1f}{found['perplexity']:>13.3f}"
          f"{found['kl_mean']:>10.4f}{found['top1_agreement']:>11.1%}")
PYTHON

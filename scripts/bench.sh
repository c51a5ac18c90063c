#!/usr/bin/env sh
# `gptq bench` on the real model and on what `make demo` made of it.
set -eu
cd "$(dirname "$0")/.."

model=$(scripts/fetch-smollm2.sh)
cargo build --release --quiet --locked
for path in "$model" .demo/SmolLM2-135M-4bit-gptq; do
    if [ -e "$path" ]; then
        echo "== $path"
        target/release/gptq bench "$path" "$@"
    else
        echo "SKIPPED: $path is not there; run \`make demo\` first"
    fi
done

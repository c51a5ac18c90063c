#!/usr/bin/env sh
# gptq beside llama.cpp and OpenVINO on the same shapes with random weights: paired alternating runs,
# medians. Installs both into .demo/peers-venv; llama.cpp is compiled for this machine's instruction set,
# which takes a quarter of an hour once. Arguments go to scripts/peers/main.py (see --help there).
set -eu
cd "$(dirname "$0")/.."

venv=.demo/peers-venv
requirements=scripts/peers/requirements.txt
if ! cmp -s "$requirements" "$venv/installed.txt"; then
    mkdir -p .demo
    python3 -m venv "$venv"
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" "$venv/bin/pip" install --quiet --requirement "$requirements"
    cp "$requirements" "$venv/installed.txt"
fi
if [ -z "${GPTQ_BINARY:-}" ]; then
    cargo build --release --quiet --locked -p gptq-cli
    GPTQ_BINARY=target/release/gptq
fi
export GPTQ_BINARY
exec "$venv/bin/python" scripts/peers/main.py "$@"

#!/usr/bin/env sh
# The kernels for 64-bit ARM: compiled, and their tests run under emulation where that is possible.
set -eu
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu
linker=aarch64-linux-gnu-gcc

rustup target add $target >/dev/null 2>&1 || true
cargo check --locked --target $target -p gptq-compute --tests
if ! command -v $linker >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
    echo "SKIPPED: running the tests; needs $linker (gcc-aarch64-linux-gnu) and qemu-aarch64 (qemu-user)"
    exit 0
fi
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=$linker
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
cargo test --release --locked --target $target -p gptq-compute --lib

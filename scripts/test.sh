#!/usr/bin/env sh
# The tests of the workspace, after a note on what cannot be tested here.
set -eu
cd "$(dirname "$0")/.."

if [ -z "${GPTQ_SMOLLM2:-}" ] && ! fetched=$(scripts/fetch-smollm2.sh 2>&1); then
    echo "SKIPPED: tests on the real model, which could not be downloaded:"
    echo "$fetched" | tail -n 2 | sed 's/^/    /'
fi
if [ ! -d "${GPTQ_SHARED:-../shared}/fixtures" ]; then
    echo "SKIPPED: conformance tests on the shared fixtures; set GPTQ_SHARED to their directory"
fi

if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --workspace --locked
    cargo test --workspace --locked --quiet --doc
else
    cargo test --workspace --locked --quiet
fi

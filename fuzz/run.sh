#!/bin/sh
# Runs fuzz targets, each for some seconds: fuzz/run.sh [SECONDS] [TARGET]...
# Needs cargo-fuzz (cargo install cargo-fuzz) and a C++ compiler. Findings land in fuzz/artifacts.
set -eu
cd "$(dirname "$0")"
seconds=${1:-60}
[ $# -eq 0 ] || shift
# The toolchain is a stable one; coverage flags are for nightly ones.
export RUSTC_BOOTSTRAP=1
env -u RUSTC_BOOTSTRAP cargo test --quiet --manifest-path ../Cargo.toml -p hopgate-proxy --test proxy -- \
    --ignored --exact smuggling::the_rows_become_seeds_of_the_fuzz_targets
for target in ${*:-$(cargo fuzz list)}; do
    echo "== $target: $seconds s"
    cargo fuzz run --sanitizer none "$target" -- -max_total_time="$seconds" -max_len=4096 -timeout=5 -rss_limit_mb=2048
done

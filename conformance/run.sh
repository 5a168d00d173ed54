#!/usr/bin/env bash
# Runs every check of Hawker: format, lints, and all tests from unit to end to end, with real daemons in network
# namespaces. Needs root on a Debian machine with a Rust toolchain; installs the Debian packages that are missing.
#
#   sudo -E bash conformance/run.sh [--fuzz SECONDS] [--deny]
#
#   --fuzz N   fuzz each target for N seconds with a new random seed (by default 10 s with a fixed one, so that two runs of
#              the same tree agree)
#   --deny     also licences, advisories and duplicates by cargo-deny (built by cargo first, if it is not there)
#
# The last line is "N passed, N failed"; a format, lint or build error counts as one failure. The exit code is 0 only when
# nothing failed.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/common.sh

deny= fuzz_limits=(-seed=1 -max_total_time=10)
while (($# > 0)); do
    case $1 in
    --deny) deny=1 ;;
    --fuzz)
        [[ ${2-} =~ ^[1-9][0-9]*$ ]] || die "--fuzz needs a number of seconds" "example: bash conformance/run.sh --fuzz 600"
        fuzz_limits=(-max_total_time="$2")
        shift
        ;;
    *) die "unknown option $1" "usage: bash conformance/run.sh [--fuzz SECONDS] [--deny]" ;;
    esac
    shift
done

need_root
need_debian
install_missing ip=iproute2 nsenter=util-linux iptables=iptables containerd=containerd runc=runc jq=jq curl=curl \
    docker-registry=docker-registry skopeo=skopeo umoci=umoci openssl=openssl nginx=nginx-light \
    htpasswd=apache2-utils podman=podman buildah=buildah dockerd=docker.io cc=gcc c++=g++ make=make
need_namespaces
need_cargo
cargo fmt --version >/dev/null 2>&1 || die "rustfmt is missing" "Run: rustup component add rustfmt"
cargo clippy --version >/dev/null 2>&1 || die "clippy is missing" "Run: rustup component add clippy"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=0 failed=0

# step WHAT COMMAND...: one pass or one failure.
step() {
    say "$1"
    local what=$1
    shift
    if "$@"; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        say "FAILED: $what"
    fi
}

# The tests count one by one, by what cargo says at the end of each of their programs. A program that ends without saying
# so, or that never ends, is one failure.
run_tests() {
    local status=0
    timeout --kill-after=30 2400 cargo test --release --locked --workspace --no-fail-fast 2>&1 | tee "$log" || status=$?
    local counts ok bad
    counts=$(sed -n 's/^test result: .* \([0-9]*\) passed; \([0-9]*\) failed;.*/\1 \2/p' "$log")
    ok=$(awk '{ sum += $1 } END { print sum + 0 }' <<<"$counts")
    bad=$(awk '{ sum += $2 } END { print sum + 0 }' <<<"$counts")
    ((status == 0 || bad > 0)) || bad=1
    ((ok + bad > 0)) || bad=1
    passed=$((passed + ok)) failed=$((failed + bad))
}

# Fuzz one target. Inputs that break an assertion stay in fuzz/artifacts; all others are thrown away.
fuzz() {
    local target=$1 found status=0
    found=$(mktemp -d)
    cargo fuzz run --sanitizer none "$target" "$found" "fuzz/corpus/$target" -- "${fuzz_limits[@]}" -max_len=4096 \
        -verbosity=0 || status=$?
    rm -rf "$found"
    return "$status"
}

summary() { printf '\n%d passed, %d failed\n' "$passed" "$failed"; }

step "Format" cargo fmt --all --check
say "Building hawker and its benches (release)"
if ! cargo build --release --locked --workspace --bins; then
    failed=$((failed + 1))
    summary
    exit 1
fi
step "Lints" cargo clippy --release --locked --workspace --all-targets -- -D warnings
cargo machete --version >/dev/null 2>&1 || { say "Building cargo-machete" && cargo install --locked cargo-machete; }
step "Unused dependencies" cargo machete
if [[ -n $deny ]]; then
    command -v cargo-deny >/dev/null || { say "Building cargo-deny" && cargo install --locked cargo-deny; }
    step "Licences, advisories, duplicates" cargo deny check
fi
step "The image for the tests, from Debian's packages" bash deploy/image.sh small
cargo fuzz --version >/dev/null 2>&1 || { say "Building cargo-fuzz" && cargo install --locked cargo-fuzz; }
for target in fuzz/fuzz_targets/*.rs; do
    target=$(basename "$target" .rs)
    step "Fuzzing: $target" fuzz "$target"
done
say "Tests"
run_tests
summary
((failed == 0))

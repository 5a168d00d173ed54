# shellcheck shell=bash
# What Hawker's scripts share; sourced, not run. Messages go to standard error.

if [[ -t 2 ]]; then bold=$'\e[1m' plain=$'\e[0m'; else bold='' plain=''; fi
say() { printf '%s==>%s %s\n' "$bold" "$plain" "$*" >&2; }

die() {
    printf 'error: %s\n' "$1" >&2
    shift
    (($# == 0)) || printf '       %s\n' "$@" >&2
    exit 1
}

need_root() {
    ((EUID == 0)) || die "this needs root: it makes network namespaces and runs containers" "Run: sudo -E bash $0"
}

need_debian() {
    [[ -n $(command -v apt-get) && -n $(command -v dpkg) ]] \
        || die "this needs Debian (or a relative of it): apt-get and dpkg are missing here"
}

# Debian's containers often have a reduced PATH; daemons live in sbin.
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

need_cargo() {
    command -v cargo >/dev/null || PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
    command -v cargo >/dev/null || die "there is no Rust toolchain: cargo is missing" \
        "Install Rust 1.90 or newer (https://rustup.rs), then run this again."
}

need_namespaces() {
    local probe="hwkprobe$$" why
    if ! why=$(ip netns add "$probe" 2>&1); then
        die "this machine does not allow network namespaces: $why" \
            "In a container, run it with --privileged; in a sandbox, on a machine of its own."
    fi
    local cure="The kernel needs veth, bridge and sch_tbf."
    why=$(ip -n "$probe" link add br0 type bridge 2>&1 \
        && ip -n "$probe" link add veth0 type veth peer name veth1 2>&1 \
        && tc -n "$probe" qdisc add dev veth0 root tbf rate 1mbit burst 64k latency 100ms 2>&1) \
        || { ip netns del "$probe"; die "this kernel cannot make shaped links: $why" "$cure"; }
    ip netns del "$probe"
}

# apt_get ARGS: without questions, quiet unless it fails.
apt_get() {
    local log
    log=$(DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" 2>&1) && return
    printf '%s\n' "$log" >&2
    return 1
}

# Fetches the lists of packages where there are none, or none young enough to trust.
apt_lists() {
    [[ -n $(find /var/lib/apt/lists -name '*Packages*' -mtime -7 -print -quit 2>/dev/null) ]] \
        || apt_get update || die "apt-get update failed" "Is there a network, or a mirror in /etc/apt?"
}

# install_missing COMMAND=PACKAGE ...: installs the packages whose command is not there.
install_missing() {
    local pair packages=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null || packages+=("${pair#*=}")
    done
    ((${#packages[@]} == 0)) && return
    say "Installing from Debian: ${packages[*]}"
    apt_lists
    # Their services shall not start: each lab runs daemons of its own.
    local policy=/usr/sbin/policy-rc.d made=
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && made=$policy
    fi
    local install=(apt_get install -y --no-install-recommends "${packages[@]}") ok=1
    # The lists may name versions that the mirror no longer has.
    "${install[@]}" || { apt_get update && "${install[@]}"; } || ok=0
    [[ -z $made ]] || rm -f "$made"
    ((ok)) || die "could not install ${packages[*]}" "Install them by hand, then run this again."
}

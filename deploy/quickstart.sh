#!/usr/bin/env bash
# Shows Hawker at work on one Debian machine: an origin registry, a seed and several nodes, each in a network namespace of
# its own behind a link of limited rate, each node with its own containerd. All nodes pull a real image at once.
#
#   sudo -E bash deploy/quickstart.sh [--nodes N] [--rate MBIT] [--small]
#
#   --nodes N     how many nodes pull (default 4)
#   --rate MBIT   the rate of every link in each direction, in Mbit/s (default 200)
#   --small       a small image, to see quickly that everything works
#
# HAWKER_BIN names a binary to use in place of a build. Everything is removed at the end, also on Ctrl-C, except
# Debian's packages, the build in target/, and the image in /var/cache/hawker-conformance.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/common.sh

nodes=4 rate=200 size=large
while (($# > 0)); do
    case $1 in
    --nodes) nodes=${2-} && shift ;;
    --rate) rate=${2-} && shift ;;
    --small) size=small ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" && exit ;;
    *) die "unknown option $1" "See: bash $0 --help" ;;
    esac
    shift
done
[[ $nodes =~ ^[1-9][0-9]?$ ]] || die "--nodes takes a number from 1 to 99, not '$nodes'"
[[ $rate =~ ^[1-9][0-9]{0,4}$ ]] || die "--rate takes a number of Mbit/s, not '$rate'"

# ---------------------------------------------------------------- the hosts

lab=hwk$$-0
base=${TMPDIR:-/var/tmp}
dir=$base/$lab

# on HOST COMMAND...: runs it there. (Not by `ip netns exec`, which hides the control groups that containers need.)
on() {
    local host=$1
    shift
    nsenter --net="/run/netns/$lab-$host" -- "$@"
}

# start HOST NAME COMMAND...: in the background, with a log.
start() {
    local host=$1 log=$dir/$1/$2.log
    shift 2
    on "$host" "$@" >>"$log" 2>&1 &
}

# host NAME NUMBER: a namespace with a shaped link to the bridge, and the address 10.77.0.NUMBER.
host() {
    local ns=$lab-$1 bridge=$lab-bridge shaper="tbf rate ${rate}mbit burst 64k latency 100ms"
    mkdir "$dir/$1"
    ip netns add "$ns"
    ip -n "$ns" link set lo up
    ip link add eth0 netns "$ns" type veth peer name "$1" netns "$bridge"
    ip -n "$bridge" link set dev "$1" gso_max_size 16384 master br0 up
    ip -n "$ns" link set dev eth0 gso_max_size 16384 up
    ip -n "$ns" addr add "10.77.0.$2/24" dev eth0
    # shellcheck disable=SC2086 # the shaper is several words
    tc -n "$ns" qdisc add dev eth0 root $shaper && tc -n "$bridge" qdisc add dev "$1" root $shaper
}

# wait_for SECONDS WHAT LOG COMMAND...: until the command succeeds.
wait_for() {
    local deadline=$((SECONDS + $1)) what=$2 log=$3
    shift 3
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || die "$what did not come up; the end of its log:" "$(tail -n 20 "$log")"
        sleep 0.1
    done
}

# remove_lab NAME: the processes in its namespaces, the mounts in its folder, and both.
remove_lab() {
    local ns pids mount signal
    for signal in TERM KILL; do
        for _ in {1..30}; do
            pids=$(for ns in /run/netns/"$1"-*; do [[ ! -e $ns ]] || ip netns pids "${ns##*/}"; done)
            [[ -n $pids ]] || break 2
            # shellcheck disable=SC2086 # several pids
            kill -$signal $pids 2>/dev/null || true
            sleep 0.1
        done
    done
    while read -r mount; do umount -l "$mount" || true; done \
        < <(awk -v dir="$base/$1/" 'index($2, dir) == 1 { print $2 }' /proc/mounts | tac)
    for ns in /run/netns/"$1"-*; do [[ ! -e $ns ]] || ip netns del "${ns##*/}"; done
    rm -rf "${base:?}/$1"
}

clean_up() {
    local status=$?
    trap '' INT TERM
    trap - EXIT
    if [[ -d $dir ]]; then
        say "Cleaning up"
        remove_lab "$lab" 2>/dev/null
    fi
    exit "$status"
}

# Remove the remains of a killed run.
sweep() {
    local ns name pid
    for ns in /run/netns/hwk*-*-bridge; do
        name=${ns##*/} && name=${name%-bridge} && pid=${name#hwk} && pid=${pid%%-*}
        [[ ! -e $ns || -e /proc/$pid ]] || remove_lab "$name" 2>/dev/null
    done
}

# ---------------------------------------------------------------- the daemons

origin=10.77.0.1:5000
seed=10.77.0.2

start_origin() {
    cat >"$dir/origin/config.yml" <<END
version: 0.1
log: {level: error, accesslog: {disabled: false}}
storage: {filesystem: {rootdirectory: $dir/origin/data}}
http: {addr: $origin, secret: unused}
END
    start origin registry docker-registry serve "$dir/origin/config.yml"
    wait_for 15 "docker-registry" "$dir/origin/registry.log" on origin curl -fs "http://$origin/v2/"
}

start_hawker() { # HOST SUBCOMMAND FLAGS...
    local host=$1
    shift
    start "$host" hawker "$hawker" "$@" --name "$host" --data-dir "$dir/$host/hawker" \
        --registry "$origin=http://$origin"
}

hawker_is_ready() { on "$1" curl -fs http://127.0.0.1:6503/readyz; }

start_containerd() { # HOST
    local at=$dir/$1/containerd
    mkdir -p "$at/certs.d/_default"
    # This is all that a node's containerd is told about Hawker.
    cat >"$at/certs.d/_default/hosts.toml" <<END
[host."http://127.0.0.1:6500"]
  capabilities = ["pull", "resolve"]
END
    cat >"$at/config.toml" <<END
version = 2
root = "$at/root"
state = "$at/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
[grpc]
  address = "$at/sock"
[ttrpc]
  address = "$at/sock.ttrpc"
END
    start "$1" containerd containerd --config "$at/config.toml"
}

ctr() { # HOST ARGS...
    local host=$1
    shift
    on "$host" ctr --address "$dir/$host/containerd/sock" "$@"
}

# Overlays do not stack on every file system; a copy of each layer works everywhere.
choose_snapshotter() {
    mkdir -p "$dir"/probe/{lower,upper,work,merged}
    local o=lowerdir=$dir/probe/lower,upperdir=$dir/probe/upper,workdir=$dir/probe/work
    if mount -t overlay overlay -o "$o" "$dir/probe/merged" 2>/dev/null; then
        umount "$dir/probe/merged" && snapshotter=overlayfs
    else
        snapshotter=native
    fi
}

# ---------------------------------------------------------------- the pull

# From version 2 on, ctr can leave the pull to the daemon; this one reads the hosts' folder itself.
pull() { # HOST
    local local_pull=()
    ctr "$1" images pull --help | grep -q -- ' --local' && local_pull=(--local)
    local began=$EPOCHREALTIME
    ctr "$1" images pull "${local_pull[@]}" --snapshotter "$snapshotter" \
        --hosts-dir "$dir/$1/containerd/certs.d" "$reference" >"$dir/$1/pull.log" 2>&1 || return
    # ctr tells how long the unpacking took at the end ("done: 1m2.5s"); the rest is the transfer.
    sed -n 's/^done: *\([0-9.hmsµ]*\).*/\1/p' "$dir/$1/pull.log" | awk -v a="$began" -v b="$EPOCHREALTIME" '
        /ms$/ { unpacked = $0 / 1000; next }
        { n = split($0, part, /[hms]/); for (i = 1; i < n; i++) unpacked = unpacked * 60 + part[i] }
        END { printf "%.1fs %.1fs\n", b - a - unpacked, unpacked }' >"$dir/$1/seconds"
}

status() { on "$1" curl -fs http://127.0.0.1:6503/status; } # HOST

show_progress() {
    local i line
    line=$(for ((i = 1; i <= nodes; i++)); do
        status "node$i" | jq -r --argjson size "$image_bytes" \
            '"\(.name) \([100, ((.bytes.received_peers + .bytes.received_seeds + .bytes.received_origin) * 100 / $size | floor)] | min)%"'
    done 2>/dev/null | paste -sd ' ')
    [[ $line != "${shown-}" ]] && printf '    %s\n' "$line" >&2
    shown=$line
}

pull_everywhere() {
    local i pids=() failed=0
    for ((i = 1; i <= nodes; i++)); do
        pull "node$i" &
        pids+=($!)
    done
    while jobs -rp | grep -qFx "$(printf '%s\n' "${pids[@]}")"; do
        sleep 1
        show_progress
    done
    for ((i = 1; i <= nodes; i++)); do
        wait "${pids[i - 1]}" && continue
        failed=1
        printf 'node%d: the pull failed:\n%s\n' "$i" "$(tail -n 5 "$dir/node$i/pull.log" "$dir/node$i/hawker.log")" >&2
    done
    ((!failed)) || die "not every node has the image"
}

mb() { awk -v bytes="$1" 'BEGIN { printf "%.1f", bytes / 1e6 }'; }

print_table() {
    local i host times row
    printf '\n%-8s %11s %11s %12s %12s %12s %12s\n' \
        node "fetched in" "unpacked in" "from peers" "from seed" "from origin" "to peers"
    for host in $(seq -f node%g "$nodes") seed; do
        times=(- -)
        [[ $host == seed ]] || read -ra times <"$dir/$host/seconds"
        mapfile -t row < <(status "$host" \
            | jq '.bytes | .received_peers, .received_seeds, .received_origin, .uploaded')
        printf '%-8s %11s %11s' "$host" "${times[@]}"
        for i in 0 1 2 3; do printf ' %9s MB' "$(mb "${row[i]}")"; done
        echo
    done
    local sent
    sent=$(awk '/"GET \/v2\/[^ ]*\/blobs\/.* 20[06] / { sum += $10 } END { print sum + 0 }' "$dir/origin/registry.log")
    printf '\nThe image has %s MB; the origin sent %s MB of blobs, %s copies, for %d nodes.\n' "$(mb "$image_bytes")" \
        "$(mb "$sent")" "$(awk -v a="$sent" -v b="$image_bytes" 'BEGIN { printf "%.2f", a / b }')" "$nodes"
    printf 'Without Hawker it would have sent %s MB, which takes %s s at %d Mbit/s.\n' "$(mb $((image_bytes * nodes)))" \
        "$(awk -v bits="$((image_bytes * nodes * 8))" -v r="$rate" 'BEGIN { printf "%.0f", bits / r / 1e6 }')" "$rate"
}

# ---------------------------------------------------------------- the run

need_root
need_debian
install_missing ip=iproute2 nsenter=util-linux containerd=containerd runc=runc docker-registry=docker-registry \
    skopeo=skopeo umoci=umoci jq=jq curl=curl cc=gcc make=make
need_namespaces
[[ -n ${HAWKER_BIN-} ]] || need_cargo
free_mb=$(df --output=avail -m "$base" | tail -n 1)
needed_mb=$([[ $size == small ]] && echo 500 || echo $((1000 + nodes * 1600)))
((free_mb > needed_mb)) || die "$base has $free_mb MB free, $needed_mb are needed" "Set TMPDIR, or take fewer --nodes."

hawker=${HAWKER_BIN:-target/release/hawker}
if [[ -z ${HAWKER_BIN-} ]]; then
    say "Building hawker (release)"
    cargo build --release --locked -p hawker
fi
say "Making the image from Debian's packages (kept for the next time)"
layout=$(bash deploy/image.sh "$size")

trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
sweep
mkdir "$dir"
choose_snapshotter

say "Making $nodes nodes, a seed and an origin, each behind a link of $rate Mbit/s"
ip netns add "$lab-bridge"
ip -n "$lab-bridge" link add br0 type bridge forward_delay 0 mcast_snooping 0
ip -n "$lab-bridge" link set dev br0 up
host origin 1
host seed 2
for ((i = 1; i <= nodes; i++)); do host "node$i" $((i + 9)); done

say "Starting the origin and giving it the image"
start_origin
reference=$origin/debian/quickstart:latest
on origin skopeo --insecure-policy copy --quiet --dest-tls-verify=false "oci:$layout:latest" "docker://$reference"
image_bytes=$(skopeo inspect --raw "oci:$layout:latest" | jq '[.config.size, .layers[].size] | add')

say "Starting 'hawker up' on the seed, 'hawker proxy' and containerd on the nodes"
start_hawker seed up
wait_for 15 "hawker up" "$dir/seed/hawker.log" hawker_is_ready seed
for ((i = 1; i <= nodes; i++)); do
    (umask 077 && "$hawker" token create --data-dir "$dir/seed/hawker" >"$dir/node$i/token")
    start_hawker "node$i" proxy --join "$seed:6502" --token-file "$dir/node$i/token"
    start_containerd "node$i"
done
for ((i = 1; i <= nodes; i++)); do
    wait_for 15 "hawker on node$i" "$dir/node$i/hawker.log" hawker_is_ready "node$i"
    wait_for 20 "containerd on node$i" "$dir/node$i/containerd.log" ctr "node$i" version
done

say "Pulling $(mb "$image_bytes") MB on $nodes nodes at once (progress: what Hawker received)"
pull_everywhere
print_table

printf '\n'
say "Running a container from it on node1"
if [[ $size == small ]]; then inside='uname -a'; else inside='uname -a; python3 --version; perl -e "print qq(perl \$^V\n)"'; fi
ctr node1 run --rm --net-host --snapshotter "$snapshotter" "$reference" "quickstart$$" \
    /bin/sh -c "echo 'Hello from inside the container:'; $inside"
printf '\n'
say "Done."

#!/usr/bin/env bash
# Makes a container image from Debian's packages and prints the folder of its OCI layout (tag: latest).
#
#   image.sh small    busybox and two small layers: a few MB
#   image.sh large    six layers with shells, compilers and interpreters: more than 200 MB compressed
#
# Layouts are kept in HAWKER_CACHE_DIR (default: hawker-conformance in XDG_CACHE_HOME or /var/cache), so only the first
# run takes long. Packages come by apt-get from the machine's own sources.
set -euo pipefail
cd "$(dirname "$0")"
. ./common.sh

case ${1-} in
small) layers=("busybox-static" "hello" "tzdata") ;;
large) layers=("base-files bash coreutils dash findutils grep hostname sed" "perl" "python3" "git" "g++" "default-jre-headless") ;;
*) die "usage: image.sh small|large" ;;
esac

need_debian
install_missing umoci=umoci
cache=${HAWKER_CACHE_DIR:-${XDG_CACHE_HOME:-/var/cache}/hawker-conformance}
mkdir -p "$cache"
# Another recipe or another Debian makes another image.
recipe=$(cat image.sh /etc/debian_version | sha256sum | cut -c1-12)
layout="$cache/$1-$(dpkg --print-architecture)-$recipe"

exec 9>"$cache/lock"
flock 9
if [[ -e $layout/index.json ]]; then
    echo "$layout"
    exit
fi

work=$(mktemp -d "$cache/making.XXXXXX")
trap 'rm -rf "$work"' EXIT
apt_lists
: >"$work/nothing-installed"

# closure PACKAGES: the packages they need on an empty machine.
closure() {
    apt-get -s --no-install-recommends -o Dir::State::status="$work/nothing-installed" install "$@" \
        | awk '$1 == "Inst" { print $2 }'
}

# download DIR PACKAGES
download() (
    mkdir "$1" && cd "$1" && shift
    # As root apt warns that its sandbox user cannot write here; all the same it works.
    apt_get -o APT::Sandbox::User=root download "$@"
)

umoci init --layout "$work/layout"
umoci new --image "$work/layout:latest"
wanted=() have="$work/have"
: >"$have"
for packages in "${layers[@]}"; do
    # The layer is what these packages need beyond the layers below.
    read -ra names <<<"$packages"
    wanted+=("${names[@]}")
    mapfile -t new < <(closure "${wanted[@]}" | grep -vxFf "$have")
    printf '%s\n' "${new[@]}" >>"$have"
    say "Image layer: $packages (${#new[@]} packages)"
    rm -rf "$work/debs" "$work/root"
    mkdir "$work/root"
    download "$work/debs" "${new[@]}"
    for deb in "$work"/debs/*.deb; do dpkg-deb --extract "$deb" "$work/root"; done
    # The effects of the packages' scripts, as far as a command needs them to run.
    if [[ -e $work/root/bin/busybox ]]; then
        for applet in sh ls cat echo uname; do ln -s busybox "$work/root/bin/$applet"; done
    elif [[ -e $work/root/bin/dash && ! -e $work/root/bin/sh ]]; then
        ln -s dash "$work/root/bin/sh"
    elif [[ -e $work/root/usr/bin/dash && ! -e $work/root/usr/bin/sh ]]; then
        ln -s dash "$work/root/usr/bin/sh"
    fi
    umoci insert --image "$work/layout:latest" "$work/root" / >/dev/null
done
umoci config --image "$work/layout:latest" --architecture "$(dpkg --print-architecture)" --os linux \
    --config.env PATH=/usr/sbin:/usr/bin:/sbin:/bin --config.cmd /bin/sh
umoci gc --layout "$work/layout" >/dev/null
mv "$work/layout" "$layout"
echo "$layout"

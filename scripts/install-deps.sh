#!/bin/sh
# Installs the Debian packages that are missing: those the build needs ("build", the default),
# those the tests need ("test"), those the fuzzers need ("fuzz"), those the Debian package is made
# and tested with ("package"), those the comparison with other servers needs ("bench"), or several
# of these. Asks apt for nothing when nothing is missing.
set -eu

build_packages="gcc binutils libc6-dev make meson ninja-build pkg-config libuv1-dev liblmdb-dev
libxxhash-dev liblz4-dev libzstd-dev libjansson-dev libgnutls28-dev libsystemd-dev
libmicrohttpd-dev libnl-genl-3-dev"

test_packages="libcmocka-dev python3 python3-pytest python3-libnbd libnbd-bin nbd-client
qemu-utils qemu-system-x86 binutils fio user-mode-linux kmod uml-utilities iproute2 xfsprogs
e2fsprogs fuse3 util-linux procps openssl gnutls-bin nbdkit nbd-server python3-matplotlib
python3-yaml mandoc man-db bash-completion zsh libxml2-utils libvirt0 iputils-arping chromium
curl lmdb-utils strace libseccomp2"

# (cmocka: the fuzzers stand with the unit tests.)
fuzz_packages="clang libclang-rt-dev llvm libcmocka-dev python3 python3-pytest"

package_packages="debhelper lintian debootstrap systemd
systemd-container zstd"

bench_packages="libcmocka-dev python3 python3-matplotlib nbdkit qemu-utils nbd-server fio
util-linux"

[ $# -gt 0 ] || set -- build
wanted=""
for what in "$@"; do
    case $what in
    build) wanted="$wanted $build_packages" ;;
    test) wanted="$wanted $test_packages" ;;
    fuzz) wanted="$wanted $fuzz_packages" ;;
    package) wanted="$wanted $package_packages" ;;
    bench) wanted="$wanted $bench_packages" ;;
    *)
        echo "usage: $0 [build] [test] [fuzz] [package] [bench]" >&2
        exit 2
        ;;
    esac
done

installed() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

missing=""
for package in $wanted; do
    # pkgconf provides pkg-config on newer releases.
    if [ "$package" = pkg-config ] && command -v pkg-config >/dev/null; then
        continue
    fi
    installed "$package" || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "these Debian packages are missing, and there is no apt-get to install them:$missing" >&2
    exit 1
fi

as_root=""
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "missing packages; as root, run: apt-get install$missing" >&2
        exit 1
    fi
    as_root="sudo"
fi

echo "installing:$missing" >&2
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086  # words are meant to split
install() {
    $as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q --no-install-recommends $missing </dev/null
}

# The package lists of a fresh machine are empty, those of an old one may name versions that
# are gone; either way an update and a second attempt help.
install || { $as_root apt-get update -q && install; }

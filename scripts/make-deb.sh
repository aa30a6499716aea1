#!/bin/sh
# make-deb.sh FOLDER: builds the Debian package from the files as they are here, committed or not,
# and leaves it in FOLDER, which is made anew. Needs no network.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
version=$(sed -n "s/^  version: '\(.*\)',$/\1/p" "$root/meson.build")
packaged=$(dpkg-parsechangelog -l "$root/debian/changelog" -S Version)
if [ "$packaged" != "$version" ]; then
    echo "make-deb: meson.build says version $version, debian/changelog $packaged" >&2
    exit 1
fi
rm -rf "$1"
mkdir -p "$1/fdb-nbd-$version"
tar -C "$root" --exclude-vcs --exclude=./build --exclude='./build-*' --exclude=__pycache__ -c . |
    tar -C "$1/fdb-nbd-$version" -x
cd "$1/fdb-nbd-$version"
dpkg-buildpackage --build=binary --no-sign -j2
cd ..
rm -r "fdb-nbd-$version"
ls -l "$PWD"/*.deb

#!/bin/sh
# install-settings.sh FILE DIRECTORY: installs a settings file, unless there is one: that one was
# written by whoever runs this machine.
set -eu
to=${DESTDIR:-}$2/$(basename "$1")
[ ! -e "$to" ] || { echo "Keeping $to" && exit 0; }
install -D -m 644 "$1" "$to"

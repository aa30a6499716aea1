#!/usr/bin/python3
"""Stands in for systemctl on a machine without systemd, as far as the examples need it.

    systemctl start|restart|stop [--now] UNIT...     enable --now, daemon-reload

foundationdb starts what /etc/foundationdb/foundationdb.conf says, as fdbmonitor does; any other
unit is what ExecStart of its file says. Processes are remembered in /run/units.
"""

import configparser
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

RUN = Path("/run/units")
FOLDERS = (Path("/etc/systemd/system"), Path("/usr/lib/systemd/system"))
# A machine that several clusters share has less than fdbserver takes by itself.
SMALL = ["--memory", "3GiB", "--cache-memory", "128MiB", "--storage-memory", "1GiB"]


def fdbservers():
    conf = configparser.ConfigParser(interpolation=None)
    assert conf.read("/etc/foundationdb/foundationdb.conf"), "no foundationdb.conf"
    for section in conf.sections():
        kind, _, number = section.partition(".")
        if kind != "fdbserver" or not number:
            continue
        values = {**conf["general"], **conf["fdbserver"], **conf[section]}
        values = {k: v.replace("$ID", number) for k, v in values.items()}
        words = [values.pop("command")]
        Path(values["datadir"]).mkdir(parents=True, exist_ok=True)
        Path(values["logdir"]).mkdir(parents=True, exist_ok=True)
        values.pop("restart-delay", None)
        for key, value in values.items():
            words += [f"--{key}", value]
        yield words + SMALL


def commands(unit):
    if unit == "foundationdb":
        return list(fdbservers())
    for folder in FOLDERS:
        path = folder / f"{unit}.service"
        if path.exists():
            for line in path.read_text().splitlines():
                if line.startswith("ExecStart="):
                    return [shlex.split(line.removeprefix("ExecStart="))]
    sys.exit(f"Unit {unit}.service not found.")


def stop(unit):
    for line in (RUN / unit).read_text().split() if (RUN / unit).exists() else []:
        try:
            os.kill(int(line), signal.SIGTERM)
            while Path(f"/proc/{line}").exists():
                time.sleep(0.01)
        except ProcessLookupError:
            pass
    (RUN / unit).unlink(missing_ok=True)


def start(unit):
    RUN.mkdir(exist_ok=True)
    pids = []
    for words in commands(unit):
        with open(RUN / f"{unit}.log", "ab") as log:
            pids.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                         start_new_session=True).pid)
    (RUN / unit).write_text("\n".join(map(str, pids)))


def main():
    what, *words = sys.argv[1:]
    units = [w.removesuffix(".service") for w in words if not w.startswith("-")]
    if what in ("start", "restart", "stop") or "--now" in words:
        for unit in units:
            stop(unit)
            if what != "stop":
                start(unit)
    else:
        assert what in ("daemon-reload", "enable"), f"no such verb here: {what}"


main()

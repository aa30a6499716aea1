"""What people install: make install, and the Debian package on a bare system, with systemd too."""

import os
import re
import shlex
import subprocess

import pytest

from harness.server import REPO, SLOW, wait_until
from system import ENVIRONMENT, Booted, System

PROGRAMS = ["systemd", "libnbd-bin"]  # what the tests use in it
EXPOSURE_MAX = 20  # of systemd-analyze security, in tenths; below 20 is "OK"
ATTACH_EXPOSURE_MAX = 40
BUILD_LIMIT_S = 280 * SLOW


def make(*words):
    done = subprocess.run(["make", "--no-print-directory", "-C", REPO, *words],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=BUILD_LIMIT_S)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def packages_of(kind):
    """The Debian packages that scripts/install-deps.sh names for a purpose."""
    script = (REPO / "scripts/install-deps.sh").read_text()
    return re.search(rf'^{kind}_packages="([^"]*)"', script, re.MULTILINE)[1].split()


@pytest.fixture(scope="module")
def built(module_folder):
    """What `make deb` says, and the package."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a Debian system in a folder")
    said = make("deb", f"BUILD={module_folder}/build")
    deb, = (module_folder / "build/deb").glob("fdb-nbd_*.deb")
    return said, deb


@pytest.fixture(scope="module")
def system(built, module_folder):
    """A bare system with what the package depends on, and without the package."""
    depends = subprocess.run(["dpkg-deb", "--field", built[1], "Depends"], capture_output=True,
                             text=True, check=True).stdout
    names = {re.split(r"[ (|]", d.strip())[0] for d in depends.split(",")}
    made = System(module_folder / "root", names | set(PROGRAMS))
    made.path("root/fdb-nbd.deb").write_bytes(built[1].read_bytes())
    return made


@pytest.fixture
def installed(system):
    system.run("dpkg", "--install", "/root/fdb-nbd.deb")
    return system


def volumes(text):
    return re.findall(r"^(\w+) +\S+ +\S+ +16K", text, re.MULTILINE)


# --- make install --------------------------------------------------------------------------------

def test_make_install(folder):
    build = folder / "build"
    subprocess.run(["meson", "setup", build, REPO, "--buildtype=plain", "-Dtests=disabled"],
                   check=True, capture_output=True)
    words = ["install", f"BUILD={build}", f"DESTDIR={folder}/dest", "PREFIX=/opt/nbd"]
    make(*words)
    dest = folder / "dest"
    files = {str(p.relative_to(dest)) for p in dest.rglob("*") if not p.is_dir()}
    assert {"opt/nbd/bin/fdb-nbd", "etc/fdb-nbd/fdb-nbd.conf",
            "opt/nbd/lib/systemd/system/fdb-nbd.service",
            "opt/nbd/lib/systemd/system/fdb-nbd.socket",
            "opt/nbd/lib/systemd/system/fdb-nbd-attach@.service",
            "opt/nbd/lib/sysusers.d/fdb-nbd.conf",
            "opt/nbd/lib/tmpfiles.d/fdb-nbd.conf", "opt/nbd/share/doc/fdb-nbd/SECURITY.md"} <= files
    assert all(f.startswith(("opt/nbd/", "etc/fdb-nbd/")) for f in files), files
    unit = (dest / "opt/nbd/lib/systemd/system/fdb-nbd.service").read_text()
    assert "ExecStart=/opt/nbd/bin/fdb-nbd serve --config /etc/fdb-nbd/fdb-nbd.conf" in unit
    assert not re.search(r"@\w+@", unit)
    done = subprocess.run([dest / "opt/nbd/bin/fdb-nbd", "--version"], capture_output=True,
                          text=True, check=True)
    assert done.stdout.startswith("fdb-nbd ")
    # Settings that somebody wrote are left alone.
    (dest / "etc/fdb-nbd/fdb-nbd.conf").write_text("read-only = yes\n")
    make(*words)
    assert (dest / "etc/fdb-nbd/fdb-nbd.conf").read_text() == "read-only = yes\n"


# --- the package ---------------------------------------------------------------------------------

@pytest.mark.limit(300)
def test_builds_without_warnings(built):
    said, deb = built
    assert not [line for line in said.splitlines() if re.search(r"\bwarning:", line, re.I)]


def test_build_depends_are_those_of_the_build():
    control = (REPO / "debian/control").read_text()
    depends = control.split("Build-Depends:")[1].split("Standards-Version")[0]
    missing = [p for p in packages_of("build")
               if p.startswith("lib") and p != "libc6-dev" and f" {p}," not in depends]
    assert not missing, "debian/control does not have what scripts/install-deps.sh installs"


@pytest.mark.limit(120)
def test_lintian(built):
    said = subprocess.run(["lintian", "--no-tag-display-limit", "--allow-root",
                           *built[1].parent.glob("*.changes")], capture_output=True, text=True)
    tags = [line for line in said.stdout.splitlines() if line.startswith(("E:", "W:"))]
    if not (REPO / "docs/man").is_dir():
        tags = [t for t in tags if "no-manual-page" not in t]
    assert not tags


@pytest.mark.limit(600)
def test_one_store_for_root_and_the_service(installed):
    """On the bare system, as the unit starts it but without systemd."""
    unit = installed.path("lib/systemd/system/fdb-nbd.service").read_text()
    start = shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1])
    socket = "/run/fdb-nbd/nbd.sock"
    installed.run("fdb-nbd", "create", "v", "64M")
    server = subprocess.Popen(
        installed.words("setpriv", "--pdeathsig", "KILL", "--reuid=fdb-nbd", "--regid=fdb-nbd",
                        "--clear-groups", *start, "--listen", f"unix:{socket}"),
        stdin=subprocess.DEVNULL, env=dict(ENVIRONMENT, RUNTIME_DIRECTORY="/run/fdb-nbd"))
    try:
        wait_until(lambda: server.poll() is not None or installed.path(socket).exists(), 30 * SLOW,
                   "it listens")
        uri = f"nbd+unix:///v?socket={socket}"
        assert installed.run("nbdinfo", "--size", uri).stdout.strip() == str(64 << 20)
        installed.run("nbdcopy", "/usr/bin/bash", uri)
        installed.run("fdb-nbd", "snapshot", "create", "v@s")
        installed.run("fdb-nbd", "create", "w", "1M")
        as_service = ["runuser", "-u", "fdb-nbd", "--"]
        for who in ([], as_service):
            assert volumes(installed.run(*who, "fdb-nbd", "list").stdout) == ["v", "w"]
        installed.run(*as_service, "fdb-nbd", "snapshot", "remove", "v@s")
    finally:
        server.terminate()
        assert server.wait(60 * SLOW) == 0
    strange = installed.run("find", "/var/lib/fdb-nbd", "!", "-user", "fdb-nbd", "-o",
                            "-perm", "/077").stdout
    assert not strange


def test_units_are_sound(installed):
    for unit in ("fdb-nbd.service", "fdb-nbd.socket", "fdb-nbd-attach@i.service"):
        done = installed.run("systemd-analyze", "verify", "--man=no", unit, check=False)
        said = [line for line in (done.stdout + done.stderr).splitlines() if "fdb-nbd" in line]
        assert not said, said
    for unit, most in (("fdb-nbd.service", EXPOSURE_MAX),
                       ("fdb-nbd-attach@.service", ATTACH_EXPOSURE_MAX)):
        installed.run("systemd-analyze", "security", "--offline=true", "--no-pager",
                      f"--threshold={most}", f"/lib/systemd/system/{unit}")


@pytest.mark.limit(240)
def test_under_systemd(installed):
    """The service as installed: started, reloaded, replaced, restarted, its sockets, its journal."""
    with Booted(installed) as booted:
        booted.run("systemctl start fdb-nbd.service")
        assert booted.show("ActiveState") == "active"
        pid = booted.show("MainPID")
        status = booted.run(f"cat /proc/{pid}/status").stdout
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
        assert "serving on" in booted.show("StatusText")
        booted.run("fdb-nbd create booted 64M; nbdcopy /usr/bin/bash nbd://127.0.0.1/booted; "
                   "fdb-nbd snapshot create booted@s")
        lists = [booted.run(f"{who}fdb-nbd list").stdout for who in ("", "runuser -u fdb-nbd -- ")]
        assert all("booted" in volumes(text) for text in lists), lists
        fields = booted.run("journalctl -q -o verbose -u fdb-nbd VOLUME=booted").stdout
        assert re.search(r"CLIENT=127\.0\.0\.1:\d+\n", fields), fields
        # (Root finds its control socket.)
        assert f":{pid}  serving  lmdb:/var/lib/fdb-nbd" in booted.run("fdb-nbd status").stdout
        booted.run("systemctl reload fdb-nbd")
        assert booted.show("MainPID") == pid, "a reload ended it"
        # The way of docs/operations.md to replace it.
        booted.run("mkdir -p /etc/systemd/system/fdb-nbd.service.d")
        installed.path("/etc/systemd/system/fdb-nbd.service.d/replace.conf").write_text(drop_in())
        booted.run("systemctl daemon-reload; systemctl reload fdb-nbd")
        wait_until(lambda: booted.show("MainPID") not in ("0", pid), 30 * SLOW,
                   "another process is the service's")
        wait_until(lambda: booted.run(f"test -e /proc/{pid}", check=False).returncode == 1,
                   30 * SLOW, "the old one ends")
        assert booted.show("ActiveState") == "active" and booted.show("NRestarts") == "0"
        booted.run("nbdinfo --size nbd://127.0.0.1/booted")
        # The sockets; the settings name no addresses.
        booted.run("rm -r /etc/systemd/system/fdb-nbd.service.d; systemctl daemon-reload; "
                   "systemctl stop fdb-nbd.service; systemctl start fdb-nbd.socket")
        for uri in ("nbd://127.0.0.1/booted", "'nbd+unix:///booted?socket=/run/fdb-nbd/nbd.sock'"):
            assert booted.run(f"nbdinfo --size {uri}").stdout.strip() == str(64 << 20)
            booted.run("systemctl restart fdb-nbd.service")
        booted.run("systemctl stop fdb-nbd.socket fdb-nbd.service")
        assert booted.show("Result") == "success"
        assert not booted.run("find /var/lib/fdb-nbd ! -user fdb-nbd").stdout


SETTINGS = """\
listen = 127.0.0.1:10809
listen = unix:/run/fdb-nbd/s
http = 127.0.0.1:9181
tls = on
tls-psk = /etc/fdb-nbd/psk
access = /etc/fdb-nbd/access
threads = 2
"""


@pytest.mark.limit(240)
def test_its_sandbox_under_systemd(installed, module_folder):
    """With every way in open; and what the sandbox is to keep it from. (What it needs of system calls:
    tests/sandbox.)"""
    settings = installed.path("/etc/fdb-nbd/fdb-nbd.conf")
    before = settings.read_text()
    settings.write_text(SETTINGS)
    installed.path("/etc/fdb-nbd/access").write_text("psk:alice rw *\nuser:root rw *\n")
    psk = installed.path("/etc/fdb-nbd/psk")
    subprocess.run(["psktool", "-u", "alice", "-p", psk], check=True, capture_output=True)
    try:
        with Booted(installed) as booted:
            sandboxed(booted)
    finally:
        settings.write_text(before)
        for name in "access", "psk":
            installed.path(f"/etc/fdb-nbd/{name}").unlink()


def sandboxed(booted):
    booted.run("chown fdb-nbd: /etc/fdb-nbd/psk; chmod 600 /etc/fdb-nbd/psk; "
               "systemctl start fdb-nbd.service")
    pid = booted.show("MainPID")
    uri = "'nbds://alice@127.0.0.1/boxed?tls-psk-file=/etc/fdb-nbd/psk'"
    booted.run(f"fdb-nbd create boxed 64M; nbdcopy /usr/bin/bash {uri}; nbdinfo --size "
               "'nbd+unix:///boxed?socket=/run/fdb-nbd/s'; fdb-nbd snapshot create boxed@s; "
               f"fdb-nbd clone boxed@s boxed2; nbdcopy {uri} /root/copy; "
               "cmp -n $(stat -c %s /usr/bin/bash) /usr/bin/bash /root/copy; rm /root/copy; "
               "fdb-nbd status --http 127.0.0.1:9181; fdb-nbd clients; systemctl reload fdb-nbd")
    log = "journalctl -q --no-pager -u fdb-nbd"
    wait_until(lambda: booted.run(log).stdout.count("were read again") == 2, 30 * SLOW, "reload")
    # What it is.
    status = dict(line.split(":\t", 1)
                  for line in booted.run(f"cat /proc/{pid}/status").stdout.splitlines())
    user = booted.run("id -u fdb-nbd").stdout.strip()
    assert status["Uid"].split() == [user] * 4 and status["Seccomp"] == "2"
    assert all(int(status[f"Cap{kind}"], 16) == 0 for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb"))
    limits = booted.run(f"cat /proc/{pid}/limits").stdout
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    # What it sees.
    for path, may in (("/var/lib/fdb-nbd", True), ("/run/fdb-nbd", True), ("/etc", False),
                      ("/usr", False), ("/var/lib", False), ("/root", False), ("/home", False)):
        done = booted.run(f"nsenter --mount=/proc/{pid}/ns/mnt touch {path}/mine", check=False)
        assert (done.returncode == 0) == may, (path, done.stderr)
    devices = booted.run(f"nsenter --mount=/proc/{pid}/ns/mnt ls /dev").stdout.split()
    assert not [d for d in devices if d.startswith(("sd", "nvme", "nbd", "mem", "kmsg", "loop"))]
    booted.run("rm /var/lib/fdb-nbd/mine /run/fdb-nbd/mine; fdb-nbd drain --wait; "
               "systemctl stop fdb-nbd.service; fdb-nbd verify boxed; "
               "fdb-nbd remove boxed2 --yes; fdb-nbd remove boxed --snapshots --yes")
    assert booted.show("Result") == "success"


def drop_in():
    """From the manual."""
    text = (REPO / "docs/operations.md").read_text()
    return re.search(r"```ini\n# (?:\S*/)?replace\.conf\n(.*?)```", text, re.DOTALL)[1]


def test_purge(installed):
    """All but volumes goes."""
    assert installed.path("/var/lib/fdb-nbd").stat().st_mode & 0o777 == 0o700
    if not installed.path("/var/lib/fdb-nbd/data.mdb").exists():
        installed.run("fdb-nbd", "create", "kept", "1M")
    # Removed and installed again, it is what it was.
    installed.run("dpkg", "--remove", "fdb-nbd")
    assert installed.path("/etc/fdb-nbd/fdb-nbd.conf").exists()
    assert not installed.path("/usr/bin/fdb-nbd").exists()
    installed.run("dpkg", "--install", "/root/fdb-nbd.deb")
    said = installed.run("dpkg", "--purge", "fdb-nbd").stderr
    assert "the volumes in /var/lib/fdb-nbd are left" in said
    left = [p for p in installed.traces("fdb-nbd")
            if not p.startswith(("/var/lib/fdb-nbd", "/root/fdb-nbd.deb", "/var/log/"))]
    assert not left
    assert installed.path("/var/lib/fdb-nbd/data.mdb").exists()
    # Without volumes nothing is left at all.
    installed.run("rm", "-r", "/var/lib/fdb-nbd")
    installed.run("dpkg", "--install", "/root/fdb-nbd.deb")
    installed.run("dpkg", "--purge", "fdb-nbd")
    assert not installed.path("/var/lib/fdb-nbd").exists()

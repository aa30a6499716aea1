"""Every example of the README and the guides, run as it stands there.

Each file has machines of its own (sandbox.py) and is gone through from top to bottom, as a reader
does. What can't be run says why in a comment above it (examples.py), is checked as far as its
language can be, and is listed at the end of the test.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

import examples
from harness import uml
from harness.cluster import Cluster, Programs, why_missing
from harness.fixtures import new_folder
from harness.server import REPO
from harness.waiting import SLOW, wait_until
from sandbox import Machine, Network

FILES = ["README.md", *(f"docs/{name}.md" for name in
                        ("access", "foundationdb", "http", "operations", "tls")),
         *sorted(str(p.relative_to(REPO)) for p in (REPO / "docs" / "guides").glob("*.md"))]
# Where a guide's hosts are. The first is where a block is run that names none.
HOSTS = {"host1": "10.0.0.11", "host2": "10.0.0.12", "host3": "10.0.0.13"}
BLOCK_LIMIT_S = 60
AT_ONCE = 3
LIBVIRT_SCHEMAS = "/usr/share/libvirt/schemas"


def shape(text):
    """What an output is but for numbers and the width of columns."""
    return [" ".join(re.sub(r"[0-9][0-9.]*", "0", line).split()) for line in text.strip().splitlines()]


class Reader:
    """Somebody who tries out a file."""

    def __init__(self, folder, found):
        self.folder, self.found = folder, found
        self.env = Programs().client_env() if not why_missing() else {}
        self.network, self.machines, self.cluster = None, {}, None
        self.printed = ""
        self.staying = []
        named = [n for e in found for n in e.parts.get("on", "").replace(",", " ").split()]
        if named:
            self.network = Network()
            hosts = "".join(f"{a} {n}\n" for n, a in HOSTS.items())
            for name, address in HOSTS.items():
                made = Machine(folder, name, self.env, self.network, address)
                self.machines[name] = made
                made.write("/etc/hosts", "127.0.0.1 localhost\n" + hosts)
        else:
            self.machines["example"] = Machine(folder, "example", self.env)
        self.first = next(iter(self.machines.values()))

    def end(self):
        """Ends all; what was to stay has to be there still."""
        ended = [f"{e.place} did not stay" for e, p, _ in self.staying if p.poll() is not None]
        if self.cluster:
            self.cluster.end()
        for machine in self.machines.values():
            machine.end()
        if self.network:
            self.network.end()
        return ended

    def close_last(self):
        """As Ctrl-C in its terminal, and again: QEMU that has only just begun may miss one."""
        _, process, _ = self.staying.pop()
        for _ in range(6):
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(BLOCK_LIMIT_S * SLOW / 6)
                return
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError(f"{process.args} did not end")

    def have_cluster(self):
        if self.cluster:
            return
        # The first machine's network, but not its root: the cluster is not what is tried out.
        self.cluster = Cluster(prefix=["nsenter", f"--target={self.first.pid}", "--net"]).start()
        self.first.write("/etc/foundationdb/fdb.cluster", self.cluster.file.read_text())

    def try_out(self, example):
        parts = example.parts
        if "cluster" in parts:
            self.have_cluster()
        while self.staying and ("instead" in parts or "closes" in parts):
            self.close_last()
            if "closes" in parts:
                break
        if "given" in parts:
            self.first.run(["bash", "-ec", parts["given"]])
        names = parts.get("on", "").replace(",", " ").split()
        if "kills" in parts:
            self.staying = [s for s in self.staying if s[2].name not in names]
        for machine in [self.machines[n] for n in names] or [self.first]:
            if "file" in parts:
                machine.write(parts["file"], example.text,
                              0o755 if example.text.startswith("#!") else 0o644)
                if parts["file"].endswith("fdb-nbd.conf"):
                    # Mistakes in it would be said before the store is looked for.
                    done = machine.run(["fdb-nbd", "--config", parts["file"], "--store",
                                        "lmdb:/nowhere", "list"], check=False)
                    assert done.returncode == 4, f"{example.place}: {done.stderr}"
                if parts["file"].endswith("fdb-nbd/access"):
                    # They are read before the store is.
                    done = machine.run(["fdb-nbd", "--store", "lmdb:/nowhere", "serve", "--access",
                                        parts["file"]], check=False)
                    assert done.returncode == 4, f"{example.place}: {done.stderr}"
                if parts["file"].endswith(".service"):
                    machine.run(["systemd-analyze", "verify", parts["file"]])
            elif "shows" in parts:
                shown = shape(example.text)
                assert shown == shape(self.printed)[-len(shown):], (
                    f"{example.place} shows\n{example.text}\nbut it was\n{self.printed}")
            elif "stays" in parts:
                self.leave_running(example, machine)
            elif "kernel" in parts:
                self.printed = machine.guest().run(
                    f"export PATH=/usr/local/guest:/usr/local/bin:$PATH\n{example.text}",
                    limit_s=BLOCK_LIMIT_S)
            else:
                done = machine.run(self.shell(example), check=False,
                                   limit_s=BLOCK_LIMIT_S)
                assert done.returncode == int(parts.get("ends", "with 0").split()[1]), (
                    f"{example.place}, on {machine.name}:\n{example.text}\ngave {done.returncode}:\n"
                    f"{done.stdout}{done.stderr}")
                self.printed = done.stdout + done.stderr * ("ends" in parts)

    @staticmethod
    def shell(example):
        return ["bash", "-ec", f"cd {REPO}\n" * ("source" in example.parts) + example.text]

    def leave_running(self, example, machine):
        log = self.folder / f"{machine.name}-{example.line}.log"
        text = re.fullmatch(r'until "(.*)"', example.parts["stays"])[1]
        process = machine.start(self.shell(example), log)

        def ready():
            said = log.read_text(errors="replace")
            assert process.poll() is None, f"{example.place} ended with {process.returncode}:\n{said}"
            return text in said
        wait_until(ready, BLOCK_LIMIT_S * SLOW, f"{example.place} says \"{text}\"")
        if "replaces" in example.parts:
            _, old, _ = self.staying.pop()
            assert old.wait(BLOCK_LIMIT_S * SLOW) == 0, f"what {example.place} replaces"
        self.staying.append((example, process, machine))


@pytest.fixture(scope="module")
def results(request):
    """Goes through some files at a time, since most of what is done is waiting."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        names = [i.callspec.params["name"] for i in request.session.items
                 if i.function is test_examples_of]
        yield {name: pool.submit(try_out_file, name) for name in names}


@pytest.mark.limit(240)
@pytest.mark.parametrize("name", FILES)
def test_examples_of(name, results):
    print("\n".join(results[name].result()))


def try_out_file(name):
    folder = new_folder()
    try:
        return list(_try_out_file(name, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _try_out_file(name, folder):
    found = examples.read(REPO / name, name)
    unmarked = [e.place for e in found if e.language != "sh" and not e.parts]
    assert not unmarked, f"not sh, and nothing says what becomes of them: {', '.join(unmarked)}"
    for example in found:
        check_language(example, folder)
        if "in" in example.parts:
            other = (REPO / example.parts["in"]).read_text()
            assert name.rpartition("/")[2] in other, f"{example.place}: not read there"
    tried = [e for e in found if not e.why_not_run]
    if any("kernel" in e.parts for e in tried) and uml.missing():
        pytest.skip(f"no user-mode-linux here: {uml.missing()}")
    if any("cluster" in e.parts or "foundationdb" in e.text for e in tried) and why_missing():
        pytest.skip(why_missing())
    if tried:
        reader = Reader(folder, tried)
        try:
            for example in tried:
                reader.try_out(example)
        finally:
            ended = reader.end()
        assert not ended, ", ".join(ended)
    yield f"{name}: {len(tried)} of {len(found)} examples were run"
    for example in found:
        if example.why_not_run:
            yield f"  not run, {example.place}: {example.why_not_run}"


# --- what can be said of a text that is not run ------------------------------------------


def check_language(example, folder):
    check = {"sh": check_shell, "yaml": check_yaml, "xml": check_libvirt,
             "json": check_json}.get(example.language)
    if check:
        check(example, folder)


def check_shell(example, folder):
    done = subprocess.run(["bash", "-n"], input=example.text, capture_output=True, text=True)
    assert done.returncode == 0, f"{example.place}: {done.stderr}"


def check_json(example, folder):
    """An object, or some members of one."""
    text = example.text.strip()
    json.loads(text if text.startswith("{") else f"{{{text}}}")


# What each kind of object must have, and may have at its top.
KUBERNETES = {
    "Pod": ("v1", {"spec"}),
    "Deployment": ("apps/v1", {"spec"}),
    "DaemonSet": ("apps/v1", {"spec"}),
    "PersistentVolume": ("v1", {"spec"}),
    "PersistentVolumeClaim": ("v1", {"spec"}),
    "StorageClass": ("storage.k8s.io/v1", {"provisioner", "volumeBindingMode"}),
}


def check_yaml(example, folder):
    for thing in yaml.safe_load_all(example.text):
        if "kind" not in thing:
            continue
        version, fields = KUBERNETES[thing["kind"]]
        assert thing["apiVersion"] == version, example.place
        assert set(thing) == {"apiVersion", "kind", "metadata"} | fields, example.place
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", thing["metadata"]["name"]), example.place
        if thing["kind"] in ("Pod", "Deployment", "DaemonSet"):
            check_pod(example, thing["spec"] if thing["kind"] == "Pod"
                      else thing["spec"]["template"]["spec"])


CONTAINER = {"name", "image", "command", "args", "env", "securityContext", "volumeMounts",
             "volumeDevices", "lifecycle", "livenessProbe", "readinessProbe", "restartPolicy"}


def check_pod(example, spec):
    """Fields that exist, and names that are there."""
    assert set(spec) <= {"containers", "initContainers", "volumes", "nodeSelector", "hostNetwork",
                         "hostPID", "terminationGracePeriodSeconds", "restartPolicy",
                         "tolerations"}, f"{example.place}: {set(spec)}"
    volumes = {v["name"] for v in spec.get("volumes", [])}
    for container in spec["containers"] + spec.get("initContainers", []):
        assert set(container) <= CONTAINER and "image" in container, f"{example.place}: {container}"
        for mount in container.get("volumeMounts", []) + container.get("volumeDevices", []):
            assert mount["name"] in volumes, f"{example.place}: no volume {mount['name']}"


def check_libvirt(example, folder):
    """A domain, or disks that are put into one, as libvirt's own schema wants it."""
    if not shutil.which("xmllint") or not (REPO / "/").joinpath(LIBVIRT_SCHEMAS, "domain.rng").exists():
        pytest.skip("xmllint and libvirt's schemas are not installed")
    text = example.text
    kind = ElementTree.fromstring(f"<all>{text}</all>")[0].tag
    if kind == "disk":
        text = (f"<domain type='kvm'><name>x</name><memory>1048576</memory><os><type>hvm</type></os>"
                f"<devices>{text}</devices></domain>")
        kind = "domain"
    path = folder / "example.xml"
    path.write_text(text)
    done = subprocess.run(["xmllint", "--noout", "--nonet", "--relaxng",
                           f"{LIBVIRT_SCHEMAS}/{kind}.rng", path], capture_output=True, text=True)
    assert done.returncode == 0, f"{example.place}: {done.stderr}"

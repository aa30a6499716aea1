"""The pytest options and fixtures that all test folders share.

Each folder's conftest.py imports everything from here, so that any one of them
can be run alone.
"""

import faulthandler
import itertools
import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from . import cluster, rawnbd, stores
from .server import SLOW, Server

_seed = None


def pytest_addoption(parser):
    try:
        parser.addoption("--seed", type=int, default=None,
                         help="seed of all random choices (default: SEED, else a new one)")
        parser.addoption("--store", choices=stores.ENGINES, default=None,
                         help="the engine the tests run on (default: STORE, else lmdb)")
    except ValueError:
        # Several test folders given at once each bring these options.
        pass


def pytest_configure(config):
    global _seed
    config.addinivalue_line("markers", "limit(seconds): how long this test may take")
    config.addinivalue_line("markers", "lmdb(why): about the embedded engine alone")
    config.addinivalue_line("markers", "fdb: needs FoundationDB, whatever --store says")
    chosen = config.getoption("--store", default=None)
    if chosen:
        stores.choose(chosen)
    if _seed is None:
        given = config.getoption("--seed", default=None)
        if given is None and os.environ.get("SEED"):
            given = int(os.environ["SEED"])
        _seed = random.SystemRandom().randrange(1 << 32) if given is None else given


def pytest_collection_modifyitems(config, items):
    """On FoundationDB the tests of the embedded engine's files and ways are no tests at all."""
    if stores.on_fdb():
        gone = [item for item in items if item.get_closest_marker("lmdb")]
        if gone:
            config.hook.pytest_deselected(items=gone)
            items[:] = [item for item in items if not item.get_closest_marker("lmdb")]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture starts a cluster that can't be had."""
    if stores.on_fdb() or item.get_closest_marker("fdb"):
        why = cluster.why_missing()
        if why and os.environ.get("REQUIRE_FDB", "0") not in ("", "0"):
            pytest.fail(f"{why}, and REQUIRE_FDB is set", pytrace=False)
        if why:
            pytest.skip(why)


def pytest_unconfigure(config):
    cluster.end_shared()


_told = False


def pytest_terminal_summary(terminalreporter):
    """Always, also with -q, which leaves the header out; once, however many folders."""
    global _told
    if not _told:
        terminalreporter.write_line(f"seed: {_seed}")
        _told = True


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed:
        line = f"replay with: --seed {_seed}"
        if line not in (text for _, text in report.sections):
            report.sections.append(("seed", line))
    # Fixtures look here to know whether to show or keep what they hold.
    setattr(item, f"report_{report.when}", report)


@pytest.fixture(scope="session")
def seed():
    return _seed


@pytest.fixture
def rng(request, seed):
    """Random numbers that depend on the seed and on this test alone."""
    return random.Random(f"{seed}:{request.node.nodeid.split('/')[-1]}")


@pytest.fixture(autouse=True)
def time_limit(request):
    """A test that hangs fails with a trace instead of holding everything up."""
    mark = request.node.get_closest_marker("limit")
    seconds = (mark.args[0] if mark else 120) * SLOW

    def on_alarm(*unused):
        raise TimeoutError(f"the test took longer than {seconds:g} s")

    old = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    # A call stuck inside a C library never comes back to the handler above.
    faulthandler.dump_traceback_later(seconds + 60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


def new_folder(where=None):
    """A short path: a socket's has to stay under 108 bytes. KEEP=1 leaves it behind."""
    return Path(tempfile.mkdtemp(prefix="fdbnbd-", dir=where))


@pytest.fixture
def folder(request):
    path = new_folder()
    yield path
    _drop(path)


@pytest.fixture(scope="module")
def module_folder(request):
    path = new_folder()
    yield path
    _drop(path)


def _drop(path):
    if os.environ.get("KEEP"):
        print(f"kept: {path}")
    else:
        shutil.rmtree(path, ignore_errors=True)


class Servers:
    """Makes servers and ends them all; a test that passed also wants clean ends."""

    def __init__(self, folder):
        self.folder = folder
        self.made = []
        self._numbers = itertools.count()

    def make(self, volumes=None, args=(), **more):
        server = Server(self.folder / f"n{next(self._numbers)}", volumes, args, **more)
        self.made.append(server)
        return server

    def start(self, volumes=None, args=(), **more):
        return self.make(volumes, args, **more).start()

    def end(self, clean):
        problems = []
        for server in self.made:
            if server.process is None:
                continue
            try:
                if clean:
                    server.check_alive()
                    server.stop()
                else:
                    server.kill()
            except AssertionError as e:
                server.kill()
                problems.append(str(e))
        assert not problems, "\n".join(problems)

    def logs(self):
        return "\n".join(s.log_tail() for s in self.made)


def _ended(node, servers):
    report = getattr(node, "report_call", None)
    clean = report is not None and report.passed
    if report is not None and report.failed:
        print(servers.logs())
    servers.end(clean)


@pytest.fixture
def servers(request, folder):
    """Starts servers of the test's own; all are gone when it is over."""
    made = Servers(folder)
    yield made
    _ended(request.node, made)


@pytest.fixture(scope="module")
def module_servers(request, module_folder):
    """As `servers`, but kept for all tests of a file."""
    made = Servers(module_folder)
    yield made
    if request.session.testsfailed:
        print(made.logs())
    made.end(clean=True)


@pytest.fixture
def clients():
    """connect(...) as rawnbd.connect; all connections are closed when the test is over."""
    made = []

    def connect(server, *args, **more):
        client = rawnbd.connect(server, *args, **more)
        made.append(client)
        return client

    def raw(server, **more):
        client = rawnbd.Client(server, **more)
        made.append(client)
        return client

    connect.raw = raw
    yield connect
    for client in made:
        client.close()

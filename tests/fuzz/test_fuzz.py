"""Each fuzzer for FUZZ_S seconds (30; 600 with LONG=1), the inputs that once failed, and whether the
fuzzers can fail at all. docs/fuzzing.md is the manual."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

import run

LONG = os.environ.get("LONG", "0") not in ("", "0")
FUZZ_S = int(os.environ.get("FUZZ_S") or (600 if LONG else 30))
JOBS = int(os.environ.get("FUZZ_JOBS") or min(2, os.cpu_count() or 1))

# What each kind of planted fault is reported as (tests/fuzz/planted.c).
FAULTS = {
    "read": "AddressSanitizer: heap-buffer-overflow",
    "undefined": "runtime error: signed integer overflow",
    "check": "libFuzzer: deadly signal",
    "leak": "LeakSanitizer: detected memory leaks",
    "memory": "libFuzzer: out-of-memory",
    "endless": "libFuzzer: timeout",
}


@pytest.fixture(scope="session")
def built():
    run.build()


@pytest.fixture(scope="session")
def outcomes(built):
    """Of all targets, run beside one another: by name, what is to be waited for."""
    with ThreadPoolExecutor(JOBS) as pool:
        yield {name: pool.submit(run.run, name, FUZZ_S) for name in run.targets()}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_its_input_kept(built, tmp_path, fault):
    outcome = run.run("planted", 60, env={"PLANTED": fault}, crashes=tmp_path,
                      options=["-timeout=2"])
    assert outcome.status != 0
    assert FAULTS[fault] in outcome.text
    assert outcome.crashes, outcome.text
    status, text = run.replay("planted", outcome.crashes, env={"PLANTED": fault},
                              options=["-timeout=2"])
    assert status != 0 and FAULTS[fault] in text
    assert run.replay("planted", outcome.crashes)[0] == 0, "it fails without the fault, too"


@pytest.mark.parametrize("target", run.targets())
def test_inputs_that_once_failed_pass(built, target):
    files = sorted(path for folder in ("corpus", "regress")
                   for path in (run.HERE / folder / target).glob("*"))
    assert files, f"{target} has no inputs to begin with"
    status, text = run.replay(target, files)
    assert status == 0, text


@pytest.mark.parametrize("target", run.targets())
def test_finds_nothing(outcomes, target):
    outcome = outcomes[target].result()
    print(outcome.line())
    assert outcome.status == 0, outcome.failure()
    assert outcome.executions > 0 and outcome.edges > 0, outcome.text

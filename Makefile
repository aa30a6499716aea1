# A short front for meson: the commands a person types. The build itself is in meson.build.

BUILD = build

PREFIX = /usr/local
SYSCONFDIR = /etc

.PHONY: all run install deb check check-long simulate mutants simulate-mutants soak bench clean

all: $(BUILD)/build.ninja
	@ninja -C $(BUILD) fdb-nbd

$(BUILD)/build.ninja: | tools
	@meson setup $(BUILD)

.PHONY: tools
tools:
	@for tool in gcc meson ninja pkg-config; do \
	    command -v $$tool >/dev/null || { \
	        echo "$$tool is missing; scripts/install-deps.sh build installs what the build needs" >&2; \
	        exit 1; }; \
	done

# Installs what is missing, builds, and serves a volume to try things with. exec: Ctrl-C goes to
# the server itself.
run:
	@scripts/install-deps.sh build
	@$(MAKE) --no-print-directory all
	@exec $(BUILD)/fdb-nbd serve --create example:1G --listen localhost:10809

# Installs the program and what belongs to it below $(DESTDIR)$(PREFIX): units, the service's user
# and directories, man pages, completions; settings below $(DESTDIR)$(SYSCONFDIR). On the machine
# itself systemd-sysusers, systemd-tmpfiles --create and systemctl daemon-reload come next.
install: $(BUILD)/build.ninja
	@meson configure $(BUILD) --prefix=$(PREFIX) --sysconfdir=$(SYSCONFDIR)
	@ninja -C $(BUILD) fdb-nbd
	@DESTDIR=$(DESTDIR) meson install -C $(BUILD) --no-rebuild

# Builds the Debian package, build/deb/fdb-nbd_*.deb.
deb:
	@scripts/install-deps.sh build package
	@scripts/make-deb.sh $(BUILD)/deb

check:
	@scripts/install-deps.sh build test fuzz package
	@/usr/bin/python3 scripts/check.py

check-long:
	@scripts/install-deps.sh build test fuzz
	@/usr/bin/python3 scripts/check.py --long

# Runs the simulator: SEEDS of them, from FIRST on (without it: from the clock).
SEEDS = 1000
simulate:
	@scripts/install-deps.sh build test
	@$(MAKE) --no-print-directory $(BUILD)/build.ninja
	@meson configure $(BUILD) -Dtests=enabled
	@ninja -C $(BUILD) tests/simulate tests/fdb/libfdb_c.so
	@$(BUILD)/tests/simulate --seeds $(SEEDS) $(if $(FIRST),--first $(FIRST))

# Shows that the crash tests notice planted faults.
mutants:
	@scripts/install-deps.sh build test
	@/usr/bin/python3 tests/crash/mutants.py

# Shows that the simulator finds planted faults.
simulate-mutants:
	@scripts/install-deps.sh build test
	@/usr/bin/python3 tests/sim/mutants.py

# Runs the fuzzers (docs/fuzzing.md), FUZZ_S seconds each, or those that TARGET names; keeps what they
# found as inputs in the repository; shows what these reach.
FUZZ_S = 30
TARGET =
.PHONY: fuzz fuzz-merge fuzz-coverage
fuzz:
	@scripts/install-deps.sh build fuzz
	@FUZZ_S=$(FUZZ_S) /usr/bin/python3 tests/fuzz/run.py run $(TARGET)

fuzz-merge:
	@scripts/install-deps.sh build fuzz
	@/usr/bin/python3 tests/fuzz/run.py merge $(TARGET)

fuzz-coverage:
	@scripts/install-deps.sh build fuzz
	@/usr/bin/python3 tests/fuzz/run.py coverage $(TARGET)

# An hour (SOAK_S seconds) of mixed load with clients, servers and commands killed at random, all
# verified all the time, on STORE (lmdb or fdb; both: one after the other). It prints its SEED, which
# replays the choices. SOAK_LOAD: how much of the processors all of it may use (0.5: half of one).
SOAK_S = 3600
STORE = lmdb
soak:
	@scripts/install-deps.sh build test
	@$(MAKE) --no-print-directory all
	@for store in $(if $(filter both,$(STORE)),lmdb fdb,$(STORE)); do \
	    nice /usr/bin/python3 tests/soak/soak.py --seconds $(SOAK_S) --store $$store \
	        $(if $(SEED),--seed $(SEED)) $(if $(SOAK_LOAD),--load $(SOAK_LOAD)) || exit 1; done

# Measures this server beside others: everything (BENCH=full), a part in few minutes (quick), the
# long random writes (sustained), or workloads by their names (bench/peers.py list names them).
# A full run's figures are kept in bench/results/ and shown in docs/benchmarks.md.
BENCH = full
bench:
	@scripts/install-deps.sh build bench
	@$(MAKE) --no-print-directory $(BUILD)/build.ninja
	@meson configure $(BUILD) -Dtests=enabled
	@ninja -C $(BUILD) fdb-nbd tests/bare_sync tests/fdb_bare
	@/usr/bin/python3 bench/peers.py run $(BENCH)

clean:
	rm -rf $(BUILD) build-asan build-tsan build-fuzz build-fuzz-coverage

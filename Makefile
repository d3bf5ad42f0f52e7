# The doors of the house. `make demo` and `make test` set up all that they need: a Rust toolchain and Python 3.11+ must be there.
#   make demo        build, start the daemon, and show a real vLLM reusing what another process computed
#   make test        everything that must hold, real vLLM included; prints where the minutes went
#   make check       the edit loop: format, lints, unit and property tests, house rules
#   make sim         fresh seeds of the simulator, for a minute or SIM_FOR=10m
#   make soak        the long statistical runs of which `make test` has a small sample
#   make engine-matrix  the connector's tests with every vLLM that runs here; writes docs/compatibility.md (an hour, 13 GB more the first time)
#   make gpu-check   measure what the device path hangs on; for a machine with an NVIDIA GPU (no registry needed)
#   make gpu-test    the device path itself: tests on an NVIDIA GPU, then `kvd bench gpu`
#   make gpu-vllm GPU_PY=…  a real vLLM on an NVIDIA GPU, with the Python that has it: shapes of models, then `make bench-hooks` there
#   make ptx         compile the GPU kernel anew, after a change of it (no GPU needed)
#   make bench       `kvd bench session`, and lookups from Python; the others: `kvd bench --help`
#   make bench-hooks  what the connector costs in vLLM's processes, by model shape; BENCH="--shapes llama --json" chooses
#   make bench-baselines  foyer and LMCache beside `kvd bench nvme`; BENCH="--dir DIR --bytes SIZE" goes to both
#   make wheel       the Python package `kvdaemon`, in target/wheels

PYTHON ?= python3
VENV := .venv/vllm
# How long `make sim` runs fresh seeds.
SIM_FOR = 60s
PY := $(VENV)/bin/python
CARGO := cargo
CRATES := --workspace --exclude kvd-python
export CARGO_TERM_PROGRESS_WHEN = never

.PHONY: demo test check soak engine-matrix gpu-check gpu-test gpu-vllm ptx wheel build venv plugin fmt clippy unit blackbox sim vllm demo-short bench bench-hooks bench-baselines fuzz-build tools help

help:
	@sed -n '2,16p' Makefile | cut -c3-

tools:
	@command -v $(CARGO) >/dev/null || { echo "kvd needs Rust (cargo). Install rustup from your distribution or rustup.rs, then run make again."; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "kvd needs Python 3.11 or newer as '$(PYTHON)'. On Debian or Ubuntu: apt-get install python3 python3-venv. Or set PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@command -v cc >/dev/null || { echo "kvd needs a C compiler and linker. On Debian or Ubuntu: apt-get install gcc libc6-dev"; exit 1; }

build: tools
	$(CARGO) build --release $(CRATES)

venv: tools
	@$(PYTHON) scripts/vllm_env.py --path $(VENV)

wheel: venv
	$(VENV)/bin/maturin build --release --quiet -m python/Cargo.toml --interpreter $(PY) --out target/wheels

plugin: wheel
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --force-reinstall "$$(ls -t target/wheels/kvdaemon-*.whl | head -1)"

demo: build plugin
	@$(PY) demo/demo.py --kvd target/release/kvd

demo-short: build plugin
	@$(PY) demo/demo.py --kvd target/release/kvd --short

fmt:
	$(CARGO) fmt --all --check

clippy:
	$(CARGO) clippy --release --workspace --all-targets --quiet -- -D warnings

unit:
	$(CARGO) test --release $(CRATES) --lib --bins --test house --quiet
	$(CARGO) test --release -p kvd-core -p kvd-sim --tests --quiet

blackbox:
	$(CARGO) test --release $(CRATES) --quiet

sim: build
	target/release/kvd sim --for $(SIM_FOR)

vllm: build plugin
	$(PY) -m pytest tests/vllm tests/gpu -q --durations=25

check: tools
	@$(PYTHON) scripts/stages.py fmt clippy unit

test: tools
	@$(PYTHON) scripts/stages.py venv fmt clippy blackbox sim plugin vllm demo-short

soak: SIM_FOR = 10m
soak: build plugin sim
	KVD_TEST_SOAK=1 $(CARGO) test --release $(CRATES) --quiet
	KVD_TEST_SOAK=1 $(PY) -m pytest tests/vllm -q --durations=25

# MATRIX="--only 0.31 --tests lora" runs a part of it, and writes no page; MATRIX=--resume goes on after an interruption.
engine-matrix: build wheel
	@$(PYTHON) scripts/engine_matrix.py $(MATRIX)

bench: build plugin
	target/release/kvd bench session
	$(PY) scripts/bench_lookup.py

bench-hooks: build plugin
	@$(PY) scripts/bench_hooks.py $(BENCH)

bench-baselines: tools
	$(CARGO) build --release --manifest-path benches/baselines/foyer/Cargo.toml --target-dir target/baselines
	target/baselines/release/kvd-baseline-foyer $(BENCH)
	@$(PYTHON) benches/baselines/lmcache.py $(BENCH)

fuzz-build:
	cd fuzz && $(CARGO) +nightly fuzz build

gpu-check:
	@$(PYTHON) scripts/gpu_check.py

gpu-test: build plugin
	$(CARGO) test --release -p kvd-device --test cuda -- --include-ignored
	$(CARGO) test --release -p kvd --test cuda -- --include-ignored
	$(PY) -m pytest tests/gpu -q
	target/release/kvd bench gpu

gpu-vllm: build wheel
	@test -n "$(GPU_PY)" || { echo "say which Python has a vLLM built for CUDA, 0.32 or newer: make gpu-vllm GPU_PY=…"; exit 1; }
	$(GPU_PY) -m pip install -q --disable-pip-version-check pytest
	$(GPU_PY) -m pip install -q --disable-pip-version-check --no-deps --force-reinstall "$$(ls -t target/wheels/kvdaemon-*.whl | head -1)"
	KVD_TEST_GPU=1 $(GPU_PY) -m pytest tests/gpu/test_vllm.py tests/vllm/test_shapes.py -q
	KVD_TEST_GPU=1 $(GPU_PY) scripts/bench_hooks.py $(BENCH)

ptx: tools
	@$(PYTHON) scripts/ptx.py

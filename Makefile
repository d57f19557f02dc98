# Everything a newcomer types; `make demo` and `make test` set up what they need, in a cache outside the tree.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune-operator
UV_VERSION := 0.13.9
UV := $(CACHE)/uv-$(UV_VERSION)/bin/uv
VENV := $(CACHE)/venv
UNSLOTH_VENV := $(CACHE)/venv-unsloth
PY := $(VENV)/bin/python
ARGS ?=
# Two threads that wait without spinning: a machine that is shared loses three quarters of its time to spinning ones.
BENCH_THREADS := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive

# The virtual environment holds third-party packages only, so that several clones can share it; our own packages are found here.
export PYTHONPATH := $(CURDIR)/crds:$(CURDIR)/operator:$(CURDIR)/trainer
export FINETUNE_BIN ?= $(CACHE)/bin
export UV_SYSTEM_CERTS ?= 1
export TORCHAO_FORCE_SKIP_LOADING_SO_FILES := 1

.DEFAULT_GOAL := help
.PHONY: help setup cluster-setup unsloth-setup test test-unsloth pytest lint format types demo crd lock images cluster soak soak-trainer bench-architectures bench-qat bench-quality bench-schemes bench-memory bench-padding bench-mirror bench-gpu bench-operator clean-images clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed, $$($(PYTHON) --version) was found; name another with PYTHON=python3.12" >&2; exit 1; }
	@echo "installing uv $(UV_VERSION) into $(CACHE)"
	@bootstrap=$(CACHE)/bootstrap; install="-m pip install --quiet --disable-pip-version-check --target $(CACHE)/uv-$(UV_VERSION) uv==$(UV_VERSION)"; \
	if $(PYTHON) -m venv --clear $$bootstrap >/dev/null 2>&1; then $$bootstrap/bin/python $$install; \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then $(PYTHON) $$install; \
	else echo "$(PYTHON) has neither venv nor pip; on Debian: apt-get install python3-venv" >&2; exit 1; fi; \
	rm -rf $$bootstrap

# A virtual environment ($1) from hashed requirements ($2); nothing to do when they are as they were. $3 says what it takes, $4 ends it.
# Compiled at once: where PYTHONDONTWRITEBYTECODE is set, each process that imports torch and transformers would take twice as long to begin.
define environment
	@wanted="$$(cat $2 | sha256sum) $$($(PYTHON) --version)"; \
	mkdir -p $(CACHE); exec 9>$(CACHE)/.$(notdir $1).lock; flock -n 9 || { echo "waiting for another set-up"; flock 9; }; \
	[ "$$(cat $1/.requirements 2>/dev/null)" = "$$wanted" ] || { \
	  echo "installing $3"; \
	  $(UV) venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $1; \
	  $(UV) pip sync --python $1 --require-hashes --compile-bytecode $2; $4 \
	  echo "$$wanted" > $1/.requirements; }
endef

setup: $(UV) ## the virtual environment, from hashed requirements; nothing to do when they are as they were
	$(call environment,$(VENV),requirements/dev.txt,the Python packages (3 GB to download; about 5 minutes the first time))

# uv checks the hashes of constraints too, so pytest comes as requirements/dev.txt has it.
unsloth-setup: $(UV) ## the environment of the unsloth backend, whose versions differ
	$(call environment,$(UNSLOTH_VENV),requirements/unsloth.txt,the environment of the unsloth backend (0.3 GB to download beside what setup has),$(UV) pip install --python $(UNSLOTH_VENV) --constraint requirements/dev.txt pytest pytest-asyncio pytest-timeout;)

cluster-setup: ## the programs of the test cluster: Debian packages, and Kubernetes, helm and versitygw from Go modules
	@tests/cluster/setup.sh

# What needs no cluster has one thread a process, so it runs in as many as there are cores; the clusters need the machine to themselves.
test: ## everything: lint, types, import rules, unit, trainer, unsloth, cluster and end-to-end tests
	@$(MAKE) --no-print-directory -j2 setup cluster-setup
	@$(MAKE) --no-print-directory unsloth-setup
	@$(MAKE) --no-print-directory lint
	@images/build.sh --in-time operator trainer & building=$$!; status=0; \
	$(PY) -m pytest tests/unit tests/trainer --numprocesses $$(nproc) --dist loadfile $(ARGS) || status=$$?; \
	$(MAKE) --no-print-directory test-unsloth || status=$$?; \
	$(PY) -m pytest tests/cluster tests/e2e $(ARGS) || status=$$?; \
	wait $$building || true; exit $$status

test-unsloth: setup unsloth-setup ## the unsloth backend on the CPU, in its own environment: the same whole runs, the proof included; plain peft loads its adapter
	@$(UNSLOTH_VENV)/bin/python -m pytest tests/trainer/backends tests/trainer/pipeline/test_whole_run.py $(ARGS)
	@FINETUNE_UNSLOTH_PYTHON=$(UNSLOTH_VENV)/bin/python $(PY) -m pytest tests/unsloth $(ARGS)

pytest: setup ## some tests: make pytest ARGS="tests/unit -k digest"
	@$(PY) -m pytest $(ARGS)

lint: setup types ## formatting, lint, types, import rules
	@$(VENV)/bin/ruff format --check --quiet
	@$(VENV)/bin/ruff check --quiet
	@$(VENV)/bin/lint-imports --no-cache

types: setup ## strict type checks
	@$(PY) -m mypy

format: setup ## formats the code and mends what lint can mend
	@$(VENV)/bin/ruff format
	@$(VENV)/bin/ruff check --fix

demo: setup ## fine-tunes a small model on this machine: one YAML in, one verified, quantized model out (.demo/)
	@$(PY) -m finetune_trainer.cli run examples/laptop.yaml --workdir .demo

crd: setup ## the CRD, the chart's RBAC rules and the generated pages of docs/ from the code
	@$(PY) -m finetune_api.crd && $(PY) -m finetune_api.docs && $(PY) -m finetune_operator.metrics && $(PY) -m finetune_operator.permissions
	@$(PY) -m finetune_trainer.qat.schemes_page && $(PY) -m finetune_trainer.memory.page && $(PY) -m finetune_trainer.troubleshooting

lock: $(UV) ## the pinned, hashed requirement files; unsloth's has the trainer's versions wherever unsloth allows them
	@for target in operator trainer unsloth dev; do \
	  extras="--extra $$target"; [ $$target != dev ] || extras="--extra operator --extra trainer --extra dev"; \
	  [ $$target != unsloth ] || { extras="--extra trainer --extra unsloth"; cp requirements/trainer.txt requirements/unsloth.txt; }; \
	  $(UV) pip compile -q pyproject.toml $$extras --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header -o requirements/$$target.txt; \
	done

images: ## both container images, with Docker or buildah
	@images/build.sh operator trainer

cluster: cluster-setup ## a whole Kubernetes that runs until Ctrl-C; prints its KUBECONFIG
	@tests/cluster/up.sh $(CACHE)/cluster

# Half an hour: 100 FineTuneJobs, 100 deaths of the operator, one request in five fails; then ten minutes without an API server.
soak: setup cluster-setup ## the fault tests at full size (half an hour); SOAK_SEED=123 replays a seed
	@SOAK_JOBS=100 SOAK_KILLS=100 SOAK_AWAY_SECONDS=600 $(PY) -m pytest tests/cluster/test_faults.py -s -o timeout=3600 $(ARGS)

soak-trainer: setup cluster-setup ## 100 kills of runs at random moments, each ends with the bits of an undisturbed one; SOAK_SEED=123 replays a seed
	@SOAK_KILLS=$${SOAK_KILLS:-100} $(PY) -m pytest tests/trainer/pipeline/test_kills.py -s -o timeout=7200 $(ARGS)

bench-qat: setup ## exact QAT against plain LoRA: time and memory
	@$(PY) benchmarks/qat.py $(ARGS)

bench-schemes: setup ## size and held-out loss of each scheme on SmolLM2; measures what is missing, then writes docs/schemes.md
	@$(BENCH_THREADS) $(PY) benchmarks/schemes.py $(ARGS) && $(PY) -m finetune_trainer.qat.schemes_page

bench-memory: setup ## the memory estimate against what training processes really take; the rows of docs/memory.md
	@PYTHONPATH=$(PYTHONPATH):$(CURDIR)/tests $(BENCH_THREADS) $(PY) benchmarks/memory.py $(ARGS) && $(PY) -m finetune_trainer.memory.page

bench-architectures: setup ## which models the line works for: each of transformers', tiny, through a whole job; tries what is missing, writes docs/models.md
	@PYTHONPATH=$(PYTHONPATH):$(CURDIR)/tests $(PY) -W ignore benchmarks/architectures.py $(ARGS)

bench-padding: setup ## what rows of different lengths cost: tokens computed for each one there is, and micro-batches a step
	@PYTHONPATH=$(PYTHONPATH):$(CURDIR)/tests $(PY) -W ignore benchmarks/padding.py

bench-mirror: setup cluster-setup ## what a checkpoint costs: bytes, and seconds to seal, mirror and fetch it
	@PYTHONPATH=$(PYTHONPATH):$(CURDIR)/tests $(PY) benchmarks/mirror.py $(ARGS)

bench-quality: setup ## what exact QAT recovers of PTQ's loss, on real text: makes the missing cells (minutes each), prints the table; FRESH=2 makes two again
	@$(BENCH_THREADS) $(PY) -W ignore benchmarks/quality.py $(if $(FRESH),--fresh $(FRESH)) $(ARGS)

bench-gpu: setup ## exact QAT on an NVIDIA GPU: training, the kernels that serve, what compiled quantizers would gain
	@$(PY) -W ignore benchmarks/gpu.py $(ARGS)

bench-operator: setup cluster-setup ## the operator under load: latency, throughput, writes, memory; minutes with ARGS="--jobs 300"
	@PYTHONPATH=$(PYTHONPATH):$(CURDIR)/tests $(PY) benchmarks/operator_bench.py $(ARGS)

clean-images: ## removes the built images, their layers too (about 15 GB)
	@rm -rf $(CACHE)/images $(CACHE)/containerd
	@! command -v buildah >/dev/null || buildah images --format '{{.Name}}:{{.Tag}}' | awk '/^localhost\/finetune-/' | xargs -r buildah rmi --force

clean: ## removes what runs left in the tree; the cache stays
	@rm -rf .demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist

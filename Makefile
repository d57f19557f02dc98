# Everything a newcomer types; `make demo` and `make test` set up what they need, in a cache outside the tree.
SHELL := bash
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune-operator
VENV := $(CACHE)/venv
BIN := $(VENV)/bin
UV_VERSION := 0.11.0
export TORCHAO_FORCE_SKIP_LOADING_SO_FILES := 1

.PHONY: lock
lock:
	@for target in operator trainer unsloth dev; do \
	  extras="--extra $$target"; [ $$target = dev ] && extras="--extra operator --extra trainer --extra dev"; \
	  uv pip compile -q pyproject.toml $$extras --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header -o requirements/$$target.txt || exit 1; \
	done

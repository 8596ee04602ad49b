# Needs make, python3 (3.11 or 3.12, with venv) and a package index. `make` alone lists the targets.
PYTHON ?= python3
WORKERS ?= 2
# auto: a machine with CUDA whose python already has torch keeps that torch. Or: pinned (constraints.txt), system.
TORCH ?= auto

RUN := .venv/bin/python
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help .venv demo test test-all check format clean

help:  ## list the targets
	@grep -hE '^[-.a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([-.a-z]+):.*## /  make \1\t/' | expand -t 18

.venv: $(STAMP)  ## install everything into .venv; runs again only when pyproject.toml or constraints.txt change

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into .venv: about 3 minutes and 2 GB, once."
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || \
	    { echo "make: '$(PYTHON)' must be Python 3.11 or 3.12 with venv (Debian: apt install python3-venv); name another: make PYTHON=python3.11" >&2; exit 1; }
	@torch=$(TORCH); \
	if [ $$torch = auto ]; then \
	    torch=pinned; \
	    if nvidia-smi >/dev/null 2>&1 && $(PYTHON) -c 'import torch' 2>/dev/null; then torch=system; fi; \
	fi; \
	case $$torch in \
	    pinned) $(PYTHON) -m venv .venv && cp constraints.txt .venv/constraints.txt ;; \
	    system) $(PYTHON) -m venv --system-site-packages .venv && \
	        $(RUN) -c 'import torch; print("keeping torch", torch.__version__, "of $(PYTHON)")' && \
	        grep -v '^torch==' constraints.txt > .venv/constraints.txt ;; \
	    *) echo "make: TORCH=$(TORCH) is not one of auto, pinned, system" >&2; exit 1 ;; \
	esac || { echo "make: no .venv was made with '$(PYTHON)' and TORCH=$$torch; remove .venv and try again with" \
	    "another PYTHON, or with TORCH=pinned" >&2; exit 1; }
	@$(RUN) -m pip install -q --disable-pip-version-check -c .venv/constraints.txt -e ".[train,deepspeed,eval,data,dev]"
	@# their requirements would replace torch, or are not needed: see pyproject.toml
	@$(RUN) -m pip install -q --disable-pip-version-check -c .venv/constraints.txt --no-deps taming-transformers-rom1504 pycocoevalcap
	@touch $@

demo: $(STAMP)  ## train the demo model further, sample pairs, evaluate, say where the pictures are
	$(RUN) train.py configs/train/demo.yaml
	@rm -rf runs/demo/samples runs/demo/eval
	$(RUN) sample.py runs/demo/final --task pair --domain xray,pathology -n 16 --out runs/demo/samples
	$(RUN) -m eval.run eval/demo.yaml --model runs/demo/final --out runs/demo/eval --limit 24
	@echo
	@echo "Look at them (all synthetic):"
	@echo "  contact sheet  runs/demo/samples/contact_sheet.png"
	@echo "  report page    runs/demo/eval/report.html"

test: $(STAMP)  ## the test suite, WORKERS=2 processes
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile -q

test-all: $(STAMP)  ## the test suite with the slow ones: every engine from every other, twenty kills of each
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile -q -m "slow or not slow"

check: $(STAMP)  ## lint, format, types, layers
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	.venv/bin/lint-imports

format: $(STAMP)  ## rewrite the sources as ruff likes them
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove caches and build leftovers (.venv and runs/ stay)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

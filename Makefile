# make demo     set up, then the whole way from a dense LLaMA to a trained mixture of experts
# make test     set up, then lint, types and the CPU test suite
# make test-5.17  models and kernels again with the oldest transformers that is tested
# make docs     docs/commands.md from the help texts
# make install  .venv with the pinned dependencies and this package, editable
#               TORCH_INDEX=URL takes torch from another package index (see the README)
#               PYTHON=python3.12 picks the interpreter

.PHONY: demo test test-5.17 install lint docs
.DEFAULT_GOAL := install
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& { echo $$p; break; }; done)
BIN := .venv/bin
STAMP := .venv/.installed
STAMP517 := .venv517/.installed
OUT ?= runs/demo

demo: install
	@$(BIN)/moesaic demo -o $(OUT) --overwrite

test: install lint
	@OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m "not slow and not gpu"

test-5.17: $(STAMP517)
	@OMP_NUM_THREADS=2 .venv517/bin/python -m pytest -q -m "not slow and not gpu" \
		-p no:cacheprovider tests/models tests/kernels

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/mypy

docs: install
	@$(BIN)/python docs/make_commands.py
	@$(BIN)/python docs/make_training.py

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "moesaic needs Python 3.11 to 3.13: apt install python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: apt install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (a few minutes the first time)"
ifdef TORCH_INDEX
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		--index-url $(TORCH_INDEX) torch
endif
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[cpu,test]'
	@touch $(STAMP)

# An environment over the first one: only what constraints-5.17.txt names is installed anew.
$(STAMP517): $(STAMP) constraints-5.17.txt
	@test -x .venv517/bin/python || $(BIN)/python -m venv .venv517
	@.venv517/bin/python -c 'import pathlib, sysconfig; \
		base = pathlib.Path("$(BIN)/python").absolute().parents[1].glob("lib/python*/site-packages"); \
		file = pathlib.Path(sysconfig.get_path("purelib"), "moesaic-base.pth"); \
		file.write_text(f"import site; site.addsitedir({str(next(base))!r})\n")'
	@.venv517/bin/python -m pip install -q --disable-pip-version-check --ignore-installed \
		--no-warn-conflicts --no-deps -r constraints-5.17.txt
	@touch $(STAMP517)

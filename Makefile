# Every target makes what it needs on a fresh machine with Python 3.11 or newer and pip.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
LIGHT := .venv-light
DOCS := .venv-docs
S3 := .venv-s3
BIN := $(VENV)/bin
# PyTorch's own wheel index: the CPU build is published there alone.
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu
PIP_FLAGS := --quiet --disable-pip-version-check
DEMO_DIR ?= runs/demo

FIDELITY_DIR ?= runs/fidelity
BENCH_DIR ?= runs/bench
GPU_DIR ?= runs/gpu
# So many processes test at once, each whole files: a server that starts keeps one core busy.
TEST_PROCESSES ?= 2
# A thread to a process: what they compute is small, and they share the cores.
ONE_THREAD := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
PYTEST := -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
# Of benchmarks.gpu.run: --model, --gsm8k FILE where no hub is reached, --gate-scale; of vLLM.
GPU_OPTIONS ?=
GPU_FLAGS ?=

.PHONY: help setup setup-light setup-dev demo test test-unit test-contract test-kernels test-e2e \
	test-fidelity test-versions vllm-diff fidelity fuzz soak bench bench-gpu dashboards pictures docs \
	lint format lock image clean

help: ## Show this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

# The CPU build's list leaves out packages whose only published builds want CUDA, hence --no-deps.
$(VENV)/.done: requirements/cpu.txt requirements/build.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX_URL) \
		"$$(grep '^torch==' requirements/cpu.txt)"
	$(BIN)/pip install $(PIP_FLAGS) --no-deps -r requirements/cpu.txt -r requirements/build.txt
	$(BIN)/pip install $(PIP_FLAGS) --no-deps --no-build-isolation --editable .
	@touch $@

# The light base alone, as people install it who only fetch and draw.
$(LIGHT)/.done: requirements/light.txt requirements/build.txt pyproject.toml
	$(PYTHON) -m venv $(LIGHT)
	$(LIGHT)/bin/pip install $(PIP_FLAGS) --no-deps -r requirements/light.txt \
		-r requirements/build.txt
	$(LIGHT)/bin/pip install $(PIP_FLAGS) --no-deps --no-build-isolation --editable .
	@touch $@

# What only developers need goes on top: .venv/.test has requirements/test.txt, and so on.
$(VENV)/.%: requirements/%.txt $(VENV)/.done
	$(BIN)/pip install $(PIP_FLAGS) --no-deps -r $<
	@touch $@

$(LIGHT)/.%: requirements/%.txt $(LIGHT)/.done
	$(LIGHT)/bin/pip install $(PIP_FLAGS) --no-deps -r $<
	@touch $@

setup: $(VENV)/.done ## Make .venv with what serves and measures, for the CPU
setup-light: $(LIGHT)/.done ## Make .venv-light with the light base
setup-dev: $(VENV)/.test $(VENV)/.dev $(LIGHT)/.unit ## Both, with tools for tests and lint

demo: setup ## Serve the bundled model, replay, fetch, draw, measure: 3 to 10 minutes on 2 cores
	$(BIN)/moescope demo --run-dir $(DEMO_DIR) --force

test: ## Run every test, and print what each stage took: 25 to 60 minutes on 2 cores
	@for stage in unit contract kernels e2e fidelity; do \
		SECONDS=0; $(MAKE) --no-print-directory test-$$stage || exit; \
		echo "== make test-$$stage: $$SECONDS s"; \
	done

test-unit: $(LIGHT)/.unit ## Unit tests, with the light base alone
	$(LIGHT)/bin/python $(PYTEST) tests/unit

test-contract: $(VENV)/.test $(S3)/.done ## The real app and collector around a fake engine; packages, pages
	MOESCOPE_S3_SERVER=$(abspath $(S3))/bin/moto_server $(BIN)/python $(PYTEST) \
		tests/contract tests/fuzz tests/packaging tests/docs/test_docs.py \
		tests/docs/test_console.py

# A server of S3, which wants packages that others pin otherwise.
$(S3)/.done: requirements/s3.txt
	$(PYTHON) -m venv $(S3)
	$(S3)/bin/pip install $(PIP_FLAGS) --no-deps -r requirements/s3.txt
	@touch $@

test-kernels: $(VENV)/.test ## GPU kernels, interpreted where there is no GPU; rest is skipped
	$(BIN)/python $(PYTEST) tests/kernels tests/gpu

test-e2e: $(VENV)/.test ## Real vLLM servers on the CPU: behavior, dashboards, the documents' code
	$(ONE_THREAD) $(BIN)/python $(PYTEST) tests/e2e tests/page tests/dashboards tests/docs/test_code.py \
		tests/docs/test_examples.py

test-fidelity: $(VENV)/.test ## Rows against HF transformers: schemes, situations, ranks
	$(ONE_THREAD) $(BIN)/python $(PYTEST) tests/fidelity

# One vLLM a lane: what requirements/vllm-VERSION.txt lists, on top of .venv.
LANES := .lanes
$(LANES)/%/.done: requirements/vllm-%.txt $(VENV)/.test
	rm -rf $(@D)
	$(BIN)/pip install $(PIP_FLAGS) --no-deps --target $(@D) -r $<
	@touch $@

# There is no CPU build of vLLM 0.33 yet: its Python files run over the libraries of 0.32's.
$(LANES)/0.33/.done: requirements/vllm-0.33.txt $(VENV)/.test
	rm -rf $(@D)
	$(BIN)/pip install $(PIP_FLAGS) --no-deps --target $(@D) -r $<
	find $(@D) -name '*.so' -delete
	cd $(VENV)/lib/python3.*/site-packages && find vllm -name '*.so' -exec \
		cp --parents --target-directory $(abspath $(@D)) {} +
	@touch $@

# The version that .venv holds needs nothing on top.
$(LANES)/0.32/.done: $(VENV)/.test
	mkdir -p $(@D)
	@touch $@

VERSIONS ?= 0.30 0.31 0.32 0.33
STAGES ?= contract serving fidelity
# Without what is about processes and files of moescope alone.
stage_contract := tests/contract $(addprefix --ignore tests/contract/test_,\
	$(addsuffix .py,archive archive_kills archive_s3 bounds link))
stage_serving := tests/e2e/test_serving.py tests/e2e/test_pauses.py
stage_fidelity := tests/fidelity --ignore tests/fidelity/test_half_precision.py  # moescope verify's
lane_0.33 := VLLM_TARGET_DEVICE=cpu \
	MOESCOPE_VLLM_BUILD="Python files of vllm 0.33.0, libraries of vllm-cpu 0.32.0"

lanes_done := $(VERSIONS:%=$(LANES)/%/.done)
test-versions: $(lanes_done) ## Test every supported vLLM, and write down what passed
	$(foreach version,$(VERSIONS),$(foreach stage,$(STAGES), \
		PYTHONPATH=$(abspath $(LANES)/$(version)) $(lane_$(version)) $(ONE_THREAD) \
		$(BIN)/python $(PYTEST) $(stage_$(stage)) -p tests.versions.evidence --evidence $(stage) &&)) true

vllm-diff: $(VENV)/.done ## Show what changed in what moescope relies on: FROM=0.32.0 TO=0.33.0
	$(BIN)/python -m tests.versions.diff $(FROM) $(TO)

fidelity: $(VENV)/.test ## Compare every route with HF transformers', and write the table
	mkdir -p $(FIDELITY_DIR)
	rm -f $(FIDELITY_DIR)/cells.jsonl
	MOESCOPE_CELLS=$(abspath $(FIDELITY_DIR))/cells.jsonl $(ONE_THREAD) $(BIN)/python $(PYTEST) tests/fidelity
	$(BIN)/python -m benchmarks.fidelity.table $(FIDELITY_DIR)/cells.jsonl \
		benchmarks/results/fidelity/gpu.jsonl --out benchmarks/results/fidelity/TABLE.md

FUZZ_EXAMPLES ?= 2000
fuzz: $(VENV)/.test ## Random requests and messages, $(FUZZ_EXAMPLES) a test: some minutes
	MOESCOPE_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/fuzz \
		tests/contract/test_sharing.py tests/unit/test_hostile*.py

# Of benchmarks.soak: --simulated REQUESTS, --served REQUESTS, --minutes N, --workers N, --out DIR.
SOAK_OPTIONS ?=
soak: $(VENV)/.test ## A million simulated requests, up to 50,000 of vLLM, with faults: up to 2 hours
	$(BIN)/python -m benchmarks.soak $(SOAK_OPTIONS)

bench: setup ## Measure again all that needs no GPU and an idle machine: about an hour
	$(BIN)/python -m benchmarks.cpu --out $(BENCH_DIR)

bench-gpu: ## Measure again all that needs a GPU of 141 GB, where .[cuda] is installed
	$(PYTHON) -m benchmarks.gpu.run --out $(GPU_DIR) $(GPU_OPTIONS) -- $(GPU_FLAGS)

# The pages need nothing of moescope, and nothing of moescope needs them.
$(DOCS)/.done: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install $(PIP_FLAGS) --no-deps -r requirements/docs.txt
	@touch $@

docs: $(DOCS)/.done ## Build the documentation, strictly: runs/site/index.html
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

lint: $(VENV)/.dev ## Format check, lint, types, container files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
	$(BIN)/yamllint --strict docker

dashboards: $(VENV)/.dev ## Write the Grafana dashboards' JSON anew
	$(BIN)/python -m dashboards.build

pictures: $(VENV)/.test ## Draw the pictures of the page anew, in chromium beside a server on the CPU
	$(BIN)/python -m tests.page.pictures

format: $(VENV)/.dev ## Format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

UV_COMPILE := uv pip compile --quiet --universal --python-version 3.11 --no-header \
	--no-emit-index-url --no-emit-find-links --no-emit-package moescope
# Each of these is held to the lists before it.
BESIDE_CPU := light build arrow unit test dev

lock: ## Compile requirements/*.in anew (needs uv)
	cd requirements && $(UV_COMPILE) --find-links $(TORCH_INDEX_URL)/torch/ cpu.in -o cpu.txt
	cd requirements && for name in $(BESIDE_CPU); do \
		$(UV_COMPILE) $$name.in -o $$name.txt || exit; \
	done
	cd requirements && $(UV_COMPILE) --no-config cuda.in -o cuda.txt
	cd requirements && $(UV_COMPILE) --no-config docs.in -o docs.txt
	cd requirements && $(UV_COMPILE) --no-config s3.in -o s3.txt

image: ## Build moescope:cpu, the container image for the CPU (needs Docker)
	docker build --file docker/Dockerfile.cpu --build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) \
		--tag moescope:cpu .

clean: ## Remove the environments
	rm -rf $(VENV) $(LIGHT) $(DOCS) $(S3)

# Every target makes what it needs on a fresh machine with Python 3.11 or newer and pip.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
LIGHT := .venv-light
BIN := $(VENV)/bin
# PyTorch's own wheel index: the CPU build is published there alone.
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu
PIP_FLAGS := --quiet --disable-pip-version-check
DEMO_DIR ?= runs/demo

FIDELITY_DIR ?= runs/fidelity
BENCH_DIR ?= runs/bench
GPU_DIR ?= runs/gpu
GPU_MODEL ?= Qwen/Qwen1.5-MoE-A2.7B-Chat
GPU_FLAGS ?= --max-model-len 8192
# Of tests.gpu.measure: --gsm8k FILE where no hub is reached, --gate-scale where weights are random.
GPU_OPTIONS ?=
MEASURE := $(PYTHON) -m tests.gpu.measure --model $(GPU_MODEL) $(GPU_OPTIONS)
# KV caches that leave room for the weights, once or four times, in 141 GB; by default three times.
ONE_SERVER := $(MEASURE) --part throughput --placement one-server --kv-cache-bytes 98784247808 \
	--out $(GPU_DIR)/one_server.json
SIDE_BY_SIDE := $(MEASURE) --kv-cache-bytes 4939212390
OWN_SERVERS := $(SIDE_BY_SIDE) --part throughput --out $(GPU_DIR)/own_servers.json --arm stock \
	--arm stock-again
OWN_TURNS := $(MEASURE) --part throughput --out $(GPU_DIR)/own_servers_turns.json \
	--load "4 conv" --rounds 4 --arm stock --arm stock-again
OWN_FLAGS := $(GPU_FLAGS) --max-num-seqs 256 --max-num-batched-tokens 2048
OVERHEAD := VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/moescope overhead --prompts $(BENCH_DIR)/prompts.txt

.PHONY: help setup setup-light demo test test-unit test-contract test-kernels test-e2e \
	test-fidelity fidelity bench bench-gpu dashboards lint format lock image clean

help: ## Show this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

# The CPU build's list leaves out packages whose only published builds want CUDA, hence --no-deps.
$(VENV)/.done: requirements/cpu.txt requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX_URL) \
		"$$(grep '^torch==' requirements/cpu.txt)"
	$(BIN)/pip install $(PIP_FLAGS) --no-deps -r requirements/cpu.txt -r requirements/dev.txt
	$(BIN)/pip install $(PIP_FLAGS) --no-deps --no-build-isolation --editable .
	@touch $@

# The light base alone, as people install it who only fetch and draw.
$(LIGHT)/.done: requirements/light.txt pyproject.toml
	$(PYTHON) -m venv $(LIGHT)
	$(LIGHT)/bin/pip install $(PIP_FLAGS) --no-deps -r requirements/light.txt
	$(LIGHT)/bin/pip install $(PIP_FLAGS) --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(VENV)/.done ## Make .venv with everything, for the CPU
setup-light: $(LIGHT)/.done ## Make .venv-light with the light base

demo: setup ## Serve the bundled model, replay, fetch, draw, measure: 3 to 5 minutes
	$(BIN)/moescope demo --run-dir $(DEMO_DIR)

test: test-unit test-contract test-kernels test-e2e test-fidelity ## Run every test: about 20 minutes

test-unit: setup-light ## Unit tests, with the light base alone
	$(LIGHT)/bin/python -m pytest tests/unit

test-contract: setup ## The real app and collector around a fake engine; what the wheel holds
	$(BIN)/python -m pytest tests/contract tests/packaging

test-kernels: setup ## GPU kernels, interpreted where there is no GPU; what needs one is skipped
	$(BIN)/python -m pytest tests/kernels tests/gpu

test-e2e: setup ## Real vLLM servers on the CPU, and Prometheus on one of them
	$(BIN)/python -m pytest tests/e2e tests/dashboards

test-fidelity: setup ## Every row against HF transformers: schemes, situations, ranks
	$(BIN)/python -m pytest tests/fidelity

fidelity: setup ## Compare routes with HF transformers', scheme by scheme, and write the table
	mkdir -p $(FIDELITY_DIR)
	rm -f $(FIDELITY_DIR)/cells.jsonl
	MOESCOPE_CELLS=$(abspath $(FIDELITY_DIR))/cells.jsonl $(BIN)/python -m pytest tests/fidelity
	$(BIN)/python -m tests.fidelity.table $(FIDELITY_DIR)/cells.jsonl \
		tests/fidelity/results/gpu.jsonl --out tests/fidelity/TABLE.md

bench: setup ## Measure again all that needs no GPU and an idle machine: about an hour
	mkdir -p $(BENCH_DIR)
	$(BIN)/python -m tests.bench.collector --out $(BENCH_DIR)/collector.json
	$(BIN)/python -m tests.bench.fetch --out $(BENCH_DIR)/fetch.json
	$(BIN)/python -m tests.bench.scrape --out $(BENCH_DIR)/scrape.json
	$(BIN)/python -m tests.bench.client_rate --out $(BENCH_DIR)/client_rate.json
	$(BIN)/python -m tests.bench.vllm_bench --out $(BENCH_DIR)/vllm_bench.json
	$(BIN)/moescope prompts sample --out $(BENCH_DIR)/prompts.txt
	$(OVERHEAD) --run-dir $(BENCH_DIR)/overhead --rounds 15 --arm stock --arm stock-again \
		--arm moescope --arm counts -- --dtype bfloat16 --enforce-eager --max-model-len 2048
	$(BIN)/python -m tests.bench.cpu_model $(BENCH_DIR)/24_layers/model
	$(OVERHEAD) --run-dir $(BENCH_DIR)/24_layers --model $(BENCH_DIR)/24_layers/model --rounds 30 \
		--max-tokens 16 -- --load-format dummy --enforce-eager --max-model-len 1024

bench-gpu: ## Measure again all that needs a GPU of 141 GB, where .[cuda] is installed
	mkdir -p $(GPU_DIR)
	$(MEASURE) --part fidelity_v2 --part fidelity_v1 --out $(GPU_DIR)/fidelity.json -- $(GPU_FLAGS)
	$(SIDE_BY_SIDE) --part stock_routing --out $(GPU_DIR)/stock_routing.json -- $(GPU_FLAGS)
	$(MEASURE) --part timeline --out $(GPU_DIR)/timeline.json -- $(GPU_FLAGS)
	$(SIDE_BY_SIDE) --part kernels --out $(GPU_DIR)/kernels.json --arm stock --arm stock-again \
		--arm moescope --arm counts -- $(OWN_FLAGS)
	$(ONE_SERVER) --load batch --load 64 --load 256 --load prefill --load GSM8K -- $(GPU_FLAGS)
	$(ONE_SERVER) --load 256 --stream-interval 10 -- $(GPU_FLAGS)
	$(ONE_SERVER) --load batch --load "64 concurrent" --arm detached --arm detached-again \
		--arm counts -- $(GPU_FLAGS)
	$(OWN_SERVERS) --load batch --load "64 concurrent" --arm moescope --arm routed-experts \
		-- $(OWN_FLAGS)
	$(OWN_SERVERS) --load batch --load "64 concurrent" --arm counts --arm installed -- $(OWN_FLAGS)
	$(OWN_TURNS) --arm moescope -- $(GPU_FLAGS)
	$(OWN_TURNS) --arm routed-experts -- $(GPU_FLAGS)
	$(PYTHON) -m tests.bench.overhead_table $(GPU_DIR)/o*.json \
		--picture $(GPU_DIR)/overhead.png

lint: setup ## Format check, lint, types, container files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
	$(BIN)/yamllint --strict docker

dashboards: setup ## Write the Grafana dashboards' JSON anew
	$(BIN)/python -m dashboards.build

format: setup ## Format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

UV_COMPILE := uv pip compile --quiet --universal --python-version 3.11 --no-header \
	--no-emit-index-url --no-emit-find-links --no-emit-package moescope

lock: ## Compile requirements/*.in anew (needs uv)
	cd requirements && $(UV_COMPILE) --find-links $(TORCH_INDEX_URL)/torch/ cpu.in -o cpu.txt
	cd requirements && $(UV_COMPILE) --find-links $(TORCH_INDEX_URL)/torch/ dev.in -o dev.txt
	cd requirements && $(UV_COMPILE) light.in -o light.txt
	cd requirements && $(UV_COMPILE) --no-config cuda.in -o cuda.txt

image: ## Build moescope:cpu, the container image for the CPU (needs Docker)
	docker build --file docker/Dockerfile.cpu --build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) \
		--tag moescope:cpu .

clean: ## Remove both environments
	rm -rf $(VENV) $(LIGHT)

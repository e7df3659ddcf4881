# Every target works on a fresh clone: .venv is made on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test unit unit-312 check format proto bench-coldstart bench-coldstart-smoke bench-hop \
	bench-fetch bench-tier bench-engine bench-gpu bench-gateway bench-overload bench-handover bench-policy bench-simulate \
	bench-alignment simulate-paper simulate-mixed fuzz clients test-vllm clean

.venv/ready: pyproject.toml
	PYTHON=$(PYTHON) ./.ci/bootstrap
	touch $@

demo: .venv/ready
	$(BIN)/python -m integration.demo

test: .venv/ready
	$(BIN)/pytest

unit: .venv/ready
	$(BIN)/pytest tests

# All that runs without torch, under the Python of NVIDIA's newer images, where there is one.
unit-312:
	./.ci/unit-312

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.12
	$(BIN)/lint-imports

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: .venv/ready
	cd backend && PATH=$(CURDIR)/$(BIN):$$PATH ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --mypy_out=. \
		--grpc_python_out=. --mypy_grpc_out=. paraserve_backend/rpc/paraserve.proto

# As root, with iproute2. The smoke test takes ten minutes, all of it some seventy.
bench-coldstart: .venv/ready
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python -m integration.benchmarks.coldstart.run --out docs/figures

bench-coldstart-smoke: .venv/ready
	$(BIN)/python -m integration.benchmarks.coldstart.run --smoke

bench-hop: .venv/ready
	$(BIN)/python -m integration.benchmarks.hop.run

# As root, with nginx-light and iproute2: it makes networks of limited bandwidth.
bench-fetch: .venv/ready
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python -m integration.benchmarks.fetch.run

bench-tier: .venv/ready
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python -m integration.benchmarks.tier.run

# Skipped without a GPU.
bench-gpu: .venv/ready
	$(BIN)/python -m integration.benchmarks.gpu

bench-engine: .venv/ready
	$(BIN)/python -m integration.benchmarks.engine

bench-gateway: .venv/ready
	$(BIN)/python -m integration.benchmarks.gateway.run

bench-overload: .venv/ready
	$(BIN)/python -m integration.benchmarks.overload.run

# As root, with iproute2.
bench-handover: .venv/ready
	$(BIN)/python -m integration.benchmarks.handover.run

bench-policy: .venv/ready
	$(BIN)/python -m integration.benchmarks.policy

# The trace itself: `python -m integration.benchmarks.simulate --trace FILE`.
bench-simulate: .venv/ready
	$(BIN)/python -m integration.benchmarks.simulate

bench-alignment: .venv/ready
	$(BIN)/python -m integration.benchmarks.alignment

# Random input to whatever takes some. Another run: `python -m integration.fuzz --seed N`.
fuzz: .venv/ready
	GRPC_VERBOSITY=ERROR $(BIN)/python -m integration.fuzz

simulate-paper: .venv/ready
	$(BIN)/python -m integration.experiments.simulate_paper --seeds 3 --out docs/figures

simulate-mixed: .venv/ready
	$(BIN)/python -m integration.experiments.simulate_mixed --out docs/figures/simulate-mixed.md

# All clients; those that bring many packages get environments of their own.
clients: .venv/ready
	$(BIN)/python -m integration.clients.environments

# vLLM itself, opt-in: 3.5 GB in an environment of its own. Of what it brings, three packages are
# built for CUDA and break what imports them, and Triton's stub does not go with NumPy 2.
.venv-vllm/ready: integration/vllm-requirements.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/pip install --quiet -r $<
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --no-deps numpy==1.26.4 -e .
	touch $@

test-vllm: .venv/ready .venv-vllm/ready
	.venv-vllm/bin/python -m pytest --noconftest -o filterwarnings= integration/system/test_vllm.py
	$(BIN)/pytest integration/system/test_vllm_in_triton.py

clean:
	rm -rf .venv .venv-312 .venv-clients .venv-vllm .mypy_cache .ruff_cache .pytest_cache

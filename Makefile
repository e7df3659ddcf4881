# Every target works on a fresh clone: .venv is made on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test unit check format proto bench-coldstart-smoke clean

.venv/ready: pyproject.toml
	PYTHON=$(PYTHON) ./.ci/bootstrap
	touch $@

demo: .venv/ready
	$(BIN)/python -m integration.demo

test: .venv/ready
	$(BIN)/pytest

unit: .venv/ready
	$(BIN)/pytest tests

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: .venv/ready
	cd backend && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --mypy_out=. \
		--grpc_python_out=. --mypy_grpc_out=. paraserve_backend/rpc/paraserve.proto

bench-coldstart-smoke: .venv/ready
	$(BIN)/python -m integration.bench_coldstart --smoke

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache

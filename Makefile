# `make` lists the targets. Needs Python 3.11 to 3.13, make and pip; everything else goes into .venv.

CANDIDATES := python3 python3.13 python3.12 python3.11
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PROTOC = $(BIN)/python -m grpc_tools.protoc -I convoy_protos=protos protos/*.proto
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header --no-annotate $(UPGRADE)
TRAIN_EXTRAS = --extra cpu --extra mlflow --extra object-store --extra parquet

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: .venv/installed ## Make .venv with everything, at the locked versions

.venv/installed: locks/dev.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r locks/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: demo
demo: install ## Train on digits, prove, publish, serve, classify: the whole line in a minute
	$(BIN)/python examples/demo.py

.PHONY: serve
serve: install ## Serve ./models on ports 8001 (gRPC) and 8002 (metrics)
	$(BIN)/convoy serve

.PHONY: test
test: install ## Run all tests but those of deploy/
	$(BIN)/pytest -m "not deploy"

.PHONY: unit
unit: install ## Run the tests that take seconds
	$(BIN)/pytest tests/unit

.PHONY: conformance
conformance: install ## Try clients that others wrote on a real server, and write docs/conformance.md
	$(BIN)/python -m tests.conformance.matrix

.PHONY: deploy-test
deploy-test: install ## Prove deploy/ with kubectl, nginx, ...: what is missing is told, and skipped
	$(BIN)/pytest tests/deploy

.PHONY: deploy-lint
deploy-lint: install ## Lint deploy/kubernetes and the Dockerfile by the policies of checkov and hadolint
	$(BIN)/pytest tests/deploy/test_kubernetes.py -k lint

.PHONY: gpu
gpu: ## On a machine with an NVIDIA card, in an environment with .[gpu,onnx] and pytest: its tests and benchmarks
	$(PYTHON) -m pytest tests/gpu
	$(PYTHON) benchmarks/gpu.py --json gpu.json

.PHONY: check
check: install ## Check format, lint, types, import rules, protocols, generated code and generated docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python .ci/sizes.py
	@new=$$(mktemp -d) && trap 'rm -rf "$$new"' EXIT && \
		$(PROTOC) --python_out="$$new" --pyi_out="$$new" --grpc_python_out="$$new" && \
		for file in "$$new"/convoy_protos/*; do cmp "$$file" "protos/convoy_protos/$${file##*/}" || \
			{ echo "the generated code is not that of protos/*.proto: make protos"; exit 1; }; done
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against protos/released.binpb
	$(BIN)/python docs/generate.py --check

.PHONY: format
format: install ## Format the code and mend what lint can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: protos
protos: install ## Generate protos/convoy_protos/*_pb2* from protos/*.proto
	$(PROTOC) --python_out=protos --pyi_out=protos --grpc_python_out=protos

# `make check` lets nothing pass that would break callers of what stands in it.
.PHONY: released
released: install ## With each release: keep what protos/*.proto promise, in protos/released.binpb
	$(BIN)/buf build protos --exclude-source-info --output protos/released.binpb

.PHONY: docs
docs: install ## Generate the pages of docs/ that come from the code
	$(BIN)/python docs/generate.py

.PHONY: lock
lock: install ## Resolve locks/*.txt anew (UPGRADE=--upgrade for the newest versions)
	$(LOCK) pyproject.toml --extra cpu --extra object-store --extra tracing --output-file locks/cpu.txt
	$(LOCK) pyproject.toml --extra gpu --extra object-store --extra tracing --output-file locks/gpu.txt
	$(LOCK) pyproject.toml --extra parquet --constraint locks/cpu.txt --output-file locks/parquet.txt
	$(LOCK) pyproject.toml --extra bulk --constraint locks/cpu.txt --output-file locks/bulk.txt
	$(LOCK) pyproject.toml $(TRAIN_EXTRAS) --extra train --output-file locks/train.txt
	$(LOCK) pyproject.toml $(TRAIN_EXTRAS) --extra train-gpu --output-file locks/train-gpu.txt
	$(LOCK) pyproject.toml --extra cpu --extra train --extra dev --output-file locks/dev.txt
	for clients in peers kserve perf-analyzer; do \
		$(LOCK) locks/$$clients.in --output-file locks/$$clients.txt || exit 1; done
	npm install --prefix locks/node --package-lock-only --omit-lockfile-registry-resolved --ignore-scripts \
		--no-audit --no-fund
	$(LOCK) locks/build.in --output-file locks/build.txt
	$(LOCK) locks/deploy.in --output-file locks/deploy.txt

.PHONY: image
image: ## Build an image: TARGET=serve, serve-gpu, train or bulk; ENGINE=docker, podman or buildah
	deploy/image.sh $(or $(TARGET),serve) $(BUILD_ARGS)

.PHONY: image-test
image-test: install ## Build the images with buildah, run them with podman, hold them to their promises
	$(BIN)/pytest tests/deploy/test_image.py

.PHONY: sbom
sbom: install ## Write what each image installs to dist/*.cdx.json (CycloneDX)
	@mkdir -p dist
	for lock in cpu gpu bulk train; do \
		$(BIN)/uv tool run --from cyclonedx-bom@7.5.0 cyclonedx-py requirements locks/$$lock.txt \
		--pyproject pyproject.toml --output-reproducible --output-file dist/convoy-$$lock.cdx.json || \
		exit 1; done

.PHONY: licences
licences: install ## List the licences of what the images install; fails on copyleft ones
	@$(BIN)/uv tool run pip-licenses@5.5.5 --python=$(BIN)/python --from=mixed --order=license --with-urls \
		--partial-match --fail-on="General Public License;GPL" \
		--packages $$(sed -nE 's/^([a-z0-9._-]+)==.*/\1/p' locks/cpu.txt locks/train.txt locks/bulk.txt | sort -u)

.PHONY: audit
audit: install ## Look up known vulnerabilities of what the images install: needs PyPI itself, no mirror
	for lock in cpu gpu parquet bulk train; do \
		$(BIN)/uv tool run pip-audit@2.10.1 --strict --disable-pip --require-hashes -r locks/$$lock.txt || exit 1; done

.PHONY: clean
clean: ## Remove .venv, caches and demo runs
	rm -rf .venv .cache .convoy dist runs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

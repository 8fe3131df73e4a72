# Every target sets up what it needs in .venv; nothing is installed again until pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
TOOLS ?= .venv-tools
DEMO ?= build/demo
LOOP := build/demo-engine
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo demo-engine test test-slow test-tools parity bench lint format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Set up .venv with sa-engine
	@echo "Installed. Run $(BIN)/sa-engine --help, or: . $(BIN)/activate"

demo: $(VENV)/.installed ## Run sa-engine auto on four photos, with real weights
	$(BIN)/sa-engine weights pull vit_t
	@mkdir -p $(DEMO)/photos
	@data=$$($(BIN)/python -c 'import os, skimage; print(os.path.dirname(skimage.__file__))')/data && \
	  cp -p $$data/astronaut.png $$data/coffee.png $$data/chelsea.png $$data/rocket.jpg $(DEMO)/photos
	$(BIN)/sa-engine auto --images $(DEMO)/photos --out $(DEMO)/shards --config configs/preview.yaml
	$(BIN)/sa-engine show $(DEMO)/shards --out $(DEMO)/pictures
	@echo
	@echo "Shards (SA-1B tars, Parquet):  $(DEMO)/shards"
	@echo "Pictures with their masks:     $(DEMO)/pictures/contact_sheet.jpg"

demo-engine: $(VENV)/.installed ## Run the whole loop in miniature: blur, annotate, train, prefill, train, segment
	$(BIN)/sa-engine weights pull vit_t
	@mkdir -p $(LOOP)/photos/first $(LOOP)/photos/second
	@data=$$($(BIN)/python -c 'import os, skimage; print(os.path.dirname(skimage.__file__))')/data && \
	  cp -p $$data/astronaut.png $$data/coffee.png $$data/coins.png $$data/motorcycle_left.png $(LOOP)/photos/first && \
	  cp -p $$data/camera.png $$data/chelsea.png $$data/rocket.jpg $(LOOP)/photos/second
	@data=$$($(BIN)/python -c 'import matplotlib; print(matplotlib.get_data_path())')/sample_data && \
	  cp -p $$data/grace_hopper.jpg $(LOOP)/photos/second
	$(BIN)/sa-engine engine run docs/demo/engine.yaml
	@test -f $(LOOP)/loop/drawn.json || $(BIN)/python docs/demo/annotator.py draw $(LOOP)/loop/blurred/first $(LOOP)/loop/drawn.json
	$(BIN)/sa-engine engine run docs/demo/engine.yaml
	@test -f $(LOOP)/loop/returned.json || $(BIN)/python docs/demo/annotator.py correct $(LOOP)/loop/handout $(LOOP)/loop/returned.json
	$(BIN)/sa-engine engine run docs/demo/engine.yaml
	@echo
	@echo "The loop on one page: $(LOOP)/loop/index.html"

test: $(VENV)/.installed-dev ## Run the tests (ARGS="-k name" for some, WORKERS=0 in one process)
	$(BIN)/python -m pytest -m "not slow and not parity_full" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.installed-dev ## Run the tests that take minutes
	$(BIN)/python -m pytest -m "slow" $(ARGS)

test-tools: $(VENV)/.installed-dev $(TOOLS)/.installed ## Read hand-outs with the annotation tools' own code
	SA_ENGINE_TOOLS=$(abspath $(TOOLS))/bin/python $(BIN)/python -m pytest tests/test_handout.py $(ARGS)

parity: $(VENV)/.installed-dev ## Compare with the reference implementations at full size
	$(BIN)/python -m pytest -m "parity_full" --timeout 0 $(ARGS)

bench: $(VENV)/.installed-dev ## Time us against the reference (PHOTO=file ARGS="--case paper")
	@photo="$(PHOTO)"; data=$$($(BIN)/python -c 'import os, skimage; print(os.path.dirname(skimage.__file__))')/data; \
	  $(BIN)/python benchmarks/speed.py "$${photo:-$$data/hubble_deep_field.jpg}" $(ARGS)

lint: $(VENV)/.installed-dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was built, except .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@

$(TOOLS)/.installed: tests/annotation_tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --requirement $<
	@touch $@

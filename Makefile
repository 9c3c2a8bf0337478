# make demo   render mini-TBAGPR, train on it from scratch, evaluate the best checkpoint
# make test   run the test suite
# make reliability   test kills, faults and untrusted files, with more examples (9 to 13 minutes)
# make resolve   check that the requirements can be installed on every supported Python
# make gpu   check and measure on a GPU, and write docs/gpu/<card>.md (without one: a dry run)
# make docs   write docs/options.md, and tables and a picture in other pages, from the code
# Each makes a virtual environment first (.venv, or VENV=PATH).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MINI ?= data/mini-TBAGPR
# Each file of tests runs in one of up to four processes.
SHARED := -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test reliability gpu resolve docs lint clean

demo: $(VENV)/installed
	$(BIN)/python -m datasets.mini --out $(MINI)
	$(BIN)/python train.py --config_file configs/mini.yaml --root_dir $(MINI)
	$(BIN)/python test.py --root_dir $(MINI) --image_cache data/image-cache \
		--config_file "$$(ls -td logs/AGDataAttr/*_mini*/configs.yaml | head -n 1)"

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(SHARED)

reliability: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/reliability --kills 100 --fuzz 1000 --attempts $(SHARED)

gpu: $(VENV)/installed-dev
	$(BIN)/python tools/gpu.py

resolve: $(VENV)/installed-dev
	$(BIN)/python .ci/resolve.py

docs: $(VENV)/installed
	$(BIN)/python tools/docs.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements-construction.txt requirements-search.txt $(VENV)/installed
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV)

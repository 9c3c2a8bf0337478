# make demo   render mini-TBAGPR, train on it from scratch, evaluate the best checkpoint, search with it
# make page   open the search page on what `make demo` has made
# make test   run the test suite
# make reliability   test kills, faults and untrusted files, with more examples (9 to 13 minutes)
# make resolve   check that the requirements can be installed on every supported Python
# make gpu   check and measure on a GPU, and write docs/gpu/<card>.md (without one: a dry run)
# make docs   write docs/options.md, and tables and a picture in other pages, from the code
# make help   these lines
# Each makes a virtual environment first (.venv, or VENV=PATH).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MINI ?= data/mini-TBAGPR
GALLERY ?= data/mini-gallery
RUN = $$(ls -td logs/AGDataAttr/*_mini*/configs.yaml | head -n 1)
# Each file of tests runs in one of up to four processes.
SHARED := -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo page test reliability gpu resolve docs lint clean help

demo: $(VENV)/installed-find
	$(BIN)/python -m datasets.mini --out $(MINI)
	$(BIN)/python train.py --config_file configs/mini.yaml --root_dir $(MINI)
	$(BIN)/python test.py --root_dir $(MINI) --image_cache data/image-cache \
		--config_file "$(RUN)"
	$(BIN)/python search.py index --config_file "$(RUN)" --dataset_name AGDataAttr \
		--root_dir $(MINI) --split test --gallery $(GALLERY) --reencode
	$(BIN)/python search.py find "a woman in a yellow dress with a black bag" \
		--gallery $(GALLERY) --top 5
	@echo "Now look at them: make page"

page: $(VENV)/installed-search
	$(BIN)/python search.py serve --gallery $(GALLERY)

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

# The search page needs ten times as much as a search in the terminal.
$(VENV)/installed-find: requirements-search.txt $(VENV)/installed
	grep -E "^(faiss-cpu|pyarrow)=" requirements-search.txt | $(BIN)/pip install -q -r /dev/stdin
	touch $@

$(VENV)/installed-search: requirements-search.txt $(VENV)/installed
	$(BIN)/pip install -q -r requirements-search.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements-construction.txt requirements-search.txt requirements-methods.txt $(VENV)/installed
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

help:
	@grep "^# make" Makefile | cut -c 3-

clean:
	rm -rf $(VENV)

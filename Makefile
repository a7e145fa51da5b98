# Every target sets up what it needs; none needs another to have been run first.
PYTHON ?= python3
BIN := .venv/bin
MAKEFLAGS += --jobs=2
WORKERS ?= 2
# what is never imported need not be compiled; what is, once, and not in each process of a test
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: lab app test untimed quick lint lowest notebooks site bench ledger record clean help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# torch first and alone: whatever is resolved after it then finds the pinned build in place.
.venv/.torch: constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(INSTALL) torch
	@touch $@

.venv/.lab: .venv/.torch pyproject.toml
	$(INSTALL) -e .
	@touch $@

.venv/.app: .venv/.lab
	$(INSTALL) -e '.[app]'
	@touch $@

# In one go with what users install: resolving it twice takes twice the time.
.venv/.test: .venv/.torch pyproject.toml
	$(INSTALL) -e '.[test,dev,docs]'
	@touch .venv/.lab $@

# The browser and the peers are fetched while the packages above are.
.venv/.browser: | .venv/.torch
	@if command -v chromium >/dev/null; then touch $@; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null && touch $@; \
	else echo "no chromium: the browser test will be skipped. Install it with: sudo apt-get install chromium"; fi

# The oracles of the panes, apart from what users install: pinned in a file of their own.
.venv/.peers: tests/peers/constraints.txt | .venv/.torch
	@test -x .venv-peers/bin/pip || $(PYTHON) -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c tests/peers/constraints.txt \
	  traceinsight torch-tb-profiler tensorboard
	@touch $@

lab: .venv/.lab  ## open JupyterLab on the first notebook
	$(BIN)/python -m jupyterlab --config=notebooks/jupyter_server_config.py notebooks/00_start_here.ipynb

app: .venv/.app  ## open the what-if page as an app without code, for a class
	$(BIN)/python notebooks/app

test: untimed lint  ## everything that CI runs: what is timed last, two ranks alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:nbval -n $(WORKERS) --dist worksteal -m timed --durations=15
	$(BIN)/python -m pytest -p no:nbval -m alone --durations=15

untimed: .venv/.test .venv/.browser .venv/.peers  # lint runs beside it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:nbval -n $(WORKERS) --dist worksteal -m "not timed and not alone" --durations=25

quick: .venv/.test lint  ## for daily work: lint, and the tests that take no longer than ten seconds and use no clock
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not timed and not alone and not slow" -q

lint: .venv/.test  ## ruff, ruff format, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lowest:  ## the quick tests on the oldest versions that pyproject.toml promises, from a wheel; downloads some GB
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check -c tests/lowest.txt torch
	.venv-lowest/bin/pip wheel --quiet --no-deps --wheel-dir .venv-lowest/wheel .
	.venv-lowest/bin/pip install --quiet -c tests/lowest.txt "$$(ls .venv-lowest/wheel/effkit-*.whl)[test]"
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest -n $(WORKERS) -q -m "not timed and not alone and not slow"

notebooks: .venv/.test  ## execute every notebook and write its canonical form
	$(BIN)/python notebooks/canonical.py $(FRESH) notebooks/*.ipynb notebooks/app/*.ipynb

site: .venv/.test  ## the documentation: guides, lessons as they are, a page per public name; opens without a network
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/site
	@echo "open build/site/index.html"

bench: .venv/.test .venv/.browser .venv/.peers  ## the timed bars, peers side by side
	$(BIN)/python -m pytest tests/bench_*.py -s -p no:cacheprovider

CONDITION ?= one thread
LIMIT = $(if $(MINUTES),--minutes $(MINUTES))
ledger: .venv/.lab  ## predict and measure the held-out grids (LAB=activations: one alone; CONDITION="one core": the machine as another one, or every); refresh docs/accuracy.md
	$(BIN)/python data/record.py ledger $(LAB) --condition "$(CONDITION)" --all $(LIMIT)

record: .venv/.lab  ## re-create the captures and the ledger under data/, on this machine (MINUTES=10: as far as it comes in them)
	$(BIN)/python data/record.py all $(LIMIT)

clean:  ## remove the virtual environment and caches
	rm -rf .venv .venv-peers .venv-lowest .mypy_cache .ruff_cache .pytest_cache .hypothesis

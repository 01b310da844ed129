# Everything happens in .venv, made here. Needs Python 3.10 to 3.13, its pip, and make (3.81 or newer).
#   make run PYTHON=python3.12     with another Python than python3 (the first time; later: make distclean first)
#   make run TORCH=cpu             with PyTorch's own build of that name instead of PyPI's: cpu, cu126, ...
#   make run PIP_OPTIONS="..."     anything else that pip should be told: a mirror, a proxy
#   make run ARGS="--model gpt2"   options of the profiling script
PYTHON ?= python3
TORCH ?=
PIP_OPTIONS ?=
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# Written last, with this folder's path: set-up is repeated after a failure, a change of the pins, or a move of the clone.
STAMP := $(VENV)/installed
PIP := $(PY) -m pip --disable-pip-version-check install $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH)) $(PIP_OPTIONS)

ifneq ($(shell test -x $(PY) && cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): again
endif

.PHONY: help run test check lab bench notebooks format clean distclean again
.PHONY: kit site teaching
help:
	@echo "make run        measure synchronous against asynchronous batching on the embedded model, into out/"
	@echo "make test       check and test everything, the notebooks too"
	@echo "make lab        open copies of the notebooks, your own, in JupyterLab"
	@echo "make kit        write dist/asyncbatch-kit: everything for a workshop without a network (TORCH=cpu makes it small)"
	@echo "make site       build/site: notebooks, README and docs as pages (REPOSITORY=https://... adds links and launch buttons)"
	@echo "make teaching   renew what is rendered in notebooks/TEACHING.md"
	@echo "make bench      measure this package against its own targets, print only"
	@echo "make notebooks  run the notebooks and save them in canonical form"
	@echo "make check      ruff, mypy, who imports whom, and the notebooks' form: no tests"
	@echo "make format     let ruff format and repair what it can"
	@echo "make clean      remove what runs and tests left; make distclean: .venv too"

run: $(STAMP)
	$(PY) -m asyncbatch.profile --out out $(ARGS)
	@echo
	@echo "The whole report as a page:   $(CURDIR)/out/report.html"
	@echo "Both timelines as a picture:  $(CURDIR)/out/timeline.png"
	@echo "Every span, to zoom into:     $(CURDIR)/out/trace.json (open it at https://ui.perfetto.dev)"
	@echo "The same numbers as JSON:     $(CURDIR)/out/report.json"
	@echo "The notebooks:                make lab"

# In two processes, a file at a time: first what computes, then what mostly waits, for a browser or a notebook's kernel
# (the longest files first, not those with most tests).
BROWSED := tests/lessons/test_notebooks_browser.py tests/profile/test_page_browser.py tests/pictures/test_timeline_browser.py
test: check
	$(PY) -m pytest tests -n 2 --dist loadfile $(addprefix --ignore=,$(BROWSED))
	$(PY) -m pytest $(BROWSED) notebooks -n 2 --dist loadfile --no-loadscope-reorder

check: $(STAMP)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo
	$(PY) tools/notebooks.py --check
	$(PY) tools/teaching.py --check

lab: $(STAMP)
	$(PY) tools/notebooks.py --copies
	$(PY) -m jupyter lab my-notebooks/00_start_here.ipynb

bench: $(STAMP)
	$(PY) tools/bench.py

notebooks: $(STAMP)
	$(PY) -m ruff format notebooks
	$(PY) tools/notebooks.py

kit: $(STAMP)
	$(PY) tools/kit.py $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH)) $(PIP_OPTIONS)

# Sphinx lives in an environment of its own: what the notebooks are pinned to stays as it is.
REPOSITORY ?=
SITE_PIP := $(VENV)/site/bin/python -m pip --disable-pip-version-check install $(PIP_OPTIONS)
site: $(STAMP)
	@$(VENV)/site/bin/python -m pip --version >/dev/null 2>&1 || $(PY) -m venv --clear $(VENV)/site
	$(SITE_PIP) -q -r tools/website/requirements.txt
	$(PY) tools/website/build.py $(if $(REPOSITORY),--repository $(REPOSITORY))

teaching: $(STAMP)
	$(PY) tools/teaching.py

format: $(STAMP)
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis notebooks/.ipynb_checkpoints
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# pip keeps what it has installed: after a failure half way the next make goes on from there.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "asyncbatch needs Python 3.10 to 3.13; $(PYTHON) is: `$(PYTHON) --version 2>&1`"; \
	  echo "Name another one:  make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@rm -f $(STAMP)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@echo "$(CURDIR)" > $(STAMP)

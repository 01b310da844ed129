# Everything happens in .venv, made here. Needs Python 3.10 to 3.14, its pip and venv, and make (3.81 or newer).
#   make run PYTHON=python3.12     with another Python than python3 (the first time; later: make distclean first)
#   make run TORCH=cpu             with PyTorch's own build of that name instead of PyPI's: cpu, cu126, ...
#   make run PIP_OPTIONS="..."     anything else that pip should be told: a mirror, a proxy
#   make run INSTALLER=pip         with pip, also where uv is there (or uv)
#   make run V=1                   show all that pip or uv prints
#   make run ARGS="profile --model gpt2 --out out"   a sub-command of asyncbatch, with its options
PYTHON ?= python3
TORCH ?=
PIP_OPTIONS ?=
INSTALLER ?= auto
ARGS ?=
V ?=

VENV := .venv
PY := $(VENV)/bin/python
# Installs what is missing, in this order: for running, for the notebooks, for tests.
# The Python of .venv does it if it runs: a link may lead to one that is gone.
INSTALL := $(if $(shell $(PY) -c "" 2>/dev/null && echo yes),$(PY),$(PYTHON)) tools/install.py --torch "$(TORCH)" --installer $(INSTALLER) \
  --pip-options="$(PIP_OPTIONS)" $(if $(V),--verbose)

.PHONY: help run lab test quick check bench notebooks kit site teaching format clean distclean for-running for-notebooks for-tests
help:
	@echo "make run        what asynchronous batching does, and for whom: a minute of measuring, and one page"
	@echo "make lab        open copies of the notebooks, your own, in JupyterLab"
	@echo "make kit        write dist/asyncbatch-kit: everything for a workshop without a network (TORCH=cpu makes it small)"
	@echo "make site       build/site: notebooks, README and docs as pages (REPOSITORY=https://... adds links and launch buttons)"
	@echo "make teaching   renew what is rendered in notebooks/TEACHING.md"
	@echo "make test       check and test everything, the notebooks too"
	@echo "make quick      check, and the tests that take little time: for every change"
	@echo "make bench      measure this package against its own targets, print only"
	@echo "make notebooks  run the notebooks and save them in canonical form"
	@echo "make check      ruff, mypy, who imports whom, and the notebooks' form: no tests"
	@echo "make format     let ruff format and repair what it can"
	@echo "make clean      remove what runs and tests left; make distclean: .venv too"

for-running:
	@$(INSTALL) run
for-notebooks:
	@$(INSTALL) run notebooks
for-tests:
	@$(INSTALL) run notebooks test

run: for-running
	@$(PY) -m asyncbatch $(ARGS)

# A few processes, a file at a time: first what computes (a third process, since those of ranks often wait for each
# other), then what mostly waits, for a browser or a notebook's kernel (the longest files first, not those with most tests).
BROWSED := tests/lessons/test_notebooks_browser.py tests/profile/test_page_browser.py tests/pictures/test_timeline_browser.py
test: check
	$(PY) -m pytest tests -n 3 --dist loadfile $(addprefix --ignore=,$(BROWSED))
	$(PY) -m pytest $(BROWSED) notebooks -n 2 --dist loadfile --no-loadscope-reorder

# What takes long, by `pytest --durations=0`: real models and processes, whole runs of commands, kernels that are
# interpreted, every order of events, browsers.
SLOW := $(wildcard $(addsuffix .py,$(addprefix tests/, \
  core/test_batcher core/test_bounded_timeline core/test_interrupts core/test_other_processes \
  core/test_steps_of_the_device core/test_stress core/test_stress_host core/test_threads devices/test_compile \
  devices/test_garbage devices/test_host_device devices/test_interrupts_host devices/test_kernels \
  devices/test_model_now devices/test_padding devices/test_put_off devices/test_shared_memory \
  devices/test_threads_of_the_device devices/test_virtual devices/test_virtual_ranks lessons/test_lessons_* \
  lessons/test_nbval_guard lessons/test_teach measure/test_points* measure/test_recording models/test_* \
  ordering/test_explore ordering/test_faults ordering/test_races ordering/test_ranks \
  pictures/test_ranks_pictures profile/test_budget profile/test_crosscheck profile/test_in_memory \
  profile/test_outputs profile/test_page profile/test_peers* profile/test_presets profile/test_profile \
  profile/test_prompts profile/test_ranks_report profile/test_ranks_session profile/test_ranks_torchrun \
  profile/test_report_schema profile/test_situations profile/test_tooltip_browser profile/test_trace_coverage \
  profile/test_workload project/test_bench project/test_house project/test_schedules project/test_step_kernels \
  ranks/test_collectives ranks/test_dealer ranks/test_faults_on_ranks ranks/test_on_ranks ranks/test_replicas \
  ranks/test_replicas_on_ranks ranks/test_shared_page ranks/test_watch tour/test_command tour/test_replay)))
quick: check
	$(PY) -m pytest tests -n 2 --dist loadfile $(addprefix --ignore=,$(BROWSED) $(SLOW))

check: for-tests
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -c "from importlinter import cli; cli.lint_imports_command()" --no-logo
	$(PY) tools/notebooks.py --check
	$(PY) tools/teaching.py --check

lab: for-notebooks
	@$(PY) -m asyncbatch lab

bench: for-tests
	$(PY) tools/bench.py

notebooks: for-tests
	$(PY) -m ruff format notebooks
	$(PY) tools/notebooks.py

kit: for-tests
	$(PY) tools/kit.py $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH)) $(PIP_OPTIONS)

# Sphinx lives in an environment of its own: what the notebooks are pinned to stays as it is.
REPOSITORY ?=
SITE_PIP := $(VENV)/site/bin/python -m pip --disable-pip-version-check install $(PIP_OPTIONS)
site: for-tests
	@$(VENV)/site/bin/python -m pip --version >/dev/null 2>&1 || $(PY) -m venv --clear $(VENV)/site
	$(SITE_PIP) -q -r tools/website/requirements.txt
	$(PY) tools/website/build.py $(if $(REPOSITORY),--repository $(REPOSITORY))

teaching: for-tests
	$(PY) tools/teaching.py

format: for-tests
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis notebooks/.ipynb_checkpoints
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# Two commands are enough: `make run` (the whole pipeline on simulated patients) and `make test`.
# Everything is installed into .venv on first use; .make/ holds stamps and caches. `make help` lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
OUT ?= runs/laptop
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | awk -F'|' '{printf "  make %-9s %s\n", $$1, $$2}'

.make/env: constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, not " + sys.version.split()[0] + "; say which: make PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv (about 2 GB, some minutes) ...'
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@mkdir -p .make && touch $@

.PHONY: env
env: .make/env  ## install everything into .venv

.PHONY: run
run: .make/env  ## the laptop profile on simulated patients, into runs/laptop; run again to resume
	$(BIN)/mint-nb run --profile laptop --out $(OUT)

.PHONY: test
test: .make/env  ## every notebook that has changed since it last ran (all of them in a fresh clone), then all tests in tests/
	HF_HUB_OFFLINE=1 $(BIN)/python tools/site.py --execute
	$(PYTEST) --durations=10

.PHONY: check
check: .make/env  ## while you work: lint, types, modules in sync, the fast half of the tests
	$(MAKE) lint
	$(PYTEST) -m "not slow"

QUIETLY = MINT_QUIET=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
PYTEST = $(QUIETLY) $(BIN)/python -m pytest tests -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
EXAMPLES ?= 10000
.PHONY: fuzz
fuzz: .make/env  ## every loader and parser against EXAMPLES=10000 damaged inputs each, into benchmarks/fuzz.json
	$(QUIETLY) MINT_FUZZ=$(EXAMPLES) MINT_FUZZ_RECORD=benchmarks/fuzz.json $(BIN)/python -m pytest -q -p no:cacheprovider tests/test_fuzz.py --durations=10

KILLS ?= 50
.PHONY: chaos
chaos: .make/env  ## kill -9 the smoke pipeline KILLS=50 times at random moments and compare its tables, into benchmarks/chaos.json
	$(QUIETLY) MINT_KILLS=$(KILLS) MINT_CHAOS=benchmarks/chaos.json $(BIN)/python -m pytest -q -s -p no:cacheprovider tests/test_chaos.py

.PHONY: lint
lint: .make/env  ## ruff over notebooks, modules and tests; types of the modules by mypy
	$(BIN)/ruff check -q nbs mint_nb tests tools
	$(BIN)/mypy

COVER = MINT_WARM=0 $(QUIETLY) $(BIN)/coverage run
.PHONY: coverage
coverage: .make/env  ## which lines of the package the notebooks and tests run, into benchmarks/coverage.txt (40 minutes)
	@mkdir -p .make/coverage
	$(BIN)/coverage erase
	$(COVER) $(BIN)/nbdev_test --n_workers $(WORKERS)
	$(COVER) -m pytest tests -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine -q
	{ echo '# make coverage, $(shell date +%F): lines of the package that notebooks and tests run, those of subprocesses and kernels among them'; $(BIN)/coverage report; } > benchmarks/coverage.txt

.PHONY: audit
audit:  ## look the pinned versions up among known vulnerabilities; says so when the database cannot be reached
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/audit.py

.PHONY: browser
browser:  ## Debian's Chromium, for the tests in a browser (needs root); without it they are skipped
	command -v chromium > /dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends chromium; }

.PHONY: docs
docs: .make/env  ## execute the notebooks (cached), write README.md and the site in _docs/
	HF_HUB_OFFLINE=1 $(BIN)/python tools/site.py

.PHONY: bench
bench: .make/env  ## time and memory against TRL, into benchmarks/ (about 20 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/mint-nb bench

PART ?=
.PHONY: gpu-check
gpu-check:  ## on CUDA: GPU tests, step time, memory, one run, into benchmarks/gpu.json and gpu.md; PART=step for one part
	HF_HUB_OFFLINE=1 $(if $(wildcard $(BIN)/python),$(BIN)/python,python3) tools/gpu_check.py $(if $(PART),--part $(PART))

CASES ?= $(if $(MINT_DATA),$(MINT_DATA)/phenopackets.zip)
.PHONY: study
study: .make/env  ## the study, in pieces that resume (hours), then that of the tissues; CASES=phenopackets.zip for the real cohorts
	HF_HUB_OFFLINE=1 $(BIN)/mint-nb study $(if $(CASES),--cases $(CASES))
	HF_HUB_OFFLINE=1 $(BIN)/mint-nb run --task tissue --profile study --out runs/study-tissue
	$(BIN)/mint-nb report runs/study-tissue --csv benchmarks/tissue_study.csv

TILES ?= $(if $(MINT_DATA),$(MINT_DATA)/tissue.zip)
.PHONY: folds
folds: .make/env  ## real tiles in five grouped folds, a whole run in each; TILES=tiles.zip
	$(if $(TILES),HF_HUB_OFFLINE=1 $(BIN)/mint-nb folds --cases $(TILES) --csv benchmarks/tissue_folds.csv,@echo 'needs TILES=tiles.zip, a zip or folder with labels.csv'; exit 2)

NOTES ?= $(if $(MINT_DATA),$(MINT_DATA)/notes.jsonl.gz)
REASON = HF_HUB_OFFLINE=1 $(BIN)/mint-nb run --profile reasoning
WRITE = $(BIN)/mint-nb report runs/reasoning/$(1) --csv benchmarks/reasoning/$(1).csv
EXTRACT = $(BIN)/python -c "from mint_nb.reasoning import write_step_extraction as w; w('runs/reasoning/disease-notes', '$(CASES)', 'benchmarks/reasoning/extraction.csv')"
ASKED = --methods chance,retrieval,base_constrained,rag_constrained,cot_constrained,rag_cot_constrained,cot_rag_constrained --set student.max_prompt=0
.PHONY: reasoning
reasoning: .make/env  ## retrieval and reasoning on three cohorts (an hour); CASES= and NOTES= for the real ones
	for t in disease gene; do $(REASON) --task $$t --out runs/reasoning/$$t-simulated && $(call WRITE,$$t-simulated) || exit 1; done
	$(REASON) $(ASKED) --out runs/reasoning/quality-clean --set cohort.note_noise=0 && $(call WRITE,quality-clean)
	$(REASON) $(ASKED) --out runs/reasoning/quality-noisy --set cohort.note_noise=0.5 --set cohort.note_style=long --set cohort.max_findings=16 && $(call WRITE,quality-noisy)
	$(if $(CASES),for t in disease gene; do $(REASON) --task $$t --out runs/reasoning/$$t-phenopackets --cases $(CASES) --set cohort.diseases=40 && $(call WRITE,$$t-phenopackets) || exit 1; done,@echo 'published cases: left out, needs CASES=phenopackets.zip')
	$(if $(and $(CASES),$(NOTES)),$(REASON) $(ASKED) --out runs/reasoning/quality-notes --cases $(CASES) --set cohort.test_source=$(NOTES) --set cohort.diseases=0 && $(call WRITE,quality-notes))
	$(if $(and $(CASES),$(NOTES)),for t in disease gene; do $(REASON) --task $$t --out runs/reasoning/$$t-notes --cases $(CASES) --set cohort.test_source=$(NOTES) --set cohort.diseases=0 --set cohort.train=240 --set student.max_prompt=0 && $(call WRITE,$$t-notes) || exit 1; done; \
	$(EXTRACT),@echo 'free-text notes: left out, needs CASES= and NOTES=notes.jsonl.gz')

.PHONY: calibrate
calibrate: .make/env  ## the calibration study, three seeds (hours); CASES=phenopackets.zip adds published cases
	HF_HUB_OFFLINE=1 $(BIN)/mint-nb calibrate
	$(if $(CASES),HF_HUB_OFFLINE=1 $(BIN)/mint-nb calibrate --cases $(CASES) --out runs/calibration-real)

.PHONY: export
export: .make/env  ## clear outputs, clean, and write mint_nb/*.py from the notebooks
	$(BIN)/jupyter nbconvert --log-level WARN --clear-output --inplace nbs/*.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

.PHONY: prepare
prepare: .make/env  ## before a commit: export, clean, lint, site, test
	$(MAKE) export
	$(MAKE) lint
	$(MAKE) docs
	$(MAKE) test

.PHONY: hooks
hooks: .make/env  ## git hooks: notebooks stay clean, merge cell by cell, agree with the modules and pass ruff
	$(BIN)/nbdev_install_hooks
	$(BIN)/pre-commit install

.PHONY: clean
clean:  ## remove what was built (not runs/, not .venv)
	rm -rf .make/docs .make/smoke _docs _proc build dist *.egg-info .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Every job of the lab, one target each. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

ARGS ?=
SEEDS ?=
IMAGE ?=
STEP ?=
# Step 9 learns from one teacher, however many seeds of the steps are trained.
ONE_TEACHER = $(and $(filter steps,$(MAKECMDGOALS)),$(filter teacher,$@))
FLAGS = $(if $(SEEDS),$(if $(ONE_TEACHER),,--seeds $(SEEDS))) $(ARGS)
# A variable of another name would be ignored without a word, unless a program that is started here reads it.
READ := ARGS SEEDS IMAGE STEP PYTHON UV INSTALLED SHELL HOME PATH TMPDIR NO_COLOR FORCE_COLOR \
  $(addsuffix _%,MNIST_LAB MLFLOW RAY OMP GOMP MKL CUDA NVIDIA PYTORCH TORCH MPL UV PIP PYTEST HYPOTHESIS AWS HTTP HTTPS NO) PYTHON%
GIVEN := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
UNKNOWN := $(firstword $(filter-out $(READ),$(GIVEN)))
$(if $(UNKNOWN),$(error $(UNKNOWN): there are ARGS, SEEDS, STEP and IMAGE; flags go into ARGS="--epochs 3"))
FILE := $(firstword $(filter %.py,$(MAKECMDGOALS)))
$(if $(FILE),$(error $(FILE): a script is started by its name alone: make $(basename $(notdir $(FILE)))))
FOLDER := $(firstword $(wildcard $(addsuffix /.,$(filter-out data,$(MAKECMDGOALS)))))
$(if $(FOLDER),$(error $(FOLDER:/.=): it is a folder; make help lists the targets))
PYTHON := .venv/bin/python
# The machine's own uv, or one that is put into .uv/ here. Nothing is installed outside this folder.
UV := $(or $(shell command -v uv),.uv/bin/uv)
INSTALLED := .venv/.installed

export UV_PYTHON_DOWNLOADS ?= never
export MLFLOW_DISABLE_TELEMETRY := true
# torch's threads wait for each other by spinning: not long, or beside other work they spin while that has the cores.
export GOMP_SPINCOUNT ?= 10000

# In order; the network that teaches step 9 is trained before it.
STEPS := step1 step2 step3 step4 step5 step6 step7 step8 teacher step9 step10

.PHONY: help
help:  ## list the targets
	@awk -F':.*## ' '/^# ---- / {printf "\n%s\n", substr($$0, 8)} /^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' \
	  $(MAKEFILE_LIST)
	@echo; echo 'the experiments, by the names of their scripts'
	@for script in experiments/*.py; do \
	  name=$$(basename "$$script" .py); \
	  [[ $$name =~ ^step[0-9]+_ ]] && alike=(experiments/$${name%%_*}.py experiments/$${name%%_*}_*.py) && \
	    [[ $$(ls "$${alike[@]}" 2>/dev/null | wc -l) == 1 ]] && name=$${name%%_*}; \
	  printf '  %-16s %s\n' "$$name" "$$(sed -n '1{/^"""/!d;s/^"""//;s/"""$$//;p;}' "$$script")"; \
	done
	@echo; echo 'Flags pass through: make step3 ARGS="--epochs 2 --seed 7 --set lr=0.05"'
	@echo 'A study of ten seeds: make step3 SEEDS=10'

# ---- set-up

.PHONY: setup
setup: $(INSTALLED)  ## make the environment in .venv from requirements.lock

# An environment knows its own path, so in a folder that was moved or copied it is made anew.
ifneq ($(shell cat $(INSTALLED) 2>/dev/null),)
ifneq ($(shell cat $(INSTALLED)),$(CURDIR))
$(INSTALLED): folder-has-moved
folder-has-moved: ;
endif
endif

# On stderr, as what was asked for may be written to a file.
$(INSTALLED): requirements.lock pyproject.toml | $(UV)
	@test ! -s $@ || test "$$(cat $@)" = "$(CURDIR)" || rm -rf .venv
	@test -x $(PYTHON) || { echo 'Set-up: making the environment .venv' >&2; \
	  $(UV) venv --quiet --python '>=3.11,<3.14' .venv; }
	@echo 'Set-up: fetching and installing the packages of requirements.lock, a minute or two' >&2
	@$(UV) pip sync --quiet --compile-bytecode --require-hashes requirements.lock & \
	  while sleep 1; kill -0 $$! 2>/dev/null; do (( SECONDS % 10 )) && continue; \
	    now=$$(ls -d .venv/lib/python3*/site-packages/*.dist-info 2>/dev/null | wc -l); \
	    echo "Set-up: $$SECONDS s, $$now packages$$( (( now && now == before )) && echo ', compiling them')" >&2; before=$$now; \
	  done; wait $$!
	@$(UV) pip install --quiet --no-deps --editable .
	@echo "$(CURDIR)" > $@
	@echo 'Set-up: done' >&2

.uv/bin/uv:
	@echo 'Set-up: fetching uv, which installs packages' >&2
	@python3 -m venv .uv
	@.uv/bin/pip install --quiet --disable-pip-version-check uv

.PHONY: lock
lock: | $(UV)  ## renew requirements.lock from pyproject.toml
	$(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --upgrade \
		--no-header --no-emit-index-url --no-emit-find-links --quiet --output-file requirements.lock

.PHONY: data
data: $(INSTALLED)  ## fetch and verify MNIST
	@$(PYTHON) -m mnist_lab data $(ARGS)

# ---- experiments

.PHONY: steps
steps: $(STEPS)  ## train the ten steps, and once the ninth's teacher, one after another

# Without its last two lines a script would train nothing, and say nothing.
define START
if [[ -t 1 ]]; then echo "Starting $$script"; fi; \
grep -q 'main(' "$$script" || { echo "make: $$script does not call main(EXPERIMENT), so it trains nothing" >&2; exit 2; }; \
exec $(PYTHON) "$$script" $(FLAGS)
endef

step:
	@echo 'make: step needs its number, e.g. make step1; make help lists them' >&2; exit 2

# `make step3` runs experiments/step3_*.py; `make four_conv` or `make my_idea` the script of that name.
step%: $(INSTALLED)
	@scripts=(experiments/step$*.py experiments/step$*_*.py); found=(); \
	for script in "$${scripts[@]}"; do [[ -f $$script ]] && found+=("$$script"); done; \
	case $${#found[@]} in \
	  1) script=$${found[0]}; $(START);; \
	  0) echo "make: there is no experiments/step$*.py and no experiments/step$*_*.py: see make help" >&2; exit 2;; \
	  *) echo "make: step$* is not clear: $${found[*]}" >&2; exit 2;; \
	esac

%: experiments/%.py $(INSTALLED)
	@script=$<; $(START)

.DEFAULT:
	@echo 'make: there is no experiments/$@.py, and no target $@: make help lists both' >&2; exit 2

.PHONY: resume
resume: $(INSTALLED)  ## go on with the newest interrupted run that can go on, after its last finished epoch
	@$(PYTHON) -m mnist_lab resume $(ARGS)

# ---- what the runs say

.PHONY: compare
compare: $(INSTALLED)  ## set experiments side by side, and say what each change is worth: ARGS="step4 step5"
	@$(PYTHON) -m mnist_lab compare $(ARGS)

.PHONY: export
export: $(INSTALLED)  ## write the figures of the tracked runs to reports/results
	@$(PYTHON) -m mnist_lab export $(ARGS)

.PHONY: publish
publish: $(INSTALLED)  ## put the figures of the tracked runs into docs/results and README.md
	@$(PYTHON) -m mnist_lab publish $(ARGS)

.PHONY: restore
restore: $(INSTALLED)  ## put the committed runs of docs/results into the store, without any training
	@$(PYTHON) -m mnist_lab restore $(ARGS)

.PHONY: predict
predict: $(INSTALLED)  ## say which digit is in a picture: IMAGE=photo.png, or a folder; ARGS=--show
	@$(PYTHON) -m mnist_lab predict $(if $(shell test -e "$(IMAGE)" && echo 1),"$(IMAGE)",$(IMAGE)) $(ARGS)

.PHONY: draw
draw: $(INSTALLED)  ## draw a digit in the browser, and see what a network reads
	@$(PYTHON) -m mnist_lab draw $(ARGS)

.PHONY: champion
champion: $(INSTALLED)  ## let the median seed of a step read pictures: STEP=step8
	@$(PYTHON) -m mnist_lab champion $(or $(STEP),$(error STEP is missing; name one: make champion STEP=step8)) $(ARGS)

.PHONY: ui
ui: $(INSTALLED)  ## browse the runs in the MLflow UI
	@$(PYTHON) -m mnist_lab ui $(ARGS)

.PHONY: server
server: $(INSTALLED)  ## serve MLflow to a team, over a database of PostgreSQL: docs/server.md
	@$(PYTHON) -m mnist_lab server $(ARGS)

.PHONY: report
report: $(INSTALLED)  ## write reports/steps.html and reports/steps.md from the tracked runs
	@$(PYTHON) -m mnist_lab report $(ARGS)

.PHONY: notebooks
notebooks: $(INSTALLED)  ## execute the notebooks again on the tracked runs
	.venv/bin/jupyter execute --inplace notebooks/*.ipynb

.PHONY: pictures
pictures: $(INSTALLED)  ## execute the notebooks and take docs/images anew, of the committed runs
	@$(PYTHON) docs/pictures.py

.PHONY: lab
lab: $(INSTALLED)  ## open JupyterLab on the notebooks
	.venv/bin/jupyter lab --ip 127.0.0.1 notebooks $(ARGS)

# ---- measurements

.PHONY: bench
bench: $(INSTALLED)  ## measure speed, start-up and memory against other ways: ARGS="training --rounds 9", ARGS=--quick
	@$(PYTHON) benchmarks $(ARGS)

# ---- checks

# A single file begins at once, in one process; with ARGS, the code is checked after the tests.
ONE_FILE = $(filter 1,$(words $(filter tests/%,$(ARGS))))

.PHONY: test
test: $(if $(ARGS),,lint) $(INSTALLED)  ## lint, types, import directions and all tests
	$(PYTHON) -m pytest $(if $(ONE_FILE),--numprocesses=0) $(ARGS)
	@echo 'The tests passed.$(if $(ARGS), Next: lint; types; directions of imports)'
	$(if $(ARGS),@$(MAKE) --no-print-directory lint)

.PHONY: test-long
test-long: $(INSTALLED)  ## the tests that take many minutes, one after another; they print their figures
	$(PYTHON) -m pytest -m long --numprocesses=0 $(ARGS)

.PHONY: lint
lint: $(INSTALLED)  ## ruff, mypy and import-linter
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

.PHONY: format
format: $(INSTALLED)  ## format the code and sort the imports
	.venv/bin/ruff check --fix-only --quiet
	.venv/bin/ruff format

.PHONY: clean
clean:  ## remove the environment and caches; data and runs stay
	rm -rf .venv .uv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

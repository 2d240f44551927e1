# make pretrain and make test do all set-up in .venv on a fresh machine. With PYTHON=/path/python they use that
# environment as it is and install nothing (GPU machines have their own torch).
.DEFAULT_GOAL := help
.PHONY: help setup pretrain long-ctx sweep docs test test-all test-gpu test-slurm lint format bench bench-kernels bench-moe bench-step bench-infer bench-apex clean

VENV := .venv
# The first Python that runs, is new enough and can make environments.
USABLE = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
BOOTSTRAP ?= $(firstword $(foreach p,python3 python3.12 python3.11 python3.13 python,$(shell $(p) -c '$(USABLE)' 2>/dev/null && echo $(p))))
TORCH ?= 2.13.0
RUN ?= quickstart
QUICKSTART_STEPS ?= null
LONG_RUN ?= long_ctx
LONG_STEPS ?= null
# A process a GPU, 16 at most and a power of two, as the quickstart's batch is 16 rows; else two on a CPU, one on one core.
GPUS_HERE := $(shell if [ -n "$${CUDA_VISIBLE_DEVICES+set}" ]; then echo "$$CUDA_VISIBLE_DEVICES" | tr , '\n' | grep -c '^[^-]'; \
	else nvidia-smi -L 2>/dev/null | grep -c '^GPU '; fi)
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
PROCESSES ?= $(shell n=$(GPUS_HERE); p=1; [ $$n -eq 0 ] && n=$$(( $(CORES) > 1 ? 2 : 1 )); \
	while [ $$(( 2 * p )) -le $$n ] && [ $$p -lt 16 ]; do p=$$(( 2 * p )); done; echo $$p)
# Rows that one runs at once: the batch shared out, 8 at most.
ROWS = $(shell r=$$(( 16 / $(PROCESSES) )); echo $$(( r > 8 ? 8 : r < 1 ? 1 : r )))
CORPUS ?= corpora/stdlib

ifdef PYTHON
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(CURDIR)/data$(if $(PYTHONPATH),:$(PYTHONPATH))
# Threads of a process: its share of the cores.
THREADS ?= $(shell n=$$(( $(CORES) / $(PROCESSES) )); echo $$(( n > 0 ? n : 1 )))
LAUNCH = OMP_NUM_THREADS=$(THREADS) $(PY) -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES)

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv with everything in it (the other targets do it too)

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(BOOTSTRAP)" && $(BOOTSTRAP) -c '$(USABLE)' || \
		{ echo "error: mmtrain needs Python 3.11 or newer with venv; give BOOTSTRAP=/path/to/python3.11" >&2; exit 1; }
	$(BOOTSTRAP) -m venv $(VENV)
	@# Linux without an NVIDIA GPU: the CPU build of torch, never the CUDA one. pip takes it where it is offered; else uv
	@# knows where PyTorch keeps it.
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
		echo "installing torch $(TORCH), CPU build"; \
		$(PY) -m pip install -q "torch==$(TORCH)+cpu" 2>/dev/null || \
		{ $(PY) -m pip install -q uv && $(VENV)/bin/uv pip install -q --python $(PY) --torch-backend cpu "torch==$(TORCH)"; }; \
	else \
		echo "installing torch $(TORCH)"; $(PY) -m pip install -q "torch==$(TORCH)"; \
	fi
	$(PY) -m pip install -q -c constraints.txt -e ".[test]"
	@touch $@

$(CORPUS)/manifest.json: $(READY)
	$(PY) launch/prepare.py --recipe stdlib --output $(CORPUS) --vocab-size 4096 --valid-fraction 0.02

pretrain: $(READY) $(CORPUS)/manifest.json  ## the quickstart on all GPUs, else two processes: corpus, tokenizer, plot, continuation
	$(LAUNCH) launch/pretrain.py +stage=quickstart model=tiny data.path=$(CORPUS) data.num_workers=0 \
		parallel.micro_batch_rows=$(ROWS) parallel.reshard_after_forward=false run.name=$(RUN) run.resume=auto run.max_steps=$(QUICKSTART_STEPS)
	@echo; echo "a continuation of 'def __init__(self':"
	@$(PY) launch/generate.py runs/$(RUN) --prompt "def __init__(self" --tokens 48 --temperature 0.5

# A first phase of data parallelism, then rows that all processes share: 16 rows of 1,024, 4 of 4,096, 2 of 8,192 a step.
# 16 rows take so many processes at most.
CP := $(shell echo $$(( $(PROCESSES) > 16 ? 16 : $(PROCESSES) )))
long-ctx: $(READY) $(CORPUS)/manifest.json  ## rows of 512 to 8,192 tokens: the three phases of long_ctx from the quickstart's weights
	@test -d runs/$(RUN)/checkpoints || $(MAKE) pretrain
	$(LAUNCH) launch/pretrain.py +stage=long_ctx stage.scale=1/128 stage.batch_scale=1/16 stage.token_scale=1/8000 model=tiny \
		data.path=$(CORPUS) data.num_workers=0 data.valid_rows=16 parallel.reshard_after_forward=false \
		'stage.phases.1.parallel={cp: $(CP)}' 'stage.phases.2.parallel={cp: $(CP), activation_checkpoint: true}' \
		run.name=$(LONG_RUN) run.resume=auto run.init_from=runs/$(RUN) run.init_optimizer=false run.max_steps=$(LONG_STEPS)

# The stages of MiniMax-VL-01 at the size of a toy, over pictures that are drawn here: a text model of captions, to which
# eyes are given. One line of `vl` is one stage; their order is that of the paper. Records of questions and pairs are
# many more than their stages read: the first ones are prepared.
DRAWN ?= corpora/drawn
DRAWN_PICTURES ?= 14000
VL_RUNS ?= runs
VL_RUN ?= drawn_vl
VL_STEPS ?= null
VL_QUESTIONS ?= 600
VL_PROCESSES ?= $(shell echo $$(( $(PROCESSES) > 4 ? 4 : $(PROCESSES) )))
VL_PARTS := corpora text eyes stages preference answers
VL_LAUNCH = OMP_NUM_THREADS=$(THREADS) $(PY) -m torch.distributed.run --standalone --nproc-per-node $(VL_PROCESSES) launch/pretrain.py \
	model=drawn_vl optim.precision=fp32 data.num_workers=0 data.max_epochs=null parallel.reshard_after_forward=false \
	parallel.micro_batch_rows=$$(( 4 / $(VL_PROCESSES) )) run.dir=$(VL_RUNS) run.resume=auto run.max_steps=$(VL_STEPS) log.wandb=off
PREPARE_DRAWN = $(PY) launch/prepare_images.py --tile 48 --patch 16
GRIDS_DRAWN := --grids 1x1,1x2,2x1,2x2
$(DRAWN)/text/manifest.json: $(READY)
	$(PY) -m mmdata.draw --output $(DRAWN)/pictures --images $(DRAWN_PICTURES) --tile 48
	head -n 3000 $(DRAWN)/pictures/train_questions.jsonl > $(DRAWN)/pictures/first_questions.jsonl
	head -n 2500 $(DRAWN)/pictures/train_pairs.jsonl > $(DRAWN)/pictures/first_pairs.jsonl
	$(PREPARE_DRAWN) --input $(DRAWN)/pictures/train_conversations.jsonl --output $(DRAWN)/vl $(GRIDS_DRAWN) \
		--tokenizer train --vocab-size 512
	$(PREPARE_DRAWN) --input $(DRAWN)/pictures/train_captions.jsonl --output $(DRAWN)/captions --grids fixed --tokenizer $(DRAWN)/vl
	$(PREPARE_DRAWN) --input $(DRAWN)/pictures/first_questions.jsonl --output $(DRAWN)/questions $(GRIDS_DRAWN) --tokenizer $(DRAWN)/vl
	$(PREPARE_DRAWN) --input $(DRAWN)/pictures/first_pairs.jsonl --output $(DRAWN)/pairs $(GRIDS_DRAWN) --tokenizer $(DRAWN)/vl \
		--valid-fraction 0.1
	$(PY) launch/prepare.py --input $(DRAWN)/pictures/train_captions.jsonl --text-field caption --output $(DRAWN)/text \
		--tokenizer $(DRAWN)/vl

.PHONY: vl $(addprefix vl-,$(VL_PARTS))
vl: $(READY)  ## seeing: drawn pictures, a text model, its eyes, its stages and preferences, and a page of pictures with its answers
	@began=$$(date +%s); told=; for part in $(VL_PARTS); do \
		at=$$(date +%s); $(MAKE) vl-$$part || exit 1; told="$$told $$part $$(( $$(date +%s) - at )) s,"; done; \
	echo "make vl: $$(( $$(date +%s) - began )) s in all:$${told%,}"

vl-corpora: $(DRAWN)/text/manifest.json

vl-text:
	$(VL_LAUNCH) +stage=quickstart stage.token_scale=1/16 stage.batch_scale=1/4 model.vision=null data.path=$(DRAWN)/text \
		run.name=$(VL_RUN)_text

vl-eyes:
	$(VL_LAUNCH) +stage=vit_drawn 'model.vision.contrastive={size: 64, weight: 1.0, temperature: 0.07}' data.path=$(DRAWN)/captions \
		run.init_from=$(VL_RUNS)/$(VL_RUN)_text run.init_optimizer=false run.name=$(VL_RUN)_eyes

vl-stages:
	$(VL_LAUNCH) +stage=vl_drawn 'stage.phases.0.sources=[{path: $(DRAWN)/captions}]' \
		'data.sources=[{path: $(DRAWN)/vl, weight: 20}, {path: $(DRAWN)/text, weight: 1}]' \
		'stage.phases.2.sources=[{path: $(DRAWN)/questions}]' \
		run.init_from=$(VL_RUNS)/$(VL_RUN)_eyes run.init_optimizer=false run.name=$(VL_RUN)

vl-preference:
	$(VL_LAUNCH) +stage=vl_dpo_drawn data.path=$(DRAWN)/pairs log.valid_interval=20 \
		run.init_from=$(VL_RUNS)/$(VL_RUN) run.init_optimizer=false run.name=$(VL_RUN)_preferred

vl-answers:
	OMP_NUM_THREADS=$(THREADS) $(PY) launch/ask_images.py $(VL_RUNS)/$(VL_RUN)_preferred --before $(VL_RUNS)/$(VL_RUN) --limit $(VL_QUESTIONS) \
		--questions $(DRAWN)/pictures/valid_questions.jsonl --pairs $(DRAWN)/pictures/valid_pairs.jsonl

# A thread each for two runs at once on a CPU; SWEEP=gpu_small on GPUs. The same command goes on with a sweep.
SWEEP ?= tiny_cpu
SWEEP_CORPUS ?= corpora/stdlib-bytes
$(SWEEP_CORPUS)/manifest.json: $(READY)
	$(PY) launch/prepare.py --recipe stdlib --output $(SWEEP_CORPUS) --tokenizer bytes --valid-fraction 0.02

sweep: $(READY) $(SWEEP_CORPUS)/manifest.json  ## scaling laws of three architectures x three small sizes: 9 runs, points, fits
	$(PY) launch/sweep.py -m sweep=$(SWEEP) data.path=$(SWEEP_CORPUS) $(SWEEP_OPTIONS)

docs: $(READY)  ## docs/options.md, from the code
	$(PY) -m mmtrain.config.options_page configs docs/options.md

# Workers of pytest-xdist, each with whole files: one more than cores, as some wait for processes of their tests (on two cores
# 11m12 in place of 12m01); 4 at most, as many tests start processes of their own.
TEST_WORKERS ?= $(shell echo $$(( $(CORES) < 3 ? $(CORES) + 1 : 4 )))
SHARED_OUT = $(shell $(PY) -c 'import xdist' 2>/dev/null && echo '--numprocesses=$(TEST_WORKERS)' --dist=loadfile)

# Without a browser on the PATH, tests of pages in one are left out.
FIND_BROWSER = command -v chromium || command -v chromium-browser || command -v google-chrome
BROWSER := $(shell $(FIND_BROWSER))
NO_BROWSER = $(if $(BROWSER),, and not browser)

test: $(READY)  ## all tests but the wide matrix and those that need a GPU or a Slurm
	$(PY) -m pytest $(SHARED_OUT) -m "not gpu and not slow and not slurm$(NO_BROWSER)" $(TESTS)

test-all: test  ## the wide matrix too
	$(PY) -m pytest $(SHARED_OUT) -m "slow and not gpu and not slurm$(NO_BROWSER)" $(TESTS) || test $$? -eq 5  # 5: none of TESTS is of the wide matrix

test-gpu: $(READY)  ## the tests that need a GPU
	$(PY) -m pytest -m gpu $(TESTS)

.PHONY: browser test-browser
browser:
	@{ $(FIND_BROWSER); } >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
		apt-get install -qq -y chromium >/dev/null; } || { echo "error: no Chromium on the PATH; install it" >&2; exit 1; }

test-browser: $(READY) browser  ## the tests of pages in Chromium, which is installed where it is missing (Debian, as root)
	$(PY) -m pytest -m browser $(or $(TESTS),tests/report)

SLURM_STATE ?= /run/mmtrain-slurm
test-slurm: $(READY)  ## the tests that need a Slurm, on one of two nodes that is made here for them; needs root
	@export MMTRAIN_SLURM_STATE=$(SLURM_STATE); tests/slurm/cluster.sh up && { \
		trap 'tests/slurm/cluster.sh down' EXIT; \
		SLURM_CONF=$(SLURM_STATE)/slurm.conf $(PY) -m pytest -m slurm $(or $(TESTS),tests/slurm); }

lint: $(READY)  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)  ## lay the code out as lint wants it
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(READY) $(CORPUS)/manifest.json  ## the figures of the README, on this machine (quiet it first)
	$(PY) -m mmtrain.bench.model_cpu
	$(PY) -m mmtrain.bench.loss_cpu
	$(PY) data/bench/bench_prepare.py
	$(PY) data/bench/bench_loader.py
	$(PY) data/bench/bench_packing.py
	$(PY) kernels/bench/lightning_cpu.py --quick

bench-kernels: $(READY)  ## every kernel on this machine's GPU beside its peers and its floor
	$(PY) kernels/bench/gpu/run.py --out kernels/bench/results

GPUS ?= 4
MOE_OUT ?= mmtrain/bench/results/$(shell date +%F)-moe-$(GPUS)gpu
MOE = $(PY) -m torch.distributed.run --standalone --nproc-per-node $(GPUS) -m mmtrain.bench.moe_gpu --trace 4 --out $(MOE_OUT)
bench-moe: $(READY) $(CORPUS)/manifest.json  ## MoE layer beside megatron-core's, NCCL, and whole steps on this machine's GPUs (GPUS=4)
	$(MOE) --ep $(GPUS)
	$(MOE) --ep $$(( $(GPUS) / 2 )) --etp 2 --tp 2
	$(PY) -m torch.distributed.run --standalone --nproc-per-node $(GPUS) -m mmtrain.bench.nccl_gpu --out $(MOE_OUT)
	$(PY) -m mmtrain.bench.scaling_gpu launch/pretrain.py --data $(CORPUS) --gpus $(GPUS) --rows 8 --out $(MOE_OUT) \
		parallel.reshard_after_forward=false --layout parallel.ep=$(GPUS) --layout parallel.ep=1

STEP_GPUS ?= 1
STEP_OUT ?= mmtrain/bench/results/$(shell date +%F)-step-$(STEP_GPUS)gpu
STEP_ONLY ?=
STEP_MODELS := 410m-softmax-one-document 1b-softmax-one-document
STEP_PEERS ?= $(foreach model,$(STEP_MODELS),llama:$(model),megatron:$(model),)
bench-step: $(READY)  ## whole training steps on GPUs (STEP_GPUS=1, STEP_ONLY=case,...) beside other code's (STEP_PEERS=peer:case,...)
	$(PY) -m torch.distributed.run --standalone --nproc-per-node $(STEP_GPUS) -m mmtrain.bench.step_gpu --out $(STEP_OUT) \
		$(if $(STEP_ONLY),--only $(STEP_ONLY)) --peers "$(STEP_PEERS)"

INFER_ONLY ?=
INFER_OUT ?= mmtrain/bench/results/$(shell date +%F)-infer
bench-infer: $(READY)  ## the inference engine on a GPU (INFER_ONLY=case,...): decode steps beside their bytes, prefill beside the whole forward
	$(PY) -m mmtrain.bench.infer_gpu --out $(INFER_OUT) $(if $(INFER_ONLY),--only $(INFER_ONLY))
	$(PY) kernels/bench/gpu/int8_products.py --out $(INFER_OUT)/int8.json

VISION_GPUS ?= 1
VISION_OUT ?= mmtrain/bench/results/$(shell date +%F)-vision-$(VISION_GPUS)gpu
bench-vision: $(READY)  ## a model's eyes on GPUs (VISION_GPUS=1): the vision transformer beside a compiled CLIP, steps with images
	$(PY) -m torch.distributed.run --standalone --nproc-per-node $(VISION_GPUS) -m mmtrain.bench.vision_gpu --out $(VISION_OUT)

bench-apex: $(READY)  ## NVIDIA apex's FusedAdam, built of the source in APEX=folder, beside torch's AdamW and ours
	$(PY) -m mmtrain.bench.apex_adam --source $(APEX) --out mmtrain/bench/results/$(shell date +%F)-apex

clean:  ## remove caches and built files; runs, corpora and .venv stay
	rm -rf .pytest_cache .ruff_cache dist build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

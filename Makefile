# make test   sets everything up and runs the tests
# make demo   sets everything up and turns a real small Llama into a World Factbook expert, before and after measured
# make lint   style and format;  make clean   forgets the demo's results (downloads and the environment stay)
#
# TORCH says which build of torch pip takes, with any of pip's own options:
#   make demo TORCH='torch --index-url URL-OF-THE-BUILDS'
# PYTHON says which interpreter makes the environment (3.11 or 3.12).

SHELL := /bin/bash -euo pipefail
.DELETE_ON_ERROR:
.PHONY: setup test demo lint clean

TORCH ?= torch
PYTHON ?= $(shell for candidate in python3.12 python3.11 python3 python; do \
	$$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& { echo $$candidate; break; }; done)

PIP := .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt
INSTALLED := .venv/.installed

setup: $(INSTALLED)

# torch goes first and alone: whatever is installed after it then takes the build that was chosen here.
$(INSTALLED): requirements.txt constraints.txt setup.py
	@$(if $(PYTHON),,echo 'error: Python 3.11 or 3.12 is needed and none was found; install one or say make PYTHON=/path/to/python3.12' >&2; exit 1)
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	|| { echo 'error: $(PYTHON) is not Python 3.11 or 3.12; say make PYTHON=/path/to/python3.12' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --quiet -e '.[documents,hub,plots,tensorboard,test]'
	@# The extra "streaming" without torchvision, which it names but only images need, and which must match the build of torch.
	$(PIP) --quiet --no-deps litdata obstore tifffile
	@touch $@

test: $(INSTALLED)
	.venv/bin/python -m pytest -n auto --dist loadfile

# The demo is what a user would type, with the Factbook for a domain. Its settings suit two CPU cores in ten minutes; a
# GPU is used if there is one.
BASE := checkpoints/smollm2-135m-instruct
DOMAIN := data/factbook/tokens
GENERAL := data/general/tokens
RUN := out/factbook
ASK := --prompts_file data/factbook/probes.jsonl --max_new_tokens 24 --json true
EVALUATE := scripts/evaluate.py --checkpoint_dir $(BASE) --data_dirs '{domain: $(DOMAIN), general: $(GENERAL)}' \
	--question_file data/factbook/questions.jsonl --overwrite true
DEMO_TRAIN ?= --train.epochs 2 --train.learning_rate 1e-3 --replay.ratio 0.2

demo: $(INSTALLED)
	.venv/bin/python scripts/prepare_demo.py
	.venv/bin/python scripts/prepare_corpus.py --source data/factbook/documents --val_source data/factbook/heldout \
		--checkpoint_dir $(BASE) --data_dir $(DOMAIN) --overwrite true
	.venv/bin/python scripts/prepare_corpus.py --source data/general/replay --val_source data/general/heldout \
		--checkpoint_dir $(BASE) --data_dir $(GENERAL) --overwrite true
	.venv/bin/python $(EVALUATE) --out $(RUN)-base.json > /dev/null
	.venv/bin/python generate/base.py --checkpoint_dir $(BASE) $(ASK)
	.venv/bin/python pretrain/lora.py --checkpoint_dir $(BASE) --data_dir $(DOMAIN) --out_dir $(RUN) --overwrite true \
		--replay.data_dir $(GENERAL) --probe_file data/factbook/probes.jsonl $(DEMO_TRAIN)
	.venv/bin/python generate/lora.py --checkpoint_dir $(BASE) --adapter_dir $(RUN) $(ASK)
	.venv/bin/python $(EVALUATE) --adapter_dir $(RUN) --out $(RUN)-adapter.json > /dev/null
	.venv/bin/python scripts/compare_evaluations.py --base $(RUN)-base.json --adapter $(RUN)-adapter.json \
		--report $(RUN)/report.json

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf data/factbook data/general out/factbook out/factbook-base.json out/factbook-adapter.json

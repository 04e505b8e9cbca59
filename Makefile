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
	.venv/bin/python -m pytest -n auto --dist worksteal

# The demo is what a user would type: countries of the Factbook, read raw and by the recipe that wins on them, at equal
# tokens. Ten to twenty minutes on two CPU cores; a GPU is used if there is one.
BASE := checkpoints/smollm2-135m-instruct
GENERAL := data/general/tokens
EXPERT := out/demo/runs/views+qa+replay.lora.seed0/trained
ASK := --prompt 'If I climb to the highest spot of Albania, where am I?' --max_new_tokens 32

demo: $(INSTALLED)
	.venv/bin/python scripts/prepare_demo.py
	.venv/bin/python scripts/prepare_corpus.py --source data/general/replay --val_source data/general/heldout \
		--checkpoint_dir $(BASE) --data_dir $(GENERAL) --overwrite true
	.venv/bin/python -m benchmarks.injection.domains --domain factbook --relations '[highest_point, internet_code]' \
		--taught 20 --injected 24 --validation 0 --questions_per_cell 24 --known_questions 16 \
		--checkpoint_dir $(BASE) --out_dir data/demo --overwrite true > /dev/null
	.venv/bin/python generate/base.py --checkpoint_dir $(BASE) $(ASK)
	.venv/bin/python scripts/compare_injection.py --config benchmarks/injection/demo.yaml --overwrite true
	.venv/bin/python generate/lora.py --checkpoint_dir $(BASE) --adapter_dir $(EXPERT) $(ASK)

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf data/factbook data/general data/demo out/demo

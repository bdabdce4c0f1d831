# `make test` and `make demo` are the two commands of the README; everything else is a convenience.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install tfgan test demo figures wasserstein clean

# Installs again when what is required has changed. TORCH=cpu: torch without CUDA, a tenth of the download; or another of
# the folders of download.pytorch.org/whl.
install: $(VENV)/.installed

WANTED := import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else f"error: \
  $(PYTHON) is Python {v[0]}.{v[1]}; 3.10 to 3.13 are supported: make PYTHON=python3.12 …")
$(VENV)/.installed: requirements.txt requirements-published.txt
	@$(PYTHON) -c '$(WANTED)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH),$(BIN)/python -m pip install --quiet --index-url https://download.pytorch.org/whl/$(TORCH) torch torchvision)
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-published.txt
	touch $@

# tensorflow-gan, for --config.eval.backend=tfgan, in Python 3.10 and 3.11; its tests are skipped without it.
tfgan: $(VENV)/.tfgan

$(VENV)/.tfgan: requirements-tfgan.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements-tfgan.txt
	touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2

# On the bundled digits: U for 2500 steps; QC from U's checkpoint of step 1800, also to step 2500, so that U is its
# control; and C. What does not wait for something else goes side by side, a thread each. Every command resumes, or does
# nothing if its work is done.
DEMO := runs/digits
RUN := TQDM_MININTERVAL=1 $(BIN)/python main.py --threads=1 --cache_dir=$(DEMO)/cache
demo: install
	$(MAKE) --no-print-directory -j $$(getconf _NPROCESSORS_ONLN) demo-qc-eval demo-c-eval demo-u-eval demo-u-samples
	$(BIN)/python -m report.main $(DEMO)/c $(DEMO)/u $(DEMO)/qc --output $(DEMO)

.PHONY: demo-u demo-qc demo-c demo-u-eval demo-u-samples demo-qc-eval demo-c-eval
demo-u:
	$(RUN) --config=configs/digits.py:u --workdir=$(DEMO)/u --mode=train
demo-qc: demo-u
	$(RUN) --config=configs/digits.py:qc --workdir=$(DEMO)/qc --mode=train \
	  --config.training.init_from=$(DEMO)/u/checkpoints/step_00001800.pt
demo-c:
	$(RUN) --config=configs/digits.py:c --workdir=$(DEMO)/c --mode=train
demo-u-eval demo-qc-eval demo-c-eval: demo-%-eval: demo-%
	$(RUN) --config=configs/digits.py:$* --workdir=$(DEMO)/$* --mode=eval
demo-u-samples: demo-u-eval
	$(RUN) --workdir=$(DEMO)/u --mode=sample --config.sampling.method=ode
	$(RUN) --workdir=$(DEMO)/u --mode=sample --config.sampling.method=few_step \
	  --config.sampling.solver=dpmpp_2m_sde --config.sampling.num_steps=19

# The figures and tables of the small experiments and of the demo, on one page. Resumes as the demo does.
FIGURES := runs/figures
figures: install demo
	$(BIN)/python -m gaussian_example.main --workdir=$(FIGURES)/gaussian_example
	$(BIN)/python -m autoencoder_example.main --workdir=$(FIGURES)/autoencoder_example
	$(BIN)/python -m 2d_examples.main --mode=table --workdir=$(FIGURES)/2d_examples
	$(BIN)/python -m wasserstein_example.main --workdir=$(FIGURES)/wasserstein_example
	$(BIN)/python -m tutorial_example.main --workdir=$(FIGURES)/tutorial_example
	$(BIN)/python -m report.main $(DEMO)/c $(DEMO)/u $(DEMO)/qc --output $(FIGURES)/digits
	$(BIN)/python -m report.index $(FIGURES)

# Nine forward processes, in exact theory and trained on digits, on the same page. Resumes as the demo does.
wasserstein: install
	$(BIN)/python -m wasserstein_example.main --workdir=$(FIGURES)/wasserstein_example
	$(BIN)/python -m wasserstein_example.digits --workdir=$(FIGURES)/wasserstein_digits
	$(BIN)/python -m report.index $(FIGURES)

clean:
	rm -rf runs

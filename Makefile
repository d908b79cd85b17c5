# make quickstart   photographs in, answers out, on this machine's CPU
# make test         the default tests
# make test-all     the slow ones too
# make lint         ruff, which make test runs too
# make fuzz         ten thousand damaged pictures, thousands of damaged annotation files and directories
# make test-original   the refiner's networks as their authors' packages run them, in an environment of their own
PYTHON ?= python3
VENV ?= .venv
ORIGINAL := .venv-original/bin/python
RUN := runs/quickstart
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: quickstart test test-all test-original lint fuzz clean-quickstart
.DELETE_ON_ERROR:

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: setup.py constraints.txt | $(PY)
	$(INSTALL) --editable '.[quickstart]'
	touch $@

$(VENV)/.dev: setup.py constraints.txt | $(PY)
	$(INSTALL) --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.quickstart
	@echo "== 1/5 export: twelve photographs, their objects and local features become records"
	$(PY) -m refiner_export --config configs/export_quickstart.py
	$(PY) -m refiner_export gallery $(RUN)/records
	@echo "== 2/5 tokenizers, trained on the records' texts"
	test -d $(RUN)/tokenizers || $(PY) -m lyrics_jax.data.train_tokenizers --records $(RUN)/records --output $(RUN)/tokenizers
	@echo "== 3/5 stage 1: align pictures, objects and text"
	$(PY) -m lyrics_jax.train --config configs/quickstart_align.py
	@echo "== 4/5 stage 2: learn to answer"
	$(PY) -m lyrics_jax.train --config configs/quickstart_instruct.py
	@echo "== 5/5 ask it"
	$(PY) -m lyrics_jax.generate --checkpoint $(RUN)/instruct --record '$(RUN)/records#2' \
	  --prompt 'What animal is in the photo?' --prompt 'Where is the cat?'
	$(PY) -m lyrics_jax.evaluate --checkpoint $(RUN)/instruct --records $(RUN)/records --output $(RUN)/answers
	@echo "gallery of the records: $(RUN)/records/gallery.html"
	@echo "next: your own pictures and a TPU pod, see README.md; curves while training: tensorboard --logdir $(RUN)"

test: $(VENV)/.dev
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/.dev
	$(PY) -m pytest -m 'slow or not slow'

lint: $(VENV)/.dev
	$(PY) -m ruff check .

fuzz: $(VENV)/.dev
	$(PY) tests/fuzz/fuzz.py

.venv-original/.installed: constraints-original.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info[:2] == (3, 11) else "Python 3.11 is needed: make PYTHON=python3.11 test-original")'
	$(PYTHON) -m venv --clear .venv-original
	$(ORIGINAL) -m pip install --disable-pip-version-check --quiet --constraint $< torch
	$(ORIGINAL) -m pip install --disable-pip-version-check --quiet --no-deps --requirement $<
	touch $@

test-original: .venv-original/.installed
	$(ORIGINAL) -m pytest tests/original

clean-quickstart:
	rm -rf $(RUN)

# `make test` and `make demo` need only Python, pip and make: they set up .venv on their own.
# `make test PYTHON=/path/to/python` uses that environment as it is and installs nothing.

SYSTEM_PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

# Only a PYTHON given to make counts: one inherited from the shell is not a choice of environment.
ifeq ($(origin PYTHON),command line)
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(STAMP)
# What pip leaves uncompiled is compiled when it is imported, and kept. Without that each process
# that imports torch and transformers takes 28 s of a core, not 10.
unexport PYTHONDONTWRITEBYTECODE
endif

NOW := $(shell date +%Y%m%d-%H%M%S)
demo: OUT ?= runs/demo-$(NOW)
bench: OUT ?= runs/bench-$(NOW)
bench-quick: OUT ?= runs/bench-quick-$(NOW)

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-all test-isa test-ptx test-versions test-installation lint format types docs bench \
	bench-quick results clean

help:
	@echo "make demo    SFTMix on a small model; results in runs/demo-DATE (OUT=... to choose)"
	@echo "make test    the tests that this machine can run; make test-all   the slow ones, too"
	@echo "make test-quick   the losses, partition, collator, methods and config: under a minute"
	@echo "make test-isa   what computes, capped to plain x86-64, to AVX2, and on the machine's own"
	@echo "make test-ptx   the compiled GPU kernels, executed on the CPU"
	@echo "make test-versions   the lowest, pinned and newest versions of other libraries"
	@echo "make test-installation   the distributions, built, installed elsewhere and used"
	@echo "make lint    ruff and clang-format; make format mends what they can"
	@echo "make types   mypy --strict"
	@echo "make docs    the site, in site/; dead links and pages without a place fail"
	@echo "make bench   all benchmarks, with tables and pictures in runs/bench-DATE (OUT=...)"
	@echo "make bench-quick   at tiny sizes: ratios beside those committed; fails on errors alone"
	@echo "make results  tables and pictures on pages, from committed results and the code"
	@echo "make clean   removes build products and caches; keeps .venv and runs/"
	@echo "PYTHON=/path/to/python uses that environment and installs nothing"

demo: $(READY)
	"$(PYTHON)" -m sftmix demo --output "$(OUT)"

# One process for each core, each on one thread; a process that is done takes over what others have
# left. Each holds torch and a toy model or two, so that there are eight at most.
PYTEST = OMP_NUM_THREADS=1 "$(PYTHON)" -m pytest -n logical --maxprocesses 8 --dist worksteal

# Few of the benchmarks' files have such tests, and to collect the others is to import transformers.
INTERPRETED = tests/sftmix_kernels $(shell grep -l 'mark[.]interpret' tests/benchmarks/*.py)

test: $(READY)
	if "$(PYTHON)" -c "import triton" 2>/dev/null; then \
		TRITON_INTERPRET=1 $(PYTEST) -m "interpret$(if $(NOT_SLOW), and not slow)" $(INTERPRETED); fi
	$(MAKE) --no-print-directory test-isa-default ISA_TESTS="$(ISA_FEW)"
	$(PYTEST) $(NOT_SLOW) --durations 25 --durations-min 4

# What takes long beside what it tells: `make test-all` runs it, too.
NOT_SLOW := -m "not slow"
test-all: $(READY)
	$(MAKE) --no-print-directory test NOT_SLOW=

# What most changes touch: the losses on the CPU, the partition, the collator, methods, options.
QUICK := $(addprefix tests/sftmix_kernels/,test_checks.py test_cross_entropy.py \
		test_mixup_loss.py::test_every_dtype_and_option \
		test_sftmix_loss.py::test_every_dtype_and_option) \
	$(addprefix tests/sftmix/,pairs/test_partition.py pairs/test_collator.py \
		training/test_methods.py recipe/test_config_file.py) tests/test_layers.py
test-quick: $(READY)
	$(PYTEST) $(NOT_SLOW) $(QUICK)

# Arithmetic differs by instruction set, and so may what holds by chance. PyTorch's own kernels, and
# the extension's with them, are capped by the first variable, oneDNN and MKL by the others.
CAP_default := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
CAP_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
CAP_own :=

ISA_TESTS = tests/sftmix_kernels tests/benchmarks/test_bench_perplexity.py $(patsubst \
	%,tests/sftmix/%.py,model/test_one_by_one ../tools/test_families model/test_head \
	model/test_stand_in model/test_tiled_mlp pairs/test_layouts training/test_methods \
	training/test_peft training/test_scoring training/test_trainer training/test_trainer_options \
	integrations/test_trl)
# A few for the gate: the fold, an op and the trainer's gradients.
ISA_FEW = $(addprefix tests/sftmix_kernels/perplexity/test_online_softmax.py::,\
		test_two_chunks_give_the_loss test_the_loops_are_capped_as_pytorchs_kernels_are) \
	tests/sftmix_kernels/test_mixup_loss.py::test_every_dtype_and_option \
	tests/sftmix/pairs/test_layouts.py::test_every_layout_gives_the_loss_and_gradients_of_examples_alone \
	tests/sftmix/training/test_trainer.py::test_ntp_and_mu_0_are_the_same_training

test-isa: test-isa-default $(if $(shell grep -m1 -o avx2 /proc/cpuinfo),test-isa-avx2) test-isa-own

test-isa-%: $(READY)
	$(CAP_$*) $(PYTEST) $(ISA_TESTS)

test-ptx: $(READY)
	$(PYTEST) -m ptx tests/sftmix_kernels/ptx

test-versions: $(READY)
	"$(PYTHON)" -m tests.versions

test-installation: $(READY)
	"$(PYTHON)" tests/installation.py

CLANG_FORMAT = "$(PYTHON)" -c "import clang_format; clang_format.clang_format()"
CPP := $(foreach e,cpp cu cuh h,$(wildcard csrc/*.$e tests/csrc/*.$e tests/sftmix_kernels/ptx/*.$e))

lint: $(READY)
	"$(PYTHON)" -m ruff check .
	"$(PYTHON)" -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CPP)

format: $(READY)
	"$(PYTHON)" -m ruff check --fix .
	"$(PYTHON)" -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

types: $(READY)
	"$(PYTHON)" -m mypy

# An environment of its own with the site's tools: kernels are described from their source.
DOCS := .venvs/docs
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

$(DOCS)/.installed: pyproject.toml constraints.txt
	"$(SYSTEM_PYTHON)" -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(DOCS)/bin/python -m pip install --quiet -c constraints.txt --group docs
	touch $@

bench: $(READY)
	"$(PYTHON)" -m benchmarks run all --out "$(OUT)"
	"$(PYTHON)" -m benchmarks plot "$(OUT)"

bench-quick: $(READY)
	"$(PYTHON)" -m benchmarks run all --device cpu --quick --out "$(OUT)"
	"$(PYTHON)" -m benchmarks compare "$(OUT)"

results: $(READY)
	"$(PYTHON)" -m benchmarks plot benchmarks/results --markdown benchmarks/RESULTS.md \
		--readme README.md
	for study in smollm2 gemma3; do \
		"$(PYTHON)" -m benchmarks.study report --study $$study \
			--document docs/study.md || exit 1; done
	"$(PYTHON)" -m benchmarks.study small report benchmarks/study/results \
		--document docs/study_small.md
	"$(PYTHON)" -m benchmarks.long_sequence plot benchmarks/long_sequence/results \
		--document docs/memory.md
	"$(PYTHON)" -m benchmarks.half_precision report benchmarks/half_precision/results \
		--document docs/memory.md
	"$(PYTHON)" -m benchmarks.reading report benchmarks/reading/results --document docs/data.md
	"$(PYTHON)" -m tools.architecture

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f sftmix_kernels/*.so $(STAMP)
	find $(wildcard sftmix sftmix_kernels tests benchmarks) -name __pycache__ -prune -exec rm -rf {} +

# torch comes before the package, whose kernels are built beside it: build isolation would have
# none. A virtual environment without pip was interrupted while it was made. What is imported is
# compiled when it is: pip would compile all of it, 35 s of a core for torch. The pip of Python 3.11
# takes 30 s longer to find out what fits together.
PIP_INSTALL = "$(PYTHON)" -m pip install --no-compile -c constraints.txt
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	"$(PYTHON)" -m pip --version >/dev/null 2>&1 || "$(SYSTEM_PYTHON)" -m venv $(VENV)
	"$(PYTHON)" -m pip install --no-compile "pip>=25.1"
	$(PIP_INSTALL) setuptools ninja wheel torch
	$(PIP_INSTALL) --no-build-isolation -e ".[dev]"
	touch $@

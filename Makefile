# DeepSeek-V4-Flash as an MLX bundle that speaks: routed experts 4-bit affine, the rest 8-bit.
#
# Read from top to bottom: the stages stand in the order in which they run. Each stage has a phony
# name and a stamp in build/, one folder for each pair of SOURCE and BUNDLE. A stage is redone when
# its script, a module that it uses, a setting, or a stage before it has changed.
# `make help` lists the targets. GNU Make 3.81 (macOS) will do.

MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
SHELL = /bin/sh

# Your own settings, one `NAME = value` a line; never committed.
-include config.mk

# ------------------------------------------------------------------------------------ settings

# nano: the small trained model that the repository ships, instead of the 160 GB.
MODEL ?= flash
ifeq ($(MODEL),nano)
SOURCE = scripts/nano/checkpoint
BUNDLE = build/nano/bundle
REPO =
endif

# What is downloaded; the first download pins the commit that REVISION stands for then.
REPO ?= deepseek-ai/DeepSeek-V4-Flash
REVISION ?= main
# Where the FP4/FP8 source lies or will lie: 160 GB (149 GiB).
SOURCE ?= /Volumes/Backup/DeepSeek-V4/source
# The bundle that is made: about 180 GB.
BUNDLE ?= $(HOME)/.cache/huggingface/hub/Deviad/DeepSeek-V4-Flash-MLX-Q4Q8
# native reads the source once and writes the finished bundle once; jang runs upstream's converter.
CONVERTER ?= native
# 1: fetch the source's shards while converting and delete them when used (CONVERTER=native).
LOW_DISK ?=
# The largest shard of the bundle; empty for 5 GB.
SHARD_BYTES ?=
# A finished bundle to take tokenizer and encoding files from, instead of the source.
REFERENCE ?=
# The toolchain that serves: a file of scripts/stacks, installed into .toolchain/STACK. new is the
# most faithful to transformers, as the README there shows; old is the plan's, and has what
# CONVERTER=jang needs.
STACK ?= new
# Or any Python of your own that serves, such as the one inside a vMLX.app.
TOOLCHAIN_PYTHON ?= .toolchain/$(STACK)/bin/python
# Where the server listens, on this machine only.
PORT ?= 8010
# How routed experts are stored: mlx (as mx.quantize does, 5 bits a weight), optimal (5 bits, least
# error), exact5 (6 bits, exact), mxfp4 (4.25 bits, exact; not every runtime), lossless (mxfp4, and
# everything else as the source has it too, FP8 as mxfp8; STACK=new). Changing it on a finished
# bundle requantizes from the source.
QUANTIZER ?= mlx
# With optimal: a llama.cpp/ds4 importance matrix (.dat) that weighs the error; empty for none.
IMATRIX ?=
# Processors that requantize uses; empty for all.
JOBS ?=
# What verify looks at: 1 for headers and JSON, 2 for every number too.
LEVEL ?= 2
# 1: download hashes every file again, also those that it knows.
VERIFY_HASHES ?=
# The Python that .venv is made with: 3.11 to 3.13.
PYTHON3 ?= python3

# --------------------------------------------------------------------------- names used below

PYTHON := .venv/bin/python
KEY := $(shell printf '%s\n' '$(SOURCE)' '$(BUNDLE)' | cksum | cut -d ' ' -f 1)
STAMPS := build/$(KEY)
FOLDERS = --source '$(SOURCE)' --bundle '$(BUNDLE)'
space := $(subst ,, )
escaped = $(subst $(space),\ ,$(1))
ifeq ($(wildcard scripts/stacks/$(STACK).txt),)
$(error STACK: found $(STACK), expected one of $(patsubst scripts/stacks/%.txt,%,$(wildcard scripts/stacks/*.txt)))
endif
TOOLCHAIN := $(patsubst %/bin/python,%/installed,$(filter .toolchain/%,$(TOOLCHAIN_PYTHON)))
# What every stage uses.
CORE := .venv/installed $(TOOLCHAIN) $(STAMPS)/settings

# needs_NAME: scripts/NAME.py and all modules that its imports lead to, told by the imports.
-include build/needs.mk
build/needs.mk: scripts/lab/depend.py $(wildcard scripts/*.py scripts/dsv4/*.py scripts/dsv4/*/*.py)
	@mkdir -p build
	@$(PYTHON3) scripts/lab/depend.py > $@.new
	@mv $@.new $@

# A bundle or a source that is gone takes its stamp along.
$(shell test -e '$(BUNDLE)/config.json' || rm -f $(STAMPS)/convert.stamp)
$(shell test -e '$(SOURCE)/config.json' || rm -f $(STAMPS)/download.stamp)

.PHONY: all help FORCE
all: $(STAMPS)/verify.stamp ## build the bundle: every stage from check to verify
	@echo '$(BUNDLE): finished and verified'

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z_]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Settings (make NAME=value, or config.mk): MODEL REPO REVISION SOURCE BUNDLE REFERENCE"
	@echo "  CONVERTER QUANTIZER IMATRIX LOW_DISK SHARD_BYTES STACK TOOLCHAIN_PYTHON PORT JOBS LEVEL"
	@echo "  VERIFY_HASHES PYTHON3; README.md tells what they mean."

# The values that stages depend on. Rewritten only when one of them changes.
$(STAMPS)/settings: FORCE
	@mkdir -p $(STAMPS)
	@printf '%s\n' 'SOURCE=$(SOURCE)' 'BUNDLE=$(BUNDLE)' 'REPO=$(REPO)' 'REVISION=$(REVISION)' \
	  'REFERENCE=$(REFERENCE)' 'TOOLCHAIN_PYTHON=$(TOOLCHAIN_PYTHON)' 'CONVERTER=$(CONVERTER)' \
	  'QUANTIZER=$(QUANTIZER)' 'IMATRIX=$(IMATRIX)' > $@.new
	@cmp -s $@.new $@ || cp $@.new $@
	@rm -f $@.new

# -------------------------------------------------------------------------------------- set-up

.PHONY: venv
venv: .venv/installed $(TOOLCHAIN) ## make .venv for the scripts and .toolchain/STACK (2.4 GB)

.venv/installed: requirements.txt
	rm -f $@
	$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer needed")'
	$(PYTHON3) -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

.toolchain/%/installed: scripts/stacks/%.txt
	rm -rf $(@D)
	$(PYTHON3) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

# Also the old stack, whose converter and loaders the tests compare with; pytest, ruff.
.venv/tests-installed: tests/requirements.txt .venv/installed
	rm -f $@
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --requirement tests/requirements.txt
	touch $@

# -------------------------------------------------------------------------------------- stages

# Can the build succeed? Toolchain, volumes, free space. Writes nothing.
.PHONY: check
check: $(STAMPS)/check.stamp ## say whether the build can succeed: toolchain, volumes, free space
$(STAMPS)/check.stamp: $(CORE) $(needs_check) patches/load_jangtq.patch patches/mlx_model.patch
	rm -f $@
	$(PYTHON) scripts/check.py $(FOLDERS) --python '$(TOOLCHAIN_PYTHON)' \
	  --repo '$(REPO)' --revision '$(REVISION)' --converter '$(CONVERTER)' --quantizer '$(QUANTIZER)' \
	  $(if $(SHARD_BYTES),--shard-bytes $(SHARD_BYTES)) $(if $(IMATRIX),--imatrix '$(IMATRIX)') \
	  $(if $(LOW_DISK),--low-disk)
	touch $@

# Mends the installed jang_tools. Belongs to the toolchain, not to the bundle.
.PHONY: patch_loader unpatch_loader
patch_loader: $(STAMPS)/patch_loader.stamp ## mend the toolchain's loader (undo: unpatch_loader)
$(STAMPS)/patch_loader.stamp: $(STAMPS)/check.stamp $(needs_patch_loader) \
  patches/load_jangtq.patch patches/mlx_model.patch
	rm -f $@
	$(PYTHON) scripts/patch_loader.py --python '$(TOOLCHAIN_PYTHON)'
	touch $@

unpatch_loader: .venv/installed ## put the original loader back, byte for byte
	rm -f build/*/patch_loader.stamp
	$(PYTHON) scripts/patch_loader.py --python '$(TOOLCHAIN_PYTHON)' --undo

# 160 GB from the hub, pinned to a commit, each file compared with the hub's size and hash.
# LOW_DISK=1 brings the small files and the shards' headers only.
.PHONY: download
download: $(STAMPS)/download.stamp ## fetch the source, or recognise a complete one
$(STAMPS)/download.stamp: $(STAMPS)/patch_loader.stamp $(needs_download)
	rm -f $@
	$(PYTHON) scripts/download.py --source '$(SOURCE)' --repo '$(REPO)' --revision '$(REVISION)' \
	  $(if $(VERIFY_HASHES),--verify-hashes) $(if $(LOW_DISK),--low-disk)
	touch $@

QUANTIZE = --quantizer '$(QUANTIZER)' $(if $(IMATRIX),--imatrix '$(IMATRIX)') $(if $(JOBS),--jobs $(JOBS))
# The bundle's tensors, 180 GB, at about the speed of copying: experts to 4-bit affine, other matrices
# to 8-bit. CONVERTER=jang: hours, and experts that are FP4 bytes under an affine label.
.PHONY: convert
convert: $(STAMPS)/convert.stamp ## convert the source into a new bundle (CONVERTER, LOW_DISK)
$(STAMPS)/convert.stamp: $(STAMPS)/download.stamp $(needs_convert)
	rm -f $@
	$(PYTHON) scripts/convert.py $(FOLDERS) --converter '$(CONVERTER)' --python '$(TOOLCHAIN_PYTHON)' \
	  $(QUANTIZE) $(if $(SHARD_BYTES),--shard-bytes $(SHARD_BYTES)) \
	  $(if $(LOW_DISK),--low-disk --repo '$(REPO)')
	touch $@

# What upstream's converter left wrong: experts to 4-bit affine, controls back to F32; shard by shard.
# After CONVERTER=native it finds nothing to do; with LOW_DISK=1 there is no source left to ask.
.PHONY: requantize
requantize: $(STAMPS)/requantize.stamp ## make the routed experts right, from the FP4 source
$(STAMPS)/requantize.stamp: $(STAMPS)/convert.stamp $(needs_requantize)
	rm -f $@
	$(if $(LOW_DISK),@echo 'requantize: convert compared every shard with the source before it was freed', \
	  $(PYTHON) scripts/requantize.py $(FOLDERS) $(QUANTIZE))
	touch $@

# Tokenizer and encoding files.
.PHONY: finalize
finalize: $(STAMPS)/finalize.stamp ## copy tokenizer and encoding files into the bundle
$(STAMPS)/finalize.stamp: $(STAMPS)/requantize.stamp $(needs_finalize)
	rm -f $@
	$(PYTHON) scripts/finalize.py $(FOLDERS) $(if $(REFERENCE),--reference '$(REFERENCE)')
	touch $@

# Stop tokens, chat template, labels: what each runtime reads, where it reads it.
.PHONY: patch
patch: $(STAMPS)/patch.stamp ## write stop tokens, chat template and labels
$(STAMPS)/patch.stamp: $(STAMPS)/finalize.stamp $(needs_patch)
	rm -f $@
	$(PYTHON) scripts/patch.py $(FOLDERS)
	touch $@

# With LOW_DISK=1 without the source, which is gone: convert compared each shard with it.
# LEVEL=1: headers and JSON, seconds. 2: every number against the source, at the disk's speed.
VERIFY = $(PYTHON) scripts/verify.py --bundle '$(BUNDLE)' --level $(LEVEL) \
  $(if $(LOW_DISK),,$(if $(wildcard $(call escaped,$(SOURCE))/config.json),--source '$(SOURCE)')) \
  $(if $(IMATRIX),--imatrix '$(IMATRIX)') \
  --python '$(TOOLCHAIN_PYTHON)' --json $(STAMPS)/verify.json $(if $(JOBS),--jobs $(JOBS))
.PHONY: verify report
verify: $(STAMPS)/patch.stamp ## prove the finished bundle right, or name what is wrong (LEVEL=1: fast)
	$(VERIFY)
$(STAMPS)/verify.stamp: $(STAMPS)/patch.stamp $(needs_verify)
	rm -f $@
	$(VERIFY)
	touch $@

# What the last verify found, as one page to put beside a published bundle.
report: .venv/installed ## write the last verify's result as one HTML page, build/KEY/verify.html
	$(PYTHON) scripts/report.py --json $(STAMPS)/verify.json --out $(STAMPS)/verify.html

# -------------------------------------------------------------------------------------- repairing

# Any DeepSeek-V4 MLX bundle, whoever made it: what level 1 finds is mended, the rest stays.
# Rewritten shards cost disk twice while BUNDLE/.before-repair keeps the originals.
.PHONY: repair unrepair
repair: .venv/installed $(TOOLCHAIN) ## mend a bundle made elsewhere, or damaged: BUNDLE=… SOURCE=… (DRY_RUN=1 first)
	$(PYTHON) scripts/repair.py --bundle '$(BUNDLE)' --python '$(TOOLCHAIN_PYTHON)' $(QUANTIZE) \
	  $(if $(or $(filter command,$(firstword $(origin SOURCE))),$(wildcard $(call escaped,$(SOURCE))/config.json)), \
	  --source '$(SOURCE)') $(if $(REFERENCE),--reference '$(REFERENCE)') $(if $(DRY_RUN),--dry-run)

unrepair: .venv/installed ## put back every file that repair changed, byte for byte
	$(PYTHON) scripts/repair.py --bundle '$(BUNDLE)' --undo

# ------------------------------------------------------------------------------- using the bundle

.PHONY: serve smoke
serve: .venv/installed $(TOOLCHAIN) ## serve the bundle with vMLX on 127.0.0.1:PORT
	$(PYTHON) scripts/serve.py --bundle '$(BUNDLE)' --port $(PORT) --python '$(TOOLCHAIN_PYTHON)'

smoke: .venv/installed ## ask the running server two questions and judge the answers
	$(PYTHON) scripts/smoke.py --port $(PORT)

# -------------------------------------------------------------------- in from and out to the hub

# Headers and JSON of a published bundle, some 30 MB of its 180 GB.
# AGAINST=repository compares it with a source, tensor by tensor, by name and shape.
AGAINST ?=
.PHONY: inspect
inspect: .venv/installed ## judge published bundles before their download: REPO="user/bundle user/other"
	@test '$(origin REPO)' = 'command line' || \
	  { echo 'error: REPO: found none, expected user/bundle; make inspect REPO=user/bundle' >&2; exit 2; }
	$(PYTHON) scripts/inspect_bundle.py --repo '$(REPO)' $(if $(AGAINST),--against '$(AGAINST)') \
	  $(if $(filter command,$(firstword $(origin REVISION))),--revision '$(REVISION)')

# Exactly the bytes that verify read, with a card of facts, in one commit.
# DRY_RUN=1 shows everything and uploads nothing; PRIVATE=1 makes a new repository private.
TO ?=
DRY_RUN ?=
PRIVATE ?=
.PHONY: publish
publish: report ## upload the verified bundle to the hub: TO=user/name (DRY_RUN=1 first)
	$(PYTHON) scripts/publish.py $(FOLDERS) --to '$(TO)' --report $(STAMPS)/verify.json \
	  --page $(STAMPS)/verify.html $(if $(PRIVATE),--private) $(if $(DRY_RUN),--dry-run)

# ----------------------------------------------------------------------------------- the nano demo

# The small trained model through every stage; the stock bundle beside it; both asked.
NANO = scripts/nano/checkpoint
NANO_WORK = build/nano
.PHONY: demo selftest
demo: ## build, serve and ask the small model that the repository ships (no download)
	$(MAKE) all MODEL=nano BUNDLE=$(NANO_WORK)/bundle
	$(PYTHON) scripts/lab/make_stock.py --source $(NANO) --bundle $(NANO_WORK)/stock
	$(PYTHON) scripts/demo.py --source $(NANO) --stock $(NANO_WORK)/stock \
	  --bundle $(NANO_WORK)/bundle --python '$(TOOLCHAIN_PYTHON)'

# Every stack of scripts/stacks, in venvs of their own: 6 GB in build/, up to an hour.
.PHONY: matrix
matrix: .venv/tests-installed ## which runtime loads which bundle of the small model, and answers rightly?
	$(PYTHON) scripts/patch_loader.py --python $(PYTHON)
	$(PYTHON) scripts/lab/matrix.py

# The same from nothing each time, for a toolchain of your own: TOOLCHAIN_PYTHON=…
selftest: ## can this toolchain be trusted with the big model? Convert, load and serve the small one
	rm -rf build/selftest
	$(MAKE) demo NANO_WORK=build/selftest

# What each QUANTIZER costs: on full-shape weights, and through the nano model beside its source.
# SOURCE2 is a source that was trained less, so that differences show (train_nano.py --save-early).
SOURCE2 ?=
.PHONY: fidelity
fidelity: .venv/tests-installed ## measure every QUANTIZER: tables in build/fidelity, .github/fidelity.svg
	$(PYTHON) scripts/patch_loader.py --python $(PYTHON)
	$(PYTHON) scripts/lab/fidelity.py --source scripts/nano/checkpoint \
	  $(if $(SOURCE2),--source2 '$(SOURCE2)') --out build/fidelity --picture .github/fidelity.svg

# Bundles of the small model by mlx-vlm's, mlx_lm's and jang's converters, for verify to be tried on.
.PHONY: specimens
specimens: .venv/installed .toolchain/new/installed ## make bundles as others make them, in build/specimens (3 minutes)
	$(PYTHON) scripts/lab/specimens.py

# ------------------------------------------------------------------------------------- development

# jang_tools as published, for the tests of the patches.
build/wheels/jang-%-py3-none-any.whl: | .venv/installed
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps \
	  --dest build/wheels jang==$*

# requantize against copying and the plan's own method, verify's level 2 against cat, side by side.
.PHONY: bench bench_convert
bench: .venv/installed ## measure requantize beside copying and the plan's method, verify beside cat (10 GB)
	$(PYTHON) scripts/lab/bench.py

# 8 GB under build/ while it runs, about 7 minutes on two cores.
bench_convert: .venv/tests-installed ## measure convert against the disk, and against upstream and the plan
	$(PYTHON) scripts/lab/bench_convert.py

.PHONY: test lint format clean
test: .venv/tests-installed .toolchain/new/installed $(patsubst %,build/wheels/jang-%-py3-none-any.whl,2.5.8 2.5.9 2.5.50) ## run the tests
	$(PYTHON) scripts/patch_loader.py --python $(PYTHON)
	$(PYTHON) -m pytest -q -n auto --dist loadfile tests

lint: .venv/tests-installed ## check style, format, the workflow, and that imports go down the stairs only
	PYTHONPATH=scripts .venv/bin/lint-imports --no-cache --no-logo
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml
	$(PYTHON) -m ruff check scripts tests
	$(PYTHON) -m ruff format --check scripts tests

format: .venv/tests-installed ## format the code
	$(PYTHON) -m ruff format scripts tests

clean: ## remove stamps and reports; never a bundle or a source
	rm -f build/*/*.stamp build/*/settings build/*/verify.json build/*/verify.html
	rm -f build/matrix/matrix.json build/fidelity/fidelity.*

# Convert DeepSeek-V4-Flash to an MLX bundle: routed experts 4-bit affine, the rest 8-bit.
#
# The stages are in the order in which they run. Each stage has a phony name and a stamp in build/,
# one folder for each pair of SOURCE and BUNDLE. A stage is redone when its script, a module that it
# uses, a setting, or a stage before it has changed. `make all` runs all of them; `make STAGE` runs
# that stage and those before it; but `make verify` runs verify alone. `make help` lists the targets.
# GNU Make 3.81, which macOS has, is enough.

MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
SHELL = /bin/sh

# Your own settings, one `NAME = value` a line, a comment on a line of its own; never committed.
before := $(.VARIABLES)
-include config.mk
in_config_mk := $(filter-out before $(before),$(.VARIABLES))

# A setting's value. config.mk's values are expanded by make; those of the command line and the
# environment are taken literally. ~/ at the beginning is the home folder.
as_said = $(if $(filter file,$(origin $(1))),$($(1)),$(value $(1)))
value_of = $(subst $(begin),,$(subst $(begin)~/,$(value HOME)/,$(begin)$(as_said)))
begin := <the value begins here>
on_command_line = $(filter command,$(firstword $(origin $(1))))
# A path without the slash at its end that shells complete, so that both spellings are one folder.
path_of = $(subst $(end),,$(subst /$(end),$(end),$(value_of)$(end)))
end := <the value ends here>
# The value if it is one of the names $(2), else another text.
one_of = $(or $(filter $(2),$(firstword $(as_said))),no $(as_said))

# ------------------------------------------------------------------------------------ settings

# nano: the small trained model in this repository, instead of the 160 GB.
MODEL ?= flash
ifneq ($(call as_said,MODEL),$(call one_of,MODEL,flash nano))
$(error MODEL: found '$(call as_said,MODEL)', expected flash or nano)
endif
ifeq ($(call as_said,MODEL),nano)
SOURCE = scripts/nano/checkpoint
BUNDLE = build/nano/bundle
REPO =
endif

# What is downloaded. The first download pins the commit that REVISION means at that time.
REPO ?= deepseek-ai/DeepSeek-V4-Flash
REVISION ?= main
# The folder of the FP4/FP8 source, present or to be downloaded: 160 GB (149 GiB).
SOURCE ?= /Volumes/Backup/DeepSeek-V4/source
# The bundle to make: about 180 GB.
BUNDLE ?= ~/.cache/huggingface/hub/Deviad/DeepSeek-V4-Flash-MLX-Q4Q8
# native reads the source once and writes the finished bundle once; jang runs upstream's converter.
CONVERTER ?= native
# 1: download the source's shards while converting and delete them after use (CONVERTER=native).
LOW_DISK ?=
# Limit of a shard's size in the bundle; empty for 5 GB.
SHARD_BYTES ?=
# A finished bundle to take tokenizer and encoding files from, instead of the source.
REFERENCE ?=
# download: a repository that has the tokenizer and encoding files, for a source without them.
BASE ?=
# patch: first or 0731, whose conversation the model speaks, if the encoding file does not tell.
RELEASE ?=
# The toolchain that serves: a file of scripts/stacks, installed into .toolchain/STACK. new is
# nearest to transformers, see the README there; old is the plan's, and has what CONVERTER=jang needs.
STACK ?= new
STACKS := $(patsubst scripts/stacks/%.txt,%,$(wildcard scripts/stacks/*.txt))
ifeq ($(STACKS),)
$(error $(CURDIR): found no scripts/stacks, expected this repository; make -C $(dir $(firstword $(MAKEFILE_LIST))) …)
endif
ifneq ($(call as_said,STACK),$(call one_of,STACK,$(STACKS)))
$(error STACK: found '$(call as_said,STACK)', expected one of $(STACKS))
endif
# Or another Python with a server, such as the one inside a vMLX.app.
TOOLCHAIN_PYTHON ?= .toolchain/$(STACK)/bin/python
# The server's port, on this machine only.
PORT ?= 8010
# How routed experts are stored: mlx (as mx.quantize does, 5 bits a weight), mxfp4 (4.25 bits, exact;
# not every runtime), lossless (mxfp4, and everything else exact too, FP8 as mxfp8; STACK=new),
# affineBgG (B bits in groups of G columns, least error: affine4g32 has mlx's format), small (2.67
# bits, a shape for which vMLX has fused kernels), turboquant2 (2 bits, jang's TurboQuant, for vMLX on
# Metal only). Empty: the quantizer in the bundle's record; for a new bundle mlx, or mixture with a
# PLAN. Only a name requantizes the experts of a finished bundle, from the source.
QUANTIZER ?=
# How MTP, or DSpark, is stored, with which no server computes: source (mxfp4 and mxfp8, exact) or
# as-experts (as the main layers, by QUANTIZER). Empty: as in the bundle's record; for a new one
# source. DROP_MTP=1 leaves it out: 12.7 GB less for -0731 by mlx.
MTP ?=
DROP_MTP ?=
# With affineBgG or small: a llama.cpp/ds4 importance matrix (.dat) that weighs the error;
# empty for none, or for the one that the bundle was made with.
IMATRIX ?=
# The bundle that fits your Mac: FIT=96GB (its memory, with CONTEXT tokens) or SIZE=88GB (the bundle's
# size) plan a mixture of formats by layer. PLAN: the file of that plan, which you may edit, or your
# own. QUANTIZER=mixture-lossless: everything but the experts exact (STACK=new). ANY_SHAPE=1: the
# least error, without regard to the shape for which vMLX has fused kernels.
FIT ?=
SIZE ?=
ANY_SHAPE ?=
# All empty: a finished mixture keeps its plan.
PLAN ?= $(if $(call as_said,FIT)$(call as_said,SIZE),$(call path_of,BUNDLE).plan.json)
# Processors that requantize uses; empty for all.
JOBS ?=
# What verify checks: 1 for headers and JSON, 2 for every number too.
LEVEL ?= 2
# 1: download hashes every file again, also those that it has hashed before.
VERIFY_HASHES ?=
# The Python that .venv and .toolchain are made with: 3.11 to 3.13; 3.14 was not tried.
PYTHON3 ?= python3
# inspect: a source to compare with, by tensor names and shapes. accept: the URL of a second server,
# and the name of its model.
AGAINST ?=
AGAINST_NAME ?=
# accept: the URL of a server, if not that of `make serve`, and its model's name. CONTEXT: for accept
# the longest prompt in tokens; for check and plan the context to leave memory for.
URL ?=
MODEL_NAME ?=
CONTEXT ?=
# publish: user/name on the hub; 1: a new repository is private.
TO ?=
PRIVATE ?=
# 1: repair and publish print what they would do, and do nothing.
DRY_RUN ?=
# fidelity: a second source, trained less, which shows larger differences (train_nano.py --save-early).
SOURCE2 ?=
# evaluate: several bundles, separated by blanks, instead of BUNDLE.
BUNDLES ?=
# evaluate and imatrix: a text instead of the repository's own, the number of its tokens, and the
# device: cpu or gpu; evaluate also: both.
TEXT ?=
TOKENS ?=
DEVICE ?=
# evaluate: the model code, jang or vlm; 1: compute the bundle in float32.
RUNTIME ?=
FLOAT32 ?=

# Settings reach the scripts as RECIPE_NAME in the environment, so that no shell expands the value.
SETTINGS := REPO BASE RELEASE REVISION SOURCE BUNDLE CONVERTER LOW_DISK SHARD_BYTES REFERENCE TOOLCHAIN_PYTHON PORT \
  QUANTIZER IMATRIX JOBS LEVEL VERIFY_HASHES PYTHON3 AGAINST TO PRIVATE DRY_RUN SOURCE2 \
  BUNDLES TEXT TOKENS DEVICE RUNTIME FLOAT32 AGAINST_NAME URL MODEL_NAME CONTEXT \
  FIT SIZE ANY_SHAPE PLAN MTP DROP_MTP
# An unknown name on the command line stops make. One in config.mk, which may have variables of its
# own, does if it is nearly that of a setting.
NAMES := $(SETTINGS) MODEL STACK NANO_WORK SEED FUZZ MAKE
given := $(foreach name,$(.VARIABLES),$(if $(call on_command_line,$(name)),$(name)))
unknown_given := $(filter-out $(NAMES),$(given))
unknown_there := $(filter-out $(NAMES),$(in_config_mk))
WRONG := $(if $(unknown_given)$(unknown_there),$(shell $(PYTHON3) -c 'import difflib, sys; \
  names, given, there = map(str.split, sys.argv[1:]); \
  near = lambda name: difflib.get_close_matches(name.upper(), names, 1, 0.7); \
  print(*next(([n, *near(n)] for n in given + there if n in given or near(n)), []))' \
  '$(NAMES)' '$(unknown_given)' '$(unknown_there)'))
$(if $(WRONG),$(error $(firstword $(WRONG)): found no setting of that name, expected \
  $(or $(word 2,$(WRONG)),one of those in the README)))
$(foreach name,$(SETTINGS),$(eval export RECIPE_$(name) = $$(call value_of,$(name))))
unexport $(foreach name,$(SETTINGS) MODEL STACK,$(if $(call on_command_line,$(name)),$(name)))
# Keep the variables of another Python installation out of ours.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONUSERBASE __PYVENV_LAUNCHER__
export PYTHONNOUSERSITE := 1

# --------------------------------------------------------------------------- names used below

PYTHON := .venv/bin/python
quoted = '$(subst ','\'',$(path_of))'
KEY := $(shell printf '%s\n' $(call quoted,SOURCE) $(call quoted,BUNDLE) | cksum | cut -d ' ' -f 1)
STAMPS := build/$(KEY)
TOOLCHAIN := $(filter $(STACKS:%=.toolchain/%/installed), \
  $(patsubst %/bin/python,%/installed,$(call value_of,TOOLCHAIN_PYTHON)))
# Prerequisites of every stage.
CORE := .venv/installed $(TOOLCHAIN) $(STAMPS)/settings
on = $(filter-out 0 no false off,$(call as_said,$(1)))
# Stages do not change a bundle of another maker, unless the target requantize is named.
OURS = $(if $(filter requantize,$(MAKECMDGOALS)),,--ours)

# needs_NAME: scripts/NAME.py and all modules that it imports, directly or not.
-include build/needs.mk
python3 = command -v "$$RECIPE_PYTHON3" > /dev/null || { echo "error: PYTHON3: found no program \
  '$$RECIPE_PYTHON3', expected Python 3.11 to 3.13; make … PYTHON3=/path/to/python3" >&2; exit 1; }; \
  "$$RECIPE_PYTHON3" -I
build/needs.mk: scripts/lab/depend.py $(wildcard scripts/*.py scripts/dsv4/*.py scripts/dsv4/*/*.py scripts/dsv4/*/*/*.py)
	@mkdir -p build
	@$(python3) scripts/lab/depend.py > $@.new
	@mv $@.new $@

.PHONY: all help FORCE
all: $(STAMPS)/verify.stamp ## build the bundle: every stage from check to verify
	@printf '%s: finished and verified\n' "$$RECIPE_BUNDLE"

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z_-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Settings (make NAME=value, or config.mk): MODEL REPO BASE RELEASE REVISION SOURCE BUNDLE REFERENCE"
	@echo "  CONVERTER QUANTIZER MTP DROP_MTP IMATRIX FIT SIZE CONTEXT ANY_SHAPE PLAN LOW_DISK SHARD_BYTES STACK"
	@echo "  TOOLCHAIN_PYTHON PORT JOBS LEVEL VERIFY_HASHES PYTHON3 BUNDLES TEXT TOKENS DEVICE RUNTIME"
	@echo "  FLOAT32; see README.md."

# The values that stages depend on. Rewritten only when one of them has changed.
$(STAMPS)/settings: FORCE
	@mkdir -p $(STAMPS)
	@printf '%s\n' $(foreach name,SOURCE BUNDLE REPO BASE RELEASE REVISION REFERENCE TOOLCHAIN_PYTHON CONVERTER \
	  QUANTIZER MTP DROP_MTP IMATRIX FIT SIZE CONTEXT ANY_SHAPE PLAN,"$(name)=$$RECIPE_$(name)") > $@.new
	@cmp -s $@.new $@ || cp $@.new $@
	@rm -f $@.new

# Newer than every stamp while there is no source, bundle or plan, so that its stage is redone.
$(STAMPS)/no_SOURCE $(STAMPS)/no_BUNDLE: FORCE
	@mkdir -p $(STAMPS)
	@test -e "$$RECIPE_$(@F:no_%=%)/config.json" && test -e $@ || touch $@
$(STAMPS)/no_PLAN: FORCE
	@mkdir -p $(STAMPS)
	@test -e "$${RECIPE_PLAN:-/}" && test -e $@ || touch $@

# -------------------------------------------------------------------------------------- set-up

.PHONY: venv
venv: .venv/installed $(TOOLCHAIN) ## make .venv for the scripts and .toolchain/STACK (2.5 GB)

# scripts/lab/install.py makes each. It writes a copy of the pins as the stamp once the modules named
# last can be imported. STALE: the stamps that are no such copy, or whose installation was
# interrupted, or whose Python is gone or has another version now. Dates do not matter.
INSTALL = $(python3) scripts/lab/install.py
STALE := $(shell exec 2> /dev/null; \
  has() { v=`$$1/bin/python -ISc 'import sys; print("python%d.%d" % sys.version_info[:2])'`; \
    test -d $$1/lib/$$v/site-packages && test ! -s $$1/made-by-install && \
    cmp -s $$2 $$1/installed; }; \
  if has .venv requirements.txt; then \
    cmp -s tests/requirements.txt .venv/tests-installed || echo .venv/tests-installed; \
  else echo .venv/installed .venv/tests-installed; fi; \
  $(foreach stack,$(STACKS),has .toolchain/$(stack) scripts/stacks/$(stack).txt || \
    echo .toolchain/$(stack)/installed;))
$(STALE): FORCE

.venv/installed: | requirements.txt
	@$(INSTALL) $@ requirements.txt mlx.core numba safetensors huggingface_hub tokenizers socksio

.toolchain/%/installed: | scripts/stacks/%.txt
	@$(INSTALL) --anew $@ scripts/stacks/$*.txt mlx.core transformers

# Also the old stack, whose converter and loaders the tests compare with; pytest, ruff.
.venv/tests-installed: | tests/requirements.txt .venv/installed
	@$(INSTALL) $@ tests/requirements.txt mlx.core transformers pytest hypothesis

# -------------------------------------------------------------------------------------- stages

# Checks toolchain, volumes and free space. Writes only its stamp.
.PHONY: check
check: $(STAMPS)/check.stamp ## check that the build can succeed: toolchain, volumes, free space
$(STAMPS)/check.stamp: $(CORE) $(needs_check) patches/load_jangtq.patch patches/mlx_model.patch
	rm -f $@
	$(PYTHON) scripts/check.py $(OURS)
	touch $@

# Patches the installed jang_tools: the toolchain, not the bundle.
.PHONY: patch_loader unpatch_loader
patch_loader: $(STAMPS)/patch_loader.stamp ## patch the toolchain's loader (undo: unpatch_loader)
$(STAMPS)/patch_loader.stamp: $(STAMPS)/check.stamp $(needs_patch_loader) \
  patches/load_jangtq.patch patches/mlx_model.patch
	rm -f $@
	$(PYTHON) scripts/patch_loader.py
	touch $@

unpatch_loader: .venv/installed ## put the original loader back, byte for byte
	rm -f build/[0-9]*/patch_loader.stamp
	$(PYTHON) scripts/patch_loader.py --undo

# Downloads 160 GB, pinned to a commit; compares each file with the hub's size and hash. With
# LOW_DISK=1 only the small files and the shards' headers.
.PHONY: download
download: $(STAMPS)/download.stamp ## download the source, or recognise a complete one
$(STAMPS)/download.stamp: $(STAMPS)/patch_loader.stamp $(STAMPS)/no_SOURCE $(needs_download)
	rm -f $@
	$(PYTHON) scripts/download.py
	touch $@

# Chooses each layer's format by a sample of the experts, 0.3 GB of Flash. Keeps an existing plan.
.PHONY: plan
plan: $(STAMPS)/plan.stamp ## plan which layer gets how many bits, to FIT=96GB or SIZE=88GB
$(STAMPS)/plan.stamp: $(STAMPS)/download.stamp $(STAMPS)/no_PLAN $(needs_plan)
	rm -f $@
	$(PYTHON) scripts/plan.py
	touch $@

# A copy of the plan, which changes when the plan was edited.
$(STAMPS)/plan: $(STAMPS)/plan.stamp FORCE
	@test -z "$$RECIPE_PLAN" && { test -e $@ || touch $@; } || \
	  cmp -s - $@ < "$$RECIPE_PLAN" || cat < "$$RECIPE_PLAN" > $@

# Writes the bundle's tensors, 180 GB, at about the speed of copying: experts as 4-bit affine, other
# matrices as 8-bit. CONVERTER=jang: hours, and experts that are FP4 bytes under an affine label.
.PHONY: convert
convert: $(STAMPS)/convert.stamp ## convert the source into a new bundle (CONVERTER, LOW_DISK)
$(STAMPS)/convert.stamp: $(STAMPS)/plan.stamp $(STAMPS)/plan $(STAMPS)/no_BUNDLE $(needs_convert)
	rm -f $@
	$(PYTHON) scripts/convert.py
	touch $@

# Corrects upstream's bundle: experts to 4-bit affine, controls back to F32; shard by shard. After
# CONVERTER=native there is nothing to do; with LOW_DISK=1 the source is gone. A finished bundle gets
# another format only if QUANTIZER, IMATRIX, PLAN, FIT or SIZE asks for one.
.PHONY: requantize
requantize: $(STAMPS)/requantize.stamp ## correct the routed experts, from the FP4 source
$(STAMPS)/requantize.stamp: $(STAMPS)/convert.stamp $(needs_requantize)
	rm -f $@
	$(if $(call on,LOW_DISK),@echo 'requantize: convert compared every shard with the source before it was freed', \
	  $(PYTHON) scripts/requantize.py $(OURS))
	touch $@

# Copies tokenizer and encoding files.
.PHONY: finalize
finalize: $(STAMPS)/finalize.stamp ## copy tokenizer and encoding files into the bundle
$(STAMPS)/finalize.stamp: $(STAMPS)/requantize.stamp $(needs_finalize)
	rm -f $@
	$(PYTHON) scripts/finalize.py
	touch $@

# Writes stop tokens, chat template and labels into the files that each runtime reads.
.PHONY: patch
patch: $(STAMPS)/patch.stamp ## write stop tokens, chat template and labels
$(STAMPS)/patch.stamp: $(STAMPS)/finalize.stamp $(needs_patch)
	rm -f $@
	$(PYTHON) scripts/patch.py
	touch $@

# `make verify` runs no stage and reads the bundle only, which may be of any maker. With LOW_DISK=1 it
# needs no source: convert compared each shard with it. LEVEL=1: headers and JSON, seconds. 2: every
# number against the source, at the disk's speed. A SOURCE of the command line must exist, and is
# passed as an option; any other is used if it exists.
WITH_SOURCE = $(if $(call on_command_line,SOURCE),RECIPE_SOURCE= $(1) --source="$$RECIPE_SOURCE",$(1))
VERIFY = $(if $(call on,LOW_DISK),RECIPE_SOURCE= $(1),$(WITH_SOURCE)) --json $(STAMPS)/verify.json
.PHONY: verify report
verify: .venv/installed $(TOOLCHAIN) ## check a bundle against its source, and name every fault; changes nothing (LEVEL=1: fast)
	$(call VERIFY,$(PYTHON) scripts/verify.py)
$(STAMPS)/verify.stamp: $(STAMPS)/patch.stamp $(needs_verify)
	rm -f $@
	$(call VERIFY,$(PYTHON) scripts/verify.py)
	touch $@

# One page to put beside a published bundle.
report: .venv/installed ## write the last verify's result as one HTML page, build/KEY/verify.html
	$(PYTHON) scripts/report.py --json $(STAMPS)/verify.json --out $(STAMPS)/verify.html

# -------------------------------------------------------------------------------------- repairing

# Repairs what level 1 finds, in a DeepSeek-V4 MLX bundle of any maker. Rewritten shards take disk
# space twice while BUNDLE/.before-repair keeps the originals.
.PHONY: repair unrepair
repair: .venv/installed $(TOOLCHAIN) ## repair a damaged bundle, or one of another maker: BUNDLE=… SOURCE=… (DRY_RUN=1 first)
	$(call WITH_SOURCE,$(PYTHON) scripts/repair.py)

unrepair: .venv/installed ## restore every file that repair changed, byte for byte
	$(PYTHON) scripts/repair.py --undo

# ----------------------------------------------------------------------- measuring the real model

# Runs source and bundle over one text, layer by layer, in the memory of one layer; uses 8 GB of disk.
# DEVICE=cpu, gpu or both; RUNTIME=vlm for mlx-vlm's model; FLOAT32=1 computes the bundle in float32.
# Paths in BUNDLES="a b" have no blanks.
.PHONY: evaluate imatrix
evaluate: .venv/installed $(TOOLCHAIN) ## measure how far the bundle is from its source (BUNDLES="a b", TEXT, TOKENS, DEVICE)
	$(PYTHON) scripts/evaluate.py --out $(STAMPS)/evaluate

# For QUANTIZER=affineBgG, small and mixtures. Reads the source once.
imatrix: .venv/installed $(TOOLCHAIN) ## measure how much each column of each expert matters, for IMATRIX (TEXT, DEVICE)
	$(PYTHON) scripts/imatrix.py --out $(STAMPS)/imatrix.dat

# ------------------------------------------------------------------------------- using the bundle

.PHONY: serve smoke accept
serve: .venv/installed $(TOOLCHAIN) ## serve the bundle with STACK's server on 127.0.0.1:PORT
	$(PYTHON) scripts/serve.py

smoke: .venv/installed ## ask the running server two questions and check the answers
	$(PYTHON) scripts/smoke.py

# Any server of OpenAI's chat completions. Keys come from OPENAI_API_KEY and AGAINST_API_KEY.
accept: .venv/installed ## test the served model and measure its speed (URL, MODEL_NAME, AGAINST=URL, CONTEXT)
	$(PYTHON) scripts/accept.py --out $(STAMPS)/accept

# -------------------------------------------------------------------- in from and out to the hub

# Reads headers and JSON of a published bundle, some 30 MB of its 180 GB. REPO and REVISION are the
# source's unless the command line gives them.
.PHONY: inspect
inspect: .venv/installed ## check published bundles before their download: REPO="user/bundle user/other"
	$(if $(call on_command_line,REPO),,$(error REPO: found none on the command line, expected user/bundle))
	$(PYTHON) scripts/inspect_bundle.py $(if $(call on_command_line,REVISION),,--revision main)

# Uploads the bytes that verify read, with a model card, in one commit. DRY_RUN=1 prints everything
# and uploads nothing.
.PHONY: publish
publish: report ## upload the verified bundle to the hub: TO=user/name (DRY_RUN=1 first)
	$(PYTHON) scripts/publish.py --report $(STAMPS)/verify.json --page $(STAMPS)/verify.html

# ----------------------------------------------------------------------------------- the nano demo

# Runs every stage on the small trained model, makes the stock bundle, and asks both questions.
NANO = scripts/nano/checkpoint
NANO_WORK = build/nano
.PHONY: demo selftest
demo: ## build, serve and ask the small model of this repository (no download)
	$(MAKE) all MODEL=nano BUNDLE=$(NANO_WORK)/bundle
	$(PYTHON) scripts/lab/make_stock.py --source $(NANO) --bundle $(NANO_WORK)/stock
	$(PYTHON) scripts/demo.py --source $(NANO) --stock $(NANO_WORK)/stock \
	  --bundle $(NANO_WORK)/bundle

# Makes a venv for every stack of scripts/stacks: 6 GB in build/, up to an hour.
.PHONY: matrix
matrix: .venv/tests-installed ## test every runtime with every bundle of the small model
	$(PYTHON) scripts/patch_loader.py --python $(PYTHON)
	$(PYTHON) scripts/lab/matrix.py

# `make demo` from the start each time, for a toolchain of your own: TOOLCHAIN_PYTHON=… Removes the
# files of the last run in build/selftest; stops at other files there.
selftest: ## test a toolchain before the big model: convert, load and serve the small one
	@test ! -e build/selftest || test -f build/selftest/made-by-selftest && test ! -L build/selftest || \
	  { echo "error: build/selftest: found what this target did not make, expected nothing there;" \
	  "look at it, and move it away" >&2; exit 1; }
	rm -rf build/selftest
	@mkdir -p build/selftest && touch build/selftest/made-by-selftest
	$(MAKE) demo NANO_WORK=build/selftest

# The error of each QUANTIZER on full-shape weights, and on the nano's answers.
.PHONY: fidelity
fidelity: .venv/tests-installed .toolchain/new/installed ## measure every QUANTIZER: tables in build/fidelity, .github/fidelity.svg
	$(PYTHON) scripts/patch_loader.py --python $(PYTHON)
	$(PYTHON) scripts/lab/fidelity.py --picture .github/fidelity.svg

# Bundles of the small model by mlx-vlm's, mlx_lm's and jang's converters, to test verify.
.PHONY: specimens
specimens: .venv/installed .toolchain/new/installed ## make bundles by other tools, in build/specimens, and check them (10 minutes)
	$(PYTHON) scripts/lab/specimens.py --judge

# ------------------------------------------------------------------------------------- development

# jang_tools as published, for the tests of the patches.
build/wheels/jang-%-py3-none-any.whl: | .venv/installed
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps \
	  --dest build/wheels jang==$*

# requantize against copying and the plan's method; verify's level 2 against cat.
.PHONY: bench bench_convert
bench: .venv/installed ## measure requantize against copying and the plan's method, verify against cat (10 GB)
	$(PYTHON) scripts/lab/bench.py

# Uses 8 GB under build/; about 7 minutes on two cores.
bench_convert: .venv/tests-installed ## measure convert against the disk, and against upstream and the plan
	$(PYTHON) scripts/lab/bench_convert.py

# The last line of `make test` names the tests that it leaves to test-full.
# SEED=N or random, FUZZ=N: see tests/conftest.py.
.PHONY: test test-full lint format clean
TESTS_NEED := .venv/tests-installed .toolchain/new/installed $(patsubst %,build/wheels/jang-%-py3-none-any.whl,2.5.8 2.5.9 2.5.50)
PYTEST = $(PYTHON) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder tests
test: $(TESTS_NEED) ## run the tests that a contributor runs
	$(PYTHON) scripts/patch_loader.py --python $(PYTHON)
	$(PYTEST) -m 'not full'

test-full: $(TESTS_NEED) ## run the tests that `make test` leaves out
	$(PYTHON) scripts/patch_loader.py --python $(PYTHON)
	$(PYTEST) -m full

lint: .venv/tests-installed ## check style, format, the workflow, and that imports go to lower layers only
	PYTHONPATH=scripts .venv/bin/lint-imports --no-cache --no-logo
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml
	$(PYTHON) -m ruff check scripts tests
	$(PYTHON) -m ruff format --check scripts tests

format: .venv/tests-installed ## format the code
	$(PYTHON) -m ruff format scripts tests

clean: ## remove stamps and reports; never a bundle or a source
	cd build && for key in [0-9]*; do \
	  case $$key in *[!0-9]*) continue;; esac; \
	  test -L $$key || rm -f $$key/*.stamp $$key/settings $$key/verify.json $$key/verify.html \
	    $$key/evaluate.json $$key/evaluate.md $$key/evaluate.html $$key/accept.json $$key/accept.html; \
	done
	rm -f build/matrix/matrix.json build/fidelity/fidelity.json build/fidelity/fidelity.md \
	  build/fidelity/fidelity.svg

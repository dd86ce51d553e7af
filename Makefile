# make toy     an environment with all that is needed, and the toy trained in it: the paper's finding in a minute
# make test    the same environment, and the tests
#
# PYTHON is the interpreter, VENV the environment's place: make toy PYTHON=python3.12 VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv

ifneq ($(shell nvidia-smi -L 2>/dev/null),)
INSTALL := -r requirements.txt
else ifeq ($(shell uname -s)-$(shell uname -m),Linux-x86_64)
# a lock, because what the CPU builds of torch and vLLM ask for would bring CUDA builds of other packages
INSTALL := --no-deps -r requirements-cpu.txt
# where the plain install fails: torch's CPU build is not on the main package index
SECOND_TRY := --extra-index-url https://download.pytorch.org/whl/cpu
else
# no vLLM for this machine: the packages without it, and transformers samples
INSTALL := $(shell grep -v -e '^vllm' -e '^\#' requirements.txt)
SAMPLER := --sampler hf
endif

toy: $(VENV)/installed
	$(VENV)/bin/torchrun train_dpo.py --sync-steps 10 $(SAMPLER)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

$(VENV)/installed: requirements.txt requirements-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || \
		{ echo "Python 3.11 to 3.14 is needed, not `$(PYTHON) -V 2>&1`: make toy PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module: on Debian or Ubuntu, apt install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(INSTALL) $(if $(SECOND_TRY),|| $(VENV)/bin/pip install $(INSTALL) $(SECOND_TRY))
	@touch $@

.PHONY: toy test

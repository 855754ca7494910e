# Every target does its own set-up; CI runs the same ones.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON := build/venv/bin/python
PYTEST := $(PYTHON) -m pytest
LAUNCHER := build/podlane

.PHONY: help
help: ## Show this help
	@echo "podlane: an eBPF-accelerated CNI datapath. Targets (as root):"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

.PHONY: setup
setup: ## Install what everything here needs (Debian packages, Python environment)
	@deploy/setup.sh test

.PHONY: build
build: ## Build the launcher, the one executable that is not Python
	@deploy/setup.sh run
	@$(MAKE) --no-print-directory --silent $(LAUNCHER)

# Static, since the hosts of a CNI plugin have no particular C library; musl keeps it small and fast to start.
$(LAUNCHER): cni/launcher.c $(wildcard cni/*.h)
	@mkdir -p $(@D)
	musl-gcc -std=c11 -static -Os -s -Wall -Wextra -Werror -o $@ $<

# One after the other, also with -j.
.PHONY: ready
ready: setup
	@$(MAKE) --no-print-directory $(LAUNCHER)

NODES ?= 1

.PHONY: demo
demo: ## Wire real pods in a real containerd and show what happens; NODES=3 for a cluster (cleans up after itself)
	@deploy/setup.sh demo
	@$(MAKE) --no-print-directory --silent $(LAUNCHER)
	@$(PYTHON) -m tests.e2e.demo $(NODES)

.PHONY: test
test: ready ## Run every test, all four layers
	$(PYTEST) || $(SECOND_TRY)

# On a machine with few and busy processors the kernel's own queues overflow now and then, and a packet is lost that
# podlane never saw. So what failed on real devices is tried again, alone and on nodes of its own. What fails twice is no accident.
SECOND_TRY = { test $$? -eq 1 && $(PYTEST) --last-failed --last-failed-no-failures=none --maxfail=1 -n0; }

.PHONY: test-unit
test-unit: ready ## Run the tests that need no root
	$(PYTEST) tests/unit

.PHONY: test-packet
test-packet: ready ## Run the BPF programs on single packets (BPF_PROG_TEST_RUN)
	$(PYTEST) tests/packet

.PHONY: soak
soak: export PODLANE_SOAK_STEPS ?= 3000000
soak: export PODLANE_FUZZ_PACKETS ?= 20000000
soak: export PODLANE_MUTATIONS ?= 1000000
soak: export PODLANE_NODES ?= 5000
soak: export PODLANE_CHURN_SECONDS ?= 300
soak: ready ## Run the random tests, a cluster of 5,000 nodes among them, for an hour (PODLANE_…: see Makefile)
	$(PYTEST) tests/packet/test_nat_model.py tests/packet/test_fuzz.py tests/packet/test_fuzz_uplink.py \
		tests/unit/test_mutations.py tests/node/test_mutations.py tests/node/test_many_nodes.py

.PHONY: test-node
test-node: ready ## Run agent and launcher in network namespaces
	$(PYTEST) tests/node

.PHONY: test-e2e
test-e2e: ready ## Run pods in containerd
	$(PYTEST) tests/e2e

# Its other variables (API_STOP=…, README.md lists them) reach the tests by themselves: make exports what it is given.
.PHONY: test-kubernetes
test-kubernetes: setup ## Test podlane on the cluster of KUBECONFIG=…, which runs it already
	@[ -n "$(KUBECONFIG)" ] || { echo "give KUBECONFIG=…, of a cluster that runs podlane"; exit 2; }
	PODLANE_TEST_KUBECONFIG=$(KUBECONFIG) $(PYTEST) tests/kubernetes --numprocesses=0

.PHONY: image
image: ## Build the container image, build/podlane.tar
	@deploy/setup.sh image
	@$(MAKE) --no-print-directory --silent $(LAUNCHER)
	$(PYTHON) deploy/image/build.py build/podlane.tar

.PHONY: lint
lint: setup ## Check style, types, layering and C formatting
	build/venv/bin/ruff check .
	build/venv/bin/ruff format --check .
	build/venv/bin/mypy
	build/venv/bin/lint-imports
	clang-format --dry-run --Werror bpf/*.[ch] cni/*.[ch]

.PHONY: bench
bench: ready ## Measure against the reference plugins, interleaved; prints ratios
	$(PYTHON) -m tests.bench

.PHONY: clean
clean: ## Remove everything that was built here
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

.PHONY: install
install: ## Install the agent on this node, to run from this folder (see README.md)
	@$(MAKE) --no-print-directory build
	install -D -m 755 $(LAUNCHER) /usr/lib/podlane/podlane
	[ -e /etc/podlane/agent.yaml ] || install -D -m 644 deploy/agent.yaml /etc/podlane/agent.yaml
	sed 's|@ROOT@|$(CURDIR)|' deploy/podlane-agent.service > /etc/systemd/system/podlane-agent.service
	[ ! -d /run/systemd/system ] || systemctl daemon-reload
	@echo "Now set this node's ranges in /etc/podlane/agent.yaml, then: systemctl enable --now podlane-agent"

# The commands of the project. `make demo` and `make test` are the two to know.

# One profile for tests and demo, so that they share what they compile.
PROFILE ?= quick
LEAN := --no-default-features --features data-plane
CARGO ?= cargo
# How many histories `make soak` runs.
SOAK_SEEDS ?= 200
# Where the benchmark writes its report.
BENCH_OUTPUT ?= docs/benchmarks

# Servers and clients that scripts/setup put beside the sources come first.
export PATH := $(CURDIR)/.cache/bin:$(CURDIR)/.cache/venv/bin:$(PATH)

# Stands for a finished scripts/setup; a change of either file runs it again.
SETUP := .cache/setup.stamp

.DEFAULT_GOAL := build
.PHONY: setup build test soak demo bench lint doc

setup: ## Install what is missing for all other targets
	scripts/setup
	@mkdir -p .cache && touch $(SETUP)

$(SETUP): scripts/setup scripts/requirements.txt tests/clients/node/package.json tests/clients/go/go.mod
	scripts/setup
	@mkdir -p .cache && touch $@

build: ## Both binaries, as they are shipped
	$(CARGO) build --release --bins

test: $(SETUP) ## Every test. TEST_ARGS is passed to cargo, e.g. TEST_ARGS='ttl -- --nocapture'
	ulimit -Sn 16384 2>/dev/null; \
	$(CARGO) test --profile $(PROFILE) $(TEST_ARGS)

soak: $(SETUP) ## Many histories of cache-aside under faults. SOAK_SEEDS says how many
	LARDER_SOAK_SEEDS=$(SOAK_SEEDS) LARDER_SOAK_REPORT=$(CURDIR)/docs/soak/cache-aside.md \
	$(CARGO) test --profile $(PROFILE) --test integration cache_aside::history::soak -- --ignored --nocapture

demo: $(SETUP) ## The main job in a minute. DEMO_ARGS is passed on, e.g. DEMO_ARGS='--seconds 20'

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
.PHONY: setup build test soak demo bench bench-write-behind bench-invalidation bench-resharding apiserver-tests agent-program agent-memory kind-up kind-down e2e e2e-full lint doc

setup: ## Install what is missing for all other targets
	scripts/setup
	@mkdir -p .cache && touch $(SETUP)

$(SETUP): scripts/setup scripts/requirements.txt tests/clients/node/package.json tests/clients/go/go.mod
	scripts/setup
	@mkdir -p .cache && touch $@

build: ## Both binaries, as they are shipped
	$(CARGO) build --release --bins

test: $(SETUP) ## Every test, two to a processor, since most wait. TEST_ARGS is passed to cargo, e.g. TEST_ARGS='ttl -- --nocapture'
	ulimit -Sn 16384 2>/dev/null; \
	RUST_TEST_THREADS=$${RUST_TEST_THREADS:-$$((2 * $$(nproc)))} $(CARGO) test --profile $(PROFILE) $(TEST_ARGS)

soak: $(SETUP) ## Many histories of cache-aside, write-through, write-behind, database changes and versions under faults. SOAK_SEEDS says how many
	LARDER_SOAK_SEEDS=$(SOAK_SEEDS) LARDER_SOAK_REPORT=$(CURDIR)/docs/soak/cache-aside.md \
	$(CARGO) test --profile $(PROFILE) --test integration cache_aside::history::soak -- --ignored --nocapture
	LARDER_SOAK_SEEDS=$(SOAK_SEEDS) LARDER_SOAK_THROUGH_REPORT=$(CURDIR)/docs/soak/write-through.md \
	LARDER_SOAK_THROUGH_POINTS_REPORT=$(CURDIR)/docs/soak/write-through-points.md \
	$(CARGO) test --profile $(PROFILE) --test integration write_through::history:: -- --ignored --nocapture --test-threads 1
	LARDER_SOAK_SEEDS=$(SOAK_SEEDS) LARDER_SOAK_BEHIND_REPORT=$(CURDIR)/docs/soak/write-behind.md \
	LARDER_SOAK_POINTS_REPORT=$(CURDIR)/docs/soak/write-behind-points.md \
	$(CARGO) test --profile $(PROFILE) --test integration relay::history:: -- --ignored --nocapture --test-threads 1
	LARDER_SOAK_SEEDS=$(SOAK_SEEDS) LARDER_SOAK_CHANGES_REPORT=$(CURDIR)/docs/soak/database-changes.md \
	$(CARGO) test --profile $(PROFILE) --test integration relay::changes_history::soak -- --ignored --nocapture
	LARDER_SOAK_SEEDS=$(SOAK_SEEDS) LARDER_SOAK_VERSIONS_REPORT=$(CURDIR)/docs/soak/versions.md \
	$(CARGO) test --profile $(PROFILE) --test integration versions_history::soak -- --ignored --nocapture

demo: ## The main job in a minute. DEMO_ARGS is passed on, e.g. DEMO_ARGS='--seconds 20'
	@test -f $(SETUP) || scripts/setup --demo
	scripts/demo-data
	@test -x target/$(PROFILE)/larder || echo "building larder: about ten minutes on two processors the first time"
	$(CARGO) build --profile $(PROFILE) --bin larder
	$(CARGO) run --quiet --profile $(PROFILE) --bin larder -- demo $(DEMO_ARGS)

bench: $(SETUP) ## Side by side with other proxies. BENCH_ARGS is passed on, e.g. BENCH_ARGS='--rounds 9'
	$(CARGO) build --release $(LEAN) --bin larderd --target-dir target/lean
	ulimit -Sn 16384 2>/dev/null; \
	$(CARGO) bench --profile $(PROFILE) --bench peers -- --larderd target/lean/release/larderd --output $(BENCH_OUTPUT) $(BENCH_ARGS)

bench-write-behind: $(SETUP) ## Write-behind beside write-through and direct writes to a database
	LARDER_BEHIND_REPORT=$(CURDIR)/$(BENCH_OUTPUT)/write-behind.md \
	$(CARGO) test --profile $(PROFILE) --test integration relay::bench -- --ignored --nocapture

bench-invalidation: $(SETUP) ## How soon what is invalidated is gone everywhere, and what a walk over all names costs others
	LARDER_INVALIDATION_REPORT=$(CURDIR)/$(BENCH_OUTPUT)/invalidation.md \
	$(CARGO) test --profile $(PROFILE) --test integration invalidation_bench -- --ignored --nocapture

bench-resharding: $(SETUP) ## A million keys rebalanced, beside redis-cli, and what other clients see meanwhile: some ten minutes
	LARDER_RESHARDING_REPORT=$(CURDIR)/$(BENCH_OUTPUT)/resharding.md \
	$(CARGO) test --profile $(PROFILE) --test integration resharding::bench -- --ignored --nocapture

apiserver-tests: ## The operator on a real API server without a cluster; builds that, etcd and helm. TEST_ARGS is passed on, e.g. TEST_ARGS=forming
	tests/kind/tools kube-apiserver etcd helm
	ulimit -Sn 16384 2>/dev/null; \
	LARDER_OPERATOR_REPORT=$(CURDIR)/docs/benchmarks/operator.md LARDER_POLICIES_REPORT=$(CURDIR)/docs/benchmarks/policies.md \
	LARDER_INJECTOR_REPORT=$(CURDIR)/docs/benchmarks/injector.md \
	$(CARGO) test --profile $(PROFILE) --test apiserver -- --test-threads=1 $(TEST_ARGS)

agent-program: ## The agent as it is shipped: the data plane alone, static
	$(CARGO) rustc --release $(LEAN) --bin larderd --target-dir target/lean -- -C target-feature=+crt-static

agent-memory: $(SETUP) agent-program ## The agent's memory, of the program as it is shipped; the test of it has a bound then
	ulimit -Sn 16384 2>/dev/null; LARDER_AGENT_PROGRAM=$(CURDIR)/target/lean/release/larderd \
	$(CARGO) test --profile $(PROFILE) --test integration it_ends_within_its_bound -- --nocapture

kind-up: ## A Kubernetes cluster on this machine, by kind; from package registries where no image can be pulled
	tests/kind/up

kind-down: ## Delete it
	tests/kind/down

e2e: ## End to end on Kubernetes: on the cluster of KUBECONFIG, else on that of kind-up. E2E_ARGS is passed on, e.g. E2E_ARGS=valkey_9_1
	CARGO='$(CARGO)' PROFILE=$(PROFILE) tests/e2e/run $(E2E_ARGS)

e2e-full: ## The same, with every engine in every way
	LARDER_E2E_FULL=1 CARGO='$(CARGO)' PROFILE=$(PROFILE) tests/e2e/run $(E2E_ARGS)

lint: ## Format, clippy on both planes
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
	$(CARGO) clippy --test e2e --test apiserver -- -D warnings
	$(CARGO) clippy $(LEAN) --lib --bins -- -D warnings

doc: ## The API documentation
	RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' $(CARGO) doc --no-deps --lib --document-private-items

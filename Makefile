# make haiku   sets up all it needs, starts a worker, and asks it for a haiku
# make test    sets up all it needs, runs every test that needs no GPU
# make test-clients   schemathesis and a hundred answers in JSON, against a live worker (minutes)
# make test-page      the worker's page in a headless Chromium
# make test-load      hundreds of clients that stream, stall and leave, on a real model (minutes)
# make bench   speed of the default model, or of MODEL=name-or-path, on the best device here
# make ptx     the kernels as PTX, assembled: registers, shared memory, spills (a spill fails it)
# make fuzz    any bytes as model files, texts and chat templates, FUZZ_SECONDS each
# make setup   set-up alone

.PHONY: haiku test test-clients test-page test-load bench ptx fuzz setup

DEFAULT_MODEL := qwen2.5-coder-0.5b-instruct-q4_k_m
TEST_MODELS := $(DEFAULT_MODEL) smollm2-135m-instruct-q4_1 gemma-3-270m-q4_k_m
MODEL ?= $(DEFAULT_MODEL)
FUZZ_TARGETS ?= gguf tokenizer template
FUZZ_SECONDS ?= 600
KIGO := cargo run --release --quiet --bin kigo --

haiku: setup
	$(KIGO) models fetch $(DEFAULT_MODEL) >/dev/null
	cargo run --release --quiet --example haiku

test: setup test-models
	./setup.sh clients
	cargo test --release --workspace
	cargo test --release --features kigo-tests/otel --test otel

test-clients: setup test-models
	./setup.sh clients
	cargo test --release -p kigo-tests --test clients -- --include-ignored --skip the_page --nocapture

test-page: setup test-models
	./setup.sh browser
	cargo test --release -p kigo-tests --test clients -- --ignored the_page

test-load: setup test-models
	cargo test --release -p kigo-tests --test load -- --ignored --test-threads 1 --nocapture

.PHONY: test-models
test-models:
	@for model in $(TEST_MODELS); do $(KIGO) models fetch $$model >/dev/null || exit 1; done

bench: setup
	$(KIGO) bench --model $(MODEL) -p 512 -n 128 -r 5

ptx: setup
	./setup.sh ptxas
	KIGO_PTXAS=$${KIGO_PTXAS:-$(CURDIR)/.tools/ptxas} $(KIGO) ptx stats

# cargo-fuzz asks for flags that a stable compiler takes in bootstrap mode only. What is found worth keeping
# goes to fuzz/found; the seeds in fuzz/corpus stay as they are.
fuzz: setup
	./setup.sh fuzz
	for target in $(FUZZ_TARGETS); do \
		mkdir -p fuzz/found/$$target && \
		PATH="$(CURDIR)/.tools/bin:$$PATH" RUSTC_BOOTSTRAP=1 cargo fuzz run $$target \
			fuzz/found/$$target fuzz/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 || exit 1; \
	done

setup:
	@./setup.sh

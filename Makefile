# make haiku   sets up all it needs, starts a worker, and asks it for a haiku
# make test    sets up all it needs, runs every test that needs no GPU
# make bench   speed of the default model, or of MODEL=name-or-path, on the best device here
# make ptx     the kernels as PTX, assembled: registers, shared memory, spills (a spill fails it)
# make setup   set-up alone

.PHONY: haiku test bench ptx setup

DEFAULT_MODEL := qwen2.5-coder-0.5b-instruct-q4_k_m
TEST_MODELS := $(DEFAULT_MODEL) smollm2-135m-instruct-q4_1 gemma-3-270m-q4_k_m
MODEL ?= $(DEFAULT_MODEL)
KIGO := cargo run --release --quiet --bin kigo --

haiku: setup
	$(KIGO) models fetch $(DEFAULT_MODEL) >/dev/null
	cargo run --release --quiet --example haiku

test: setup
	@for model in $(TEST_MODELS); do $(KIGO) models fetch $$model >/dev/null || exit 1; done
	cargo test --release --workspace

bench: setup
	$(KIGO) bench --model $(MODEL) -p 512 -n 128 -r 5

ptx: setup
	./setup.sh ptxas
	KIGO_PTXAS=$${KIGO_PTXAS:-$(CURDIR)/.tools/ptxas} $(KIGO) ptx stats

setup:
	@./setup.sh

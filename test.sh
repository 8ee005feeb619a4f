#!/usr/bin/env bash
# Makes .venv, then checks and tests everything.
#
#   ./test.sh                        ruff, pytest, and a quick subset on Python 3.13
#   ./test.sh --long                 the long campaigns too, and the files for devices
#                                    in .venv-export
#   ./test.sh tests/losses/test_kd.py -x   arguments for pytest; no quick subset
set -euo pipefail

# shellcheck source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$hintjax_root"

marks="not long"
arguments=()
for argument in "$@"; do
  if [ "$argument" = --long ]; then
    marks="long or not long"
    export HINTJAX_EXAMPLES=20 # of each property
  else
    arguments+=("$argument")
  fi
done

extras=test,cli,data,viz
set_up "$hintjax_root/.venv" "$(find_python any || true)" "$extras"
if [ ${#arguments[@]} -eq 0 ] && [ "$marks" != "not long" ]; then
  # The converters of `hintjax export` need an environment of their own.
  set_up_export "$(find_python any || true)" test
fi
bin="$hintjax_root/.venv/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/pyright" --pythonpath "$bin/python"
# Compilation uses one core, so there is one process for each core. A process runs whole
# files, because the tests of a file share their compiled steps.
parallel=(-n logical --maxprocesses 4 --dist loadfile)
# The slowest tests are named at the end, so that none becomes slow unseen.
parallel+=(--durations=20 --durations-min=1)
if [ ${#arguments[@]} -gt 0 ]; then
  "$bin/python" -m pytest "${parallel[@]}" -m "$marks" "${arguments[@]}"
  exit
fi
# Most tests only need programs that compile fast. Tests of bits need those of users.
HINTJAX_COMPILE_FAST=1 \
  "$bin/python" -m pytest "${parallel[@]}" -m "($marks) and not bits"
mapfile -t of_bits < <(grep -rl "mark.bits" tests --include="*.py")
"$bin/python" -m pytest "${parallel[@]}" -m "($marks) and bits" "${of_bits[@]}"

# A second Python, if the machine has one.
if ! usable_python "$bin/python" 3.13 && python="$(find_python 3.13)"; then
  set_up "$hintjax_root/.venv-3.13" "$python" "$extras"
  # Annotations were checked above, and properties were tried on more examples.
  HINTJAX_ANNOTATIONS_UNCHECKED=1 HINTJAX_EXAMPLES=2 \
    "$hintjax_root/.venv-3.13/bin/python" -m pytest "${parallel[@]}" \
    -m "quick and not long"
fi

if [ "$marks" != "not long" ]; then
  "$hintjax_root/.venv-export/bin/python" -m pytest tests/export tests/examples
fi

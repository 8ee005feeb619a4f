#!/usr/bin/env bash
# Sets up .venv, then checks and tests everything.
#
#   ./test.sh                        ruff and pytest, and on Python 3.13 a quick subset
#   ./test.sh --long                 the long campaigns too
#   ./test.sh tests/losses/test_kd.py -x   pytest's own arguments; without the quick subset
set -euo pipefail

# shellcheck source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$hintjax_root"

marks="not long"
arguments=()
for argument in "$@"; do
  if [ "$argument" = --long ]; then
    marks="long or not long"
  else
    arguments+=("$argument")
  fi
done

extras=test,cli,data,viz
set_up "$hintjax_root/.venv" "$(find_python any || true)" "$extras"
bin="$hintjax_root/.venv/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
# Compilation keeps one core busy: a process for each, and whole files in each, which
# share their compiled steps.
parallel=(-n logical --maxprocesses 4 --dist loadfile)
"$bin/python" -m pytest "${parallel[@]}" -m "$marks" ${arguments[@]+"${arguments[@]}"}

# A second Python, when the machine has one and the tests were not narrowed down.
if [ ${#arguments[@]} -eq 0 ] && ! usable_python "$bin/python" 3.13 &&
  python="$(find_python 3.13)"; then
  set_up "$hintjax_root/.venv-3.13" "$python" "$extras"
  "$hintjax_root/.venv-3.13/bin/python" -m pytest "${parallel[@]}" -m "quick and not long"
fi

#!/usr/bin/env bash
# Makes .venv on a fresh machine, then distills a teacher into students.
#
#   ./quickstart.sh                  compares methods on handwritten digits, 3 minutes
#   ./quickstart.sh ARGUMENTS        runs hintjax distill ARGUMENTS (see --help)
set -euo pipefail

# shellcheck source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

set_up "$hintjax_root/.venv" "$(find_python any || true)" cli,data,viz
exec "$hintjax_root/.venv/bin/hintjax" distill "$@"

#!/usr/bin/env bash
# From a fresh machine to distilled students: sets up .venv, then runs the main job.
#
#   ./quickstart.sh                  the comparison on handwritten digits, 3 minutes
#   ./quickstart.sh ARGUMENTS        hintjax distill ARGUMENTS (--help lists them)
set -euo pipefail

# shellcheck source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

set_up "$hintjax_root/.venv" "$(find_python any || true)" cli,data,viz
exec "$hintjax_root/.venv/bin/hintjax" distill "$@"

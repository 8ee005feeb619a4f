#!/usr/bin/env bash
# Makes .venv on a fresh machine, then trains and exports a student for a device.
#
#   ./quickstart.sh                  the practical job on handwritten digits, 3 minutes
#   ./quickstart.sh ARGUMENTS        runs hintjax distill ARGUMENTS (see --help)
#
# The practical job: a student with a tenth of the teacher's parameters learns by
# backpropagation, by KD, and by hints and KD. The student that is best on the validation
# split is exported, and its file is measured beside the teacher's.
set -euo pipefail

# shellcheck source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

set_up "$hintjax_root/.venv" "$(find_python any || true)" cli,data,viz,stablehlo
hintjax="$hintjax_root/.venv/bin/hintjax"
if [ $# -gt 0 ]; then
  exec "$hintjax" distill "$@"
fi

run=runs/quickstart
if [ -e "$run/config.yaml" ]; then
  "$hintjax" resume "$run"
else
  "$hintjax" distill --compare backprop kd fitnets --rates 2e-3 --epochs 20 --cosine \
    --student hintjax.models:plain_thin_he --run-dir "$run"
fi
"$hintjax" export "$run/teacher" --output "$run/exported/teacher.stablehlo"
"$hintjax" export "$run"
"$hintjax" measure "$run"
echo "
The table and the picture are in $run, and the student for a device in $run/exported.
For int8 files: ./setup.sh --export
                $hintjax export $run --to tflite-int8
                $hintjax measure $run"

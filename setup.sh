#!/usr/bin/env bash
# quickstart.sh and test.sh source this file for its functions. Run as a program, it
# makes .venv with everything that the command needs. With --export it makes .venv-export
# with the converters of `hintjax export`.
#
#   find_python any|VERSION          prints a Python, 3.11 or newer, or VERSION
#   set_up DIRECTORY PYTHON EXTRAS   makes a virtual environment there, with hintjax
#   set_up_export PYTHON EXTRAS      makes .venv-export
#
# HINTJAX_ACCELERATOR=cpu|cuda12|cuda13|tpu chooses the build of jax. If it is not set,
# the accelerator of the machine decides.

hintjax_root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

# Version managers leave commands on the PATH that only print an error, and Debian has
# Pythons that cannot make environments. So each candidate must run.
usable_python() {
  "$1" - "$2" > /dev/null 2>&1 << 'PYTHON'
import sys
import ensurepip, venv
wanted, have = sys.argv[1], sys.version_info
sys.exit(have < (3, 11) or wanted not in ("any", "%d.%d" % have[:2]))
PYTHON
}

find_python() {
  local version="$1" candidate
  local -a candidates=(python3 python3.13 python3.12 python3.11 python3.14 python)
  if [ "$version" != any ]; then
    candidates=("python$version" python3)
    if command -v pyenv > /dev/null 2>&1; then
      candidates+=("$(pyenv root || true)/versions/$version"*/bin/python)
    fi
  fi
  for candidate in "${candidates[@]}"; do
    if usable_python "$candidate" "$version"; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# Prints the extra that installs jax for this machine's accelerator; nothing for a CPU.
accelerator() {
  local gpu device
  if [ -n "${HINTJAX_ACCELERATOR:-}" ]; then
    if [ "$HINTJAX_ACCELERATOR" != cpu ]; then
      echo "$HINTJAX_ACCELERATOR"
    fi
    return
  fi
  gpu="$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader \
    2> /dev/null)" || gpu=""
  if [[ "$gpu" =~ ^([0-9]+)\.[^,]*,\ *([0-9]+)\.([0-9]+) ]]; then
    # CUDA 13 needs driver 580 and compute capability 7.5; CUDA 12 needs driver 525.
    local driver="${BASH_REMATCH[1]}" capability="${BASH_REMATCH[2]}${BASH_REMATCH[3]}"
    if [ "$driver" -ge 580 ] && [ "$capability" -ge 75 ]; then
      echo cuda13
    elif [ "$driver" -ge 525 ]; then
      echo cuda12
    else
      echo "NVIDIA's driver $driver is too old for jax, which needs 525 or newer." \
        "jax will use the CPU." >&2
    fi
  elif [ -e /dev/accel0 ]; then
    echo tpu
  elif [ -d /dev/vfio ]; then
    # Newer TPUs use this directory, but other hardware does too: look for the chips
    # (v4, v5p, v5e, v6e, 7x).
    for device in /sys/bus/pci/devices/*; do
      case "$(cat "$device/vendor" "$device/device" 2> /dev/null | tr '\n' ' ')" in
        "0x1ae0 0x005e " | "0x1ae0 0x0062 " | "0x1ae0 0x0063 " | "0x1ae0 0x006f " | \
          "0x1ae0 0x0076 ")
          echo tpu
          return
          ;;
      esac
    done
  fi
}

set_up() {
  local directory="$1" python="$2" extras="$3" build made_for project stamp extra
  local old="" old_project="" old_extras=""
  if [ -z "$python" ]; then
    echo "hintjax needs Python 3.11 or newer with its venv module on the PATH." \
      "On Debian and Ubuntu: apt install python3 python3-venv." >&2
    return 1
  fi
  build="$(accelerator)"
  extras="$extras${build:+,$build}"
  made_for="${build:-cpu} $directory"
  project="$(cksum < "$hintjax_root/pyproject.toml")"

  # The stamp says how the environment was made; it is written only after a success.
  stamp="$directory/hintjax.stamp"
  if [ -f "$stamp" ]; then
    { read -r old && read -r old_project && read -r old_extras; } < "$stamp" || true
  fi
  # Make it again if its Python is missing, if it was copied here from another place, or
  # if it is for another accelerator.
  if ! "$directory/bin/python" -c "import pip" 2> /dev/null ||
    [ "${old:-$made_for}" != "$made_for" ]; then
    "$python" -m venv --clear "$directory"
    old_project="" old_extras=""
  fi
  # Keep the earlier extras. If no extra is new, the two lists have the same length.
  for extra in ${old_extras//,/ }; do
    case ",$extras," in
      *",$extra,"*) ;;
      *) extras="$extras,$extra" ;;
    esac
  done
  if [ "$old_project" = "$project" ] && [ ${#extras} -eq ${#old_extras} ]; then
    return
  fi
  rm -f -- "$stamp"
  echo "Installing hintjax[$extras] in $directory. This takes a few minutes, once." >&2
  "$directory/bin/python" -m pip install -qq --disable-pip-version-check \
    --editable "${hintjax_root}[$extras]"
  printf '%s\n' "$made_for" "$project" "$extras" > "$stamp"
}

# jax2onnx asks for an older orbax-checkpoint than hintjax, but works with a new one. So
# it is installed without its requirements, which are among the extras. TFLite Micro has
# no release yet, and hintjax works without it.
set_up_export() {
  local directory="$hintjax_root/.venv-export"
  set_up "$directory" "$1" "cli,data,stablehlo,tflite,onnx${2:+,$2}"
  if [ ! -f "$directory/converters.stamp" ] ||
    [ "$directory/hintjax.stamp" -nt "$directory/converters.stamp" ]; then
    "$directory/bin/python" -m pip install -qq --disable-pip-version-check --no-deps \
      "jax2onnx>=0.17.1"
    "$directory/bin/python" -m pip install -qq --disable-pip-version-check --no-deps \
      --pre tflite-micro ||
      echo "TFLite Micro has no package for this machine. Arenas stay unknown." >&2
    touch "$directory/converters.stamp"
  fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  if [ "${1:-}" = --export ]; then
    set_up_export "$(find_python any || true)" ""
  else
    set_up "$hintjax_root/.venv" "$(find_python any || true)" cli,data,viz
  fi
fi

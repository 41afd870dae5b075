#!/usr/bin/env bash
# Makes the models up to M3 on this machine: on its TPU or GPU if the installed jax has one, else on its CPU.
#
#   launch/local.sh                                    the tiny scale, minutes on two cores
#   launch/local.sh --config=configs/iter1.py:smoke    another config, or scale
#   launch/local.sh --config.workdir=/data/run1 --config.dpo.beta=0.2
#   launch/local.sh --dry-run --config.dpo.beta=0.2    prints what it would do, ready for a shell, and does nothing
#   PYTHON=/opt/venv/bin/python launch/local.sh
#
# All arguments go to `python -m srlm_jax.main` as they are. Killed, it goes on when started again the same way.
set -euo pipefail

dry_run=
if [[ ${1-} == --dry-run ]]; then
    dry_run=yes
    shift
fi

run() { # a command, or with --dry-run its text
    local text
    printf -v text '%q ' "$@"
    if [[ $dry_run ]]; then echo "${text% }"; else "$@"; fi
}

run cd "$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Compiled programs are kept, so that a restart begins with its work; jax's own variable, where it is set, wins.
run export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/srlm_jax}"

case " $* " in
*" --config="* | *" --config "*) ;;
*) set -- --config=configs/iter3.py "$@" ;;
esac

set -- "${PYTHON:-python}" -m srlm_jax.main "$@"
[[ $dry_run ]] || exec "$@"
run "$@"

#!/usr/bin/env bash
# Makes models on all hosts of one TPU slice, from any machine that has gcloud.
#
#   export TPU=NAME ZONE=us-east5-a PROJECT=NAME WORKDIR=gs://BUCKET/RUN
#   launch/tpu_pod.sh --config=configs/iter3.py:llama2_7b --config.model.path=gs://BUCKET/llama2_7b ...
#   launch/tpu_pod.sh --dry-run --config=...    prints what it would do, ready for a shell, and does nothing
#
# TPU is a TPU VM that runs (gcloud compute tpus tpu-vm create). The model is a checkpoint that `python -m
# srlm_jax.convert --to=native` made. All arguments go to `python -m srlm_jax.main` as they are, on each host, and what it
# reads must lie where each host can read it. Interrupted or preempted, it goes on when started again the same way, on the
# same slice or a new one: all that it needs is in WORKDIR.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 1
}

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

for name in TPU ZONE PROJECT WORKDIR; do
    [[ ${!name-} ]] || fail "$name is not set; export TPU, ZONE, PROJECT and WORKDIR, as the head of ${BASH_SOURCE[0]} says"
done
[[ $WORKDIR == gs://?* ]] || fail "WORKDIR is $WORKDIR: all hosts share it, so it must be gs://BUCKET/FOLDER"
case " $* " in
*" --config="* | *" --config "*) ;;
*) fail "--config is not given: which models to make, --config=configs/iter3.py:llama2_7b" ;;
esac

# Every host finds the others by what its slice says of itself.
set -- "$@" --config.coordinator=auto --config.workdir="$WORKDIR"

environment=(
    # Programs take minutes to compile. Process 0 alone keeps them, and disks go with their hosts, so they are kept
    # beside the run, where every host of this slice and of the next one finds them.
    JAX_COMPILATION_CACHE_DIR="$WORKDIR/compiled"
    # No flags for XLA: on one slice libtpu overlaps what it sends with what it computes as it is.
)

printf -v worker '%q ' env "${environment[@]}" bash .srlm_jax/code/launch/tpu_worker.sh "$@"
archive=${TMPDIR:-/tmp}/srlm_jax-$TPU.tar.gz
unpack="rm -rf .srlm_jax/code && mkdir -p .srlm_jax/code && tar -xzf srlm_jax.tar.gz -C .srlm_jax/code"
where=(--zone="$ZONE" --project="$PROJECT" --worker=all)

run cd "$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
run tar -czf "$archive" --exclude=__pycache__ configs launch srlm_jax LICENSE README.md pyproject.toml setup.py
run gcloud compute tpus tpu-vm scp "$archive" "$TPU:srlm_jax.tar.gz" "${where[@]}"
run gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --command="$unpack && exec ${worker% }"

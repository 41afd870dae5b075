#!/usr/bin/env bash
# Makes models on several TPU slices at once, from any machine that has gcloud: asks for the slices, waits for them, and
# runs on all of their hosts.
#
#   export TPU=NAME SLICES=2 TYPE=v5p-128 RUNTIME=v2-alpha-tpuv5 ZONE=us-east5-a PROJECT=NAME WORKDIR=gs://BUCKET/RUN
#   launch/tpu_multislice.sh --config=configs/iter3.py:llama2_70b --config.model.path=gs://BUCKET/llama2_70b ...
#   launch/tpu_multislice.sh --dry-run --config=...    prints what it would do, ready for a shell, and does nothing
#   REQUEST=--spot launch/tpu_multislice.sh ...        more words for the request: --spot, --reserved, --network=NAME
#
# TPU is the name of the queued resource, which stays when the run ends, and costs:
#   gcloud compute tpus queued-resources delete NAME --zone=ZONE --project=NAME --force
# The model is a checkpoint that `python -m srlm_jax.convert --to=native` made. All arguments go to `python -m
# srlm_jax.main` as they are, on each host, and what it reads must lie where each host can read it. Interrupted or
# preempted, it goes on when started again the same way: slices that are gone are asked for anew, and all that it needs is
# in WORKDIR.
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
    shell "${text% }"
}

shell() { # commands as a shell reads them, or with --dry-run themselves
    if [[ $dry_run ]]; then echo "$1"; else eval "$1"; fi
}

for name in TPU SLICES TYPE RUNTIME ZONE PROJECT WORKDIR; do
    [[ ${!name-} ]] || fail "$name is not set; export all that the head of ${BASH_SOURCE[0]} shows"
done
[[ $SLICES =~ ^([2-9]|[1-9][0-9]+)$ ]] || fail "SLICES is $SLICES: give a number above 1; tpu_pod.sh takes one slice"
[[ $WORKDIR == gs://?* ]] || fail "WORKDIR is $WORKDIR: all hosts share it, so it must be gs://BUCKET/FOLDER"
case " $* " in
*" --config="* | *" --config "*) ;;
*) fail "--config is not given: which models to make, --config=configs/iter3.py:llama2_70b" ;;
esac

# Each slice holds whole copies of the weights.
case " $* " in
*" --config.mesh.data"*) ;;
*) set -- "$@" --config.mesh.data="$SLICES" ;;
esac
# Every host finds the others by what its slice says of itself.
set -- "$@" --config.coordinator=auto --config.workdir="$WORKDIR"

libtpu=(
    # Gradients are summed over the data-centre network, far slower than the links within a slice. The first has the
    # compiler optimize these sums, the second lets each run on while the loop over the layers computes the next.
    # (MaxText, benchmarks/xla_flags_library.py: DATA_PARALLEL_OVERLAP)
    --xla_tpu_enable_data_parallel_all_reduce_opt=true
    --xla_tpu_data_parallel_opt_different_sized_ops=true
)
environment=(
    # Programs take minutes to compile. Process 0 alone keeps them, and disks go with their hosts, so they are kept
    # beside the run, where every host of these slices and of the next ones finds them.
    JAX_COMPILATION_CACHE_DIR="$WORKDIR/compiled"
    LIBTPU_INIT_ARGS="${libtpu[*]}"
)

printf -v worker '%q ' env "${environment[@]}" bash .srlm_jax/code/launch/tpu_worker.sh "$@"
archive=${TMPDIR:-/tmp}/srlm_jax-$TPU.tar.gz
unpack="rm -rf .srlm_jax/code && mkdir -p .srlm_jax/code && tar -xzf srlm_jax.tar.gz -C .srlm_jax/code"
where=(--zone="$ZONE" --project="$PROJECT")
# gcloud serves 64 hosts at a time unless told otherwise, and the first 64 would wait for the others for ever.
all=(--node=all --worker=all --batch-size=all)
queued=(gcloud compute tpus queued-resources)
read -ra request <<<"${REQUEST-}"
request+=(--node-count="$SLICES" --accelerator-type="$TYPE" --runtime-version="$RUNTIME")

printf -v state '%q ' "${queued[@]}" describe "$TPU" "${where[@]}" --format='value(state.state)'
printf -v delete '%q ' "${queued[@]}" delete "$TPU" "${where[@]}" --force --quiet
printf -v create '%q ' "${queued[@]}" create "$TPU" "${where[@]}" "${request[@]}"

run cd "$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# Preempted, or never given: it holds no slices, and never will again.
shell "if ${state}2>/dev/null | grep -qxE 'SUSPENDED|FAILED'; then ${delete% }; fi"
shell "if ! ${state}>/dev/null 2>&1; then ${create% }; fi"
shell "until ${state}| tee /dev/stderr | grep -qxE 'ACTIVE|SUSPENDED|FAILED'; do sleep 60; done"
run tar -czf "$archive" --exclude=__pycache__ configs launch srlm_jax LICENSE README.md pyproject.toml setup.py
run "${queued[@]}" scp "$archive" "$TPU:srlm_jax.tar.gz" "${where[@]}" "${all[@]}"
run "${queued[@]}" ssh "$TPU" "${where[@]}" "${all[@]}" --command="$unpack && exec ${worker% }"

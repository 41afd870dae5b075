#!/usr/bin/env bash
# What tpu_pod.sh and tpu_multislice.sh start on every host: ends what a former start left there, installs the package
# this file belongs to, or what is new of it, and runs `python -m srlm_jax.main` with all arguments as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
home="$HOME/.srlm_jax"
mkdir -p "$home"

# When the connection to a host breaks, its process stays, and holds the chips. Nothing is lost by killing it.
if [[ -e $home/pid ]] && pkill -KILL --pidfile "$home/pid" --full 'srlm_jax\.main|tpu_worker\.sh'; then
    while kill -0 "$(<"$home/pid")" 2>/dev/null; do sleep 1; done
fi
echo $$ >"$home/pid" # of the run too, which takes this process's place below

# Ubuntu 22.04, on which images of TPU VMs are built, has Python 3.10, too old; uv fetches a newer one.
export PATH="$HOME/.local/bin:$PATH"
if ! command -v uv >/dev/null; then
    # Newer systems let pip install into their own Python only if told so, and even then it stays in the user's folder.
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet uv
fi
uv venv --quiet --allow-existing --python 3.12 "$home/venv"
uv pip install --quiet --python "$home/venv/bin/python" -e '.[tpu]'

exec "$home/venv/bin/python" -m srlm_jax.main "$@"

#!/bin/sh
# The image's entry point: `stas launch STAGE ...` as any user, on a root file system that may be read-only.
set -eu
trap 'exit 75' TERM # before Python is there to stop early; exec ends the trap

# Library caches go into the workspace, the only place that is sure to be writable.
cache=${STAS_WORKSPACE:=/workspace}/.cache
if ! mkdir -p "$cache" 2>/dev/null; then
    echo "entrypoint: user $(id -u):$(id -g) cannot write to $STAS_WORKSPACE; caches go to /tmp. Stages need to write" \
        "there: mount it writable, give it to that user, or run as its owner (--user UID:GID)." >&2
    cache=/tmp/stas-cache
fi
export STAS_WORKSPACE HOME="$cache"
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$cache}"
export HF_HOME="${HF_HOME:-$cache/huggingface}"
export TORCH_HOME="${TORCH_HOME:-$cache/torch}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$cache/triton}"
export MPLCONFIGDIR="${MPLCONFIGDIR:-$cache/matplotlib}"
mkdir -p "$HOME" "$MPLCONFIGDIR"
# getpass and torch's compiler need a user name, and a user who is not in /etc/passwd has none.
export USER="${USER:-stas}" LOGNAME="${LOGNAME:-stas}"

# exec, so that Python receives SIGTERM. -P, or a yaml.py in the workspace would be run.
set -- python3 -P -m stas launch "$@"
if [ -x /opt/nvidia/nvidia_entrypoint.sh ]; then
    exec /opt/nvidia/nvidia_entrypoint.sh "$@"
fi
exec "$@"

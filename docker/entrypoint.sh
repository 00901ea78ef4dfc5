#!/bin/sh
# The image's entry point: `stas launch STAGE ...` by whatever user, on a root that may be read-only.
set -eu

# Everything that libraries want to keep goes under the workspace, the one place that can surely be written.
cache=${STAS_WORKSPACE:=/workspace}/.cache
if ! mkdir -p "$cache" 2>/dev/null; then
    echo "entrypoint: $STAS_WORKSPACE cannot be written by user $(id -u):$(id -g); caches go to /tmp." \
        "Stages need it: mount it writable, give it to that user, or run as its owner (--user UID:GID)." >&2
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
# A user without a line in /etc/passwd has no name, which getpass and torch's compiler ask for.
export USER="${USER:-stas}" LOGNAME="${LOGNAME:-stas}"

# exec, so that Python is the process that gets SIGTERM.
set -- python3 -m stas launch "$@"
if [ -x /opt/nvidia/nvidia_entrypoint.sh ]; then
    exec /opt/nvidia/nvidia_entrypoint.sh "$@"
fi
exec "$@"

# shellcheck shell=bash
# Sourced by the batch scripts: run a stage on the job's nodes, pass signals on, requeue a job that was cut off.
set -euo pipefail
# shellcheck source=slurm/site.sh
source "$SLURM_SUBMIT_DIR/slurm/site.sh"
export STAS_WORKSPACE=$WORKSPACE

EXIT_RESUMABLE=75
KILLED_BY_USR1=138 # warned before Python could handle it
cut_off=no     # whether Slurm's early warning of the walltime came
interrupted=no # whether a signal may have ended a wait
step=          # the process of the stage that runs

# Slurm warns this shell only (--signal=B:...); srun passes USR1 on to its tasks, and the stage writes a checkpoint.
trap 'cut_off=yes interrupted=yes; [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true' USR1
# A cancelled or preempted job gets TERM in all its processes; Slurm decides whether it runs again.
trap 'interrupted=yes' TERM

# stage NAME ARGUMENTS...: run `stas launch NAME ARGUMENTS...` on every node of the job, one launcher on each.
stage() {
    local options=(--processes "${SLURM_GPUS_ON_NODE:-1}") status=0
    if ((SLURM_JOB_NUM_NODES > 1)); then
        # This shell runs on the job's first node. A job that runs again must not meet what is left of its last run.
        options+=(--nodes "$SLURM_JOB_NUM_NODES" --rendezvous "$(hostname):$((20000 + SLURM_JOB_ID % 20000))"
            --job "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}")
    fi
    mkdir -p "$WORKSPACE"
    runtime
    [[ $cut_off = no ]] || go_on_later "$1" "$EXIT_RESUMABLE" # the warning came between two stages
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        --kill-on-bad-exit=0 "${container[@]}" "${launch[@]}" "${options[@]}" "$@" &
    step=$!
    [[ $cut_off = no ]] || kill -USR1 "$step" 2>/dev/null || true # it came just before
    wait "$step" || status=$?
    while [[ $interrupted = yes ]]; do
        interrupted=no status=0
        wait "$step" || status=$?
    done
    step=
    if [[ $cut_off = yes ]] && ((status == EXIT_RESUMABLE || status == KILLED_BY_USR1)); then
        go_on_later "$1" "$status"
    fi
    ((status == 0)) || exit "$status"
}

# Stop a vote of which a member failed. INFER_JOB is scripts/submit_slurm's; a vote submitted by hand takes what is there.
all_predicted() {
    local failed
    [[ -n ${INFER_JOB:-} ]] || return 0
    failed=$(scontrol --oneliner show job "$INFER_JOB" | grep -v JobState=COMPLETED | grep -o 'ArrayTaskId=[0-9,-]*') || return 0
    echo "no vote, because members are missing: number ${failed//$'\n'/, } of $ENSEMBLE; see $WORKSPACE/logs." \
        "Masks of an older run may be there: to vote on what is there, sbatch slurm/vote.sbatch" >&2
    exit 3
}

# Set `launch`, the site's way to say `stas launch`, and `container`, what srun itself needs for it.
runtime() {
    local entry=/usr/local/bin/entrypoint.sh gpus=()
    container=()
    case $RUNTIME in
    bare) launch=(stas launch) ;;
    apptainer | singularity)
        launch=("$RUNTIME" exec --nv --bind "$DATA:$DATA:ro" --bind "$WORKSPACE:$WORKSPACE" "$IMAGE" "$entry")
        ;;
    pyxis) # an image's own variables win over the host's unless they are named
        container=(--container-image="$IMAGE" "--container-mounts=$DATA:$DATA:ro,$WORKSPACE:$WORKSPACE"
            "--container-env=STAS_WORKSPACE,STAS_WEIGHTS_DIR" --no-container-mount-home)
        launch=("$entry")
        ;;
    docker | podman) # Docker's container is no child of this job: it is told the job's memory and the node's own GPU numbers
        [[ -z ${SLURM_JOB_GPUS:-} ]] || gpus=(--gpus "\"device=$SLURM_JOB_GPUS\"")
        [[ $RUNTIME = docker || -z ${gpus[*]} ]] || gpus=(--device nvidia.com/gpu=all --env CUDA_VISIBLE_DEVICES)
        [[ -z ${SLURM_MEM_PER_NODE:-} ]] || gpus+=(--memory "${SLURM_MEM_PER_NODE}m")
        launch=("$RUNTIME" run --rm --network host --ipc host --user "$(id -u):$(id -g)" --read-only --tmpfs /tmp
            "${gpus[@]}" --volume "$DATA:$DATA:ro" --volume "$WORKSPACE:$WORKSPACE"
            --env STAS_WORKSPACE --env STAS_WEIGHTS_DIR "$IMAGE")
        ;;
    *)
        echo "RUNTIME=$RUNTIME: must be bare, apptainer, singularity, pyxis, docker or podman (slurm/site.sh)" >&2
        exit 2
        ;;
    esac
}

# go_on_later STAGE STATUS: end this job, which was cut off, and requeue it where the stage keeps what it has done.
go_on_later() {
    case $1 in
    train | infer) requeue ;;
    *) echo "cut off by the walltime, and $1 begins anew each time: give it more (#SBATCH --time)" >&2 ;;
    esac
    exit "$2"
}

# Put this job, or this task of an array only, back into the queue: it goes on from its checkpoint.
requeue() {
    local id=$SLURM_JOB_ID
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    if ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
        echo "cut off by the walltime: job $id goes back into the queue, restart $((${SLURM_RESTART_COUNT:-0} + 1))"
        scontrol requeue "$id"
    else
        echo "cut off by the walltime, and restarted $MAX_RESTARTS times already (MAX_RESTARTS): giving up" >&2
    fi
}

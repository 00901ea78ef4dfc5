# shellcheck shell=bash
# Sourced by the batch scripts: run a stage on the job's nodes, forward signals, requeue a job at its walltime.
set -euo pipefail
# shellcheck source=slurm/site.sh
source "$SLURM_SUBMIT_DIR/slurm/site.sh"
export STAS_WORKSPACE=$WORKSPACE

EXIT_RESUMABLE=75
KILLED_BY_USR1=138 # the signal came before Python could handle it
cut_off=no     # whether Slurm warned that the walltime is near
interrupted=no # whether a signal may have interrupted `wait`
step=          # process of the running stage

# Slurm warns only this shell (--signal=B:...). srun forwards USR1 to its tasks, and the stage writes a checkpoint.
trap 'cut_off=yes interrupted=yes; [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true' USR1
# When a job is cancelled or preempted, all its processes get TERM; Slurm decides whether it runs again.
trap 'interrupted=yes' TERM

# stage NAME ARGUMENTS...: run `stas launch NAME ARGUMENTS...` once on every node of the job.
stage() {
    local options=(--processes "${SLURM_GPUS_ON_NODE:-1}") numbered=() status=0
    # Every GPU that Slurm granted has to be there. Otherwise train and infer would spend the walltime on a CPU.
    [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || options+=(--gpus "${GPUS:-$SLURM_GPUS_ON_NODE}")
    if ((SLURM_JOB_NUM_NODES > 1)); then
        # This shell runs on the job's first node. A restarted job must not join leftovers of its previous run.
        options+=(--nodes "$SLURM_JOB_NUM_NODES" --rendezvous "$(hostname):$((20000 + SLURM_JOB_ID % 20000))"
            --job "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --node @node)
        # Each node learns its own number only from srun.
        # shellcheck disable=SC2016
        numbered=(bash -c 'exec "${@/#@node/$SLURM_NODEID}"' "$1")
    fi
    mkdir -p "$WORKSPACE"
    runtime
    [[ $cut_off = no ]] || resume_later "$1" "$EXIT_RESUMABLE" # the warning came between two stages
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        --kill-on-bad-exit=0 "${container[@]}" "${numbered[@]}" "${launch[@]}" "${options[@]}" "$@" &
    step=$!
    [[ $cut_off = no ]] || kill -USR1 "$step" 2>/dev/null || true # the warning came before `step` was set
    wait "$step" || status=$?
    while [[ $interrupted = yes ]]; do
        interrupted=no status=0
        wait "$step" || status=$?
    done
    step=
    if [[ $cut_off = yes ]] && ((status == EXIT_RESUMABLE || status == KILLED_BY_USR1)); then
        resume_later "$1" "$status"
    fi
    ((status == 0)) || exit "$status"
}

# The file that says that a task of an array predicted its member. Slurm itself soon forgets how a task ended.
predicted_file() { echo "$WORKSPACE/logs/infer-$1_$2.done"; }

# Note that this task has predicted its member, and the number of the last one.
predicted() {
    mkdir -p "$WORKSPACE/logs"
    echo "$SLURM_ARRAY_TASK_MAX" >"$(predicted_file "$SLURM_ARRAY_JOB_ID" "$SLURM_ARRAY_TASK_ID")"
}

# Stop the vote if a member failed. scripts/submit_slurm sets INFER_JOB; a vote submitted by hand uses existing masks.
all_predicted() {
    local number last missing=
    [[ -n ${INFER_JOB:-} ]] || return 0
    last=$(sort -n "$WORKSPACE/logs/infer-${INFER_JOB}_"*.done 2>/dev/null | tail -n 1) || true
    [[ $last =~ ^[0-9]{1,4}$ ]] || last=
    for ((number = 0; number <= ${last:-0}; number++)); do
        [[ -s $(predicted_file "$INFER_JOB" "$number") ]] || missing+="${missing:+, }ArrayTaskId=$number"
    done
    [[ -n $missing ]] || return 0
    [[ -n $last ]] || missing="${missing} and all others"
    echo "no vote, because members are missing: number $missing of $ENSEMBLE; see $WORKSPACE/logs." \
        "There may be masks of an older run; to vote on existing masks, run sbatch slurm/vote.sbatch" >&2
    exit 3
}

# Set `launch`, the command for `stas launch` at this site, and `container`, the options srun needs for it.
runtime() {
    local entry=/usr/local/bin/entrypoint.sh gpus=()
    container=()
    case $RUNTIME in
    bare) launch=(stas launch) ;;
    apptainer | singularity)
        launch=("$RUNTIME" exec --nv --bind "$DATA:$DATA:ro" --bind "$WORKSPACE:$WORKSPACE" "$IMAGE" "$entry")
        ;;
    pyxis) # an image's variables win over the host's unless named here
        container=(--container-image="$IMAGE" "--container-mounts=$DATA:$DATA:ro,$WORKSPACE:$WORKSPACE"
            "--container-env=STAS_WORKSPACE,STAS_WEIGHTS_DIR" --no-container-mount-home)
        launch=("$entry")
        ;;
    docker | podman) # the container is not a child of this job, so pass the job's memory and GPU numbers
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

# resume_later STAGE STATUS: exit at the walltime, and requeue the job if the stage keeps its finished work.
resume_later() {
    case $1 in
    train | infer) requeue ;;
    *) echo "cut off by the walltime, and $1 cannot resume: give it more time (#SBATCH --time)" >&2 ;;
    esac
    exit "$2"
}

# Requeue this job, or only this array task; it resumes from its checkpoint.
requeue() {
    local id=$SLURM_JOB_ID
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    if ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
        echo "cut off by the walltime: job $id goes back into the queue, restart $((${SLURM_RESTART_COUNT:-0} + 1))"
        scontrol requeue "$id"
    else
        echo "cut off by the walltime, and already restarted $MAX_RESTARTS times (MAX_RESTARTS): giving up" >&2
    fi
}

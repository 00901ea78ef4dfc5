# shellcheck shell=bash disable=SC2034  # read by the scripts that source it
# All settings that differ between clusters. Environment variables win over these lines.

# Locations, on a file system that all nodes share.
: "${DATA:=/data/stas}"
: "${TRAIN_IMAGES:=$DATA/Train_Images}"
: "${TRAIN_ANNOTATIONS:=$DATA/Train_Annotations}"
: "${PREDICT_IMAGES:=$DATA/Private_Image}" # images to outline
: "${WORKSPACE:=$PWD/workspace}"

# What to train: an ensemble that `stas recipes` lists, or a YAML file under DATA or WORKSPACE.
: "${ENSEMBLE:=reference}"
: "${TIME_LIMIT:=7.5h}" # training time of a member over all its jobs, including requeued ones
: "${NODES:=1}"         # nodes per member
: "${MAX_RESTARTS:=20}" # a job that reaches its walltime more often than this is not requeued

# GPUS=0 runs train and infer on CPUs, with as many processes as the job has GPUs. Otherwise a job that sees fewer GPUs
# than Slurm granted fails.
: "${GPUS:=}"

# Account and partition; sbatch reads them from the environment. Remove the # if your site needs them.
# export SBATCH_ACCOUNT=GOV000000 SBATCH_PARTITION=gp4d

# How a stage is run: bare (stas on the PATH), apptainer, singularity, pyxis, docker or podman.
: "${RUNTIME:=bare}"
: "${IMAGE:=stas.sif}" # a .sif file for apptainer and singularity, an image's name for the others
# bare: an environment made by `make install`
export PATH="$PWD/.venv/bin:$PATH"
# Pretrained weights for nodes without network access, fetched by `stas weights fetch` on a machine that has it.
# export STAS_WEIGHTS_DIR=$DATA/weights

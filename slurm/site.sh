# shellcheck shell=bash disable=SC2034  # read by the scripts that source it
# All that differs from cluster to cluster. A variable that is set in the environment wins over the line here.

# Where things are, on a file system that all nodes share.
: "${DATA:=/data/stas}"
: "${TRAIN_IMAGES:=$DATA/Train_Images}"
: "${TRAIN_ANNOTATIONS:=$DATA/Train_Annotations}"
: "${PREDICT_IMAGES:=$DATA/Private_Image}" # what the ensemble shall outline
: "${WORKSPACE:=$PWD/workspace}"

# What to train: an ensemble that `stas recipes` lists, or a YAML file under DATA or WORKSPACE.
: "${ENSEMBLE:=reference}"
: "${TIME_LIMIT:=7.5h}" # what a member's training may take over all its jobs, requeued ones included
: "${NODES:=1}"         # nodes for each member
: "${MAX_RESTARTS:=20}" # a job that is cut off more often than this stays down

# Account and partition, as sbatch itself reads them from the environment. Remove the # where the site wants them.
# export SBATCH_ACCOUNT=GOV000000 SBATCH_PARTITION=gp4d

# How a stage is run: bare (stas on the PATH), apptainer, singularity, pyxis, docker or podman.
: "${RUNTIME:=bare}"
: "${IMAGE:=stas.sif}" # a .sif file for apptainer and singularity, an image's name for the others
# bare: an environment made by `make install`
export PATH="$PWD/.venv/bin:$PATH"
# Pretrained weights for nodes without network, filled by `stas weights fetch` on a machine that has it.
# export STAS_WEIGHTS_DIR=$DATA/weights

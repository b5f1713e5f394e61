#!/usr/bin/env bash
# Align on a GPU cluster under SLURM: one process a node, which takes all its GPUs.
#
#   sbatch scripts/launch/slurm.sh configs/llama3_simpo.py --mesh.data 2 \
#       --packing.rows 16
#
# Run it from the repository, on a file system that all nodes share, after
# pip install -e '.[cuda13]' into .venv. What comes after the config overrides settings;
# packing.rows must be a multiple of mesh.data x mesh.fsdp, here 2 x 8. A job that is
# preempted, reaches its time limit or loses a node saves what it can and goes back to
# the queue; the same command continues from the latest checkpoint.
#SBATCH --job-name=lpc_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
# To every process, so long before the limit: time to save.
#SBATCH --signal=TERM@300
set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch scripts/launch/slurm.sh CONFIG [--setting value ...]" >&2
    exit 2
fi
config=$1
shift

status=0
srun --kill-on-bad-exit=1 .venv/bin/python scripts/train.py --config "$config" \
    --resume "$@" || status=$?

# 143: told to end, and saved; 4 and 134: a process was lost, and with it the others.
# 137 is a kill from outside. Anything else would only happen again.
case $status in
    4 | 134 | 137 | 143)
        echo "exit status $status: back to the queue"
        scontrol requeue "$SLURM_JOB_ID"
        ;;
esac
exit "$status"

#!/usr/bin/env bash
# Serves: `hf_s3t.ray.train` on four nodes with eight GPUs each, by SLURM and `ray symmetric-run`:
#
#   sbatch cluster_configs/slurm.sh my_training.py
#
# my_training.py calls `hf_s3t.ray.train(make_trainer, workers=32)`. It runs once, on the first node: that is the driver.
# If it is killed or runs out of time, submit it again: it continues from the stages in the store.
#
# What was run: `ray symmetric-run` with one node, without SLURM. Not run: SLURM, and several nodes.

#SBATCH --job-name=hf_s3t
# As many nodes as you have. Stages of different shards and sequences train side by side; `hf-s3t plan --gpus` counts.
#SBATCH --nodes=4
# One Ray per node. It starts a worker process for each stage that trains there.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# One for each GPU at least; more where rows are prepared while a stage trains.
#SBATCH --cpus-per-task=64
# Requeue when a node fails: no stage in the store is trained again.
#SBATCH --requeue

set -euo pipefail

# The node that holds the store's driver. The output_dir has to be a folder that this node reaches under the same name
# every time; the others need not see it.
head=$(scontrol show hostnames "${SLURM_JOB_NODELIST}" | head -n 1)

# Base model and dataset come from the shared cache of Hugging Face, once per node, not once per stage. Fill it before
# (`hf download ...`), as nodes often have no way out.
export HF_HOME="${HF_HOME:?name a cache that every node can read}"
export HF_HUB_OFFLINE=1

# The partition key stays in the store's state on the first node. If you keep it elsewhere, let my_training.py read it
# from a file and set `os.environ["HF_S3T_KEY"]`: a variable of the job would reach every node.
unset HF_S3T_KEY

# The same command on every node. Ray starts, waits for the others, runs the script on the first node, and stops.
srun --nodes="${SLURM_JOB_NUM_NODES}" --ntasks="${SLURM_JOB_NUM_NODES}" \
  ray symmetric-run \
  --address "${head}:6379" \
  --min-nodes "${SLURM_JOB_NUM_NODES}" \
  --num-gpus=8 \
  -- \
  python "$@"

#!/bin/bash
# Several nodes under Slurm: one torchrun agent a node, which starts one process a GPU.
#
#     sbatch --nodes=4 config/slurm.sh config/polyglu_a100.py --out=/shared/out/polyglu
#     for i in 1 2 3; do sbatch --dependency=singleton --nodes=4 config/slurm.sh config/polyglu_a100.py; done     # days, in pieces
#     sbatch --array=0-31 --nodes=1 --wrap='python -m prepare.text --from="web/*.parquet" --out=data/web --part=$SLURM_ARRAY_TASK_ID/32'
#
# Three minutes before its time is up every process gets SIGUSR1: the ranks save at one step and leave, and the next job of the chain
# goes on from there; a run that is done does nothing more. A process that dies is started again on all nodes, up to three times.
#SBATCH --job-name=prism
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --open-mode=append

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# Without this the workers of a restart look for each other under the number of restarts of their own node, which differ between nodes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
trap '' USR1 # agents and this script ignore the signal that their workers act on
srun bash -c "trap '' USR1; exec \"\$@\"" _ torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-gpu}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$((29500 + SLURM_JOB_ID % 1000))" --rdzv-id="$SLURM_JOB_ID" --max-restarts=3 \
    train.py "$@" --resume=auto

#!/usr/bin/env bash
# A search over Slurm nodes:  sbatch [--nodes=N] cluster/slurm.sh FILE STORE [options of `dtmsearch run`]
# Submit it again, or let Slurm requeue it, and it goes on where it was.
#SBATCH --job-name=dtmsearch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dtmsearch-%j.log
set -euo pipefail

if [ "$#" -lt 2 ]; then
  echo "usage: sbatch cluster/slurm.sh FILE STORE [options of dtmsearch run]" >&2
  exit 2
fi
file=$1 store=$2
shift 2

# The home folder is every node's, and so are its token and the weights that a node has fetched.
if [ ! -s "$HOME/.ray/auth_token" ]; then
  echo "no token in ~/.ray/auth_token: run 'ray get-auth-token --generate' once" >&2
  exit 2
fi
export RAY_AUTH_MODE=token
export HF_HOME="${HF_HOME:-$HOME/.cache/huggingface}"
export RAY_TMPDIR="${SLURM_TMPDIR:-/tmp}"

# Ray wants the head's address, not its name: the first node of the job.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | awk '{print $1}')

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
  ray symmetric-run --address "$address:6379" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
  python -m dtmsearch run "$file" --store "$store" --address "$address:6379" "$@"

#!/usr/bin/env bash
# A search on Slurm: one Ray cluster for the length of the job, one search on it. Submitting it again goes on.
#
#   sbatch --nodes=4 --gpus-per-node=4 --time=12:00:00 cluster/slurm.sh CONFIG.yaml [moe-evo flags]
#
# It ends with `ray stop` on every node (ray symmetric-run does that), which ends every Ray process of your user
# there: hence --exclusive. A Ray of somebody else on a node keeps it from starting.
#
#SBATCH --job-name=moe-evo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail

fail() {
  echo "slurm.sh: error: $*" >&2
  exit 2
}

case ${1:-} in
  '' | -h | --help)
    echo 'usage: sbatch [sbatch options] cluster/slurm.sh CONFIG.yaml [--folder DIR] [moe-evo flags]' >&2
    if (($#)); then exit 0; else exit 2; fi
    ;;
esac
config=$1
shift
[[ -n ${SLURM_JOB_ID:-} ]] || fail "not in a Slurm job; use: sbatch cluster/slurm.sh $config"
[[ -f $config ]] || fail "$config: no such file in $PWD; give the YAML file of a search"
for program in ray srun scontrol; do
  command -v "$program" >/dev/null || fail "no $program on the PATH; activate the environment before sbatch"
done

name=$(basename "$config")
name=${name%.yaml}
folder=${MOE_EVO_RUNS:-runs}/${name%.yml}
flags=()
while (($#)); do
  case $1 in
    --folder=*) folder=${1#*=} ;;
    --folder)
      (($# > 1)) || fail '--folder: needs a value'
      folder=$2
      shift
      ;;
    *) flags+=("$1") ;;
  esac
  shift
done
[[ -n $folder ]] || fail '--folder: got nothing, expected a folder'
[[ $folder == /* ]] || folder=$PWD/$folder # $PWD is where sbatch was called, on storage that all nodes share

# whoever reaches the ports of a Ray without a token runs code as its owner; the nodes get ours through srun
export RAY_AUTH_MODE=token
if [[ -z ${RAY_AUTH_TOKEN:-} && -z ${RAY_AUTH_TOKEN_PATH:-} ]]; then
  RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
  export RAY_AUTH_TOKEN
fi

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 10000)) # other users may have a Ray too
ray_start=("--num-cpus=${SLURM_CPUS_PER_TASK:-1}" "--num-gpus=${SLURM_GPUS_ON_NODE:-0}")
entrypoint=(python -m moe_evo search "$config" --cluster.address auto --folder "$folder")
entrypoint+=(${flags[@]+"${flags[@]}"})
echo "slurm.sh: run folder $folder"

# shellcheck disable=SC2329 # a trap calls it
requeue() {
  echo 'slurm.sh: the time is nearly over; the job goes back into the queue and will go on from the run folder'
  scontrol requeue "$SLURM_JOB_ID" || echo 'slurm.sh: requeue was refused; run the same sbatch again' >&2
}
trap requeue USR1

srun --nodes "$SLURM_JOB_NUM_NODES" --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 --no-kill \
  ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" "${ray_start[@]}" -- \
  "${entrypoint[@]}" &
step=$!
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
  status=0
  wait "$step" || status=$?
done

if ((status == 0)) && [[ ! -f $folder/result.json ]]; then
  echo 'slurm.sh: error: no result, so Ray did not start (symmetric-run says 0 then); its words are above' >&2
  status=1
fi
exit "$status"

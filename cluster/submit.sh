#!/usr/bin/env bash
# Submit a search to a Ray cluster as a Ray job, follow its log, and answer with its exit code.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: cluster/submit.sh CONFIG.yaml [options] [moe-evo flags]

Runs `moe-evo search CONFIG.yaml --cluster.address auto --folder FOLDER [moe-evo flags]` on a Ray cluster. The same
command again goes on where the run stood, on this cluster or on a new one.

  --folder DIR         the run's folder, on storage that the head node keeps; made absolute against this folder.
                       Default: $MOE_EVO_RUNS (default ./runs) and the config's file name
  --address URL        the cluster's dashboard; default: $RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265
  --working-dir DIR    what is uploaded (at most 100 MiB) and where the job starts, so that relative paths of the
                       config mean the same there; default: this folder. Checkpoints, runs, caches, .git and
                       whatever .gitignore names stay here
  --config-only        upload the config alone: moe_evo is in the cluster's image, data are on its storage
  --pass-env NAME      give this variable of yours to the job; may be repeated. Ray shows its value in the
                       dashboard and keeps it in logs of the head: prefer secrets that the cluster holds itself
  --python PROGRAM     Python of the cluster's nodes; default: python
  --submission-id ID   name of the job; default: moe-evo-, the config's name, date and time
  --no-wait            leave after submitting
  --                   everything after it is for moe-evo

Where the cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.
Exit codes: 0 done; 2 wrong input, here or there, or no cluster that answers; 130 stopped or interrupted; otherwise that of the job, or 1.
TEXT
}

fail() {
  echo "submit.sh: error: $*" >&2
  exit 2
}

note() {
  echo "submit.sh: $*" >&2
}

yaml_quoted() {
  printf "'%s'" "${1//\'/\'\'}"
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "needs bash 4.4 or newer, got ${BASH_VERSION}"

config='' folder='' working_dir='' python=python submission_id=''
address=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
config_only=false wait_for_it=true
pass_env=() flags=()

while (($#)); do
  word=$1
  shift
  case $word in
    --address=* | --folder=* | --working-dir=* | --pass-env=* | --python=* | --submission-id=*)
      set -- "${word#*=}" "$@"
      word=${word%%=*}
      ;;
    --address | --folder | --working-dir | --pass-env | --python | --submission-id)
      (($#)) || fail "$word: needs a value"
      ;;
  esac
  case $word in
    -h | --help)
      usage
      exit 0
      ;;
    --address) address=$1 && shift ;;
    --folder) folder=$1 && shift && [[ -n $folder ]] || fail "--folder: got nothing, expected a folder" ;;
    --working-dir) working_dir=$1 && shift ;;
    --pass-env) pass_env+=("$1") && shift ;;
    --python) python=$1 && shift ;;
    --submission-id) submission_id=$1 && shift ;;
    --config-only) config_only=true ;;
    --no-wait) wait_for_it=false ;;
    --)
      flags+=("$@")
      break
      ;;
    *)
      if [[ -n $config ]]; then
        flags+=("$word")
      elif [[ $word == -* ]]; then
        fail "got $word before the config; give CONFIG.yaml first (--help tells more)"
      else
        config=$word
      fi
      ;;
  esac
done

if [[ -z $config ]]; then
  usage >&2
  exit 2
fi
[[ -f $config && -r $config ]] || fail "$config: no such file; give the YAML file of a search"
command -v ray >/dev/null || fail "no ray on the PATH; activate the environment that moe_evo is installed in"

name=$(basename "$config")
name=${name%.yaml}
name=${name%.yml}
folder=${folder:-${MOE_EVO_RUNS:-runs}/$name}
[[ $folder == /* ]] || folder=$PWD/$folder

if $config_only && [[ -n $working_dir ]]; then
  fail "--working-dir: got one beside --config-only, expected one of the two"
fi
# the job's folder is unpacked under a new path on every cluster: nothing that must last may lie there
temporary=$(umask 077 && mktemp -d)
trap 'rm -rf "$temporary"' EXIT
if $config_only; then
  working_dir=$temporary/upload
  mkdir "$working_dir"
  cp "$config" "$working_dir/"
  job_config=$(basename "$config")
else
  [[ -d ${working_dir:=$PWD} ]] || fail "--working-dir: $working_dir is no folder"
  working_dir=$(cd "$working_dir" && pwd -P)
  [[ $working_dir != / && $working_dir != "$(cd ~ && pwd -P)" ]] ||
    fail "would upload all of $working_dir; run this in the folder of your configs and data, or add --config-only"
  whole=$(cd "$(dirname "$config")" && pwd -P)/$(basename "$config")
  [[ $whole == "$working_dir"/* ]] ||
    fail "$config: lies outside of $working_dir, which is uploaded; add --working-dir DIR or --config-only"
  job_config=${whole#"$working_dir"/}
fi

# a file and not --runtime-env-json: every user of a machine sees its command lines
runtime_env=$temporary/runtime_env.yaml
excludes=(
  .git .venv venv .env __pycache__ '.*_cache' .hypothesis '*.egg-info' build dist node_modules
  runs wandb mlruns '*.safetensors' '*.gguf' '*.bin' '*.pt' '*.ckpt' '*.sqlite*'
  '!/moe_evo/data/**/*.safetensors' '!/moe_evo/runs' '!/moe_evo/runs/*.py'
)
(umask 077 && : >"$runtime_env")
(
  echo 'excludes:'
  for pattern in "${excludes[@]}"; do
    echo "- $(yaml_quoted "$pattern")"
  done
  ((${#pass_env[@]} == 0)) || echo 'env_vars:'
  for variable in ${pass_env[@]+"${pass_env[@]}"}; do
    [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "--pass-env: got $variable, expected the name of a variable"
    [[ $variable != RAY_* ]] || fail "--pass-env: $variable belongs to Ray; the cluster has its own"
    [[ -n ${!variable+set} ]] || fail "--pass-env: $variable is not set"
    [[ ${!variable} != *[[:cntrl:]]* ]] || fail "--pass-env: $variable holds line breaks or control characters"
    echo "  $variable: $(yaml_quoted "${!variable}")"
  done
) >"$runtime_env"

submission_id=${submission_id:-moe-evo-${name//[^A-Za-z0-9_-]/-}-$(date +%Y%m%d-%H%M%S)-$$}
submit=(
  ray job submit --address "$address" --submission-id "$submission_id"
  --working-dir "$working_dir" --runtime-env "$runtime_env"
)
$wait_for_it || submit+=(--no-wait)
# python -m also where the command moe-evo is on the PATH: it runs an uploaded moe_evo/ as well as an installed one
entrypoint=("$python" -m moe_evo search "$job_config" --cluster.address auto --folder "$folder")
entrypoint+=(${flags[@]+"${flags[@]}"})

# asked before anything is submitted: of a cluster that does not answer `ray job submit` tells in a traceback
if ! ray job list --address "$address" >/dev/null 2>"$temporary/refusal"; then
  reason=$(grep -v '^[[:space:]]*$' "$temporary/refusal" | tail -n 1) || reason=''
  fail "no Ray cluster takes jobs at $address (${reason:-no reason given}); check that --address is the URL of its" \
    "dashboard, and its token if it asks for one, or start one with \`ray start --head\`"
fi

note "job $submission_id at $address"
note "run folder $folder (on the cluster)"
interrupted=false status=0
trap 'interrupted=true' INT
"${submit[@]}" -- "${entrypoint[@]}" || status=$?
where="--address $address $submission_id"
if $interrupted; then
  note "interrupted; if the job was submitted it goes on: ray job logs --follow $where, or ray job stop $where"
  exit 130
fi
if ! $wait_for_it; then
  ((status == 0)) || exit 1
  note "follow it: ray job logs --follow $where; stop it: ray job stop $where; then the same command goes on"
  exit 0
fi

# ray answers 1 for every failure, and 0 for a job that was stopped
state=$(ray job status --address "$address" "$submission_id" 2>&1) || state=''
kept="every finished evaluation is kept in $folder; the same command goes on"
if [[ $state == *"Job '$submission_id' succeeded"* ]]; then
  ((status == 0)) || fail "not submitted, a job $submission_id exists already; leave --submission-id out"
  note "done; the result is in $folder"
elif [[ $state == *"Job '$submission_id' was stopped"* ]]; then
  note "stopped; $kept"
  status=130
elif [[ $state =~ "failed with exit code "(-?[0-9]+) ]]; then
  status=${BASH_REMATCH[1]}
  ((status >= 0)) || status=$((128 - status))
  case $status in
    2) note "exit code 2, wrong input: the last line of the job's log says what; the run folder is $folder" ;;
    126 | 127) note "exit code $status: nothing was started, as the cluster's nodes cannot run $python; give the Python" \
      "there that has moe_evo with --python" ;;
    130) note "exit code 130, interrupted; $kept" ;;
    *) note "exit code $status; $kept; the whole log: ray job logs $where" ;;
  esac
else
  note "no exit code: the job was not submitted, was lost, or the cluster does not answer; if it ran, $kept"
  status=1
fi
exit "$status"

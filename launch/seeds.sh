#!/usr/bin/env bash
# Trains with several seeds, each in its own run:
#   launch/seeds.sh [option ...] 0 1 2 -- model=convnext_t recipe=in1k ...
#       on this machine, one run after the other, with a table at the end
#   launch/seeds.sh --sbatch [option ...] 0 1 2 -- model=convnext_t recipe=in1k ...
#       as a job array of launch/slurm.sbatch
# Options are passed to launch/local.sh (--ranks=2), or with --sbatch to sbatch (--nodes=4).
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
submit='' options=() seeds=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --sbatch) submit=1 ;;
        -*) options+=("$1") ;;
        *) seeds+=("$1") ;;
    esac
    shift
done
if [[ $# -eq 0 || ! ${seeds[*]-} =~ ^[0-9]+(\ [0-9]+)*$ ]]; then
    echo "launch/seeds.sh [--sbatch] [--option=value ...] SEED ... -- key=value ...:" \
        "seeds must be whole numbers, followed by --" >&2
    exit 2
fi
shift
list=$(IFS=, && echo "${seeds[*]}")
if [ -z "$submit" ]; then
    exec "$launch/local.sh" ${options[@]+"${options[@]}"} -m "seed=$list" "$@"
fi
for argument in "$@"; do
    if [[ $argument == run=* && $argument != *'${seed}'* ]]; then
        echo "launch/seeds.sh: $argument is the same folder for all seeds;" \
            "use '$argument-s\${seed}'" >&2
        exit 2
    fi
done
exec sbatch --array="$list" ${options[@]+"${options[@]}"} "$launch/slurm.sbatch" "$@"

#!/usr/bin/env bash
# Trains on this machine with torchrun, with one rank for each GPU:
#   launch/local.sh [option ...] model=convnext_t recipe=in1k ...
#   --ranks N          number of ranks, to train on the CPU or on some of the GPUs
#   --max-restarts N   if a rank is lost, restart all ranks from the last checkpoint, N times at most
# All other arguments are passed to train.py. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save the step and stop.
# torchrun returns 1 for every failure; this script returns the exit code of train.py.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python

ranks='' restarts=0 options=()
while [ $# -gt 0 ]; do
    case $1 in
        --ranks=* | --max-restarts=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --ranks) ranks=${2:-} options+=("--ranks=$ranks") && shift $(($# < 2 ? 1 : 2)) ;;
        --max-restarts) restarts=${2:-} options+=("--max-restarts=$restarts") && shift $(($# < 2 ? 1 : 2)) ;;
        *) break ;;
    esac
done
if [[ ! ${ranks:-1} =~ ^[1-9][0-9]*$ || ! $restarts =~ ^[0-9]+$ ]]; then
    echo "launch/local.sh: --ranks $ranks --max-restarts $restarts: both must be whole numbers," \
        "--ranks 1 or more" >&2
    exit 2
fi
for argument in "$@"; do
    # Options for a single process: --help, --cfg; and -m, which starts this script for each run.
    if [[ $argument == -* ]]; then
        export RECONVERGE_LAUNCHER="$(printf '%q ' "$root/launch/local.sh" ${options[@]+"${options[@]}"})"
        exec "$python" "$root/train.py" "$@"
    fi
done

"$python" "$root/train.py" --check "$@" || exit $? # report wrong settings once, before ranks start
if [ -z "$ranks" ]; then
    ranks=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit $?
    if [ "$ranks" = 0 ]; then
        echo "launch/local.sh: torch finds no GPU; to train on the CPU, give a number of ranks: --ranks N" >&2
        exit 2
    fi
fi

# Ranks write their exit code to this file. torchrun runs in its own process group (set -m), so that it gets
# Ctrl-C only once, from this script. After a second signal torchrun would end without its ranks.
export RECONVERGE_EXIT_FILE=$(mktemp)
trap 'rm -f "$RECONVERGE_EXIT_FILE"' EXIT
# seconds to finish the step and save a checkpoint, before SIGKILL
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads= sets torch's own threads
set -m
"$python" -m torch.distributed.run --standalone --nproc-per-node="$ranks" --max-restarts="$restarts" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1 "$root/train.py" "$@" </dev/null &
torchrun=$!
set +m

told=''
hand_on() {
    if [ -z "$told" ]; then kill -s "$1" "$torchrun"; else pkill -"$1" -P "$torchrun"; fi
    told=$1
}
for signal in TERM INT HUP USR1; do trap "hand_on $signal" "$signal"; done
while kill -0 "$torchrun" 2>/dev/null; do # a trap interrupts wait
    wait "$torchrun"
    code=$?
done

left=$(<"$RECONVERGE_EXIT_FILE")
# 75: stopped by a signal before there was anything to save
if [ -n "$left" ]; then code=$left; elif [ -n "$told" ]; then code=75; fi
exit "$code"

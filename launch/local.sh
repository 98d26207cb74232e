#!/usr/bin/env bash
# Trains on this machine, a rank a GPU, by torchrun:
#   launch/local.sh [option ...] model=convnext_t recipe=in1k ...
#   --ranks N          so many ranks: on a CPU, or on some of the GPUs
#   --max-restarts N   when a rank is lost, start all of them again, N times at most: they go on from the
#                      last checkpoint
# Everything else is train.py's. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save the step. Ends with the exit code of
# the run, which torchrun loses.
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
    echo "launch/local.sh: --ranks $ranks --max-restarts $restarts: numbers are wanted" >&2
    exit 2
fi
for argument in "$@"; do
    # of one process: --help, --cfg; and -m, which starts this script for each run
    if [[ $argument == -* ]]; then
        export RECONVERGE_LAUNCHER="$(printf '%q ' "$root/launch/local.sh" ${options[@]+"${options[@]}"})"
        exec "$python" "$root/train.py" "$@"
    fi
done

"$python" "$root/train.py" --check "$@" || exit $? # what is mistyped is said once, and at once
if [ -z "$ranks" ]; then
    ranks=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit $?
    if [ "$ranks" = 0 ]; then
        echo "launch/local.sh: torch sees no GPU here; --ranks N says how many ranks to start on the CPU" >&2
        exit 2
    fi
fi

# Ranks leave their exit code in this file. torchrun is a process group of its own (set -m), so that a
# terminal's Ctrl-C comes to it once, from here: a second signal makes it leave its ranks behind.
export RECONVERGE_EXIT_FILE=$(mktemp)
trap 'rm -f "$RECONVERGE_EXIT_FILE"' EXIT
# seconds for a step and its checkpoint, then SIGKILL
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                                 # torch's own are set by threads=
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
# 75: told to stop before there was anything to save
if [ -n "$left" ]; then code=$left; elif [ -n "$told" ]; then code=75; fi
exit "$code"

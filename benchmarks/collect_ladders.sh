#!/usr/bin/env bash
# Ten sets: two tasks x random, medium, medium-replay, medium-expert, expert, 200k steps each. The suite offline-ladder uses
# six of them, generative four.
#
#     MINARI_DATASETS_PATH=... benchmarks/collect_ladders.sh FOLDER
#
# FOLDER holds trpo_ladder_Hopper.npz and trpo_ladder_HalfCheetah.npz (see collect_ladder.py). Sets that exist are left
# alone. A medium policy scores about a third of the expert's return above random, as D4RL's do; Hopper's ladder skips that
# level, so its medium lies between two rungs. A replay goes through the rungs up to medium in equal parts.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:?give the folder with the two ladders}"
python="${PYTHON:-python}"

collect() { # task, kind, snapshots ...
    local task="$1" kind="$2"
    shift 2
    local id
    id="ladder/$(echo "$task" | tr '[:upper:]' '[:lower:]')-$kind-v0"
    if [ -d "${MINARI_DATASETS_PATH:-$HOME/.minari/datasets}/$id" ]; then
        echo "$id is there"
        return
    fi
    echo "== $id: snapshots $*"
    "$python" "$here/collect_ladder.py" --ladder "$folder/trpo_ladder_$task.npz" --env "$task" --steps 200000 \
        --snapshots "$@" --id "$id"
}

collect Hopper random 0
collect Hopper medium 1.6
collect Hopper medium-replay 0 0.5 1 1.3 1.6
collect Hopper medium-expert 1.6 25
collect Hopper expert 25
collect HalfCheetah random 0
collect HalfCheetah medium 3
collect HalfCheetah medium-replay 0 1 2 3
collect HalfCheetah medium-expert 3 25
collect HalfCheetah expert 25

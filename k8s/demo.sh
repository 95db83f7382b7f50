#!/usr/bin/env bash
# The demo as a RayJob: builds the small policy, fine-tunes it on demonstrations, then trains it online.
#   demo.sh RUN_FOLDER [KEY=VALUE ...]
# Both runs get the overrides, so only sections of both are allowed (cluster, tracking, deadlines).
set -euo pipefail

if [ "$#" -lt 1 ]; then
  echo "usage: demo.sh RUN_FOLDER [KEY=VALUE ...]" >&2
  exit 2
fi
folder=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipes="$here/../recipes"

if [ ! -f "$folder/warm-start.done" ]; then
  mkdir -p "$folder"
  rm -rf "$folder/model" "$folder/warm-start"  # what an interrupted attempt left
  python "$recipes/digits.py" build --out "$folder/model"
  counterpoint sft "$recipes/digits-sft.yaml" "run.folder=$folder/sft" "model.path=$folder/model" \
    "sft.export_folder=$folder/warm-start" "$@"
  touch "$folder/warm-start.done"
fi
exec "$here/entrypoint.sh" "$folder" "$recipes/digits.yaml" "model.path=$folder/warm-start" \
  weights.listen=node "$@"

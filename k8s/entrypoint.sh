#!/usr/bin/env bash
# Entrypoint of a RayJob: starts a run, or resumes the run that the folder on the volume holds.
#   entrypoint.sh RUN_FOLDER RECIPE [KEY=VALUE ...]
# A retried job calls the same command again, so the run folder decides which of the two it is.
set -euo pipefail

if [ "$#" -lt 2 ]; then
  echo "usage: entrypoint.sh RUN_FOLDER RECIPE [KEY=VALUE ...]" >&2
  exit 2
fi
folder=$1 recipe=$2
shift 2
mkdir -p "$folder"

# SQLite's WAL mode doesn't work over a network file system: the driver's databases stand on its own volume.
if [ -n "${COUNTERPOINT_DRIVER_VOLUME:-}" ]; then
  own="$COUNTERPOINT_DRIVER_VOLUME/$(basename "$folder")"
  mkdir -p "$own"
  for database in ledger.db spool.db; do
    if [ ! -e "$folder/$database" ]; then
      ln -sfn "$own/$database" "$folder/$database"
    fi
  done
fi

# Every run writes config.yaml first. With it but without a checkpoint, --resume starts over.
options=()
if [ -f "$folder/config.yaml" ]; then
  options=(--resume)
fi
echo "$$" >"${COUNTERPOINT_PID_FILE:-/tmp/counterpoint-driver.pid}"  # for drain.sh; exec keeps the number
exec counterpoint train "$recipe" "run.folder=$folder" "$@" ${options[@]+"${options[@]}"}

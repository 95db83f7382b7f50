#!/usr/bin/env bash
# Drains a pod before it is stopped (preStop), so that the driver can write a last checkpoint.
#   drain.sh driver SECONDS   on the head: stop the driver as Ctrl-C would, and wait until it has ended
#   drain.sh worker SECONDS   on a trainer's node: stay as long as the head's control store answers
# Never longer than SECONDS, which is below the pod's terminationGracePeriodSeconds.
set -euo pipefail

if [ "$#" -ne 2 ]; then
  echo "usage: drain.sh driver|worker SECONDS" >&2
  exit 2
fi
role=$1 deadline=$((SECONDS + $2))

driver() {
  local file=${COUNTERPOINT_PID_FILE:-/tmp/counterpoint-driver.pid} process
  [ -f "$file" ] || return 0
  process=$(<"$file")
  kill -TERM "$process" 2>/dev/null || return 0
  while kill -0 "$process" 2>/dev/null && [ "$SECONDS" -lt "$deadline" ]; do
    sleep 0.5
  done
}

worker() {
  local host=${FQ_RAY_IP:-} port=${RAY_PORT:-6379}  # both set by KubeRay
  [ -n "$host" ] || return 0
  while [ "$SECONDS" -lt "$deadline" ] && timeout 2 bash -c "exec 3<>/dev/tcp/$host/$port" 2>/dev/null; do
    sleep 1
  done
}

case $role in
  driver) driver ;;
  worker) worker ;;
  *)
    echo "drain.sh: $role is not a part to drain; write driver or worker" >&2
    exit 2
    ;;
esac

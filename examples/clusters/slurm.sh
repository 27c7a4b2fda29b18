#!/usr/bin/env bash
# One merge on Slurm: a Ray cluster on the nodes of the job, the merge, and the end of both.
#
#   sbatch examples/clusters/slurm.sh /mnt/models/Qwen1.5-72B /mnt/models/my-lora /mnt/models/merged
#
# docs/slurm.md says what must be there first. Yours to fill in: nodes, GPUs and time below, and
# RAYMELD_VENV, a virtual environment with raymeld on a file system that every node has.
# RAYMELD_SCRATCH is a directory on a local disk, for Ray's logs and sockets; keep it short.
#SBATCH --job-name=raymeld
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

if (($# < 3)); then
    echo "usage: sbatch $0 BASE ADAPTER OUT [OPTIONS OF THE MERGE]" >&2
    exit 2
fi
base=$1 adapter=$2 out=$3
shift 3

# shellcheck disable=SC1091 # only the cluster has it
source "${RAYMELD_VENV:-/mnt/models/raymeld-venv}/bin/activate"

# A token for this job alone; srun hands the environment to every node.
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

# Outside the ranges of Ray's workers and of the kernel's ephemeral ports.
port=$((20000 + SLURM_JOB_ID % 10000))
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
scratch=${RAYMELD_SCRATCH:-/tmp}/ray-$SLURM_JOB_ID
export head port scratch

# One step for all nodes. Ray finds the GPUs that Slurm gave the step. No dashboard: nobody asks it.
# shellcheck disable=SC2016 # expanded on the nodes
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" bash -c '
    if ((SLURM_NODEID == 0)); then
        exec ray start --head --port="$port" --include-dashboard=false \
            --block --object-store-memory=1000000000 --temp-dir="$scratch"
    fi
    until (: <"/dev/tcp/$head/$port") 2>/dev/null; do sleep 1; done
    exec ray start --address="$head:$port" \
        --block --object-store-memory=1000000000 --temp-dir="$scratch"
' &
cluster=$!
trap 'kill "$cluster" 2>/dev/null || true; wait "$cluster" || true' EXIT

# A merge counts the nodes that are there when it starts.
python - "$head:$port" "$SLURM_JOB_NUM_NODES" <<'EOF'
import socket
import sys
import time

import ray

address, wanted = sys.argv[1], int(sys.argv[2])
end = time.monotonic() + 300
host, port = address.split(":")
while True:
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
        break
    except OSError as error:
        if time.monotonic() > end:
            sys.exit(f"no Ray at {address}: {error}")
        time.sleep(1)
ray.init(address=address, log_to_driver=False, logging_level="error")
while (found := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > end:
        sys.exit(f"only {found} of {wanted} nodes came up in 5 minutes")
    time.sleep(1)
EOF

# In the background, so that Slurm's notice before the time limit reaches it.
raymeld merge "$base" "$adapter" --out "$out" --address "$head:$port" "$@" &
merge=$!
trap 'kill -TERM "$merge"' TERM
status=0
wait "$merge" || status=$?
if kill -0 "$merge" 2>/dev/null; then # the wait was cut short by the signal
    status=0
    wait "$merge" || status=$?
fi
exit "$status"

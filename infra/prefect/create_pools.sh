#!/bin/sh
# Make the work pools that infra/prefect/prefect.yaml names, each with room for one run at a time.
# Usage: create_pools.sh [process] [docker] [kubernetes]; without arguments, the process pool alone.
set -eu

for type in "${@:-process}"; do
    pool="entprune-$type"
    prefect work-pool inspect "$pool" > /dev/null 2>&1 || prefect work-pool create "$pool" --type "$type"
    prefect work-pool set-concurrency-limit "$pool" 1
done

#!/bin/sh
# Make the files that infra/compose.yaml reads passwords from; those that exist are kept.
set -eu

folder="$(dirname "$0")/secrets"
mkdir -p "$folder"
chmod 711 "$folder"
for name in postgres_password s3_user s3_password ray_token; do
    [ -s "$folder/$name" ] && continue
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n' > "$folder/$name"
    chmod 444 "$folder/$name" # the containers' users are others than the one who runs this; the folder lists nothing
done

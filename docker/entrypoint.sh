#!/bin/sh
# Runs `prefixd serve` with the container's arguments as its flags. `exec` makes it process 1, so it
# gets the signal that stops the container. `docker run IMAGE prefixd …` runs another verb.
set -eu

if [ "${1-}" = prefixd ]; then
    exec "$@"
fi
exec prefixd serve "$@"

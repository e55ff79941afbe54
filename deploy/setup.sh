#!/bin/sh
# Make the server's certificates and keys for docker-compose.yml, each part's into a
# volume of its own. May run again: what is there stays.
set -eu
if [ -e /keys/trust/ca.crt ]; then
    echo "the server's keys are there"
else
    deploy/make-keys.sh server /keys proxy ${SERVER_NAME:+"$SERVER_NAME"}
fi

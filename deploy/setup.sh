#!/bin/sh
# Make the server's certificates and keys for docker-compose.yml, with one volume for
# each part. It may run again: existing keys stay.
set -eu
if [ -e /keys/trust/ca.crt ]; then
    echo "the server's keys exist already"
else
    deploy/make-keys.sh server /keys proxy ${SERVER_NAME:+"$SERVER_NAME"}
fi

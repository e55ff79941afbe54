#!/bin/sh
# Check a node, then run it. The log contains the result of the check. `python` and
# `flower-supernode` are of an environment with the packages of requirements-node.lock.
#
# SUPERLINK         HOST:PORT of the server's proxy
# SITE              the site's name, and the name of its key file: $KEYS/$SITE
# DATA_PATH         folder with <class>/<image> (default /data)
# KEYS              folder with the site's private key (default /keys)
# CA                the server's ca.crt (default $KEYS/ca.crt)
# RUN_CONFIG        a run's configuration: classes, image size and teacher are checked,
#                   too (default: none)
# POLICY            file with the site's own rules (default $KEYS/policy.toml, if it
#                   exists)
# TRUSTED_ENTITIES  file with the keys whose signed code may run here; without it, the
#                   server's code runs unsigned
set -eu
: "${SUPERLINK:?HOST:PORT of the server}" "${SITE:?name of the site}"
: "${DATA_PATH:=/data}" "${KEYS:=/keys}"
: "${CA:=$KEYS/ca.crt}" "${RUN_CONFIG:=}" "${POLICY:=}" "${TRUSTED_ENTITIES:=}"
# A missing policy file, or a broken link, is an error: it must not mean "no policy".
if [ -z "$POLICY" ] && { [ -e "$KEYS/policy.toml" ] || [ -L "$KEYS/policy.toml" ]; }; then
    POLICY=$KEYS/policy.toml
fi
if [ -n "$POLICY" ] && [ ! -f "$POLICY" ]; then
    echo "node.sh: POLICY = $POLICY is no file" >&2
    exit 1
fi
export SITE DATA_PATH POLICY TRUSTED_ENTITIES
node_config=$(python deploy/node_config.py)

set -- --data-path "$DATA_PATH" \
    --superlink "$SUPERLINK" --root-certificates "$CA" --private-key "$KEYS/$SITE"
[ -z "$RUN_CONFIG" ] || set -- "$@" --run-config "$RUN_CONFIG"
[ -z "$POLICY" ] || set -- "$@" --policy "$POLICY"
python -m client_app.doctor "$@"

set -- --superlink "$SUPERLINK" --root-certificates "$CA" \
    --auth-supernode-private-key "$KEYS/$SITE" --node-config "$node_config"
[ -z "$TRUSTED_ENTITIES" ] || set -- "$@" --trusted-entities "$TRUSTED_ENTITIES"
exec flower-supernode "$@"

#!/bin/sh
# Check a node, then run it; what the check finds stands in the log.
#
# SUPERLINK   HOST:PORT of the server's proxy
# SITE        the site's name; also its key's: $KEYS/$SITE
# DATA_PATH   holds <class>/<image> (default /data)
# KEYS        holds the node's private key and ca.crt (default /keys)
# RUN_CONFIG  the run's configuration, for the check (default conf/sites.toml)
set -eu
: "${SUPERLINK:?HOST:PORT of the server}" "${SITE:?name of the site}"
: "${DATA_PATH:=/data}" "${KEYS:=/keys}"
python -m client_app.doctor --data-path "$DATA_PATH" --superlink "$SUPERLINK" \
    --run-config "${RUN_CONFIG:-conf/sites.toml}" \
    --root-certificates "$KEYS/ca.crt" --private-key "$KEYS/$SITE"
exec flower-supernode --superlink "$SUPERLINK" --root-certificates "$KEYS/ca.crt" \
    --auth-supernode-private-key "$KEYS/$SITE" \
    --node-config "data-path=\"$DATA_PATH\" site=\"$SITE\""

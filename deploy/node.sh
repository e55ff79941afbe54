#!/bin/sh
# Check a node, then run it; what the check finds stands in the container's log.
#
# SUPERLINK   HOST:PORT of the server's proxy
# SITE        the site's name; also its key's: /keys/$SITE
# RUN_CONFIG  the run's configuration, for the check (default conf/sites.toml)
#
# /data holds <class>/<image>, /keys the node's private key and ca.crt.
set -eu
: "${SUPERLINK:?HOST:PORT of the server}" "${SITE:?name of the site}"
python -m client_app.doctor --data-path /data --superlink "$SUPERLINK" \
    --run-config "${RUN_CONFIG:-conf/sites.toml}" \
    --root-certificates /keys/ca.crt --private-key "/keys/$SITE"
exec flower-supernode --superlink "$SUPERLINK" --root-certificates /keys/ca.crt \
    --auth-supernode-private-key "/keys/$SITE" \
    --node-config "data-path=\"/data\" site=\"$SITE\""

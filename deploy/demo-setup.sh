#!/bin/sh
# Prepare the demo of docker-compose.yml: keys, and a folder of drawn images for each
# site. May run again: what is there stays.
set -eu
nodes="site-a site-b site-c site-d"
if [ ! -e /keys/ca.crt ]; then
    deploy/make-keys.sh server /keys proxy ${SERVER_NAME:+"$SERVER_NAME"}
    # shellcheck disable=SC2086
    deploy/make-keys.sh node /keys $nodes
fi
# A node sees its own key and the CA's certificate, and no more.
for node in $nodes; do
    cp -p "/keys/nodes/$node" /keys/ca.crt "/node-keys/$node/"
done
python -m scripts.draw_sites /sites $nodes

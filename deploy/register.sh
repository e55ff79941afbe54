#!/bin/sh
# Register nodes' public keys at the SuperLink; those that are registered stay so.
#
#   deploy/register.sh SUPERLINK KEYS NODE...
#
# SUPERLINK is HOST:PORT of the SuperLink itself, KEYS the folder of make-keys.sh.
set -eu
superlink=$1 keys=$2
shift 2
mkdir -p "$FLWR_HOME"
printf '[superlink.server]\naddress = "%s"\nroot-certificates = "%s"\n' \
    "$superlink" "$keys/ca.crt" > "$FLWR_HOME/config.toml"
for node in "$@"; do
    if said=$(flwr supernode register "$keys/nodes/$node.pub" server --name "$node" 2>&1)
    then
        echo "$node: registered"
    else
        case $said in
            *already*) echo "$node: was registered before" ;;
            *) echo "$node: $said" >&2; exit 1 ;;
        esac
    fi
done

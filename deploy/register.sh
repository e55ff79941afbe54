#!/bin/sh
# Register sites' public keys at the SuperLink, and write down which site has which.
#
#   deploy/register.sh SITE=KEY.pub...    KEY.pub from anywhere; - is the input
#   deploy/register.sh --remove SITE...   whose key is of no use from then on
#   deploy/register.sh --list
#
# SUPERLINK  HOST:PORT of the SuperLink itself (default 127.0.0.1:8000)
# CA         its ca.crt (default /etc/clip2fl/trust/ca.crt)
# REGISTRY   the file (default /etc/clip2fl/registry/sites.json), which the run
#            configuration names as federation.site-registry
set -eu
root=$(dirname "$0")/..
python=$root/.venv/bin/python
[ -x "$python" ] || python=python
exec "$python" "$root/deploy/register.py" "$@"

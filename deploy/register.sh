#!/bin/sh
# Register sites' public keys at the SuperLink, and record each site's key in a file.
#
#   deploy/register.sh SITE=KEY.pub...    KEY.pub is any path; - is the standard input
#   deploy/register.sh --remove SITE...   the site's key cannot be registered again
#   deploy/register.sh --list
#
# SUPERLINK  HOST:PORT of the SuperLink itself (default 127.0.0.1:8000)
# CA         its ca.crt (default /etc/clip2fl/trust/ca.crt)
# REGISTRY   the file (default /etc/clip2fl/registry/sites.json); set
#            federation.site-registry to its path
set -eu
root=$(dirname "$0")/..
python=$root/.venv/bin/python
[ -x "$python" ] || python=python
exec "$python" "$root/deploy/register.py" "$@"

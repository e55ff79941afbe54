#!/bin/sh
# Make the image that deploy/Dockerfile builds on where no image registry is reachable.
# For tests only: elsewhere the engine fetches it by itself.
#
#   tests/deployment/base_image.sh [TAG]
#
# Needs root and debootstrap. The container trusts the certificates that this machine
# trusts ($SSL_CERT_FILE), which may have a proxy's among them.
set -eu
tag=${1:-python:3.11-slim-bookworm}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase \
    --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$root"
rm -f "$root"/usr/lib/python3.11/EXTERNALLY-MANAGED
ln -sf python3 "$root/usr/bin/python"
bundle=/etc/ssl/certs/ca-certificates.crt
cp "${SSL_CERT_FILE:-$bundle}" "$root$bundle"
tar -C "$root" -c . | docker import \
    -c "ENV SSL_CERT_FILE=$bundle" -c "ENV PIP_CERT=$bundle" - "$tag"

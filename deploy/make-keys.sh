#!/usr/bin/env bash
# Make the certificates and keys of a federation. Nothing that exists is overwritten.
#
#   deploy/make-keys.sh server DIR NAME...   CA, server certificate, SuperExec secret
#   deploy/make-keys.sh node DIR NODE...     one key pair for each node, in DIR/nodes
#
# NAME is each DNS name or IP address by which nodes reach the server; localhost,
# superlink and 127.0.0.1, by which the server's own parts reach each other, are added.
# Keep DIR at the server. A node gets its own DIR/nodes/NODE and DIR/ca.crt, no more.
set -euo pipefail
umask 077

fail() {
    echo "make-keys.sh: $*" >&2
    exit 1
}

absent() {
    for file in "$@"; do
        [ ! -e "$file" ] || fail "$file exists and is not overwritten; move it away first"
    done
}

make_server() {
    local names=""
    for name in localhost superlink 127.0.0.1 "$@"; do
        case $name in
            *[!0-9.]*:* | *:*) names+="IP:$name," ;;
            *[!0-9.]*) names+="DNS:$name," ;;
            *) names+="IP:$name," ;;
        esac
    done
    absent "$dir/ca.key" "$dir/ca.crt" "$dir/server.key" "$dir/server.crt" \
        "$dir/superexec.secret"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -sha384 -nodes \
        -days 3650 -subj "/CN=CLIP2FL federation CA" -keyout "$dir/ca.key" \
        -addext basicConstraints=critical,CA:TRUE \
        -addext keyUsage=critical,keyCertSign,cRLSign -out "$dir/ca.crt" 2>/dev/null
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
        -subj "/CN=CLIP2FL server" -keyout "$dir/server.key" 2>/dev/null |
        openssl x509 -req -CA "$dir/ca.crt" -CAkey "$dir/ca.key" -days 825 -sha256 \
            -set_serial "0x$(openssl rand -hex 16)" -out "$dir/server.crt" -extfile <(
                echo "subjectAltName=${names%,}"
                echo "extendedKeyUsage=serverAuth"
                echo "basicConstraints=critical,CA:FALSE"
            ) 2>/dev/null
    openssl rand -hex 32 | tr -d '\n' >"$dir/superexec.secret"
    # Not secret, and read by processes of other users.
    chmod 644 "$dir/ca.crt" "$dir/server.crt"
    echo "server: $dir/server.crt for ${names%,}"
}

make_nodes() {
    mkdir -p "$dir/nodes"
    for node in "$@"; do
        [[ $node =~ ^[A-Za-z0-9._-]{1,64}$ ]] ||
            fail "node name '$node': only letters, digits, '.', '_' and '-'"
        absent "$dir/nodes/$node" "$dir/nodes/$node.pub"
    done
    for node in "$@"; do
        ssh-keygen -q -t ecdsa -b 384 -N '' -C "$node" -f "$dir/nodes/$node"
        echo "node: $dir/nodes/$node and $node.pub"
    done
}

[ $# -ge 3 ] || fail "usage: make-keys.sh server DIR NAME... | node DIR NODE..."
what=$1 dir=$2
shift 2
for tool in openssl ssh-keygen; do
    command -v "$tool" >/dev/null || fail "$tool is missing: install it"
done
mkdir -p "$dir"
case $what in
    server) make_server "$@" ;;
    node) make_nodes "$@" ;;
    *) fail "'$what' is neither 'server' nor 'node'" ;;
esac

#!/usr/bin/env bash
# Make the certificates and keys of a federation. Existing files are not overwritten,
# except by `renew`.
#
#   deploy/make-keys.sh server DIR NAME...          at the server, once
#   deploy/make-keys.sh renew DIR [NAME...]         at the server, before they expire
#   deploy/make-keys.sh own-key DIR SITE [PUBLIC]   for the sites of docker-compose.yml
#
# `server` makes one folder for each part of the server. No part needs the folder of
# another part:
#
#   DIR/ca         ca.key                                    signs certificates; keep it offline
#   DIR/trust      ca.crt                                    for all parts, and for nodes
#   DIR/superlink  server.crt server.key superexec.secret
#   DIR/superexec  superexec.secret
#   DIR/proxy      proxy.crt proxy.key
#
# NAME is each DNS name or IP address by which nodes reach the proxy.
#
# `renew` makes the certificates of SuperLink and proxy anew, with the CA's key, which
# must be back in DIR/ca. Without a NAME they keep their names. The CA's certificate
# stays, so sites need nothing. Restart SuperLink and proxy afterwards.
#
# `own-key` makes a site's key pair, DIR/SITE and DIR/SITE.pub. The private key stays in
# DIR. SITE.pub goes to the server (a copy goes into the folder PUBLIC, if given).
set -euo pipefail
umask 077
# [A-Za-z] matches only ASCII letters below, regardless of the machine's language.
export LC_ALL=C

fail() {
    echo "make-keys.sh: $*" >&2
    exit 1
}

absent() {
    for file in "$@"; do
        [ ! -e "$file" ] && [ ! -L "$file" ] ||
            fail "$file exists and is not overwritten; move it away first"
    done
}

# Move a finished file to its place, so that no half-written file is ever there.
put() {
    absent "$2"
    chmod "$3" "$1"
    mv -n "$1" "$2"
}

# certificate NAME SAN: $new/NAME.key and NAME.crt, signed by the CA in $new.
certificate() {
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
        -subj "/CN=CLIP2FL $1" -keyout "$new/$1.key" 2>"$new/log" |
        openssl x509 -req -CA "$new/ca.crt" -CAkey "$new/ca.key" -days 825 -sha256 \
            -set_serial "0x$(openssl rand -hex 16)" -out "$new/$1.crt" -extfile <(
                echo "subjectAltName=$2"
                echo "extendedKeyUsage=serverAuth"
                echo "basicConstraints=critical,CA:FALSE"
            ) 2>>"$new/log" || fail "openssl: $(cat "$new/log")"
}

own="DNS:localhost,IP:127.0.0.1"

# san NAME...: the names as openssl writes them, each after a comma.
san() {
    for name in "$@"; do
        [[ $name =~ ^[A-Za-z0-9.:*-]+$ ]] || fail "'$name' is no DNS name or IP address"
        case $name in
            *:*) echo -n ",IP:$name" ;;
            *[!0-9.]*) echo -n ",DNS:$name" ;;
            *) echo -n ",IP:$name" ;;
        esac
    done
}

make_server() {
    local names
    [ $# -ge 1 ] || fail "give each name or address by which nodes reach the server"
    names=$(san "$@")
    absent "$dir/ca/ca.key" "$dir/trust/ca.crt" "$dir/superlink/server.key" \
        "$dir/superlink/server.crt" "$dir/superlink/superexec.secret" \
        "$dir/superexec/superexec.secret" "$dir/proxy/proxy.key" "$dir/proxy/proxy.crt"
    # The user of each part must be able to enter this folder.
    [ -d "$dir" ] || mkdir -p -m 755 "$dir"
    mkdir -p "$dir/ca" "$dir/trust" "$dir/superlink" "$dir/superexec" "$dir/proxy"
    new=$(mktemp -d "$dir/ca/.new.XXXXXX")
    trap 'rm -rf "$new"' EXIT
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -sha384 -nodes \
        -days 3650 -subj "/CN=CLIP2FL federation CA" -keyout "$new/ca.key" \
        -addext basicConstraints=critical,CA:TRUE \
        -addext keyUsage=critical,keyCertSign,cRLSign -out "$new/ca.crt" \
        2>"$new/log" || fail "openssl: $(cat "$new/log")"
    certificate server "$own,DNS:superlink"
    certificate proxy "$own$names"
    openssl rand -hex 32 | tr -d '\n' >"$new/superexec.secret"
    cp "$new/superexec.secret" "$new/superexec.copy"
    put "$new/ca.key" "$dir/ca/ca.key" 600
    put "$new/server.key" "$dir/superlink/server.key" 600
    put "$new/server.crt" "$dir/superlink/server.crt" 644
    put "$new/superexec.secret" "$dir/superlink/superexec.secret" 600
    put "$new/superexec.copy" "$dir/superexec/superexec.secret" 600
    put "$new/proxy.key" "$dir/proxy/proxy.key" 600
    put "$new/proxy.crt" "$dir/proxy/proxy.crt" 644
    # Written last, as the mark that all files exist. Every user may read it.
    put "$new/ca.crt" "$dir/trust/ca.crt" 644
    chmod 755 "$dir/trust"
    echo "server: $dir/{ca,trust,superlink,superexec,proxy}, proxy for $own$names"
}

# names_of CERTIFICATE: its names as openssl reads them, separated by commas.
names_of() {
    openssl x509 -in "$1" -noout -ext subjectAltName | tail -n +2 |
        sed 's/IP Address:/IP:/g; s/ //g'
}

# replace FILE OLD: put a finished file in the place of another, with its owner and mode.
replace() {
    local mode owner
    # GNU's stat, or that of macOS and the BSDs.
    read -r mode owner < <(stat -c '%a %u:%g' "$2" 2>/dev/null || stat -f '%Lp %u:%g' "$2")
    chmod "$mode" "$1"
    chown "$owner" "$1"
    mv -f "$1" "$2"
}

renew() {
    local names server
    for file in ca/ca.key trust/ca.crt superlink/server.crt superlink/server.key \
        proxy/proxy.crt proxy/proxy.key; do
        [ -f "$dir/$file" ] || fail "$dir/$file is missing; bring it back first"
    done
    new=$(mktemp -d "$dir/ca/.new.XXXXXX")
    trap 'rm -rf "$new"' EXIT
    cp "$dir/ca/ca.key" "$dir/trust/ca.crt" "$new"
    cmp -s <(openssl pkey -in "$new/ca.key" -pubout) \
        <(openssl x509 -in "$new/ca.crt" -noout -pubkey) ||
        fail "$dir/ca/ca.key is not the key of $dir/trust/ca.crt"
    if ! openssl x509 -in "$new/ca.crt" -noout -checkend 0 >/dev/null; then
        fail "the CA's certificate has expired: make a new one, in an empty folder" \
            "(make-keys.sh server), and send it to the sites"
    fi
    if [ $# -ge 1 ]; then
        names=$own$(san "$@")
    else
        names=$(names_of "$dir/proxy/proxy.crt")
    fi
    server=$(names_of "$dir/superlink/server.crt")
    certificate server "$server"
    certificate proxy "$names"
    replace "$new/server.key" "$dir/superlink/server.key"
    replace "$new/server.crt" "$dir/superlink/server.crt"
    replace "$new/proxy.key" "$dir/proxy/proxy.key"
    replace "$new/proxy.crt" "$dir/proxy/proxy.crt"
    echo "renewed, restart SuperLink and proxy: $(openssl x509 \
        -in "$dir/proxy/proxy.crt" -noout -enddate), proxy for $names"
}

make_own_key() {
    local site=$1 public=${2:-}
    [[ $site =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$ ]] ||
        fail "site name '$site': 1 to 64 ASCII letters, digits, '.', '_' or '-', the" \
            "first a letter or digit"
    # A key of such a name could be confused with other files in the same folder.
    case $site in
        *.pub | *.crt | *.toml) fail "site name '$site' ends as another file does" ;;
    esac
    mkdir -p "$dir"
    if [ -e "$dir/$site" ]; then
        echo "$dir/$site exists and stays; for a new key move it away first"
    else
        absent "$dir/$site" "$dir/$site.pub"
        new=$(mktemp -d "$dir/.new.XXXXXX")
        trap 'rm -rf "$new"' EXIT
        ssh-keygen -q -t ecdsa -b 384 -N '' -C "$site" -f "$new/key"
        put "$new/key" "$dir/$site" 600
        put "$new/key.pub" "$dir/$site.pub" 644
    fi
    if [ ! -e "$dir/$site.pub" ]; then
        half=$(ssh-keygen -y -f "$dir/$site") ||
            fail "$dir/$site is no private key; move it away first"
        echo "$half $site" >"$dir/$site.pub"
        chmod 644 "$dir/$site.pub"
    fi
    if [ -n "$public" ]; then
        [ -e "$public/$site.pub" ] || cp -p "$dir/$site.pub" "$public/$site.pub"
        cmp -s "$dir/$site.pub" "$public/$site.pub" ||
            fail "$public/$site.pub is another key's, and is not overwritten"
    fi
    echo "Send this line, which is no secret, to the server, as $site.pub:"
    cat "$dir/$site.pub"
    echo "Compare on the telephone: $(ssh-keygen -l -f "$dir/$site.pub" | cut -d' ' -f2)"
}

usage="usage: make-keys.sh server DIR NAME... | renew DIR [NAME...]"
usage+=" | own-key DIR SITE [PUBLIC]"
[ $# -ge 2 ] || fail "$usage"
what=$1 dir=$2
shift 2
need() {
    command -v "$1" >/dev/null || fail "$1 is missing: install it"
}
case $what in
    server)
        need openssl
        make_server "$@"
        ;;
    renew)
        need openssl
        renew "$@"
        ;;
    own-key)
        [ $# -ge 1 ] || fail "$usage"
        need ssh-keygen
        [ $# -le 2 ] || fail "$usage"
        make_own_key "$@"
        ;;
    *) fail "'$what' is none of 'server', 'renew' and 'own-key'" ;;
esac

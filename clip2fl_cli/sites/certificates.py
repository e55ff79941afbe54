"""The ends of a server's certificates, told before nodes stop to connect."""

import contextlib
import ipaddress
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from client_app.preflight import RENEW_DAYS

CA = "trust/ca.crt"
SIGNED_BY_IT = ("superlink/server.crt", "proxy/proxy.crt")


def endings(folder: Path, now: datetime) -> Iterator[str]:
    """Yield a text for each certificate of the server that has ended or soon ends.

    Parameters
    ----------
    folder : Path
        The server's folder, as ``deploy/make-keys.sh server`` makes it. A part may keep
        its certificate to itself; then nothing is said of it.
    now : datetime
        The time, with a time zone.

    Yields
    ------
    str
        The file, the day, and what to do.
    """
    for name in (CA, *SIGNED_BY_IT):
        path = folder / name
        try:
            end = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
        except (OSError, ValueError):
            continue
        if end - now < timedelta(days=RENEW_DAYS):
            do = (
                "make the server's keys anew in an empty folder, and send ca.crt to "
                "the sites"
                if name == CA
                else f"run deploy/make-keys.sh renew {folder}, and restart the server"
            )
            ends = "ended" if end <= now else "ends"
            yield f"the certificate {path} {ends} on {end:%Y-%m-%d}: {do}"


def names_of(certificate: x509.Certificate) -> list[str]:
    """Return the DNS names and IP addresses for which a certificate was made."""
    names = certificate.extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    ).value
    found = [
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    ]
    return list(dict.fromkeys(found))


def is_named(host: str, names: Sequence[str]) -> bool:
    """Return whether a certificate with these names is one of the host's."""
    with contextlib.suppress(ValueError):
        host = str(ipaddress.ip_address(host))
    return host in names or f"*.{host.partition('.')[2]}" in names

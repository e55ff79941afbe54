"""Certificates that end on a chosen day, signed by the CA of a server's folder."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key


def let_end(folder: Path, name: str, days: float) -> None:
    """Sign a certificate of the folder again, so that it ends in some days.

    Parameters
    ----------
    folder : Path
        From ``make-keys.sh server``, with the CA's key.
    name : str
        ``trust/ca.crt``, ``proxy/proxy.crt`` or ``superlink/server.crt``; keeps its key
        and its names.
    days : float
        From now; negative: before now.
    """
    key = load_pem_private_key((folder / "ca" / "ca.key").read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    old = x509.load_pem_x509_certificate((folder / name).read_bytes())
    end = datetime.now(UTC) + timedelta(days=days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - timedelta(days=400))
        .not_valid_after(end)
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    pem = builder.sign(key, SHA256()).public_bytes(Encoding.PEM)
    (folder / name).write_bytes(pem)

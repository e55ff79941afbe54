"""Checks of a node before it takes part. Each returns a finding and how to fix it.

They need no Flower. They need torch only to check a teacher or a GPU. The checks of the
images are in `client_app.data_check`.
"""

import http.client
import shutil
import socket
import ssl
import stat
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    SECP521R1,
    EllipticCurvePrivateKey,
)
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from clip2fl_common.files import make_cache_dir

# Days before a certificate's end at which a warning is given.
RENEW_DAYS = 30
# Most seconds that a node's clock may be ahead of or behind the server's. Flower
# refuses signed requests more than 5 s in the future or 300 s in the past.
MAX_AHEAD_S, MAX_BEHIND_S = 5.0, 240.0
CONNECT_TIMEOUT_S = 10.0
# Free space needed in the cache folder besides the images' pixels and features.
SPARE_BYTES = 200 * 2**20
FEATURE_BYTES = 5 * 1024

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes
    ----------
    level : {"ok", "warning", "problem"}
        Whether the node can take part; only a problem prevents it.
    check : str
        Name of the check, one word.
    text : str
        What the check found.
    fix : str
        How to fix it; empty if there is nothing to fix.
    """

    level: Level
    check: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        """Return one line, or two lines with the fix."""
        line = f"{self.level.upper():<8} {self.check:<12} {self.text}"
        return f"{line}\n{'':<22}fix: {self.fix}" if self.fix else line


def check_disk(folder: Path, images: int, image_size: int, views: int = 0) -> Finding:
    """Check that the cache folder is writable and has enough space.

    What a node has stored there before counts as space: it stores it once.

    Parameters
    ----------
    folder : Path
        The cache folder.
    images : int
        Number of images.
    image_size : int
        Side of a decoded image in pixels.
    views : int
        Views of each image that the teacher sees; 0: it sees the image itself.
    """
    features = max(1, views) * FEATURE_BYTES
    needed = images * (3 * image_size**2 + features) + SPARE_BYTES
    try:
        make_cache_dir(folder)
        with tempfile.NamedTemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
            stored = _stored_bytes(folder)
    except OSError as error:
        return Finding(
            "problem",
            "disk",
            f"the cache folder {folder} cannot be written to ({error})",
            "set CLIP2FL_CACHE_DIR to a folder of this user; without one every message "
            "decodes the images and computes the teacher's features again",
        )
    needed = max(SPARE_BYTES, needed - stored)
    text = f"{free / 2**30:.1f} GiB free in {folder}, {needed / 2**30:.1f} needed"
    if free < needed:
        return Finding(
            "problem", "disk", text, "make room, or set CLIP2FL_CACHE_DIR elsewhere"
        )
    return Finding("ok", "disk", text)


def _stored_bytes(folder: Path) -> int:
    """Return the bytes of decoded images and features in a cache folder."""
    files = (*folder.glob("images/*/*"), *folder.glob("features-*.sqlite"))
    return sum(file.stat().st_size for file in files)


def check_certificate(path: Path, now: datetime) -> Finding:
    """Check that a file is a CA certificate and is valid now.

    A certificate that is not valid yet is a problem of the clock.
    """
    try:
        certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError) as error:
        return Finding(
            "problem",
            "certificate",
            f"{path} is no PEM certificate ({error})",
            "copy ca.crt from the server again",
        )
    end = certificate.not_valid_after_utc
    if now < certificate.not_valid_before_utc:
        # A machine without a battery for its clock boots in 1970, until NTP sets it.
        return Finding(
            "problem",
            "clock",
            f"{path} is valid from {certificate.not_valid_before_utc:%Y-%m-%d}, and "
            f"this machine's clock says {now:%Y-%m-%d %H:%M}",
            "set the clock (see timedatectl)",
        )
    text = f"{path} is valid until {end:%Y-%m-%d}"
    renew = "make new certificates at the server and copy ca.crt to all nodes"
    if now > end:
        return Finding("problem", "certificate", text, renew)
    if end - now < timedelta(days=RENEW_DAYS):
        return Finding("warning", "certificate", text, renew)
    return Finding("ok", "certificate", text)


def check_key(path: Path) -> Finding:
    """Check that Flower accepts the node's private key, and only its user reads it."""
    make = "make one with 'clip2fl site join', and register its public half"
    try:
        key = load_ssh_private_key(path.read_bytes(), password=None)
        mode = path.stat().st_mode
    except (OSError, ValueError, TypeError) as error:
        return Finding("problem", "key", f"{path}: {error}", make)
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(
        key.curve, SECP256R1 | SECP384R1 | SECP521R1
    ):
        return Finding("problem", "key", f"{path} is no NIST elliptic curve key", make)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Finding(
            "warning",
            "key",
            f"{path} can be read by others (mode {stat.S_IMODE(mode):o})",
            f"chmod 600 {path}",
        )
    return Finding("ok", "key", f"{path}: {key.curve.name}")


def check_server(
    address: str, root_certificates: Path | None, now: datetime
) -> Iterator[Finding]:
    """Yield whether the server answers, and whether the two clocks agree.

    Parameters
    ----------
    address : str
        ``HOST:PORT``.
    root_certificates : Path or None
        CA certificate; None connects without TLS.
    now : datetime
        This machine's time.

    Yields
    ------
    Finding
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        yield Finding(
            "problem", "server", f"{address!r} is not HOST:PORT", "correct --superlink"
        )
        return
    scheme = "http" if root_certificates is None else "https"
    # Flower's node obeys the same variables.
    if scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        address += f" (through {scheme.upper()}_PROXY)"
    try:
        status, date = _health(f"{scheme}://{host}:{port}/health", root_certificates)
    except urllib.error.URLError as error:
        yield _unreachable(host, address, error.reason)
        return
    except (OSError, http.client.HTTPException) as error:
        yield _unreachable(host, address, error)
        return
    if status != http.client.OK:
        yield Finding(
            "problem",
            "server",
            f"{address} answers, but /health with status {status}",
            "look at the server's proxy and SuperLink: is it running?",
        )
    else:
        yield Finding("ok", "server", f"{address} is there")
    if date:
        ahead = (now - parsedate_to_datetime(date)).total_seconds()
        level: Level = "ok" if -MAX_BEHIND_S < ahead < MAX_AHEAD_S else "problem"
        yield Finding(
            level,
            "clock",
            f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's",
            ""
            if level == "ok"
            else "synchronise the clocks (NTP): the server refuses "
            "requests with other times",
        )


def _health(url: str, root_certificates: Path | None) -> tuple[int, str | None]:
    """Return status and date of an answer; a proxy of the environment is used."""
    handlers = []
    if root_certificates is not None:
        context = ssl.create_default_context(cafile=root_certificates)
        handlers.append(urllib.request.HTTPSHandler(context=context))
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(url, timeout=CONNECT_TIMEOUT_S) as answer:
            return answer.status, answer.headers["Date"]
    except urllib.error.HTTPError as answer:
        with answer:
            return answer.code, answer.headers["Date"]


def _unreachable(host: str, address: str, reason: object) -> Finding:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return Finding(
            "problem",
            "server",
            f"{address} shows a certificate that is not accepted: "
            f"{reason.verify_message}",
            "use the server's own ca.crt, and a name or address for which its "
            "certificate was made (see docs/deployment.md)",
        )
    if isinstance(reason, socket.gaierror) and "PROXY" not in address:
        return Finding(
            "problem", "server", f"{host} is not known", "correct the name, or the DNS"
        )
    return Finding(
        "problem",
        "server",
        f"{address} cannot be reached ({reason or type(reason).__name__})",
        "start the server, or let this machine connect to it (firewall; HTTPS_PROXY "
        "names a proxy, NO_PROXY the hosts without one)",
    )


def check_teacher(model: str, pretrained: str, expected: str) -> Finding:
    """Load the teacher and compare its fingerprint with the expected one, if any."""
    from clip2fl_common.teacher import TeacherError, load_teacher

    try:
        teacher = load_teacher(model, pretrained)
        fingerprint = teacher.network.facts.fingerprint
    except (TeacherError, ValueError) as error:
        return Finding(
            "problem", "teacher", str(error), "install the weights the server uses"
        )
    text = f"{teacher.name} has the fingerprint {fingerprint}"
    if expected and not fingerprint.startswith(expected):
        return Finding(
            "problem",
            "teacher",
            f"{text}, expected {expected}",
            "install the same weights as the server",
        )
    return Finding("ok", "teacher", text)


def check_device(name: str) -> Finding:
    """Check that the run's device is available."""
    from clip2fl_common.devices import resolve_device

    try:
        device = resolve_device(name)
    except ValueError as error:
        return Finding(
            "problem", "device", str(error), "install a driver, or run with device=auto"
        )
    return Finding("ok", "device", f"device = {name!r} is {device} here")


def now() -> datetime:
    """Return this machine's time."""
    return datetime.now(UTC)

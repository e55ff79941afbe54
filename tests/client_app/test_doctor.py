"""Test that any folder and set-up is reported clearly, without a crash."""

import http.server
import json
import os
import select
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image

from client_app import data_check, doctor, preflight
from client_app.preflight import Finding
from client_app.site_ledger import SiteLedger
from client_app.site_policy import SitePolicy
from tests.defaults import ROOT
from tests.tools import needed_tool

NOW = datetime(2030, 6, 1, tzinfo=UTC)
# A picture of 8000x6000 pixels takes 144 MB as RGB and 192 MB as CMYK.
MEMORY_LIMIT = 1100 * 2**20


def odd_images(folder: Path) -> int:
    """Write 200 odd files into two classes; return the number of unreadable ones."""
    cat, dog = folder / "cat", folder / "dög"
    cat.mkdir(parents=True)
    dog.mkdir()
    noise = Image.effect_noise((60, 40), 80)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(30):
        noise.convert("CMYK").save(cat / f"cmyk {i}.jpg")
        noise.save(cat / f"grey {i}.png")
        noise.convert("P").save(cat / f"palette {i}.webp")
        noise.convert("RGB").save(dog / f"rotated {i}.jpeg", exif=exif)
        noise.convert("RGBA").save(dog / f"ünï-日本 {i}.PNG")
    whole = (cat / "cmyk 0.jpg").read_bytes()
    unreadable = 0
    for i in range(15):
        (dog / f"truncated {i}.jpg").write_bytes(whole[: len(whole) // 2])
        (dog / f"zero {i}.png").write_bytes(b"")
        (cat / f"text {i}.jpg").write_text("this is a letter")
        unreadable += 3
    Image.new("L", (1, 1)).save(cat / "one pixel.png")
    Image.new("RGB", (8000, 6000), (9, 99, 200)).save(cat / "huge.jpg")
    Image.new("CMYK", (8000, 6000)).save(dog / "huge cmyk.jpg", exif=exif)
    Image.new("RGB", (8000, 6000)).save(dog / "huge.png")
    Image.new("P", (1, 3000)).save(dog / "line.png")
    assert sum(len(list(c.iterdir())) for c in (cat, dog)) == 200
    return unreadable


def run_config(folder: Path, **changes: object) -> Path:
    """Write a run's configuration."""
    settings: dict[str, object] = {
        "method": "fedavg",
        "dataset.name": "sites",
        "dataset.class-names": "cat, dög, eel",
        "dataset.image-size": 32,
        "device": "cpu",
        **{name.replace("__", ".").replace("_", "-"): v for name, v in changes.items()},
    }
    path = folder / "run.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    path.write_text("\n".join(lines), "utf-8")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))


def test_strangers_folder_gives_a_report_in_bounded_memory(tmp_path: Path) -> None:
    unreadable = odd_images(tmp_path / "data")
    program = (
        # Not getrusage: after fork and exec its peak is still the parent's.
        "import pathlib, sys; from client_app.doctor import main; status = main()\n"
        "lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "[peak] = [line.split()[1] for line in lines if line.startswith('VmHWM')]\n"
        "print('PEAK', peak); sys.exit(status)"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-c", program, "--data-path", tmp_path / "data"),
            *("--run-config", run_config(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    report, _, peak = done.stdout.partition("PEAK ")
    assert int(peak) * 1024 < MEMORY_LIMIT
    assert f"{200 - unreadable} images in {tmp_path / 'data'}: cat 92, dög 63" in report
    assert f"PROBLEM  images       {unreadable} of 200 cannot be read" in report
    # The first are named, with the reason of each kind.
    assert "cat/text 0.jpg: no image that is known" in report
    assert "dög/truncated 0.jpg: image file is truncated" in report
    assert f"and {unreadable - 20} more" in report
    assert "or run with dataset.skip-unreadable=true" in report
    assert report.rstrip().endswith("1 to fix, 0 warnings")


def doctor_says(
    capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str]:
    """Return the exit status and the printed text."""
    status = doctor.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its content decides that it serves training, not validation.
    Image.new("L", (8, 8), 255).save(path)


@pytest.mark.parametrize("method", ["clip2fl", "clip2flm"])
def test_good_node_passes_with_teacher_and_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    picture(tmp_path / "data" / "cat" / "a.png")
    config = run_config(tmp_path, method=method)
    status, report = doctor_says(
        capsys, "--data-path", tmp_path / "data", "--run-config", config
    )
    assert status == 0, report
    assert "OK       teacher      demo has the fingerprint " in report
    fingerprint = report.split("has the fingerprint ")[1].split()[0]
    for expected, passes in ((fingerprint[:12], True), ("f00ba5", False)):
        status, report = doctor_says(
            capsys,
            *("--data-path", tmp_path / "data", "--run-config", config),
            *("--teacher-fingerprint", expected),
        )
        assert (status == 0) == passes
        assert ("expected f00ba5" in report) != passes


def levels(findings: Iterator[Finding]) -> dict[str, str]:
    """Return the level and text of each check."""
    return {f.check: f"{f.level}: {f.text}" for f in findings}


def test_unknown_classes_are_listed_with_the_known_ones(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "a.png")
    picture(tmp_path / "wolf" / "a.png")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    found = levels(data_check.check_data(tmp_path, ["cat", "dog"], 8, False, 0.2))
    assert found["classes"].endswith("no class of the run: wolf; known: cat, dog")
    assert found["classes"].startswith("problem")
    assert found["data"].startswith("ok: 1 images")
    assert "notes.txt" in found["images"] and found["images"].startswith("warning")


@pytest.mark.parametrize("place", ["missing", "empty"])
def test_folder_without_images_is_a_problem(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (found,) = data_check.check_data(tmp_path / place, ["cat"], 8, True, 0.2)
    assert found.level == "problem" and place in found.text


def test_unreadable_images_are_a_warning_where_the_run_skips_them(
    tmp_path: Path,
) -> None:
    picture(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / "b.png").write_bytes(b"")
    for skip, level in ((True, "warning"), (False, "problem")):
        found = levels(data_check.check_data(tmp_path, ["cat"], 8, skip, 0.2))
        assert found["images"].startswith(level)
        assert "cat/b.png: the file is empty" in found["images"]


def test_disk_without_room_or_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert preflight.check_disk(tmp_path / "new", 10, 32).level == "ok"
    huge = preflight.check_disk(tmp_path, 10**12, 512)
    assert huge.level == "problem" and "make room" in huge.fix
    (tmp_path / "file").write_text("in the way")
    assert preflight.check_disk(tmp_path / "file", 1, 8).level == "problem"


def test_what_the_node_has_stored_needs_no_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that filled its cache once can start again."""
    free = preflight.SPARE_BYTES + 50_000
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert preflight.check_disk(tmp_path, 20, 64).level == "problem"
    for name, size in (
        ("images/x/pixels.bin", 20 * 3 * 64**2),
        ("features-1.sqlite", 1),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert preflight.check_disk(tmp_path, 20, 64).level == "problem"  # features
    (tmp_path / "features-1.sqlite").write_bytes(bytes(20 * preflight.FEATURE_BYTES))
    assert preflight.check_disk(tmp_path, 20, 64).level == "ok"


def certificate(
    folder: Path, start: datetime, end: datetime, name: str = "localhost"
) -> tuple[Path, Path]:
    """Write a self-signed certificate and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    crt, pem = folder / f"{name}.crt", folder / f"{name}.key"
    crt.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return crt, pem


@pytest.mark.parametrize(
    ("start", "end", "level", "text"),
    [
        (-10, 400, "ok", "valid until 2031-07-06"),
        (-10, 20, "warning", "valid until 2030-06-21"),
        (-10, -1, "problem", "valid until 2030-05-31"),
        (2, 400, "problem", "this machine's clock says 2030-06-01"),
    ],
)
def test_certificate_dates(
    tmp_path: Path, start: int, end: int, level: str, text: str
) -> None:
    crt, _ = certificate(
        tmp_path, NOW + timedelta(days=start), NOW + timedelta(days=end)
    )
    found = preflight.check_certificate(crt, NOW)
    assert found.level == level and text in found.text
    assert bool(found.fix) == (level != "ok")


def test_no_certificate(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("hello")
    for name in ("ca.crt", "absent.crt"):
        assert preflight.check_certificate(tmp_path / name, NOW).level == "problem"


def test_keys(tmp_path: Path) -> None:
    keygen = needed_tool("ssh-keygen")
    for kind, level in (("ecdsa", "ok"), ("ed25519", "problem")):
        path = tmp_path / kind
        bits = ["-b", "384"] if kind == "ecdsa" else []
        subprocess.run(
            [keygen, "-q", "-t", kind, *bits, "-N", "", "-f", path], check=True
        )
        assert preflight.check_key(path).level == level
    (tmp_path / "ecdsa").chmod(0o644)
    found = preflight.check_key(tmp_path / "ecdsa")
    assert found.level == "warning" and f"chmod 600 {tmp_path / 'ecdsa'}" in found.fix
    assert preflight.check_key(tmp_path / "absent").level == "problem"


class Server(http.server.ThreadingHTTPServer):
    """Answer /health with a status, and with a clock that is off by some seconds."""

    status = 200
    offset = timedelta()


class Health(http.server.BaseHTTPRequestHandler):
    """The handler of `Server`."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.send_response_only(self.server.status)
        date = datetime.now(UTC) + self.server.offset
        self.send_header("Date", format_datetime(date, usegmt=True))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    """Return a server on a free port and the certificate that it shows."""
    now = datetime.now(UTC)
    crt, key = certificate(tmp_path, now - timedelta(days=1), now + timedelta(days=90))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(crt, key)
    listening = Server(("127.0.0.1", 0), Health)
    listening.socket = context.wrap_socket(listening.socket, server_side=True)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield listening, crt
    listening.shutdown()
    listening.server_close()


def check(host: str, port: int, crt: Path) -> dict[str, str]:
    """Return the levels of the checks of the server."""
    return levels(preflight.check_server(f"{host}:{port}", crt, preflight.now()))


def test_server_is_there(server: tuple[Server, Path], tmp_path: Path) -> None:
    listening, crt = server
    port = listening.server_address[1]
    found = check("localhost", port, crt)
    assert found["server"].startswith("ok") and found["clock"].startswith("ok")

    for seconds, word in ((60, "behind"), (-60, "ahead of")):
        listening.offset = timedelta(seconds=seconds * 10)
        found = check("localhost", port, crt)
        assert found["clock"].startswith("problem") and word in found["clock"]

    # Its certificate was made for another name, or by somebody else.
    assert "not accepted" in check("127.0.0.1", port, crt)["server"]
    now = datetime.now(UTC)
    other, _ = certificate(tmp_path, now, now + timedelta(days=9), name="other")
    assert "not accepted" in check("localhost", port, other)["server"]

    listening.status = 404
    assert "/health with status 404" in check("localhost", port, crt)["server"]
    listening.shutdown()
    listening.server_close()
    assert check("localhost", port, crt)["server"].startswith("problem: localhost:")


def test_server_is_reached_through_the_proxy_of_the_environment(
    server: tuple[Server, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's node uses the same proxy: what one reaches, the other must reach."""
    listening, crt = server
    port = listening.server_address[1]
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        asked: list[bytes] = []
        threading.Thread(target=tunnel, args=(proxy, port, asked), daemon=True).start()
        address = f"http://user:secret@127.0.0.1:{proxy.getsockname()[1]}"
        monkeypatch.setenv("HTTPS_PROXY", address)
        monkeypatch.delenv("https_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        found = check("localhost", port, crt)
    assert asked[0].startswith(f"CONNECT localhost:{port} ".encode())
    assert found["server"] == f"ok: localhost:{port} (through HTTPS_PROXY) is there"
    assert found["clock"].startswith("ok")
    # Nobody listens there any more.
    text = check("localhost", port, crt)["server"]
    assert text.startswith("problem") and "HTTPS_PROXY" in text
    assert "secret" not in text
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert "PROXY" not in check("localhost", port, crt)["server"]


def tunnel(proxy: socket.socket, port: int, asked: list[bytes]) -> None:
    """Answer one CONNECT as an HTTP proxy does, and pass on what follows."""
    client, _ = proxy.accept()
    asked.append(client.recv(4096))
    with client, socket.create_connection(("127.0.0.1", port)) as behind:
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        ends = {client: behind, behind: client}
        while True:
            for end in select.select(list(ends), [], [])[0]:
                data = end.recv(65536)
                if not data:
                    return
                ends[end].sendall(data)


def test_wrong_usage_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "data" / "cat" / "a.png")
    bad = run_config(tmp_path, dataset__image_size=3)
    marked = tmp_path / "marked.toml"
    marked.write_bytes(b"\xef\xbb\xbf" + bad.read_bytes())
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe)  # nobody writes to it: opening it must not wait
    for path in (bad, tmp_path / "absent.toml", marked, pipe, tmp_path):
        status, text = doctor_says(
            capsys, "--data-path", tmp_path / "data", "--run-config", path
        )
        assert status == 2 and str(path) in text
    assert os.listdir(tmp_path / "data") == ["cat"]


POLICY = """
min-class-samples = 5
gradient-samples = 8
max-clip-norm = 1.5
teachers = ["abcdefabcdef"]
"""


def test_policy_is_reported_and_the_run_is_held_against_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "data" / "cat" / "a.png")
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY, "utf-8")
    bad = run_config(tmp_path, class_gradients__samples_per_class=2)
    common = ("--data-path", tmp_path / "data", "--policy", policy)
    status, report = doctor_says(capsys, *common, "--run-config", bad)
    assert status == 1
    for rule in (
        "min-class-samples = 5",
        "gradient-samples = 8",
        "gradient-cuts = 1",
        "min-evaluation-samples = 5",
        "validation-share = none",
        "max-clip-norm = 1.5",
        "teachers = [abcdefabcdef]",
        "hub-downloads = false",
    ):
        assert rule in report
    for reason in (
        "class-gradients.samples-per-class = 2, and the site's min-class-samples is 5",
        "privacy.gradient-clip-norm = 0, and the site's max-clip-norm is 1.5",
    ):
        line = f"this site would refuse the run: the run has {reason}"
        assert f"PROBLEM  policy       {line}" in report
    good = run_config(tmp_path, privacy__gradient_clip_norm=1.0)
    status, report = doctor_says(capsys, *common, "--run-config", good)
    assert status == 0, report
    other = run_config(tmp_path, privacy__gradient_clip_norm=1.0, method="clip2fl")
    status, report = doctor_says(capsys, *common, "--run-config", other)
    assert status == 1 and "is not among the site's teachers" in report


def test_no_policy_is_said_and_an_unusable_one_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "data" / "cat" / "a.png")
    common = ("--data-path", tmp_path / "data", "--run-config", run_config(tmp_path))
    status, report = doctor_says(capsys, *common)
    assert status == 0 and "OK       policy       no policy: the run decides" in report
    policy = tmp_path / "policy.toml"
    policy.write_text("min-class-sample = 5", "utf-8")
    status, report = doctor_says(capsys, *common, "--policy", policy)
    assert status == 1 and "did you mean min-class-samples?" in report
    policy.write_text("min-class-samples = 5", "utf-8")
    policy.chmod(0o646)
    status, report = doctor_says(capsys, *common, "--policy", policy)
    assert status == 0 and f"chmod go-w {policy}" in report
    policy.write_text("validation-share = 0.9", "utf-8")
    status, report = doctor_says(capsys, *common, "--policy", policy)
    assert status == 1 and "none training (validation share 0.9)" in report


def test_images_are_divided_as_the_first_run_divided_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "data" / "cat" / "a.png")
    common = ("--data-path", tmp_path / "data", "--site-state", tmp_path / "state")
    config = run_config(tmp_path)
    SiteLedger(tmp_path / "state").validation_share(0.9, keep=True)
    status, report = doctor_says(capsys, *common, "--run-config", config)
    assert status == 1 and "none training (validation share 0.9)" in report


def test_without_a_policy_a_teacher_of_anybodys_is_refused_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "data" / "cat" / "a.png")
    config = run_config(
        tmp_path, method="clip2fl", teacher__model=f"local-dir:{tmp_path / 'none'}"
    )
    status, report = doctor_says(
        capsys, "--data-path", tmp_path / "data", "--run-config", config
    )
    assert status == 1 and "outside the site's teacher-folders" in report


def test_without_a_run_only_the_node_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = doctor_says(capsys, "--data-path", tmp_path / "nowhere")
    assert status == 0, report
    assert "no --run-config: images, device and teacher are not checked" in report
    assert "disk" in report and "policy" in report
    assert "OK       device" not in report


def test_record_of_what_was_answered_is_checked_and_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The doctor may run as another user than the node."""
    state = tmp_path / "state"
    common = ("--data-path", tmp_path, "--site-state", state)
    status, report = doctor_says(capsys, *common)
    assert status == 0 and "nothing answered yet" in report and not state.exists()
    SiteLedger(state).count("1", "train", SitePolicy(), "cat, owl")
    status, report = doctor_says(capsys, *common)
    assert status == 0 and "1 runs answered so far" in report
    (state / "ledger.sqlite").write_bytes(b"")
    status, report = doctor_says(capsys, *common)
    assert status == 0 and "WARNING  ledger" in report
    policy = tmp_path / "policy.toml"
    policy.write_text("max-runs = 3", "utf-8")
    status, report = doctor_says(capsys, *common, "--policy", policy)
    assert status == 1 and "PROBLEM  ledger" in report

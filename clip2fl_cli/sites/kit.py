"""Make kits at the server: what a site needs to join, in one archive each."""

import contextlib
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from clip2fl_cli import console
from clip2fl_cli.sites import kit_archive, registration
from clip2fl_cli.sites.certificates import is_named, names_of
from clip2fl_cli.sites.keys import new_key, public_half
from clip2fl_cli.sites.kit_texts import NO_KEY, POLICY_TEMPLATE, guide
from clip2fl_cli.sites.registration import Server
from clip2fl_common.config import SITES, TEACHER_METHODS, RunConfig
from clip2fl_common.config.files import complete_config, merge_run_config, toml_pair
from clip2fl_common.files import replacing
from clip2fl_common.project import PROJECT, experiment, version
from clip2fl_common.shown import quoted
from clip2fl_common.signed_folder import SignatureError, public_key_of
from clip2fl_common.site_names import NAME_RULE, clashing, is_site_name
from clip2fl_common.site_registry import RegistryError, SiteRegistry
from server_app.signing import PUBLIC_SUFFIX

LOCAL_PREFIX = "local-dir:"
RUNS = "runs"
MOST_TEACHER_FILES = kit_archive.MOST_FILES - len(kit_archive.FILES)


class KitWishError(ValueError):
    """Kits that cannot be made as wished; says why and what to do."""


@dataclass(frozen=True)
class KitWishes:
    """What goes into kits.

    Attributes
    ----------
    address : str
        ``HOST:PORT`` by which nodes reach the server.
    run_config : Path or None
        File of the run, or the name of an experiment; None: ``sites``.
    settings : sequence of str
        Keys of the run that override the file.
    output : Path
        Folder for the archives and for ``run.toml``, the run as the server starts it.
    with_keys : bool
        Whether the server makes the sites' keys and registers them. A key that a site
        makes itself never leaves the site.
    teacher : Path or None
        Folder of the teacher's weights to pack; None: that of a ``local-dir:`` run.
    with_teacher : bool
        Whether weights are packed at all.
    policy : Path or None
        Policy file for the sites in place of the template.
    """

    address: str
    run_config: Path | None
    settings: Sequence[str]
    output: Path
    with_keys: bool = True
    teacher: Path | None = None
    with_teacher: bool = True
    policy: Path | None = None


def make_kits(names: Sequence[str], server: Server, wishes: KitWishes) -> list[Path]:
    """Write one archive for each site, and register the sites' keys.

    Parameters
    ----------
    names : sequence of str
        The sites' names.
    server : Server
        The server; its SuperLink must run unless sites make their own keys.
    wishes : KitWishes
        What goes into the kits.

    Returns
    -------
    list of Path
        The archives.

    Raises
    ------
    KitWishError, ConfigError, RegistryError, RegistrationError, OSError
        If a name is taken, the run cannot be used or a file cannot be written. Then no
        archive is left, except of sites that are registered.
    """
    _check_names(names)
    host = _host(wishes.address)
    certificate = _certificate(server)
    _check_certificate(server.folder / "proxy" / "proxy.crt", host)
    merged = merge_run_config(
        PROJECT, experiment(wishes.run_config or Path(SITES)), wishes.settings
    )
    config = complete_config(merged)
    if config.dataset.name != SITES:
        raise KitWishError(
            f"dataset.name = {config.dataset.name!r}, but a run of sites has "
            f"dataset.name = {SITES!r}"
        )
    teacher, fingerprint = _teacher(config, wishes)
    wishes.output.mkdir(parents=True, exist_ok=True)
    paths = [wishes.output / kit_archive.archive_name(name) for name in names]
    for path in paths:
        if path.exists():
            raise KitWishError(
                f"{path} exists: it may be a site's only copy of its key; move it away "
                "first, or give another --output"
            )
    shared: dict[str, bytes | Path] = {
        kit_archive.CERTIFICATE: certificate,
        kit_archive.RUN_CONFIG: _for_sites(merged).encode(),
        kit_archive.POLICY: _policy(config, wishes),
        **{f"{kit_archive.TEACHER}/{path.name}": path for path in teacher},
    }
    with _registering(server, wishes.with_keys) as registry:
        if wishes.with_keys:
            _check_free(registry, names)
        keys = {name: new_key() for name in names} if wishes.with_keys else {}
        with _removed_on_failure(paths, server):
            for name, path in zip(names, paths, strict=True):
                files = dict(shared)
                if name in keys:
                    files[kit_archive.KEY] = keys[name]
                files[kit_archive.GUIDE] = guide(
                    name,
                    wishes.address,
                    has_key=name in keys,
                    needs_teacher=_is_local(config) and not teacher,
                ).encode()
                content = kit_archive.Content(
                    name, wishes.address, version(), fingerprint, files
                )
                kit_archive.write_archive(content, path)
            _write_run(merged, server, wishes.output / kit_archive.RUN_CONFIG)
            if keys:
                wanted = [(name, public_half(key)) for name, key in keys.items()]
                with server.flower() as flower:
                    registration.register(registry, wanted, flower, server.registry)
    return paths


@contextlib.contextmanager
def _registering(server: Server, with_keys: bool) -> Iterator[SiteRegistry]:
    """Lend the registry, locked, if keys are to be registered."""
    if not with_keys:
        yield SiteRegistry()
        return
    with registration.opened(server.registry) as registry:
        yield registry


@contextlib.contextmanager
def _removed_on_failure(paths: Sequence[Path], server: Server) -> Iterator[None]:
    """Remove archives of sites that were not registered, with their keys."""
    try:
        yield
    except BaseException:
        registered: set[str] = set()
        with contextlib.suppress(RegistryError):
            registered = {
                site.name for site in SiteRegistry.read(server.registry).sites
            }
        for path in paths:
            if path.name not in map(kit_archive.archive_name, registered):
                path.unlink(missing_ok=True)
        raise


def _policy(config: RunConfig, wishes: KitWishes) -> bytes:
    """Return the rules of the kit, with the server's model key where it has one."""
    if wishes.policy:
        return wishes.policy.read_bytes()
    text = POLICY_TEMPLATE
    if key := config.delivery.signing_key:
        public = Path(f"{key}{PUBLIC_SUFFIX}").expanduser()
        # The run's own user may keep the key to itself, or make it with the first run.
        with contextlib.suppress(SignatureError, OSError):
            text = text.replace(NO_KEY, public_key_of(str(public)))
    return text.encode()


def _check_names(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if not is_site_name(name):
            raise KitWishError(
                f"{quoted(name)} is no name of a site; expected {NAME_RULE}"
            )
        if other := seen.get(clashing(name)):
            raise KitWishError(f"{other} and {name} count as the same name")
        seen[clashing(name)] = name


def _check_free(registry: SiteRegistry, names: Sequence[str]) -> None:
    for name in names:
        if known := registry.named(name):
            raise KitWishError(
                f"the name {known.name} is registered: 'clip2fl site remove "
                f"{known.name}' first. For new settings or certificates of a site that "
                "keeps its key, make the kit with --no-key"
            )


def _host(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise KitWishError(
            f"--address {address!r} is not HOST:PORT, for example fl.example.org:9092"
        )
    return host.strip("[]")


def _certificate(server: Server) -> bytes:
    """Return the CA's certificate alone: nothing else may leave the server."""
    try:
        text = server.certificate.read_bytes()
        (found,) = x509.load_pem_x509_certificates(text)
    except (OSError, ValueError) as error:
        raise KitWishError(
            f"{server.certificate} is no certificate ({error}): give the server's "
            "folder with --server, or make it with 'clip2fl serve'"
        ) from None
    return found.public_bytes(Encoding.PEM)


def _check_certificate(path: Path, host: str) -> None:
    """Check that the proxy's certificate was made for the name that nodes use."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError:
        return  # the proxy keeps its folder to itself
    known = names_of(certificate)
    if not is_named(host, known):
        raise KitWishError(
            f"the server's certificate was made for {', '.join(known)}, and nodes that "
            f"connect to {host} would refuse it: give one of these with --address, or "
            "make a certificate with that name (docs/deployment.md)"
        )


def _is_local(config: RunConfig) -> bool:
    return config.method in TEACHER_METHODS and config.teacher.model.startswith(
        LOCAL_PREFIX
    )


def _teacher(config: RunConfig, wishes: KitWishes) -> tuple[list[Path], str]:
    """Return the teacher's files to pack, and its fingerprint if it can be loaded."""
    if config.method not in TEACHER_METHODS:
        return [], ""
    from clip2fl_common.teacher import TeacherError, load_teacher

    folder = wishes.teacher
    if folder is None and _is_local(config):
        folder = Path(config.teacher.model.removeprefix(LOCAL_PREFIX)).expanduser()
    files: list[Path] = []
    model, pretrained = config.teacher.model, config.teacher.pretrained
    if folder is not None and wishes.with_teacher:
        files = _teacher_files(folder)
        model, pretrained = f"{LOCAL_PREFIX}{folder.absolute()}", ""
    try:
        fingerprint = load_teacher(model, pretrained).fingerprint
    except (TeacherError, ValueError) as error:
        if files:
            raise KitWishError(f"the teacher cannot be packed: {error}") from None
        console.tell(
            f"clip2fl: the kits do not say which weights the teacher must have, since "
            f"it cannot be loaded here: {error}"
        )
        fingerprint = ""
    return files, fingerprint


def _teacher_files(folder: Path) -> list[Path]:
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise KitWishError(
            f"the teacher's folder {folder} cannot be read ({error.strerror})"
        ) from None
    if not any(path.name == "open_clip_config.json" for path in files):
        raise KitWishError(
            f"the teacher's folder {folder} has no open_clip_config.json: give the "
            "folder of an open_clip checkpoint (configuration and weights)"
        )
    if len(files) > MOST_TEACHER_FILES:
        raise KitWishError(
            f"the teacher's folder {folder} has {len(files)} files: keep only the "
            "checkpoint's files there"
        )
    for path in files:
        if not kit_archive.is_allowed(f"{kit_archive.TEACHER}/{path.name}"):
            raise KitWishError(
                f"the teacher's folder {folder} has {quoted(path.name)}, a name that a "
                "kit cannot have: keep only the checkpoint's files there"
            )
    return files


def _for_sites(merged: str) -> str:
    """Return a run's configuration without the keys of the server's own disk."""
    own = ("run.", "checkpoint.", "delivery.", "federation.site-registry ")
    lines = [line for line in merged.splitlines(True) if not line.startswith(own)]
    return "".join(lines)


def _write_run(merged: str, server: Server, path: Path) -> None:
    """Write the run as `clip2fl federate` starts it, with the registry of the sites."""
    given = tomllib.loads(merged)
    added = {}
    if "site-registry" not in given.get("federation", {}):
        added["federation.site-registry"] = str(server.registry)
    runs = server.folder.absolute() / RUNS
    if "dir" not in given.get("run", {}) and runs.is_dir():
        added["run.dir"] = str(runs)
    text = merged + "".join(f"{toml_pair(k, v)}\n" for k, v in added.items())
    with replacing(path) as file:
        file.write(text.encode())

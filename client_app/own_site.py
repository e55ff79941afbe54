"""A site: a node with images of its own, its rules and its record of answers."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import torch

from client_app.site_epsilon import answer_cost, implied_fields, unprotected
from client_app.site_ledger import HeldImages, Kind, LedgerError, SiteLedger
from client_app.site_policy import (
    DATA_PATH,
    STATE,
    NodeConfig,
    SitePolicy,
    SiteRefusal,
    is_real_site,
    site_policy,
    teacher_folder,
)
from clip2fl_common.config import RunConfig, TeacherConfig
from clip2fl_common.data.datasets import DatasetError
from clip2fl_common.files import cache_dir
from clip2fl_common.teacher import DEMO, LOCAL_PREFIX

logger = getLogger(__name__)

MIB = 2**20


@dataclass(frozen=True)
class OwnSite:
    """A site's images, and the rules and record that protect them from a run.

    Attributes
    ----------
    folder : Path
        Folder with ``<class>/<image>``.
    policy : SitePolicy
        The site's rules.
    ledger : SiteLedger
        The site's record of what it has answered.
    teacher : Path or None
        The site's own folder of the teacher, used in place of the run's.
    """

    folder: Path
    policy: SitePolicy
    ledger: SiteLedger
    teacher: Path | None = None

    @classmethod
    def of(cls, node_config: NodeConfig) -> "OwnSite | None":
        """Return the site that a node is, or None if it simulates a client.

        Raises
        ------
        SiteRefusal
            If the site's rules cannot be used.
        DatasetError
            If the site has no data folder.
        """
        if not is_real_site(node_config):
            return None
        policy = site_policy(node_config)
        folder = data_folder(node_config)
        ledger = SiteLedger(state_folder(node_config, folder))
        return cls(folder, policy, ledger, teacher_folder(node_config))

    def admit(
        self, config: RunConfig, *, kind: Kind, run: str, request_bytes: int
    ) -> RunConfig:
        """Return a run's configuration with the changes that this site makes to it.

        Parameters
        ----------
        config : RunConfig
            The configuration from the server.
        kind : {"query", "train", "evaluate", "finish"}
            Kind of request; ``"finish"`` is that of a round that was counted before.
        run : str
            Flower's id of the run.
        request_bytes : int
            Size of the message.

        Returns
        -------
        RunConfig
            With the site's own division into training and validation images, and its
            own folder of the teacher.

        Raises
        ------
        SiteRefusal
            If a rule forbids the request; the message names the rule.
        """
        check_size("request", request_bytes, self.policy.max_request_mib)
        config = with_own_teacher(config, self.teacher)
        if problems := list(self.policy.violations(config)):
            raise SiteRefusal("; ".join(problems))
        if kind == "query" and self.policy.max_epsilon is not None:
            # Refuse here what `spend` would refuse, before others wait for this site.
            cost = answer_cost(config, implied_fields(config))
            self.ledger.spend(cost, self.policy, keep=False)
        try:
            self.ledger.count(run, kind, self.policy, config.dataset.class_names)
            share = self._validation_share(config, kind)
        except LedgerError as error:
            if self.policy.needs_ledger:
                raise
            share = self.policy.validation_share or config.dataset.validation_share
            logger.warning("%s. Until then each run divides the images anew.", error)
        if share == config.dataset.validation_share:
            return config
        logger.warning(
            "the run has dataset.validation-share = %g, but this site keeps its "
            "division into training and validation images: %g",
            config.dataset.validation_share,
            share,
        )
        return with_own_share(config, share)

    def spend(self, config: RunConfig, fields: Sequence[str]) -> None:
        """Count what an answer to train may reveal, if the site bounds its epsilon.

        Parameters
        ----------
        config : RunConfig
            The run's configuration.
        fields : sequence of str
            What the request asks for beside the model.

        Raises
        ------
        SiteRefusal
            If the answer holds anything without noise, or exceeds ``max-epsilon``.
        LedgerError
            If the answer cannot be counted.
        """
        if self.policy.max_epsilon is None:
            return
        if problems := list(unprotected(config, fields)):
            raise SiteRefusal("; ".join(problems))
        cost = answer_cost(config, fields)
        logger.info(
            "epsilon = %.4g of %g at delta = %g, with this answer",
            self.ledger.spend(cost, self.policy, keep=True),
            *(self.policy.max_epsilon, self.policy.epsilon_delta),
        )

    def _validation_share(self, config: RunConfig, kind: Kind) -> float:
        if self.policy.validation_share is not None:
            return self.policy.validation_share
        return self.ledger.validation_share(
            config.dataset.validation_share, keep=kind != "query"
        )

    def check_teacher(self, teacher: TeacherConfig, fingerprint: str) -> None:
        """Raise `SiteRefusal` unless the site's rules allow the teacher."""
        if problems := list(self.policy.teacher_violations(teacher, fingerprint)):
            raise SiteRefusal("; ".join(problems))

    def check_reply(self, reply_bytes: int) -> None:
        """Raise `SiteRefusal` if a reply is larger than the site allows."""
        check_size("reply", reply_bytes, self.policy.max_reply_mib)

    def gradient_images(
        self,
        config: RunConfig,
        class_names: Sequence[str],
        labels: torch.Tensor,
        readable: Sequence[int],
        there: Sequence[tuple[int, int]],
    ) -> dict[int, torch.Tensor] | None:
        """Return which images enter the class gradients, if the site fixes them.

        Parameters
        ----------
        config : RunConfig
            The run's configuration.
        class_names : sequence of str
            Names of the C classes.
        labels : Tensor of int64, shape [N]
            Classes of the readable training images.
        readable : sequence of int
            Digests of their N files.
        there : sequence of tuple of int and int
            Class and digest of the file of every training image.

        Returns
        -------
        dict of int to Tensor of int64, or None
            By class, positions among the N images, the same in all draws, rounds and
            runs; None if the run's seed selects the images.
        """
        if not self.policy.fixes_images:
            return None
        places = {int(c): torch.nonzero(labels == c).flatten() for c in labels.unique()}
        files: dict[int, set[int]] = {c: set() for c in places}
        for label, digest in there:
            files.get(label, set()).add(digest)
        held = {
            class_names[c]: HeldImages(
                [readable[int(i)] for i in at], frozenset(files[c])
            )
            for c, at in places.items()
        }
        # A site may require more images than the run, never fewer.
        least = max(self.policy.min_class_samples, config.privacy.min_class_samples)
        chosen = self.ledger.gradient_images(held, least, self.policy)
        return {
            c: at[torch.tensor(chosen[class_names[c]])]
            for c, at in places.items()
            if class_names[c] in chosen
        }


def with_own_teacher(config: RunConfig, folder: Path | None) -> RunConfig:
    """Return a run's configuration with the site's own folder of the teacher.

    The fingerprint in each request decides whether the folder has the run's teacher, so
    the server and the sites need not keep it at the same path. The built-in teacher
    comes with the program.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    folder : Path or None
        The site's own folder, if it has one.
    """
    if folder is None or config.teacher.model == DEMO:
        return config
    own = {"teacher.model": f"{LOCAL_PREFIX}{folder}", "teacher.pretrained": ""}
    return RunConfig.from_run_config({**config.to_flat(), **own})


def with_own_share(config: RunConfig, share: float) -> RunConfig:
    """Return a run's configuration with the site's own share of validation images."""
    own = {"dataset.validation-share": share}
    return RunConfig.from_run_config({**config.to_flat(), **own})


def data_folder(node_config: NodeConfig) -> Path:
    """Return the folder that the node was started with.

    Raises
    ------
    DatasetError
        If there is none, or its path is not absolute.
    """
    folder = node_config.get(DATA_PATH)
    if not isinstance(folder, str) or not Path(folder).is_absolute():
        raise DatasetError(
            f"this node's data-path is {folder!r}: start it with --node-config "
            "'data-path=\"/absolute/folder\"'",
            "the node has no absolute data-path in its --node-config",
        )
    return Path(folder)


def state_folder(node_config: NodeConfig, folder: Path) -> Path:
    """Return the folder of a site's record: ``site-state``, or the cache folder.

    Raises
    ------
    SiteRefusal
        If ``site-state`` is not an absolute path.
    """
    chosen = node_config.get(STATE)
    if chosen is None:
        name = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8)
        return cache_dir() / "sites" / name.hexdigest()
    if not isinstance(chosen, str) or not Path(chosen).is_absolute():
        raise SiteRefusal(
            f"no run is answered: site-state = {chosen!r} in --node-config is no "
            "absolute path",
            "the site's own rules are not usable; the site's own log says more",
        )
    return Path(chosen)


def check_size(what: str, size: int, limit_mib: float | None) -> None:
    """Raise `SiteRefusal` if a request or reply is larger than the site allows."""
    if limit_mib is not None and size > limit_mib * MIB:
        raise SiteRefusal(
            f"a {what} of {size / MIB:.2f} MiB, and the site's max-{what}-mib is "
            f"{limit_mib:g}"
        )

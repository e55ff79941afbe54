"""A client's side of secure sums: keys, masked training, commit and reveal.

docs/secure-aggregation.md describes the protocol and what each check prevents.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from logging import getLogger

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import RecordDict

from client_app.own_site import OwnSite
from client_app.secure_store import SecureStore
from client_app.site_keys import site_keys
from client_app.site_policy import SiteRefusal
from clip2fl_common import messages
from clip2fl_common.config import RunConfig
from clip2fl_common.files import cache_dir
from clip2fl_common.messages import Evaluation, TrainRequest
from clip2fl_common.messages.evaluation_sums import EvaluationSums
from clip2fl_common.messages.secure import (
    Revealed,
    SecureRequest,
    commit_reply,
    key_reply,
    request_digest,
    reveal_reply,
)
from clip2fl_common.messages.sums import SumFormat
from clip2fl_common.messages.vectors import Values, VectorFormat, masked_reply
from clip2fl_common.secure.checks import (
    check_directory,
    check_members,
    check_signatures,
)
from clip2fl_common.secure.identities import (
    Identity,
    SimulatedKeys,
    Trust,
)
from clip2fl_common.secure.masks import SEED_BYTES, pair_seed, subtracts
from clip2fl_common.secure.statements import (
    LEAST_PARTIES,
    TRAINING,
    RoundName,
    SecureError,
    SignedKey,
    key_statement,
    member_statement,
    sums_of,
    transcript,
)
from clip2fl_common.site_names import client_number, random_stream

logger = getLogger(__name__)

# What a site may have of its own, whatever the run says: the share of validation images
# and the teacher's folder. Each request has the teacher's fingerprint, and a site uses
# no other teacher.
NOT_SHARED = {"dataset.validation-share", "teacher.model", "teacher.pretrained"}


@dataclass(frozen=True)
class SecureParty:
    """One party of a run's secure sums.

    Attributes
    ----------
    config : RunConfig
        The run's configuration.
    run : str
        Name of the run's sums of one purpose (see `sums_of`).
    identity : Identity
        Name and key with which the party signs.
    trust : Trust
        The identity keys that it trusts.
    store : SecureStore
        What it remembers between the exchanges.
    least : int
        Fewest parties in a sum.
    is_site : bool
        Whether the party is a site, which has its numbers from its name.
    """

    config: RunConfig
    run: str
    identity: Identity
    trust: Trust
    store: SecureStore
    least: int
    is_site: bool = False

    @classmethod
    def of(
        cls,
        config: RunConfig,
        run: str,
        site: OwnSite | None,
        client: int,
        purpose: str = TRAINING,
    ) -> "SecureParty":
        """Return the party that a node is, or that it simulates.

        Parameters
        ----------
        config : RunConfig
            The run's configuration.
        run : str
            Flower's id of the run.
        site : OwnSite or None
            This node, if it has images of its own.
        client : int
            The simulated client, without own images.
        purpose : {"train", "evaluate"}
            What is summed.

        Raises
        ------
        SiteRefusal
            If the site's keys cannot be used.
        SecureError
            If the run has no secure aggregation, or no sums of this purpose.
        """
        if not config.aggregation.secure:
            raise SecureError("the run has aggregation.secure = false")
        run = sums_of(run, purpose)
        least = max(LEAST_PARTIES, config.federation.min_replies)
        if site is None:
            _warn_of_simulation()
            keys = SimulatedKeys(config.seed)
            store = SecureStore(cache_dir() / "secure-simulation")
            return cls(config, run, keys.identity(client), keys, store, least)
        try:
            found = site_keys(site.policy)
        except SecureError as error:
            raise SiteRefusal(
                f"no secure sum is possible: {error}",
                "the site's keys for secure sums cannot be used; the site's own log "
                "says more",
            ) from error
        assert found is not None  # the site's rules refuse a secure run without keys
        store = SecureStore(site.ledger.path.parent)
        least = max(least, site.policy.min_secure_sites)
        return cls(config, run, *found, store, least, is_site=True)

    def keys(self, request: SecureRequest) -> RecordDict:
        """Return a new, signed public key, and begin the round."""
        name = self._round(request)
        private = X25519PrivateKey.generate()
        self.store.begin(self.identity.name, name, private.private_bytes_raw())
        public = private.public_key().public_bytes_raw()
        signed = self.identity.sign(key_statement(name, self.identity.name, public))
        key = SignedKey(self.identity.name, public, signed)
        return key_reply(request.partition, key)

    def train(
        self,
        content: RecordDict,
        request: TrainRequest,
        train: Callable[[], RecordDict],
    ) -> RecordDict:
        """Train, and return what was to be sent as masked sums.

        Parameters
        ----------
        content : RecordDict
            The train request.
        request : TrainRequest
            The same, decoded.
        train : callable
            Returns the reply that would be sent without secure aggregation.

        Returns
        -------
        RecordDict
            The masked reply.

        Raises
        ------
        SecureError
            If the parties' keys must not be used.
        FloatingPointError
            If the training diverges.
        """
        sent = messages.arrays_to_numpy(request.model)
        fields = [
            messages.reply_field(field, self.config, _classes(request))
            for field in request.fields
        ]
        sums = SumFormat(self.config, sent, fields)
        return self._masked(content, request, lambda: (sums, sums.values_of(train())))

    def evaluate(
        self,
        content: RecordDict,
        request: TrainRequest,
        evaluate: Callable[[], Evaluation],
    ) -> RecordDict:
        """Evaluate, and return the accuracies as masked sums.

        Parameters, result and errors are those of `train`; ``evaluate`` returns what
        would be sent without secure aggregation.
        """

        def evaluated() -> tuple[EvaluationSums, Values]:
            found = evaluate()
            wanted = bool(request.confusion_of)
            sums = EvaluationSums(list(found.recalls), _classes(request), wanted)
            return sums, sums.values_of(found)

        return self._masked(content, request, evaluated)

    def _masked(
        self,
        content: RecordDict,
        request: TrainRequest,
        work: Callable[[], tuple[VectorFormat, Values]],
    ) -> RecordDict:
        """Do the work once the parties' keys are good; return its masked result."""
        secure = SecureRequest.parse(content)
        if secure.server_round != request.server_round:
            raise SecureError(
                f"round {request.server_round} with keys of round {secure.server_round}"
            )
        self._check_numbers(request)
        name, directory, own = self._round(secure), secure.directory, self.identity.name
        settings = {
            key: value
            for key, value in self.config.to_flat().items()
            if key not in NOT_SHARED
        }
        with self.store.step(own, name, ("keys",), "masked") as secrets:
            private = X25519PrivateKey.from_private_bytes(secrets.private)
            public = private.public_key().public_bytes_raw()
            own_key = SignedKey(own, public, b"")
            check_directory(name, directory, self.trust, own_key, self.least)
            agreed = transcript(name, request_digest(content, settings), directory)
            secrets.pairs = {
                party.name: pair_seed(private, party.public, agreed, own, party.name)
                for party in directory
                if party.name != own
            }
            secrets.own, secrets.agreed = os.urandom(SEED_BYTES), agreed
            secrets.private = b""
        sums, values = work()
        vector = sums.encode(values, len(directory))
        vector.mask(secrets.own)
        for other, seed in secrets.pairs.items():
            vector.mask(seed, subtract=subtracts(own, other))
        return masked_reply(request.partition, vector)

    def _check_numbers(self, request: TrainRequest) -> None:
        """Refuse a number or a random stream that the server has made up.

        The parties do not agree on the stream, which differs between them. With two
        streams for one party, and the same ones for all others, the difference of two
        sums would be that party's alone.
        """
        if self.is_site:
            number = client_number(self.identity.name)
            expected = (number, random_stream(number))
            if (request.partition, request.stream) != expected:
                raise SecureError(
                    f"number {request.partition} and random stream {request.stream} "
                    f"are not those of {self.identity.name}"
                )

    def commit(self, request: SecureRequest) -> RecordDict:
        """Sign the set to be summed: one set in each round.

        Raises
        ------
        SecureError
            If the set is not one that this party may sign, or another one than before.
        """
        name, own, members = self._round(request), self.identity.name, request.names
        with self.store.step(own, name, ("masked", "signed"), "signed") as secrets:
            check_members(members, [own, *secrets.pairs], own, self.least)
            if secrets.members and secrets.members != sorted(members):
                raise SecureError(
                    f"{own} has signed another set in round {request.server_round}: "
                    f"{', '.join(secrets.members)}"
                )
            secrets.members = sorted(members)
            signed = self.identity.sign(member_statement(secrets.agreed, members))
        return commit_reply(request.partition, signed)

    def reveal(self, request: SecureRequest) -> RecordDict:
        """Reveal the seeds of masks that are left in the sum, once all have signed it.

        Raises
        ------
        SecureError
            If the set is not the signed one, or not signed by all its members.
        """
        name, own = self._round(request), self.identity.name
        with self.store.step(own, name, ("signed",), "revealed") as secrets:
            if sorted(request.names) != secrets.members:
                raise SecureError(
                    f"{own} is to reveal its seeds for another set than it has signed "
                    f"in round {request.server_round}: {', '.join(secrets.members)}"
                )
            statement = member_statement(secrets.agreed, secrets.members)
            signatures = request.signed
            check_signatures(statement, secrets.members, signatures, self.trust)
            lost = secrets.pairs.keys() - set(secrets.members)
            pairs = {party: secrets.pairs[party] for party in lost}
            revealed = Revealed(secrets.own, pairs)
        return reveal_reply(request.partition, revealed)

    def _round(self, request: SecureRequest) -> RoundName:
        """Return the round of a request, which must be one of the run's.

        Begun once, a later round would bar this party from all rounds before it.
        """
        rounds = self.config.federation.rounds
        if not 1 <= request.server_round <= rounds:
            raise SecureError(f"round {request.server_round} of a run of {rounds}")
        return RoundName(self.run, request.server_round, request.session)


def _classes(request: TrainRequest) -> int:
    """Return the number of classes C of the model in a request."""
    return len(messages.arrays_to_numpy(request.model)["classifier.bias"])


@lru_cache(maxsize=1)
def _warn_of_simulation() -> None:
    logger.warning(
        "aggregation.secure in a simulation: the identity keys of simulated clients "
        "come from the seed, so that secure aggregation protects nothing here"
    )

"""Test a client's side of secure sums: its answers, and the servers it refuses."""

import sqlite3
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from client_app.own_site import with_own_teacher
from client_app.secure_store import SecureStore
from client_app.secure_sum import SecureParty
from client_app.site_database import LedgerError
from clip2fl_common import messages
from clip2fl_common.class_moments import ClassMoments
from clip2fl_common.config import RunConfig
from clip2fl_common.messages import Evaluation, TrainRequest
from clip2fl_common.messages.evaluation_sums import EvaluationSums
from clip2fl_common.messages.secure import (
    SecureRequest,
    key_in,
    revealed_in,
    signature_in,
)
from clip2fl_common.messages.sums import SumFormat
from clip2fl_common.secure.identities import SimulatedKeys
from clip2fl_common.secure.masks import Vector, subtracts
from clip2fl_common.secure.statements import EVALUATION, SecureError, SignedKey, sums_of
from clip2fl_common.site_names import client_number, random_stream
from tests.defaults import run_config

CONFIG = run_config(
    federation__rounds=5,
    method="fedavg",
    aggregation__secure=True,
    partition__clients=5,
    federation__clients_per_round=5,
)
SENT = {
    "classifier.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "classifier.bias": np.array([1, -1], np.float32),
}
KEYS = SimulatedKeys(CONFIG.seed)


def party(folder: Path, number: int, run: str = "1", least: int = 3) -> SecureParty:
    """Return a party whose file is in a folder of its own, as at a site."""
    store = SecureStore(folder / str(number))
    return SecureParty(CONFIG, run, KEYS.identity(number), KEYS, store, least)


def local(number: int) -> dict[str, np.ndarray]:
    """Return the model that a party has after training."""
    rng = np.random.default_rng(number)
    return {
        name: values + rng.normal(size=values.shape).astype(np.float32)
        for name, values in SENT.items()
    }


def arrays(model: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(values) for name, values in model.items()})


def trained(number: int) -> RecordDict:
    """Return the reply that a party would send without secure aggregation."""
    metrics: dict[str, int | float] = {
        "partition-id": number,
        "num-examples": 10 + number,
        "loss": 1.0 + number,
        "distillation-loss": 0.5,
        "unreadable-images": 1,
        "seconds-data": 0.25,
        "seconds-gradients": 0.5,
        "seconds-training": 1.0,
    }
    return RecordDict(
        {"arrays": arrays(local(number)), "metrics": MetricRecord(dict(metrics))}
    )


@dataclass
class Round:
    """A round that a server plays with parties, exchange by exchange."""

    parties: Sequence[SecureParty]
    number: int = 1
    session: bytes = b"session of the test"
    directory: list[SignedKey] = field(default_factory=list)

    def request(
        self,
        names: tuple[str, ...] = (),
        public_keys: tuple[bytes, ...] = (),
        signatures: tuple[bytes, ...] = (),
    ) -> SecureRequest:
        return SecureRequest(
            *(self.number, self.session, 0), names, public_keys, signatures
        )

    def keys(self) -> None:
        self.directory = [key_in(own.keys(self.request())) for own in self.parties]

    def content(
        self,
        number: int,
        sent: dict[str, np.ndarray] = SENT,
        directory: Sequence[SignedKey] | None = None,
    ) -> RecordDict:
        """Return a party's train request."""
        entries = self.directory if directory is None else directory
        secure = self.request(
            names=tuple(entry.name for entry in entries),
            public_keys=tuple(entry.public for entry in entries),
            signatures=tuple(entry.signature for entry in entries),
        )
        config = ConfigRecord(
            {
                messages.ROUND: self.number,
                messages.PARTITION: number,
                messages.STREAM: number,
                messages.CODE_FINGERPRINT: "code",
            }
        )
        return RecordDict(
            {
                messages.ARRAYS: arrays(sent),
                messages.CONFIG: config,
                messages.SECURE: secure.record(),
            }
        )

    def train(self, number: int, content: RecordDict | None = None) -> Vector:
        content = content or self.content(number)
        request = TrainRequest.parse(content)
        own = self.parties[number]
        reply = own.train(content, request, lambda: trained(number))
        return SumFormat(CONFIG, SENT, []).vector_in(reply, {number: 1})

    def names(self, numbers: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.parties[number].identity.name for number in numbers)

    def commit(self, number: int, members: Sequence[int]) -> bytes:
        request = self.request(names=self.names(members))
        return signature_in(self.parties[number].commit(request))

    def reveal(
        self, number: int, members: Sequence[int], signatures: Sequence[bytes]
    ) -> RecordDict:
        request = self.request(names=self.names(members), signatures=tuple(signatures))
        return self.parties[number].reveal(request)

    def up_to_masks(self) -> list[Vector]:
        """Return the masked vectors of all parties."""
        self.keys()
        return [self.train(number) for number in range(len(self.parties))]


@pytest.fixture
def play(tmp_path: Path) -> Round:
    return Round([party(tmp_path, number) for number in range(5)])


@pytest.mark.parametrize("members", [[0, 1, 2, 3, 4], [0, 2, 3, 4], [4, 1, 2]])
def test_sum_of_the_members_is_that_of_their_models(
    play: Round, members: list[int]
) -> None:
    vectors = play.up_to_masks()
    signed = [play.commit(number, members) for number in members]
    lost = set(play.names(range(5))) - set(play.names(members))
    sums = SumFormat(CONFIG, SENT, [])
    total = sums.zeros()
    for number in members:
        total.add(vectors[number])
    for number in members:
        revealed = revealed_in(play.reveal(number, members, signed), lost)
        total.mask(revealed.own, subtract=True)
        (name,) = play.names([number])
        for other, seed in revealed.pairs.items():
            total.mask(seed, subtract=not subtracts(name, other))
    reply = sums.reply_of(total, 5, dict.fromkeys(members, 100), 0)
    images = sum(10 + number for number in members)
    assert reply.images == images and set(reply.members) == set(members)
    for name in SENT:
        mean = sum(
            (10 + number) * local(number)[name].astype(np.float64) for number in members
        )
        np.testing.assert_allclose(reply.model[name], mean / images, rtol=3e-7)
    loss = sum((10 + number) * (1.0 + number) for number in members) / images
    assert reply.metrics["loss"] == pytest.approx(loss, abs=1e-6)
    assert reply.metrics["distillation-loss"] == pytest.approx(0.5, abs=1e-6)
    assert reply.metrics["unreadable-images"] == len(members)
    assert reply.metrics["seconds-gradients"] == 0.5 * len(members)


def refused(match: str) -> pytest.RaisesExc[SecureError]:
    return pytest.raises(SecureError, match=match)


def test_swapped_key_is_refused_and_named(play: Round, tmp_path: Path) -> None:
    """The server puts a key of its own in the place of another client's."""
    play.keys()
    mallory = key_in(party(tmp_path, 9).keys(play.request()))
    swapped = SignedKey("client-1", mallory.public, mallory.signature)
    directory = [play.directory[0], swapped, *play.directory[2:]]
    with refused("the key of 'client-1' is not signed by 'client-1' for this round"):
        play.train(0, play.content(0, directory=directory))
    # The honest keys are still good: nothing was masked.
    play.train(0)


def test_all_but_two_dropped_is_refused(play: Round) -> None:
    play.keys()
    with refused("2 sites take part, and 3 are needed"):
        play.train(0, play.content(0, directory=play.directory[:2]))
    play.train(0)
    with refused("2 of 5 sites are to be summed, and at least 3"):
        play.commit(0, [0, 1])


def test_sites_own_least_number_holds(tmp_path: Path) -> None:
    play = Round([party(tmp_path, number, least=4) for number in range(5)])
    play.up_to_masks()
    with refused("3 of 5 sites are to be summed, and at least 4"):
        play.commit(0, [0, 1, 2])


def test_round_is_not_begun_twice(play: Round, tmp_path: Path) -> None:
    """In another process too, and whatever the attempt is called."""
    play.up_to_masks()
    again = Round([party(tmp_path, number) for number in range(5)])
    for session in (play.session, b"another"):
        again.session = session
        with refused("client-0 has begun round 1 of this run, .* not in round 1"):
            again.keys()
    again.number = 3
    again.keys()
    again.number = 2
    with refused("client-0 has begun round 3 of this run, .* not in round 2"):
        again.keys()


def test_replayed_train_request_is_refused(play: Round) -> None:
    """Else a server could train on two models with one mask, and subtract."""
    play.keys()
    content = play.content(0)
    play.train(0, content)
    with refused("client-0 has sent its masked sums in round 1, and must have sent it"):
        play.train(0, content)
    changed = {name: values + 1 for name, values in SENT.items()}
    with refused("client-0 has sent its masked sums in round 1"):
        play.train(0, play.content(0, changed))


def test_keys_of_an_earlier_round_are_refused(play: Round) -> None:
    play.keys()
    old = list(play.directory)
    play.number = 2
    play.keys()
    with refused("the key of 'client-.' is not signed by 'client-.' for this round"):
        play.train(0, play.content(0, directory=[play.directory[0], *old[1:]]))
    content = play.content(0)
    content.config_records[messages.CONFIG][messages.ROUND] = 3
    with refused("round 3 with keys of round 2"):
        play.train(0, content)


def test_second_set_is_refused_after_a_restart_too(play: Round, tmp_path: Path) -> None:
    play.up_to_masks()
    first = play.commit(0, [0, 1, 2, 3])
    again = replace(play, parties=[party(tmp_path, number) for number in range(5)])
    # Asked for the same set again, since the answer got lost: the same statement.
    assert again.commit(0, [3, 1, 2, 0]) and first
    with refused("client-0 has signed another set in round 1: client-0, client-1, cl"):
        again.commit(0, [0, 1, 2, 4])
    with refused("client-0 has signed another set in round 1"):
        again.commit(0, [0, 1, 2, 3, 4])


def test_one_client_is_not_told_that_all_survived_and_the_others_that_it_dropped(
    play: Round,
) -> None:
    """The attack of Bonawitz et al. 2017 with an active server: client 4 is the aim.

    Its own seed and the others' pair seeds would unmask it. The others sign the set
    without it, it signs the set of all; nobody has all signatures of one set that
    would make the other half reveal.
    """
    play.up_to_masks()
    without = [play.commit(number, [0, 1, 2, 3]) for number in range(4)]
    aim = play.commit(4, [0, 1, 2, 3, 4])
    with refused("'client-0' has not signed the same set"):
        play.reveal(4, [0, 1, 2, 3, 4], [*without, aim])
    # What the server may do: sum the first four. Then client 4's seed stays secret.
    play.reveal(0, [0, 1, 2, 3], without)
    with refused("'client-0' has not signed the same set"):
        play.reveal(4, [0, 1, 2, 3, 4], [*without, aim])


def test_forged_and_missing_signatures_are_refused(play: Round) -> None:
    play.up_to_masks()
    members = [0, 1, 2]
    signed = [play.commit(number, members) for number in members]
    with refused("'client-1' has not signed the same set"):
        play.reveal(0, members, [signed[0], signed[0], signed[2]])
    with refused("'client-2' has not signed the set to be summed"):
        play.reveal(0, members, signed[:2])
    with refused("client-0 is to reveal its seeds for another set than it has signed"):
        play.reveal(0, [0, 1, 2, 3], [*signed, signed[0]])
    play.reveal(0, members, signed)


def test_sets_without_the_asked_client_or_with_strangers_are_refused(
    play: Round,
) -> None:
    play.up_to_masks()
    with refused(r"this site \(client-4\) is not in the set to be summed"):
        play.commit(4, [0, 1, 2, 3])
    with refused("'client-7' is to be summed, and is no party of the round"):
        play.parties[0].commit(
            play.request(names=("client-0", "client-1", "client-2", "client-7"))
        )


@pytest.mark.parametrize("what", ["model", "setting", "teacher", "run configuration"])
def test_different_models_or_settings_are_noticed(play: Round, what: str) -> None:
    """Model inconsistency (Pasquini et al. 2022): others train to nothing, one does.

    Their masks do not cancel, and nobody reveals a seed.
    """
    play.keys()
    other = play.content(0)
    if what == "model":
        other = play.content(0, {**SENT, "classifier.bias": np.zeros(2, np.float32)})
    elif what == "setting":
        other.config_records[messages.CONFIG][messages.PROXIMAL_MU] = 1e6
    elif what == "teacher":
        other.config_records[messages.CONFIG][messages.TEACHER_FINGERPRINT] = "other"
    else:
        flat = {**CONFIG.to_flat(), "client.learning-rate": 1e-9}
        changed = replace(play.parties[0], config=RunConfig.from_run_config(flat))
        play.parties = [changed, *play.parties[1:]]
    play.train(0, other)
    for number in (1, 2, 3, 4):
        play.train(number)
    signed = [play.commit(number, range(5)) for number in range(5)]
    with refused("'client-1' has not signed the same set .*, model, settings and keys"):
        play.reveal(0, range(5), signed)
    with refused("'client-0' has not signed the same set"):
        play.reveal(1, range(5), signed)


def test_sites_may_keep_the_teacher_in_folders_of_their_own(play: Round) -> None:
    """The request has its fingerprint, which all must have been told alike."""
    config = run_config(
        method="clip2fl",
        teacher__model="ViT-B-32",
        teacher__pretrained="openai",
        aggregation__secure=True,
        partition__clients=5,
        federation__clients_per_round=5,
    )
    play.parties = [
        replace(own, config=with_own_teacher(config, folder))
        for own, folder in zip(
            play.parties,
            [None, None, Path("/srv/clip"), Path("/srv/clip"), Path("/data/teacher")],
            strict=True,
        )
    ]
    assert len({own.config.teacher.model for own in play.parties}) == 3
    play.up_to_masks()
    signed = [play.commit(number, range(5)) for number in range(5)]
    for number in range(5):
        play.reveal(number, range(5), signed)


def test_exchanges_out_of_order_are_refused(play: Round) -> None:
    with refused("client-0 is in no round of this run, and is asked about round 1"):
        play.commit(0, [0, 1, 2])
    play.keys()
    with refused("client-0 has sent its key in round 1, and must have sent its masked"):
        play.commit(0, [0, 1, 2])
    play.train(0)
    with refused("client-0 has sent its masked sums in round 1, and must have signed"):
        play.reveal(0, [0, 1, 2], [b"", b"", b""])
    play.session = b"another"
    with refused(
        "client-0 is in round 1 of this run, and is asked about round 1 or an"
    ):
        play.commit(0, [0, 1, 2])


def stored(folder: Path) -> bytes:
    return b"".join(
        path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    )


def test_secrets_are_private_and_gone_after_they_were_revealed(
    play: Round, tmp_path: Path
) -> None:
    play.keys()
    store = play.parties[0].store
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700
    vectors = [play.train(number) for number in range(5)]
    assert len(vectors) == 5
    with sqlite3.connect(store.path) as database:
        ((text,),) = database.execute("SELECT secrets FROM round").fetchall()
    database.close()
    own = text.split('"own": "')[1][:64]
    assert len(bytes.fromhex(own)) == 32
    assert own.encode() in stored(tmp_path / "0")
    members = [0, 1, 2, 3, 4]
    signed = [play.commit(number, members) for number in members]
    reply = play.reveal(0, members, signed)
    assert revealed_in(reply, set()).own.hex() == own
    assert own.encode() not in stored(tmp_path / "0")
    with refused("client-0 has revealed its seeds in round 1"):
        play.reveal(0, members, signed)


def test_next_round_forgets_an_unfinished_one(play: Round, tmp_path: Path) -> None:
    play.up_to_masks()
    with sqlite3.connect(play.parties[0].store.path) as database:
        ((text,),) = database.execute("SELECT secrets FROM round").fetchall()
    database.close()
    play.number = 2
    play.keys()
    assert text.split('"own": "')[1][:64].encode() not in stored(tmp_path / "0")


def test_damaged_file_answers_nothing_and_is_not_replaced(play: Round) -> None:
    play.keys()
    path = play.parties[0].store.path
    path.write_bytes(b"no database")
    with pytest.raises(LedgerError, match="Delete the file, and never restore it"):
        play.train(0)
    assert path.read_bytes() == b"no database"


def test_training_that_diverges_sends_nothing(play: Round) -> None:
    play.keys()
    content = play.content(0)

    def diverged() -> RecordDict:
        reply = trained(0)
        model = {**local(0), "classifier.bias": np.array([np.nan, 0], np.float32)}
        reply["arrays"] = arrays(model)
        return reply

    with pytest.raises(FloatingPointError):
        play.parties[0].train(content, TrainRequest.parse(content), diverged)


@pytest.mark.parametrize("change", [(0, 0), (0, 2**31), (1, 0)])
def test_site_trains_with_its_own_numbers_only(
    play: Round, change: tuple[int, int]
) -> None:
    """With two streams the difference of two sums would be this site's alone."""
    play.parties = [
        replace(party, is_site=number == 0) for number, party in enumerate(play.parties)
    ]
    play.keys()
    content = play.content(0)
    number = client_number("client-0")
    config = content.config_records["config"]
    config["partition-id"] = number + change[0]
    config["random-stream"] = random_stream(number) + change[1]
    if change == (0, 0):
        request = TrainRequest.parse(content)
        assert play.parties[0].train(content, request, lambda: trained(0))
        return
    with refused("are not those of client-0"):
        play.train(0, content)


@pytest.mark.parametrize("number", [0, -1, 10_000, 1 + 5 * 2**32])
def test_round_that_the_run_does_not_have_is_refused(play: Round, number: int) -> None:
    """Its number goes into the random numbers; begun, it would bar all real rounds."""
    play.number = number
    with refused(f"round {number} of a run of"):
        play.keys()
    play.number = 1
    play.keys()


def test_clients_clip_themselves(tmp_path: Path) -> None:
    config = run_config(
        method="fedavg",
        aggregation__secure=True,
        aggregation__max_update_norm=0.5,
        aggregation__max_site_images=7,
        federation__clients_per_round=3,
    )
    sums = SumFormat(config, SENT, [])
    values = sums.values_of(trained(1))
    assert values["images"] == 7
    update = {name: values[f"model.{name}"] / 7 for name in SENT}
    norm = np.sqrt(sum(np.square(part).sum() for part in update.values()))
    assert norm == pytest.approx(0.5)
    for name, sent in SENT.items():
        exact = local(1)[name].astype(np.float64) - sent
        np.testing.assert_allclose(
            update[name] / exact, update[name].flat[0] / exact.flat[0]
        )


def test_moments_are_those_of_the_images_that_count(tmp_path: Path) -> None:
    """A site with more images than allowed is in no sum that would be refused."""
    config = run_config(
        method="fedlda",
        aggregation__secure=True,
        aggregation__max_site_images=6,
        federation__clients_per_round=3,
    )
    field = messages.reply_field(messages.MOMENTS, config, 3)
    assert isinstance(field, messages.ArrayFields)
    width = field.shapes["scatter"][0]
    features = torch.randn(9, width, dtype=torch.float64)
    moments = ClassMoments.of(features, torch.arange(9) % 3, 3).named()
    reply = trained(1)
    reply.metric_records[messages.METRICS]["num-examples"] = 9
    reply[messages.MOMENTS] = field.encode(moments)
    values = SumFormat(config, SENT, [field]).values_of(reply)
    assert values["images"] == 6
    for name, exact in moments.items():
        found = values[f"{messages.MOMENTS}.{name}"]
        np.testing.assert_allclose(found, exact.numpy() * 6 / 9, rtol=1e-5, atol=1e-4)


def evaluating(folder: Path, number: int) -> SecureParty:
    """Return the party of a site in sums of evaluations, with the same file."""
    return replace(party(folder, number), run=sums_of("1", EVALUATION))


def test_evaluation_has_keys_and_masks_of_its_own(play: Round, tmp_path: Path) -> None:
    """In the same round of the same run, after training and within it."""
    play.up_to_masks()
    other = Round([evaluating(tmp_path, number) for number in range(5)])
    other.keys()
    content, recalls = other.content(0), {"fedavg": {0: 40.0, 1: 61.0}}
    request = TrainRequest.parse(content)
    own = other.parties[0]
    reply = own.evaluate(content, request, lambda: Evaluation(8, recalls))
    sums = EvaluationSums(["fedavg"], 2, confusion=False)
    vector = sums.vector_in(reply, {0: 1})
    plain = sums.encode(sums.values_of(Evaluation(8, recalls)), 5)
    assert not (vector.wide == plain.wide).any()
    # Training goes on as if nothing had been evaluated.
    members = [0, 1, 2, 3, 4]
    signed = [play.commit(number, members) for number in members]
    for number in members:
        play.reveal(number, members, signed)
    with refused("has begun round 1 of this run"):
        own.keys(other.request())


def test_keys_of_one_purpose_are_refused_for_the_other(
    play: Round, tmp_path: Path
) -> None:
    play.keys()
    other = Round([evaluating(tmp_path, number) for number in range(5)])
    other.keys()
    # The statement that a key's signature is of names the purpose.
    with refused("the key of 'client-1' is not signed by 'client-1' for this round"):
        play.train(
            0, play.content(0, directory=[play.directory[0], *other.directory[1:]])
        )
    with refused("sums of 'both': there are none"):
        SecureParty.of(CONFIG, "1", None, 0, "both")

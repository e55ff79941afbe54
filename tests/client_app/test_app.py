"""Test the ClientApp with real messages, without Flower's processes."""

import copy
import math
import pickle
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn

from client_app import registry
from client_app.app import app
from client_app.gradients import class_gradients
from client_app.images import training_images
from client_app.part import ClientPart, ClientRound
from client_app.round import _teacher
from client_app.training import train_locally
from clip2fl_common import messages
from clip2fl_common.class_gradients import LowRankGradient, row_cosines
from clip2fl_common.config import RunConfig
from clip2fl_common.data.datasets import load_dataset, partition_indices
from clip2fl_common.messages import fields
from clip2fl_common.models import ImageClassifier, build_model
from clip2fl_common.provenance import code_fingerprint
from clip2fl_common.teacher import TeacherError, load_teacher
from tests.conftest import be_flower
from tests.defaults import ROOT, run_config
from tests.in_process_grid import client_of

# One un-augmented draw of all images, so that class gradients can be computed slowly.
# Several steps an epoch, since the first step has no proximal gradient.
CONFIG = run_config(
    client__batch_size=8,
    class_gradients__draws=1,
    class_gradients__augment=False,
    class_gradients__samples_per_class=1000,
    upload__precision="full",
)
CLASSES, DIM = 10, CONFIG.model.feature_dim
FORMAT = messages.GradientFormat(CLASSES, DIM, CONFIG.upload)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use another cache than the user's; identify as one of Flower's processes."""
    be_flower(tmp_path / "cache", monkeypatch)


def student() -> ImageClassifier:
    """Return a global model."""
    torch.manual_seed(3)
    return build_model(CONFIG.model.name, CLASSES, DIM)


def classifier() -> nn.Linear:
    """Return a re-trained classifier."""
    torch.manual_seed(4)
    return nn.Linear(DIM, CLASSES)


def request(
    *, partition: int = 1, with_classifier: bool = False, **config: str | float
) -> Message:
    """Return a train request; ``_`` in a key becomes ``-``."""
    content = RecordDict(
        {
            messages.ARRAYS: messages.model_to_arrays(student()),
            messages.CONFIG: ConfigRecord(
                {
                    messages.ROUND: 2,
                    messages.PARTITION: partition,
                    messages.CODE_FINGERPRINT: code_fingerprint(),
                    **{name.replace("_", "-"): value for name, value in config.items()},
                }
            ),
        }
    )
    if with_classifier:
        content[messages.CLASSIFIER] = messages.model_to_arrays(classifier())
    return Message(content, 42, "train")


def distilling(**config: str | float) -> Message:
    """Return a request of CLIP2FL."""
    settings: dict[str, Any] = {
        "distillation_weight": 1.0,
        "distillation_temperature": 3.0,
        "teacher_fingerprint": load_teacher("demo").fingerprint,
    }
    settings.update(config)
    return request(with_classifier=True, **settings)


def answer(message: Message, place: int = 0, config: RunConfig = CONFIG) -> Message:
    """Return the ClientApp's reply from the node with this partition number."""
    flat = cast(Any, config.to_flat())
    context = Context(1, 42, {"partition-id": place}, RecordDict(), flat)
    return app(copy.deepcopy(message), context)


def images_of(partition: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a partition's normalised images and labels."""
    parts = partition_indices(CONFIG.dataset, CONFIG.partition, CONFIG.seed)
    dataset = load_dataset(CONFIG.dataset)
    loaded = dataset.train.load(parts[partition])
    return dataset.normalization(loaded.images), loaded.labels


def array_bytes(reply: Message) -> dict[str, dict[str, bytes]]:
    """Return the bytes of the reply's arrays, as sent."""
    return {
        name: {key: array.data for key, array in record.items()}
        for name, record in reply.content.array_records.items()
    }


def test_query_says_which_partition_the_node_simulates() -> None:
    reply = answer(Message(RecordDict(), 42, "query"), place=2)
    assert set(reply.content) == {messages.METRICS}
    assert client_of(reply) == 2


@pytest.mark.parametrize("partition", [0, 1, 2])
def test_reply_keeps_the_contract(partition: int) -> None:
    """The client trains on the requested partition, whatever the node's own number."""
    message = request(partition=partition, with_classifier=True)
    reply = answer(message, place=0)
    sent = message.content.array_records[messages.ARRAYS]
    images, labels = images_of(partition)
    messages.TrainReply.parse(
        reply,
        messages.arrays_to_numpy(sent),
        [FORMAT],
        {partition: len(labels)},
    )
    values = reply.content.metric_records[messages.METRICS]
    assert client_of(reply) == partition
    assert values[messages.NUM_EXAMPLES] == len(images)
    assert values["unreadable-images"] == 0
    assert values["distillation-loss"] == 0
    assert cast(float, values["loss"]) > 0
    held = reply.content.array_records[messages.GRADIENTS]["classes"].numpy()
    assert held.tolist() == labels.unique().tolist()
    assert reply.metadata.src_node_id == 42


def test_class_gradients_are_the_global_models() -> None:
    """They are computed before local training, with the classifier that was sent."""
    images, labels = images_of(1)
    reply = answer(request(with_classifier=True))
    sent = messages.gradients_from_arrays(
        reply.content.array_records[messages.GRADIENTS], FORMAT
    )
    model, head = student().eval(), classifier()
    for c, gradient in sent.items():
        with torch.no_grad():
            features = model.features(images[labels == c])
        head.zero_grad()
        loss = nn.functional.cross_entropy(head(features), labels[labels == c])
        torch.autograd.backward(loss)
        assert head.weight.grad is not None and head.bias.grad is not None
        torch.testing.assert_close(
            gradient.weight, head.weight.grad, atol=1e-5, rtol=1e-3
        )
        torch.testing.assert_close(gradient.bias, head.bias.grad, atol=1e-5, rtol=1e-3)
    with torch.no_grad():
        own = class_gradients(
            model.features(images), labels, head.weight.detach(), head.bias.detach()
        )
    assert set(own) == set(sent)


def test_class_gradients_are_coded_as_configured() -> None:
    """The gradients have half precision and keep the configured bound."""
    config = run_config(
        class_gradients__draws=1,
        class_gradients__augment=False,
        class_gradients__samples_per_class=1000,
        upload__precision="half",
        upload__min_cosine=0.95,
    )
    plain, coded = (
        messages.gradients_from_arrays(
            answer(
                request(with_classifier=True), config=settings
            ).content.array_records[messages.GRADIENTS],
            messages.GradientFormat(CLASSES, DIM, settings.upload),
        )
        for settings in (CONFIG, config)
    )
    assert set(coded) == set(plain)
    assert any(isinstance(gradient, LowRankGradient) for gradient in coded.values())
    for c, gradient in coded.items():
        assert row_cosines(plain[c].weight, gradient.weight).min() >= 0.95 - 1e-6
        torch.testing.assert_close(gradient.bias, plain[c].bias, rtol=1 / 256, atol=0)


def test_without_classifier_no_class_gradients() -> None:
    """The local model is the same: a request for gradients does not change it."""
    plain, asked = answer(request()), answer(request(with_classifier=True))
    assert set(plain.content) == {messages.ARRAYS, messages.METRICS}
    arrays, asked_arrays = array_bytes(plain), array_bytes(asked)
    assert arrays == {messages.ARRAYS: asked_arrays[messages.ARRAYS]}


def test_local_model_is_trained() -> None:
    message = request()
    before = message.content.array_records[messages.ARRAYS]
    after = answer(message).content.array_records[messages.ARRAYS]
    moved = [
        name
        for name in before
        if not np.array_equal(before[name].numpy(), after[name].numpy())
    ]
    assert set(moved) == set(before)  # every weight and BatchNorm buffer


def test_same_request_twice_gives_identical_arrays() -> None:
    """The arrays are equal bit for bit, whatever torch's global generator did."""
    message = distilling()
    torch.manual_seed(1)
    first = answer(message)
    torch.manual_seed(2)
    second = answer(message)
    assert array_bytes(first) == array_bytes(second)
    for name in ("loss", "distillation-loss"):
        values = [
            reply.content.metric_records[messages.METRICS][name]
            for reply in (first, second)
        ]
        assert values[0] == values[1]


def test_two_clients_draw_their_own_batches_and_augmentation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They differ even with the same images in the same round of the same run."""

    def same_images(config: RunConfig, site: None, partition: int) -> Any:
        return training_images(config, site, 0)

    monkeypatch.setattr("client_app.round.training_images", same_images)
    augmented = run_config(upload__precision="full")
    first, again, other = (
        answer(request(partition=partition, with_classifier=True), config=augmented)
        for partition in (0, 0, 1)
    )
    assert array_bytes(first) == array_bytes(again)
    for record in (messages.ARRAYS, messages.GRADIENTS):
        one, two = (array_bytes(reply)[record] for reply in (first, other))
        name = {messages.ARRAYS: "bn1.bias", messages.GRADIENTS: "weight"}[record]
        assert one[name] != two[name]


def test_precision_of_the_configuration_reaches_training_and_gradients() -> None:
    """In bfloat16 both differ from float32, by no more than the rounding."""
    replies = [
        answer(
            request(with_classifier=True),
            config=run_config(client__precision=precision, upload__precision="full"),
        )
        for precision in ("float32", "bfloat16")
    ]
    for record, name in ((messages.ARRAYS, "bn1.bias"), (messages.GRADIENTS, "bias")):
        full, half = (
            reply.content.array_records[record][name].numpy() for reply in replies
        )
        assert not np.array_equal(full, half)
        np.testing.assert_allclose(half, full, atol=0.05)


def test_step_size_changes_with_the_round() -> None:
    """From 0.4 to 0.1 in 3 rounds, round 2 trains with a step size of 0.2."""
    message = request()
    scheduled = run_config(
        client__learning_rate=0.4,
        client__learning_rate_final=0.1,
        federation__rounds=3,
    )
    constant = run_config(client__learning_rate=0.2, federation__rounds=3)
    first, second = (answer(message, config=c) for c in (scheduled, constant))
    assert array_bytes(first) == array_bytes(second)
    assert array_bytes(first) != array_bytes(answer(message, config=CONFIG))


def test_muons_step_sizes_change_together() -> None:
    """From 0.04 and 0.2 to a quarter in 3 rounds, round 2 has half of both."""
    message = request()
    changes: dict[str, Any] = {"client__optimizer": "muon", "federation__rounds": 3}
    scheduled = run_config(
        client__learning_rate=0.04,
        client__learning_rate_final=0.01,
        client__learning_rate_other=0.2,
        **changes,
    )
    constant = run_config(
        client__learning_rate=0.02, client__learning_rate_other=0.1, **changes
    )
    first, second = (answer(message, config=c) for c in (scheduled, constant))
    assert array_bytes(first) == array_bytes(second)


def test_optimizer_of_the_configuration_reaches_training() -> None:
    """Each of its keys changes the result."""
    settings: list[dict[str, Any]] = [
        {},
        {"client__weight_decay": 0.1},
        {"client__optimizer": "momentum"},
        {"client__optimizer": "momentum", "client__momentum": 0.5},
        {"client__optimizer": "adam"},
        {"client__optimizer": "adam", "client__momentum": 0.5},
        {"client__optimizer": "muon"},
        {"client__optimizer": "muon", "client__momentum": 0.5},
        {"client__optimizer": "muon", "client__learning_rate_other": 0.2},
    ]
    outcomes = []
    for changes in settings:
        config = run_config(client__epochs=2, **changes)  # the first step has no memory
        outcomes.append(array_bytes(answer(request(), config=config))[messages.ARRAYS])
    assert all(a != b for a, b in combinations(outcomes, 2))


def test_labels_weigh_as_much_as_the_configuration_says() -> None:
    """With 0 they do not matter, and the loss is the distillation alone."""
    replies = [
        answer(distilling(), config=run_config(client__label_weight=weight))
        for weight in (0.0, 0.5, 1.0)
    ]
    models = {array_bytes(reply)[messages.ARRAYS]["bn1.bias"] for reply in replies}
    assert len(models) == 3
    values = replies[0].content.metric_records[messages.METRICS]
    assert values["loss"] == values["distillation-loss"]


def test_logit_adjustment_of_the_configuration_reaches_training() -> None:
    """It does so for all methods; another strength gives another result."""
    outcomes = [
        array_bytes(
            answer(request(), config=run_config(client__logit_adjustment=strength))
        )[messages.ARRAYS]["bn1.bias"]
        for strength in (0.0, 0.5, 1.0)
    ]
    assert len(set(outcomes)) == 3


def test_terms_of_the_request_change_the_training() -> None:
    """Checks distillation and the proximal term, and the weight of each."""
    outcomes = [
        array_bytes(answer(message))[messages.ARRAYS]["bn1.bias"]
        for message in (
            request(),
            request(proximal_mu=1.0),
            request(proximal_mu=2.0),
            distilling(),
            distilling(distillation_weight=0.5),
            distilling(distillation_temperature=1.0),
        )
    ]
    assert len(set(outcomes)) == len(outcomes)


def test_client_distils_from_the_logits_of_open_clip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eq. 5: logit scale times cosine, for each of the client's images in its order."""
    given: list[torch.Tensor] = []

    def noted(*arguments: Any, **settings: Any) -> Any:
        given.append(arguments[3])
        return train_locally(*arguments, **settings)

    monkeypatch.setattr("client_app.round.train_locally", noted)
    answer(distilling(), config=CONFIG)
    dataset = load_dataset(CONFIG.dataset)
    parts = partition_indices(CONFIG.dataset, CONFIG.partition, CONFIG.seed)
    teacher = load_teacher("demo")
    network: Any = teacher.network.model
    settings = PreprocessCfg(**teacher.network.preprocess)
    transform: Any = image_transform_v2(settings, is_train=False)
    prompts = [CONFIG.teacher.prompt.replace("{class}", n) for n in dataset.class_names]
    pictures = dataset.train.load(parts[1]).images.permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        text = network.encode_text(teacher.network.tokenizer(prompts), normalize=True)
        expected = [
            network.logit_scale.exp()
            * network.encode_image(transform(Image.fromarray(x))[None], normalize=True)
            @ text.T
            for x in pictures
        ]
    (found,) = given
    assert len(expected) > 3 and float(found.std(0).min()) > 0.1
    torch.testing.assert_close(found, torch.cat(expected), atol=5e-3, rtol=0)


def test_distillation_is_reported() -> None:
    reply = answer(distilling())
    values = reply.content.metric_records[messages.METRICS]
    loss = cast(float, values["loss"])
    assert 0 < cast(float, values["distillation-loss"]) < loss


def test_other_code_is_refused() -> None:
    with pytest.raises(RuntimeError, match="is not the server's.*clip2fl run"):
        answer(request(code_fingerprint="0123456789abcdef"))


@pytest.mark.parametrize(
    ("record", "array"),
    [(messages.ARRAYS, "bn1.running_mean"), (messages.CLASSIFIER, "bias")],
)
def test_model_that_is_not_finite_is_not_trained(record: str, array: str) -> None:
    """Training never reads running statistics, so its loss would stay finite."""
    message = request(with_classifier=True)
    arrays = message.content.array_records[record]
    assert array in arrays, list(arrays)
    values = arrays[array].numpy().copy()
    values[0] = math.nan
    arrays[array] = Array(values)
    error = answer(message).error
    assert error.code == messages.DIVERGED
    assert "has values that are not finite" in str(error.reason)


@pytest.mark.parametrize(
    ("array", "value"),
    [
        # Added to the scores, it would be another bias for each image.
        ("bias", np.zeros((4, 10), np.float32)),
        ("bias", np.zeros(1, np.float32)),
        ("weight", np.zeros((1, DIM), np.float32)),
        ("bias", np.zeros(10, np.float64)),
    ],
)
def test_classifier_of_another_shape_is_refused(
    array: str, value: npt.NDArray[Any]
) -> None:
    message = request(with_classifier=True)
    message.content.array_records[messages.CLASSIFIER][array] = Array(value)
    error = answer(message).error
    assert error.code == messages.SITE_REFUSES
    assert "retrained classifier has an array of shape" in str(error.reason)


def test_other_teacher_is_refused() -> None:
    own = load_teacher("demo").fingerprint
    with pytest.raises(
        TeacherError,
        match=f"teacher demo has the fingerprint {own[:12]} here, but f00ba5f00ba5 at "
        "the server: install the same weights on both",
    ):
        answer(distilling(teacher_fingerprint="f00ba5" * 10))


def test_teacher_is_not_needed_without_distillation() -> None:
    """A method without a teacher never needs its fingerprint."""
    message = distilling(distillation_weight=0.0, teacher_fingerprint="another")
    reply = answer(message)
    values = reply.content.metric_records[messages.METRICS]
    assert values["distillation-loss"] == 0


# The ClientApp imports these only if nothing is cached on disk; each takes seconds.
SLOW = ("open_clip", "torchvision", "torch._dynamo")


def test_second_message_imports_nothing_slow(tmp_path: Path) -> None:
    """In a deployment each message has its own process; the features are on disk."""
    message = distilling()
    _teacher.cache_clear()  # another test's, with another cache
    answer(message)
    for name in ("message", "config"):
        (tmp_path / name).write_bytes(
            pickle.dumps({"message": message, "config": CONFIG.to_flat()}[name])
        )
    program = (
        "import pickle, sys; from pathlib import Path\n"
        "from flwr.app import Context, RecordDict\n"
        "from tests.flower_private import act_as_flower_process\n"
        "act_as_flower_process()\n"
        "from client_app.app import app\n"
        "message, config = (pickle.loads(Path(p).read_bytes()) for p in sys.argv[1:])\n"
        "context = Context(1, 1, {'partition-id': 0}, RecordDict(), config)\n"
        "reply = app(message, context)\n"
        "assert not reply.has_error()\n"
        f"print([name for name in {SLOW!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "message", tmp_path / "config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_import_leaves_collection_on_and_torch_out_of_it() -> None:
    """Runs in a new process, like each message of a deployment."""
    code = (
        "import gc, client_app, torch; "
        "print(gc.isenabled(), any(o is torch.Tensor for o in gc.get_objects()))"
    )
    assert _run(code).stdout.split() == ["True", "False"]


def test_process_that_used_the_compiler_ends_without_complaint() -> None:
    """The module imports triton, which reports objects left at exit."""
    assert _run("import benchmarks.stages").stderr == ""


def _run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )


def test_part_computes_before_or_after_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the global model before local training, with the local model after it."""

    class Sums(ClientPart):
        def sums(self, client: ClientRound) -> ArrayRecord:
            total = sum(p.detach().sum() for p in client.model.parameters())
            return client.encode(self.field, {"sum": torch.as_tensor(total)})

    class Before(Sums):
        field = "before"

        def before_training(self, client: ClientRound) -> ArrayRecord:
            return self.sums(client)

    class After(Sums):
        field = "after"

        def after_training(self, client: ClientRound) -> ArrayRecord:
            return self.sums(client)

    for part in (Before, After):
        field = messages.ArrayFields(part.field, {"sum": ()})
        monkeypatch.setitem(fields.REPLY_FIELDS, part.field, lambda *_, f=field: f)
        monkeypatch.setitem(registry.PARTS, part.field, part)
    message = request()
    config = message.content.config_records[messages.CONFIG]
    config[messages.FIELDS] = ["before", "after"]
    content = answer(message).content.array_records
    names = [name for name, _ in student().named_parameters()]
    for field_name, arrays in (
        ("before", message.content.array_records[messages.ARRAYS]),
        ("after", content[messages.ARRAYS]),
    ):
        total = sum(float(arrays[name].numpy().sum()) for name in names)
        found = float(content[field_name]["sum"].numpy())
        assert found == pytest.approx(total, rel=1e-4)
    assert content["before"]["sum"].data != content["after"]["sum"].data


def test_class_moments_are_sums_over_the_global_models_pooled_output() -> None:
    """Image by image; classes with fewer than three images have zeros."""
    config = run_config(method="fedlda", privacy__min_class_samples=3)
    message = request(partition=1)
    wanted = message.content.config_records[messages.CONFIG]
    wanted[messages.FIELDS] = [messages.MOMENTS]
    reply = answer(message, config=config)
    arrays = reply.content.array_records[messages.MOMENTS]
    images, labels = images_of(1)
    model = student().eval()
    count = torch.zeros(CLASSES, dtype=torch.float64)
    total, scatter = torch.zeros(CLASSES, 64), torch.zeros(64, 64)
    held = torch.bincount(labels, minlength=CLASSES)
    assert 0 < int((held[held > 0] < 3).sum()) < int((held > 0).sum())
    for image, label in zip(images, labels.tolist(), strict=True):
        if held[label] < 3:
            continue
        with torch.no_grad():
            pooled = model.pooled(image[None])[0]
        count[label] += 1
        total[label] += pooled
        scatter += torch.outer(pooled, pooled)
    for name, expected in (("count", count), ("total", total), ("scatter", scatter)):
        found = torch.from_numpy(arrays[name].numpy().copy())
        torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)

"""Test each rule of a site as a server meets it: messages to the real ClientApp."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import nn

from client_app import round as client
from client_app.site_policy import SitePolicy
from clip2fl_common import messages
from clip2fl_common.config import Scalar
from clip2fl_common.data.datasets import FileSource, open_site
from clip2fl_common.data.demo import CLASS_NAMES
from clip2fl_common.models import build_model
from clip2fl_common.protection import PROTECTED_FIELDS
from clip2fl_common.teacher import load_teacher
from tests.conftest import be_flower
from tests.defaults import ROOT, run_config
from tests.site_folders import write_site
from tests.site_node import (
    DIM,
    KINDS,
    SiteNode,
    evaluated,
    gradients,
    images_in,
    policy,
    refusal,
    site_run,
    student,
    told,
    works,
)
from tests.tiny_teacher import write_teacher


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use another cache than the user's; identify as one of Flower's processes."""
    be_flower(tmp_path / "cache", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a site's folder: about 9 training images of one class, 4 of another."""
    return write_site(tmp_path / "private", {"circle": 12, "star": 6})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["imagenet-lt", "image-folder", "list", "hugging-face", "cifar10", "demo"],
)
def test_no_run_reads_or_writes_elsewhere_on_a_sites_disk(
    tmp_path: Path, folder: Path, kind: str, name: str
) -> None:
    """A run could name any file as its list of images, and any folder."""
    secret = tmp_path / "id_rsa"
    secret.write_text("-----BEGIN PRIVATE KEY-----")
    (tmp_path / "root" / "train" / "patient").mkdir(parents=True)
    config = site_run(
        dataset__name=name,
        dataset__root=str(tmp_path / ("made" if name == "cifar10" else "root")),
        dataset__train_list=str(secret),
        dataset__test_list=str(secret),
    )
    reason = refusal(SiteNode(folder).ask(kind, config))
    assert "only runs with dataset.name = 'sites'" in reason and name in reason
    assert "PRIVATE" not in reason and "patient" not in reason
    assert not (tmp_path / "made").exists()


def broken_model() -> ArrayRecord:
    """Return a model that fits no other."""
    return ArrayRecord({"fc.weight": Array(torch.zeros(2, 3).numpy())})


def unusable_model() -> ArrayRecord:
    """Return a model of NaN."""
    model = student()
    with torch.no_grad():
        model.classifier.weight.fill_(torch.nan)
    return messages.model_to_arrays(model)


@pytest.mark.parametrize(
    ("kinds", "run", "message"),
    [
        (KINDS, {"method": "creff", "nonsense\n" * 200: 1}, {}),
        (KINDS, {"dataset.image-size": "/etc/passwd\n" * 50}, {}),
        (("train", "evaluate"), {"device": "cuda:77"}, {}),
        (("train", "evaluate"), {}, {"model": broken_model}),
        (("train",), {}, {"model": unusable_model}),
        (("train",), {}, {"server_round": "one"}),
        (("train", "evaluate"), {}, {"code_fingerprint": "other"}),
        (("train", "evaluate"), {"model.feature-dim": 10**12}, {}),
    ],
)
def test_any_error_is_one_bounded_line_without_a_path(
    tmp_path: Path,
    folder: Path,
    kinds: tuple[str, ...],
    run: dict[str, Scalar],
    message: dict[str, Any],
) -> None:
    made = {k: v() if callable(v) else v for k, v in message.items()}
    for kind in kinds:
        reply = SiteNode(folder).ask(kind, {**site_run().to_flat(), **run}, **made)
        assert reply.has_error()
        reason = told(reply)
        assert str(tmp_path) not in reason and str(ROOT) not in reason
        if message.get("model") is unusable_model:
            # The code reports divergence; the text describes only the run.
            assert reply.error.code == messages.DIVERGED
        else:
            assert "SiteError" in reason


def test_whole_error_is_in_the_nodes_own_log(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "patient 7").mkdir()
    reply = SiteNode(folder).ask("train", site_run())
    assert reply.error.code == messages.DATA_ERROR
    assert told(reply) == (
        "some of its folders are no class of the run; the site's own log says more"
    )
    assert "patient 7" in caplog.text


def test_simulated_clients_unusable_images_have_a_code_of_their_own(
    tmp_path: Path,
) -> None:
    """The text may name files, since they are on the server's machine."""
    config = site_run(
        dataset__name="image-folder", dataset__root=str(tmp_path / "nowhere")
    )
    reply = SiteNode(None, {"partition_id": 0}).ask("train", config)
    assert reply.error.code == messages.DATA_ERROR
    assert str(tmp_path / "nowhere") in str(reply.error.reason)


@pytest.mark.parametrize("kind", KINDS)
def test_node_that_was_told_nothing_is_no_simulated_client(
    tmp_path: Path, kind: str
) -> None:
    """A misspelt data-path must not open the disk to a run."""
    secret = tmp_path / "secret"
    secret.write_text("-----BEGIN PRIVATE KEY-----")
    config = site_run(
        dataset__name="imagenet-lt",
        dataset__root=str(tmp_path),
        dataset__train_list=str(secret),
        dataset__test_list=str(secret),
    )
    for rules in ({}, {"datapath": str(tmp_path)}):
        reply = SiteNode(None, rules).ask(kind, config)
        assert reply.has_error() and "PRIVATE" not in told(reply)


# Rule, forbidden setting of a run, allowed setting, and reason of the refusal.
NOISY: dict[str, Scalar] = {
    "privacy__gradient_clip_norm": 1.0,
    "privacy__gradient_noise_multiplier": 0.5,
}


@pytest.mark.parametrize(
    "field", [messages.GRADIENTS, messages.CLASS_STATISTICS, messages.MOMENTS]
)
def test_site_sends_only_what_the_configuration_asks_for(
    folder: Path, field: str
) -> None:
    """It has agreed to the configuration; a request could ask for more."""
    node = SiteNode(folder, {})
    asked = node.ask("train", site_run(method="fedavg"), reply_fields=[field])
    assert f"configuration asks for no {field}" in refusal(asked)


@pytest.mark.parametrize(
    ("rules", "privacy", "expected"),
    [
        ({}, {}, []),
        ({"min_noise_multiplier": 0.5}, {}, ["privacy.moment-noise-multiplier = 0"]),
        ({"max_clip_norm": 2.0}, {}, ["privacy.moment-clip-norm = 0"]),
        (
            {"min_noise_multiplier": 0.5, "max_clip_norm": 2.0},
            {"moment_noise_multiplier": 0.5, "moment_clip_norm": 2.0},
            [],
        ),
    ],
)
def test_rules_hold_for_a_field_that_names_its_keys(
    rules: dict[str, Any],
    privacy: dict[str, Scalar],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And only for one: without keys nothing says what its noise is."""
    settings = run_config(
        **{f"privacy__{key}": value for key, value in privacy.items()}
    ).privacy
    policy = SitePolicy(**rules)
    unknown = list(policy.field_violations("class-sums", settings))
    assert ["neither clipping nor noise" in text for text in unknown] == (
        [True] if rules else []
    )
    monkeypatch.setitem(PROTECTED_FIELDS, "class-sums", "moment")
    found = list(policy.field_violations("class-sums", settings))
    assert [text.partition(",")[0].removeprefix("the run has ") for text in found] == (
        expected
    )


RULES: list[tuple[dict[str, Any], dict[str, Scalar], dict[str, Scalar], str]] = [
    (
        {"min_class_samples": 4},
        {"class_gradients__samples_per_class": 3},
        {"class_gradients__samples_per_class": 4},
        "class-gradients.samples-per-class = 3, and the site's min-class-samples is 4",
    ),
    (
        {"min_class_samples": 4, "gradient_samples": 6},
        {"privacy__min_class_samples": 7},
        {"privacy__min_class_samples": 6},
        "privacy.min-class-samples = 7, and the site's gradient-samples is 6",
    ),
    (
        {"min_noise_multiplier": 0.5},
        {"privacy__gradient_clip_norm": 1.0},
        {"privacy__gradient_clip_norm": 1.0, "privacy__gradient_noise_multiplier": 0.5},
        "gradient-noise-multiplier = 0, and the site's min-noise-multiplier is 0.5",
    ),
    (
        {"max_clip_norm": 2.0},
        {"privacy__gradient_clip_norm": 2.5},
        {"privacy__gradient_clip_norm": 2.0},
        "privacy.gradient-clip-norm = 2.5, and the site's max-clip-norm is 2",
    ),
    (
        {"max_clip_norm": 2.0},
        {"privacy__gradient_clip_norm": 0.0},
        {"privacy__gradient_clip_norm": 1.0},
        "privacy.gradient-clip-norm = 0, and the site's max-clip-norm is 2",
    ),
    (
        {"min_noise_multiplier": 0.5},
        {**NOISY, "method": "fedlda"},
        {
            **NOISY,
            "method": "fedlda",
            "privacy__moment_clip_norm": 1.0,
            "privacy__moment_noise_multiplier": 0.5,
        },
        "moment-noise-multiplier = 0, and the site's min-noise-multiplier is 0.5",
    ),
    (
        {"max_clip_norm": 2.0},
        {**NOISY, "head__delivered": "discriminant", "privacy__moment_clip_norm": 3.0},
        {**NOISY, "head__delivered": "discriminant", "privacy__moment_clip_norm": 2.0},
        "privacy.moment-clip-norm = 3, and the site's max-clip-norm is 2",
    ),
    (
        {"max_rounds": 3},
        {"federation__rounds": 4},
        {"federation__rounds": 3},
        "federation.rounds = 4, and the site's max-rounds is 3",
    ),
    (
        {"teachers": ""},
        {"method": "clip2fl"},
        {"method": "creff"},
        "teacher 'demo' is not among the site's teachers",
    ),
    (
        {},
        {"method": "clip2fl", "teacher__model": "hf-hub:someone/anything"},
        {"method": "clip2fl"},
        "teacher.model is from hf-hub:, and the site's hub-downloads is false",
    ),
    (
        {},
        {"method": "clip2fl", "teacher__model": "local-dir:/etc"},
        {"method": "clip2fl"},
        "teacher.model names a path outside the site's teacher-folders",
    ),
    (
        {"teacher_folders": "/opt/teachers"},
        {
            "method": "clip2fl",
            "teacher__model": "ViT-B-32",
            "teacher__pretrained": "/opt/teachers/../../etc/passwd",
        },
        {"method": "clip2fl"},
        "teacher.pretrained names a path outside the site's teacher-folders",
    ),
]


@pytest.mark.parametrize("place", ["node", "file"])
@pytest.mark.parametrize(("rule", "forbidden", "allowed", "reason"), RULES)
def test_run_against_a_rule_is_refused_in_every_answer_and_at_both_ends(
    tmp_path: Path,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    rule: dict[str, Any],
    forbidden: dict[str, Scalar],
    allowed: dict[str, Scalar],
    reason: str,
    place: str,
) -> None:
    node = SiteNode(folder, rule if place == "node" else policy(tmp_path, **rule))
    for kind in KINDS:
        caplog.clear()
        assert reason in refusal(node.ask(kind, site_run(**forbidden)))
        assert reason in caplog.text
    for kind in KINDS:
        works(node.ask(kind, site_run(**allowed)))


def test_hub_and_folders_may_be_allowed(tmp_path: Path, folder: Path) -> None:
    """The query, which loads nothing, is answered then."""
    teachers = tmp_path / "teachers"
    teachers.mkdir()
    (teachers / "elsewhere").symlink_to("/etc")
    for rule, model, answered in (
        ({"hub_downloads": True}, "hf-hub:someone/anything", True),
        ({"teacher_folders": f"/x, {teachers}"}, f"local-dir:{teachers}/clip", True),
        ({"teacher_folders": f"/x, {teachers}"}, f"local-dir:{teachers}x", False),
        (
            {"teacher_folders": f"/x, {teachers}"},
            f"local-dir:{teachers}/elsewhere",
            False,
        ),
    ):
        config = site_run(method="clip2fl", teacher__model=model)
        reply = SiteNode(folder, rule).ask("query", config)
        assert reply.has_error() != answered


@pytest.mark.parametrize("key", ["teacher__model", "teacher__pretrained"])
def test_answer_does_not_tell_whether_a_path_is_there(
    tmp_path: Path, folder: Path, key: str
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "open_clip_config.json").write_text("{}")
    answers = set()
    for place in (tmp_path / "there", tmp_path / "absent"):
        path = f"local-dir:{place}" if key == "teacher__model" else f"{place}/x.bin"
        changes: dict[str, Scalar] = {"teacher__model": "ViT-B-32", key: path}
        reply = SiteNode(folder).ask(
            "train",
            site_run(**changes),  # a method that needs no teacher, says the run
            distillation_weight=1.0,
            teacher_fingerprint="ab" * 32,
        )
        answers.add(refusal(reply))
    assert len(answers) == 1


def test_only_the_sites_teachers_are_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = load_teacher("demo").fingerprint
    config = site_run(method="clip2fl")
    wanted: dict[str, Any] = {"distillation_weight": 1.0}
    node = SiteNode(folder, {"teachers": f"{'0' * 12}, {own[:12]}"})
    for kind in ("train", "evaluate"):
        works(node.ask(kind, config, teacher_fingerprint=own, **wanted))
    # The server names an allowed fingerprint, but the weights here are others.
    node = SiteNode(folder, {"teachers": "ab" * 8})
    for kind in ("train", "evaluate"):
        reply = node.ask(kind, config, teacher_fingerprint="ab" * 32, **wanted)
        assert f"demo has the fingerprint {own[:12]} here" in told(reply)

    def never(*_: object, **__: object) -> None:
        pytest.fail("the teacher was loaded")

    monkeypatch.setattr(client, "load_teacher", never)
    client._teacher.cache_clear()
    for kind in ("train", "evaluate"):
        reply = node.ask(kind, config, teacher_fingerprint=own, **wanted)
        assert "is not among the site's teachers" in refusal(reply)
    for claimed in ("", "a"):
        reply = node.ask("train", config, teacher_fingerprint=claimed, **wanted)
        assert "is not among the site's teachers" in refusal(reply)


def test_sites_own_folder_has_the_teacher_whatever_path_the_run_names(
    tmp_path: Path, folder: Path
) -> None:
    """Its weights decide, by their fingerprint, and no path leaves the site."""
    for name, seed in (("own", 0), ("other", 1)):
        write_teacher(tmp_path / name, seed)
    expected = load_teacher(f"local-dir:{tmp_path / 'own'}").fingerprint
    wanted: dict[str, Any] = {
        "distillation_weight": 1.0,
        "teacher_fingerprint": expected,
    }
    for model in ("local-dir:/at/the/server", "ViT-B-32", "hf-hub:someone/anything"):
        run = site_run(method="clip2fl", teacher__model=model, model__feature_dim=512)
        own = SiteNode(folder, {"teacher_path": str(tmp_path / "own")})
        works(own.ask("query", run))
        other = SiteNode(folder, {"teacher_path": str(tmp_path / "other")})
        global_model = messages.model_to_arrays(
            build_model("resnet8-slim", len(CLASS_NAMES), 512)
        )
        works(own.ask("evaluate", run, model=global_model, **wanted))
        reply = told(other.ask("evaluate", run, model=global_model, **wanted))
        assert "has the fingerprint" in reply and str(tmp_path) not in reply
    # The built-in teacher comes with the program.
    demo = load_teacher("demo").fingerprint
    works(other.ask("evaluate", site_run(method="clip2fl"), teacher_fingerprint=demo))
    relative = SiteNode(folder, {"teacher_path": "own"})
    assert "rules are not usable" in refusal(relative.ask("query", run))


def test_sites_own_least_number_holds_whatever_the_run_says(folder: Path) -> None:
    """The site's number applies even if the run asks for more."""
    assert set(gradients(SiteNode(folder).ask("train", site_run()))) == {
        "circle",
        "star",
    }
    node = SiteNode(folder, {"min_class_samples": 6})
    assert set(gradients(node.ask("train", site_run()))) == {"circle"}
    demanding = site_run(privacy__min_class_samples=6)
    assert set(gradients(SiteNode(folder).ask("train", demanding))) == {"circle"}
    node = SiteNode(folder, {"min_class_samples": 2})
    assert set(gradients(node.ask("train", demanding))) == {"circle"}


@pytest.mark.parametrize(
    ("rules", "classes"),
    [
        ({}, {"circle", "star"}),
        ({"min_evaluation_samples": 2}, {"circle", "star"}),
        ({"min_evaluation_samples": 3}, {"circle"}),
        ({"min_class_samples": 3}, {"circle"}),
        ({"min_class_samples": 3, "min_evaluation_samples": 1}, {"circle", "star"}),
        ({"min_evaluation_samples": 50}, set()),
    ],
)
def test_class_with_few_validation_images_is_not_evaluated(
    tmp_path: Path, rules: dict[str, Any], classes: set[str]
) -> None:
    """A copy of an image counts neither as another image nor in the accuracy."""
    folder = write_site(tmp_path / "private", {"circle": 40, "star": 40})
    config = site_run(dataset__validation_share=0.5)
    files = {"circle": 3, "star": 2}
    keep_validation(folder, config.dataset, files)
    kept = next(p for p in validation_files(folder, config.dataset) if "star" in str(p))
    for i in range(3):
        (kept.parent / f"copy {i}.png").write_bytes(kept.read_bytes())
    reply = works(SiteNode(folder, rules).ask("evaluate", config))
    assert evaluated(reply) == classes
    least = rules.get("min_evaluation_samples", rules.get("min_class_samples", 1))
    held = {"circle": 3, "star": 5 if least == 1 else 2}
    assert images_in(reply) == sum(held[name] for name in classes)


def validation_files(folder: Path, dataset: Any) -> list[Path]:
    """Return the files of the validation images."""
    source = open_site(dataset, folder).test
    assert isinstance(source, FileSource)
    return list(source.paths)


def keep_validation(folder: Path, dataset: Any, counts: dict[str, int]) -> None:
    """Remove validation images until the given number of each class is left."""
    for name, count in counts.items():
        files = [p for p in validation_files(folder, dataset) if p.parent.name == name]
        assert len(files) >= count
        for path in files[count:]:
            path.unlink()


def test_message_sizes_are_bounded(folder: Path) -> None:
    arrays = messages.model_to_arrays(student())
    mib = sum(len(array.data) for array in arrays.values()) / 2**20
    for key in ("max_request_mib", "max_reply_mib"):
        works(SiteNode(folder, {key: 1.5 * mib}).ask("train", site_run()))
        reason = refusal(SiteNode(folder, {key: 0.5 * mib}).ask("train", site_run()))
        assert f"site's {key.replace('_', '-')} is" in reason
    # A limit on arrays alone would be easy to avoid.
    node = SiteNode(folder, {"max_request_mib": 1.5 * mib})
    reply = node.ask("train", site_run(), padding="x" * int(2**20 * mib))
    assert "max-request-mib" in refusal(reply)


def test_runs_are_counted(folder: Path) -> None:
    node = SiteNode(folder, {"max_runs": 2})
    for run in (1, 2, 1, 2):
        works(node.ask("evaluate", site_run(), run=run))
        works(node.ask("train", site_run(), run=run))
    for kind in KINDS:
        assert "answered 2 runs" in refusal(node.ask(kind, site_run(), run=3))
    works(node.ask("query", site_run(), run=2))


def test_a_query_is_no_run(folder: Path) -> None:
    node = SiteNode(folder, {"max_runs": 1})
    for run in (1, 2, 3):
        works(node.ask("query", site_run(), run=run))
    works(node.ask("train", site_run(), run=2))


def test_no_more_lists_of_classes_are_answered_than_runs(folder: Path) -> None:
    """Each answer, also to a query, tells whether the site holds another class."""
    node = SiteNode(folder, {"max_runs": 2})
    known = [*CLASS_NAMES, "ant"]
    works(node.ask("query", site_run(), run=1))
    works(node.ask("query", site_run(dataset__class_names=", ".join(known)), run=1))
    for left_out in CLASS_NAMES:
        others = ", ".join(name for name in known if name != left_out)
        for run in (1, 2):
            reply = node.ask("query", site_run(dataset__class_names=others), run=run)
            assert "answered 2 different lists of classes" in refusal(reply)
    works(node.ask("train", site_run(), run=2))


def test_model_of_another_type_trains_nothing(folder: Path) -> None:
    model = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in student().state_dict().items()
    }
    arrays = messages.state_to_arrays(model)
    reply = SiteNode(folder).ask("train", site_run(), model=arrays)
    assert reply.has_error() and "has the type torch.float64" in str(reply.error)


def test_rounds_are_counted_and_asking_again_counts(folder: Path) -> None:
    """Training and evaluation are counted separately, and anew in every run."""
    node = SiteNode(folder, {"max_rounds": 2})
    for run in (2**63 + 5, 4):
        works(node.ask("query", site_run(), run=run))
        for kind in ("train", "evaluate"):
            for _ in range(2):
                works(node.ask(kind, site_run(), run=run, server_round=1))
            reason = refusal(node.ask(kind, site_run(), run=run, server_round=1))
            assert f"2 requests to {kind} of this run, and its max-rounds is 2" in (
                reason
            )
        assert "max-rounds" in refusal(node.ask("query", site_run(), run=run))


def test_classifier_with_a_bias_for_each_image_evaluates_nothing(folder: Path) -> None:
    """The answer would tell how many images of each class there are."""
    head = nn.Linear(DIM, len(CLASS_NAMES))
    fair = messages.model_to_arrays(head)
    works(SiteNode(folder).ask("evaluate", site_run(), classifier=fair))
    images = len(validation_files(folder, site_run().dataset))
    bias = torch.zeros(images, len(CLASS_NAMES))
    unfair = messages.state_to_arrays({"weight": head.weight, "bias": bias})
    answer = SiteNode(folder).ask("evaluate", site_run(), classifier=unfair)
    assert f"an array of shape ({images}, " in refusal(answer)


def test_unreadable_image_of_a_strange_name_hinders_nobody(folder: Path) -> None:
    """Messages write a space that cannot be seen in another way than the disk does."""
    (folder / "star" / "Screenshot 9.41\u202fAM.png").write_bytes(b"no image")
    node = SiteNode(folder, {"min_class_samples": 2})
    works(node.ask("train", site_run(dataset__skip_unreadable=True)))

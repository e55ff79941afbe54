"""Test that CLIP2FL adds two terms to CReFF, and that each can be switched off."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from clip2fl_common import messages
from clip2fl_common.config import Scalar
from clip2fl_common.randomness import generator
from clip2fl_common.teacher import load_teacher
from strategy.clip2fl import CLIP2FL
from strategy.creff import CReFF
from strategy.retraining import retrain_classifier
from strategy.synthesis import (
    mean_class_gradients,
    prototype_contrastive_loss,
    synthesize,
)
from tests.defaults import run_config
from tests.strategy.messages import (
    client_plan,
    configure,
    global_model,
    made,
    random_gradients,
    random_model,
    safeguards,
    setting,
    train_reply,
)

CLASSES, DIM = 3, 6
PROTOTYPES = functional.normalize(
    torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(5)), dim=1
)


def strategies(
    text_features: torch.Tensor = PROTOTYPES, **changes: Scalar
) -> tuple[CLIP2FL, CReFF]:
    """Return a small CLIP2FL and the CReFF that it extends."""
    settings: dict[str, Scalar] = {
        "synthesis__steps": 6,
        "synthesis__contrast_weight": 0.5,
        "synthesis__contrast_temperature": 0.3,
        "distillation__weight": 0.75,
        "distillation__temperature": 2.5,
        "upload__precision": "full",
    }
    changed: dict[str, Scalar] = {**settings, **changes, **safeguards()}
    plan = client_plan(clients=2, per_round=2)
    shape = (CLASSES, DIM)
    clip2fl = made(CLIP2FL, plan, shape, text_features, **changed)
    return clip2fl, made(CReFF, plan, shape, **changed)


def one_round(strategy: CReFF, classes: list[int]) -> None:
    """Run round 1 with two clients that hold these classes."""
    arrays = global_model()
    replies = [
        train_reply(
            request,
            random_model(arrays, seed),
            10,
            random_gradients(classes, (CLASSES, DIM), seed),
        )
        for seed, request in enumerate(configure(strategy, arrays))
    ]
    strategy.aggregate_train(1, replies)


def test_requests_switch_distillation_on() -> None:
    """The requests equal CReFF's otherwise."""
    clip2fl, creff = strategies()
    arrays = global_model()
    for request, plain in zip(
        configure(clip2fl, arrays), configure(creff, arrays), strict=True
    ):
        assert set(request.content) == set(plain.content)
        assert dict(request.content.config_records[messages.CONFIG]) == {
            **plain.content.config_records[messages.CONFIG],
            messages.DISTILLATION_WEIGHT: 0.75,
            messages.DISTILLATION_TEMPERATURE: 2.5,
            messages.TEACHER_FINGERPRINT: "fingerprint-of-the-teacher",
        }
        parsed = messages.TrainRequest.parse(request.content)
        assert parsed.distillation_weight == 0.75
        assert parsed.distillation_temperature == 2.5
        assert parsed.teacher_fingerprint == "fingerprint-of-the-teacher"
        assert parsed.classifier is not None


def test_round_equals_its_parts_called_by_hand() -> None:
    strategy, _ = strategies()
    start = strategy.features.clone()
    weight = strategy.classifier.weight.detach().clone()
    bias = strategy.classifier.bias.detach().clone()
    one_round(strategy, [0, 1, 2])
    mean = mean_class_gradients(
        random_gradients([0, 1, 2], (CLASSES, DIM), seed) for seed in (0, 1)
    )
    features = synthesize(
        start,
        mean,
        weight,
        bias,
        PROTOTYPES,
        steps=6,
        learning_rate=run_config().synthesis.learning_rate,
        contrast_weight=0.5,
        temperature=0.3,
    )
    settings = run_config().retraining
    classifier = retrain_classifier(
        features,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        generator=generator(7, "retraining", 1),
    )
    assert torch.equal(strategy.features, features)
    assert torch.equal(strategy.classifier.weight, classifier.weight)
    assert torch.equal(strategy.classifier.bias, classifier.bias)
    assert strategy.round.losses["prototype_contrast"] == pytest.approx(
        prototype_contrastive_loss(features, PROTOTYPES, 0.3).item()
    )
    assert list(strategy.round.losses) == [
        "client",
        "distillation",
        "gradient_matching",
        "prototype_contrast",
    ]


def test_class_held_by_nobody_moves_to_its_prototype_only() -> None:
    """The features move like plain gradient descent on the contrastive loss."""
    strategy, creff = strategies()
    expected = strategy.features.clone()
    for _ in range(6):
        leaf = expected.clone().requires_grad_()
        loss = 0.5 * prototype_contrastive_loss(leaf, PROTOTYPES, 0.3)
        (gradient,) = torch.autograd.grad(loss, leaf)
        expected = expected - run_config().synthesis.learning_rate * gradient
    untouched = creff.features[1].clone()
    one_round(strategy, [0, 2])
    one_round(creff, [0, 2])
    torch.testing.assert_close(strategy.features[1], expected[1])
    assert not torch.equal(strategy.features[1], untouched)
    assert torch.equal(creff.features[1], untouched)


def test_without_its_terms_it_is_creff() -> None:
    strategy, creff = strategies(
        synthesis__contrast_weight=0.0, distillation__weight=0.0
    )
    one_round(strategy, [0, 1, 2])
    one_round(creff, [0, 1, 2])
    assert torch.equal(strategy.features, creff.features)
    assert torch.equal(strategy.classifier.weight, creff.classifier.weight)
    request = configure(strategy, global_model())[0]
    assert messages.TrainRequest.parse(request.content).distillation_weight == 0


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "distillation__weight",
            (
                "distillation.weight = 0: clients do not distil from the teacher; only "
                "the text prototypes at the server are left of CLIP2FL"
            ),
        ),
        (
            "synthesis__contrast_weight",
            (
                "synthesis.contrast-weight = 0: the text prototypes are not used; only "
                "the distillation at the clients is left of CLIP2FL"
            ),
        ),
    ],
)
def test_disabled_term_warns_and_says_what_is_left(
    flower_log: pytest.LogCaptureFixture, key: str, message: str
) -> None:
    strategies()
    assert "is left of CLIP2FL" not in flower_log.text
    assert "are left of CLIP2FL" not in flower_log.text
    off: dict[str, Any] = {key: 0.0}
    strategies(**off)
    assert [m for m in flower_log.messages if "left of CLIP2FL" in m] == [message]


def test_teacher_of_another_width_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"model\.feature-dim = 6, but the teacher's embedding has 8 dimensions; "
        r"set model\.feature-dim to that",
    ):
        strategies(text_features=torch.ones(CLASSES, 8))


def with_names(*names: str) -> CLIP2FL:
    """Return CLIP2FL of these classes, with the demo's teacher."""
    chosen = setting(client_plan(), (len(names), 512))
    return CLIP2FL(replace(chosen, class_names=names, teacher=load_teacher("demo")))


@pytest.mark.parametrize(
    ("names", "alike"),
    [
        (("cat", "dog", "ship"), "cat, dog, ship"),
        # To the demo's teacher a foreign word is its number of tokens.
        (("cat", "dog", "nevus", "fire truck"), "cat, dog; nevus, fire truck"),
        (("Star", "star"), "Star, star"),
    ],
)
def test_teacher_that_knows_no_class_teaches_nothing_and_says_so(
    names: tuple[str, ...], alike: str, flower_log: pytest.LogCaptureFixture
) -> None:
    with_names(*names)
    (warning,) = (line for line in flower_log.messages if "tell" in line)
    assert f"for them: {alike}. It teaches nothing of any class." in warning


def test_classes_that_the_teacher_does_not_tell_apart_are_named(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    with_names("star", "cat", "Star", "ring", "dog")
    (warning,) = (line for line in flower_log.messages if "tell" in line)
    assert warning.startswith(
        "the teacher demo does not tell these classes apart, as it has the same text "
        "feature for them: star, Star; cat, dog. Change their names"
    )


def test_classes_that_the_teacher_tells_apart_are_no_warning(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    with_names("star", "ring", "small red circle", "cat")
    assert "apart" not in flower_log.text


def test_summary_names_every_setting(flower_log: pytest.LogCaptureFixture) -> None:
    strategy, _ = strategies()
    with flower_log.at_level("INFO", logger="flwr"):
        strategy.summary()
    for text in (
        "Distillation: weight 0.75, temperature 2.5",
        "Prototype contrast: weight 0.5, temperature 0.3",
        "Teacher fingerprint: fingerprint-",
        "6 steps",
        "Drawn each round: 2 of 2",
    ):
        assert text in flower_log.text

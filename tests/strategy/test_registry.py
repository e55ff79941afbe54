"""Test the methods by name, and the guide for adding one."""

import pytest
import torch

from clip2fl_common import messages
from clip2fl_common.config import GRADIENT_METHODS, TEACHER_METHODS, ConfigError
from clip2fl_common.config.types import METHODS, MOMENTUM_METHODS, STATISTICS_METHODS
from clip2fl_common.teacher import load_teacher
from strategy import registry
from strategy.base import Method
from strategy.ccvr import CCVR
from strategy.clip2fl import CLIP2FL
from strategy.clip2fl_plus import CLIP2FLPlus
from strategy.clip2flm import CLIP2FLM
from strategy.creff import CReFF
from strategy.fedavg import FedAvg
from strategy.fedavgm import FedAvgM
from strategy.fedlda import FedLDA
from strategy.fedprox import FedProx
from strategy.setting import Setting
from tests.defaults import run_config
from tests.strategy.messages import client_plan

pytestmark = pytest.mark.usefixtures("federation_process")


def setting(method: str) -> Setting:
    """Return the setting of a small run."""
    teacher = load_teacher("demo") if method in TEACHER_METHODS else None
    config = run_config(
        method=method,
        fedprox__mu=0.3,
        fedavgm__momentum=0.8,
        fedavgm__learning_rate=0.7,
        federation__rounds=9,
        ccvr__virtual_features=6,
        ema__decay=0.6,
    )
    names = ("circle", "square", "star")
    return Setting(client_plan(), config, names, torch.device("cpu"), teacher)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ccvr", CCVR),
        ("clip2fl", CLIP2FL),
        ("clip2flm", CLIP2FLM),
        ("clip2fl-plus", CLIP2FLPlus),
        ("creff", CReFF),
        ("fedavg", FedAvg),
        ("fedavgm", FedAvgM),
        ("fedlda", FedLDA),
        ("fedprox", FedProx),
    ],
)
def test_method_takes_its_settings_from_the_configuration(
    name: str, expected: type[Method]
) -> None:
    chosen = setting(name)
    method = registry.method_named(name)
    assert method is expected
    assert method.needs_teacher == (name in TEACHER_METHODS)
    # What nodes and the checks of the configuration take a method for.
    assert (messages.GRADIENTS in method.reply_fields) == (name in GRADIENT_METHODS)
    statistics = messages.CLASS_STATISTICS in method.reply_fields
    assert statistics == (name in STATISTICS_METHODS)
    assert issubclass(method, FedAvgM) == (name in MOMENTUM_METHODS)
    strategy = method(chosen)
    assert strategy.clients is chosen.clients
    assert strategy.average.decay == 0.6
    if isinstance(strategy, FedProx):
        assert strategy.proximal_mu == 0.3
    if isinstance(strategy, FedAvgM):
        assert strategy.momentum == 0.8
        assert strategy.learning_rate == 0.7
    if isinstance(strategy, CCVR):
        assert strategy.virtual_features == 6
        assert strategy.retraining is chosen.config.retraining
    if isinstance(strategy, CReFF):
        assert strategy.shape == (3, 4, 512)
        assert strategy.synthesis is chosen.config.synthesis
        assert strategy.rounds == 9
    if isinstance(strategy, CLIP2FL):
        assert chosen.teacher is not None
        assert strategy.teacher_fingerprint == chosen.teacher.fingerprint
        prototypes = chosen.teacher.text_features(chosen.class_names)
        assert strategy.text_features is not None
        assert torch.equal(strategy.text_features, prototypes)
    # Tensors that a report may show; only methods with federated features have some.
    wanted: dict[type[Method], set[str]] = {
        CLIP2FL: {"features", "text_features"},
        CLIP2FLM: {"features", "text_features"},
        CLIP2FLPlus: {"features", "text_features"},
        CReFF: {"features"},
    }
    assert set(strategy.artifacts()) == wanted.get(expected, set())


def test_method_built_on_the_discriminant_needs_one() -> None:
    """Without it, it would deliver what FedAvg delivers, under another name."""
    with pytest.raises(ConfigError, match=r"set head.delivered = 'discriminant'"):
        FedLDA(setting("fedprox"))


@pytest.mark.parametrize("name", registry.METHODS)
def test_each_entry_is_a_method(name: str) -> None:
    assert name in METHODS
    assert issubclass(registry.method_named(name), Method)


def test_unknown_method_is_named_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError,
        match=r"method = 'fedavgn', but it must be one of ccvr, clip2fl, clip2flm, "
        r"clip2fl-plus, creff, fedavg, fedavgm, fedlda, fedprox .*; "
        r"did you mean 'fedavg",
    ):
        registry.method_named("fedavgn")

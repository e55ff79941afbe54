"""A node with images of its own, asked as a server would ask it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from torch import nn

from client_app.app import app
from client_app.site_epsilon import implied_fields
from clip2fl_common import messages
from clip2fl_common.config import RunConfig, Scalar
from clip2fl_common.data.demo import CLASS_NAMES
from clip2fl_common.models import ImageClassifier, build_model
from clip2fl_common.provenance import code_fingerprint
from tests.defaults import run_config

DIM = 16
KINDS = ("query", "train", "evaluate")
# Characters of an error that reach the server.
LONGEST_ERROR = 300


def site_run(**changes: Scalar) -> RunConfig:
    """Return the configuration of a tiny run of sites, without a teacher."""
    settings: dict[str, Scalar] = {
        "method": "creff",
        "dataset__name": "sites",
        "dataset__class_names": ", ".join(CLASS_NAMES),
        "dataset__image_size": 16,
        "model__feature_dim": DIM,
        "class_gradients__draws": 1,
        "class_gradients__augment": False,
        "upload__precision": "full",
    }
    return run_config(**{**settings, **changes})


def student() -> ImageClassifier:
    """Return a global model."""
    torch.manual_seed(3)
    return build_model("resnet8-slim", len(CLASS_NAMES), DIM)


@dataclass
class SiteNode:
    """Answers messages in this process, as a fresh one would.

    Attributes
    ----------
    folder : Path or None
        Its images; None: it has none.
    rules : mapping
        More of its node configuration; ``_`` stands for ``-``.
    """

    folder: Path | None
    rules: Mapping[str, Any] = field(default_factory=dict)

    def ask(
        self,
        kind: str,
        config: RunConfig | Mapping[str, Scalar],
        *,
        run: int = 1,
        server_round: int = 1,
        model: ArrayRecord | None = None,
        classifier: ArrayRecord | None = None,
        **settings: Any,
    ) -> Message:
        """Return the answer to a message; an error as Flower would send it."""
        flat = config.to_flat() if isinstance(config, RunConfig) else config
        content = RecordDict()
        if kind != "query":
            content[messages.ARRAYS] = model or messages.model_to_arrays(student())
            if kind == "train":
                # Without weights every image has the same residual.
                head = nn.Linear(DIM, len(CLASS_NAMES))
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
                content[messages.CLASSIFIER] = messages.model_to_arrays(head)
                if isinstance(config, RunConfig) and (own := implied_fields(config)):
                    settings = {"reply_fields": own, **settings}
            if classifier is not None:
                content[messages.CLASSIFIER] = classifier
            content[messages.CONFIG] = ConfigRecord(
                {
                    messages.ROUND: server_round,
                    messages.PARTITION: 5,
                    messages.CODE_FINGERPRINT: code_fingerprint(),
                    **{key.replace("_", "-"): v for key, v in settings.items()},
                }
            )
        message = Message(content, 42, kind)
        node: dict[str, Any] = {
            key.replace("_", "-"): value for key, value in self.rules.items()
        }
        if self.folder is not None:
            node["data-path"] = str(self.folder)
        context = Context(run, 42, node, RecordDict(), cast(Any, dict(flat)))
        try:
            return app(message, context)
        except Exception as error:  # as Flower's process does
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(code=2, reason=reason), reply_to=message)


def gradients(reply: Message) -> dict[str, tuple[npt.NDArray[Any], ...]]:
    """Return weight and bias of each class gradient in a reply, by class name."""
    arrays = reply.content.array_records[messages.GRADIENTS]
    weight, bias = arrays["weight"].numpy(), arrays["bias"].numpy()
    return {
        CLASS_NAMES[c]: (weight[i], bias[i])
        for i, c in enumerate(arrays["classes"].numpy().tolist())
    }


def mean_features(reply: Message) -> dict[str, npt.NDArray[Any]]:
    """Return what row over bias gives: the mean feature of a class's images."""
    return {
        name: weight[CLASS_NAMES.index(name)] / bias[CLASS_NAMES.index(name)]
        for name, (weight, bias) in gradients(reply).items()
    }


def images_in(reply: Message) -> int:
    """Return the number of images that a reply speaks of."""
    found = reply.content.metric_records[messages.METRICS][messages.NUM_EXAMPLES]
    assert isinstance(found, int)
    return found


def evaluated(reply: Message) -> set[str]:
    """Return the classes whose accuracy a reply has."""
    classes = reply.content.metric_records[messages.METRICS][messages.CLASSES]
    return {CLASS_NAMES[c] for c in np.atleast_1d(cast(Any, classes)).astype(int)}


def same(first: Message, second: Message) -> bool:
    """Tell whether two replies have the same class gradients, to the last bit."""
    one, two = gradients(first), gradients(second)
    return one.keys() == two.keys() and all(
        np.array_equal(a, b)
        for name in one
        for a, b in zip(one[name], two[name], strict=True)
    )


def refusal(reply: Message) -> str:
    """Return why a site's rules refuse."""
    assert reply.has_error(), "the site answered"
    assert reply.error.code == messages.SITE_REFUSES, reply.error
    return told(reply)


def told(reply: Message) -> str:
    """Return an error's text, which must be one bounded line."""
    reason = str(reply.error.reason)
    assert len(reason) <= LONGEST_ERROR and reason.isprintable(), reason
    return reason


def works(reply: Message) -> Message:
    """Return a reply that must not be an error."""
    assert not reply.has_error(), reply.error
    return reply


def policy(folder: Path, **rules: Any) -> dict[str, str]:
    """Write a policy file; return the node configuration that names it."""

    def shown(key: str, value: Any) -> str:
        if key in ("teachers", "teacher_folders"):
            return str([part for part in value.split(",") if part])
        return str(value).lower()

    lines = [f"{k.replace('_', '-')} = {shown(k, v)}" for k, v in rules.items()]
    path = folder / "policy.toml"
    path.write_text("\n".join(lines), "utf-8")
    return {"policy": str(path)}

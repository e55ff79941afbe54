"""Test accuracy at a client against a slow loop over single images."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from client_app.site_evaluation import predictions, recalls
from clip2fl_common.models import build_model


@pytest.mark.parametrize("count", [0, 1, 13])
def test_recalls_equal_a_slow_loop(count: int) -> None:
    torch.manual_seed(count)
    model = build_model("resnet8-slim", 3, 16)
    images = torch.randn(count, 3, 8, 8)
    labels = torch.randint(0, 2, (count,))  # class 2 has no images
    other = nn.Linear(16, 3)
    scores = torch.randn(count, 3)
    votes = predictions(
        model,
        images,
        {
            "own": (model.classifier.weight, model.classifier.bias),
            "other": (other.weight, other.bias),
        },
        {"given": scores},
        batch_size=4,
    )
    found = recalls(votes, labels)
    hits: dict[str, dict[int, list[bool]]] = {"own": {}, "other": {}, "given": {}}
    model.eval()
    for i, label in enumerate(labels.tolist()):
        with torch.no_grad():
            features = model.features(images[i : i + 1])[0]
            own = model(images[i : i + 1])[0]
            others = functional.linear(features, other.weight, other.bias)
        for name, logits in (("own", own), ("other", others), ("given", scores[i])):
            hits[name].setdefault(label, []).append(int(logits.argmax()) == label)
    assert found == {
        name: {c: pytest.approx(100 * sum(h) / len(h)) for c, h in sorted(by.items())}
        for name, by in hits.items()
    }

"""The mean of two classifiers is their ensemble, and no other."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common.models import build_model
from strategy.mean_head import mean_head


@given(st.floats(0, 0.999), st.integers(0, 2**31))
def test_logits_are_the_weighted_mean_of_both_classifiers_logits(
    share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = build_model("resnet8-slim", 4, 6)
    retrained = torch.nn.Linear(6, 4)
    before = {name: value.clone() for name, value in retrained.state_dict().items()}
    features = torch.randn(20, 6)
    mean = mean_head(retrained, model.state_dict(), share)
    expected = (1 - share) * retrained(features) + share * model.classifier(features)
    torch.testing.assert_close(mean(features), expected)
    assert all(torch.equal(before[n], v) for n, v in retrained.state_dict().items())

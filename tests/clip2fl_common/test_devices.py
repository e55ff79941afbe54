"""The setting of TF32 holds within its block only."""

import pytest
import torch

from clip2fl_common.choices import TF32
from clip2fl_common.devices import tensor_cores, tf32_state
from tests.defaults import default_config


@pytest.mark.parametrize(
    ("allowed", "state"),
    [("off", (False, False)), ("convolutions", (True, False)), ("all", (True, True))],
)
def test_products_are_rounded_as_told_and_only_within_the_block(
    allowed: TF32, state: tuple[bool, bool]
) -> None:
    before = tf32_state()
    with pytest.raises(ZeroDivisionError), tensor_cores(allowed):
        assert tf32_state() == state
        assert torch.backends.cudnn.allow_tf32 == state[0]
        assert torch.backends.cuda.matmul.allow_tf32 == state[1]
        raise ZeroDivisionError
    assert tf32_state() == before


def test_default_is_torchs() -> None:
    """So the key changes nothing for runs that do not set it."""
    allowed = default_config()["client.tf32"]
    before = tf32_state()
    with tensor_cores(allowed):  # type: ignore[arg-type]
        assert tf32_state() == before == (True, False)

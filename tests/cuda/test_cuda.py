"""Everything that computes, on a GPU."""

from collections.abc import Callable

import pytest
import torch

from tests.cuda.checks import CHECKS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", CHECKS)
def test_gpu_computes_what_the_cpu_does(check: Callable[[torch.device], None]) -> None:
    check(torch.device("cuda"))

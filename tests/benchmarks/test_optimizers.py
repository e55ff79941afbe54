"""Every optimizer is timed, on one batch."""

import torch

from benchmarks.optimizers import table


def test_table_has_a_row_for_each_optimizer() -> None:
    rows = table("resnet8-slim", 2, 3, 2, torch.device("cpu")).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [name for name, _, _ in cells] == ["sgd", "momentum", "adam", "muon"]
    assert cells[0][2] == "1 (1-1)"
    for _, milliseconds, ratio in cells:
        assert float(milliseconds.split()[0]) > 0
        assert float(ratio.split()[0]) > 0

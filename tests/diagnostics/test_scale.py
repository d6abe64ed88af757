"""What is a ratio of squares does not change with the scale of its numbers, however large or small they are."""

from __future__ import annotations

import pytest
import torch

from spectralmoe.diagnostics.geometry import row_cosines, row_spread
from spectralmoe.diagnostics.similarity import cosine_matrix, linear_cka, subspace_overlap, weight_cosine

OF_ROWS = {"row_cosines": row_cosines, "row_spread": lambda m: torch.tensor(row_spread(m).value)}
OF_OUTPUTS = {
    "cosine_matrix": cosine_matrix,
    "linear_cka": linear_cka,
    "subspace_overlap": lambda outputs: subspace_overlap(outputs, 2),
}
scales = pytest.mark.parametrize("scale", [1e-200, 1e-25, 1e25, 1e200])


@scales
@pytest.mark.parametrize("measure", [*OF_ROWS.values(), weight_cosine], ids=[*OF_ROWS, "weight_cosine"])
def test_of_rows(measure, scale, close):
    rows = torch.randn(4, 9, dtype=torch.float64)
    close(measure(rows * scale), measure(rows))


@scales
@pytest.mark.parametrize("name", OF_OUTPUTS)
def test_of_outputs(name, scale, close):
    outputs = torch.randn(3, 40, 6, dtype=torch.float64)
    close(OF_OUTPUTS[name](outputs * scale), OF_OUTPUTS[name](outputs))
    assert OF_OUTPUTS[name](outputs).isfinite().all()


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_in_fp32(scale, close):
    rows = torch.randn(4, 9)
    close(row_cosines(rows * scale), row_cosines(rows), torch.float32)
    close(weight_cosine(rows * scale), weight_cosine(rows), torch.float32)

"""Who is chosen: by the definition, and without reading every index."""

from __future__ import annotations

import pytest
import torch

from dtmsearch.model.forward.head_metrics import _diverged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_levels", [2, 40, 1_000_000])
def test_a_token_diverges_where_argmax_over_the_allowed_ones_is_another(dtype: torch.dtype, num_levels: int) -> None:
    torch.manual_seed(0)
    # Few levels make many equals, among them the target; every token is a target somewhere, forbidden ones too.
    scores = (torch.randint(num_levels, (600, 60)) / num_levels).to(dtype).float()
    never = torch.zeros(60, dtype=torch.bool)
    never[[0, 7, 59]] = True
    targets = torch.arange(600) % 60
    targets[:200] = scores[:200].masked_fill(never, -torch.inf).argmax(dim=1)
    expected = scores.masked_fill(never, -torch.inf).argmax(dim=1) != targets
    assert 0 < int(expected.sum()) < 600
    assert torch.equal(_diverged(scores, targets, never), expected)

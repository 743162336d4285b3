"""The fused comparison against the plain one, on a GPU (or in Triton's interpreter: TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import pytest
import torch

from dtmsearch.model.forward.head_metrics import _score

pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU")


def inputs(vocabulary: int, with_base: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    torch.manual_seed(0)
    logits, base = (3 * torch.randn(9, vocabulary, device=DEVICE) for _ in range(2))
    logits[0, 5] = logits[0, vocabulary - 1] = 20.0  # equals: the first is chosen
    logits[1, 7] = 50.0  # may not be chosen
    targets = torch.randint(vocabulary, (9,), device=DEVICE)
    targets[0] = 5
    never = torch.zeros(vocabulary, dtype=torch.bool, device=DEVICE)
    never[7] = True
    return logits, targets, base if with_base else None, never


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("vocabulary", [50, 4_096, 9_001])
def test_fused_scores_are_the_plain_ones(vocabulary: int, with_base: bool) -> None:
    from dtmsearch.model.forward.kernels import score

    logits, targets, base, never = inputs(vocabulary, with_base)
    fused = score(logits, targets, base, never)
    plain = _score(logits.clone(), targets, base, never)
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_not_finite_has_no_finite_likelihood() -> None:
    from dtmsearch.model.forward.kernels import score

    logits, targets, base, never = inputs(300, True)
    logits[2, 11] = torch.nan
    logits[3, 12] = torch.inf
    assert not score(logits, targets, base, never)[1][2:4].isfinite().any()


def test_targets_that_lie_apart_are_read_where_they_lie() -> None:
    from dtmsearch.model.forward.kernels import score

    logits, targets, base, never = inputs(300, True)
    apart = torch.stack([targets, targets.roll(1)], dim=1)[:, 0]
    for one, other in zip(score(logits, apart, base, never), score(logits, targets, base, never), strict=True):
        assert torch.equal(one, other)

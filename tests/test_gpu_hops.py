"""What the parts of a model over several GPUs are given is moved before they are called. On one device
nothing has to move; that it arrives as it was is shown where there are two GPUs (`test_two_gpus.py`)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtmsearch.model.forward import gpu_hops
from dtmsearch.model.forward.gpu_hops import connect
from dtmsearch.model.modules.compat import uncompiled

CPU = torch.device("cpu")


class Model(nn.Module):
    """Two layers, which read what they are given and a tensor that all of them read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, values: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            values = layer(values, shift=shift)
        return values


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, values: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.linear(values) + shift
        return made


def test_layers_get_what_was_moved_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(gpu_hops.Hops, "moved", lambda self, tensor, device: (asked.append(tensor), tensor + 1)[1])
    model, values, shift = Model(), torch.ones(2, 4), torch.ones(4)
    other = Model()
    connect(model, model, {"layers.0": CPU, "layers.1": CPU})
    expected = values
    for layer in other.layers:
        expected = layer(expected + 1, shift=shift + 1)
    assert torch.equal(model(values, shift), expected)
    assert len(asked) == 4
    with uncompiled(model.layers):  # as layers that could be compiled run where shapes change with every token
        assert torch.equal(model(values, shift), expected)
    assert torch.equal(model(values, shift), expected)
    assert len(asked) == 12

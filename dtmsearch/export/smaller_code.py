"""The file of code that lies beside the weights of a smaller model which no ordinary configuration says."""

from __future__ import annotations

CODE_FILE = "modeling_without_blocks.py"
TYPE_ENDING = "_without_blocks"


def code_of(model: str, config: str, model_type: str) -> str:
    """The file of code that builds a family's model without the blocks that its configuration names, and with smaller
    matrices where it says so."""
    return f'''"""{model} without some of its attention and MLP blocks, those that config.json names under `left_out`,
with matrices of fewer rows or columns, those that it names under `cut`, and mixtures of `fewer_experts`.

Written by dtmsearch. transformers runs this file where it is told trust_remote_code=True, and refuses the folder where
it is not: as an ordinary {model_type} model it would be loaded with random weights in the place of what is left out or
smaller.
Engines with model code of their own (vLLM, SGLang, llama.cpp) do not load it.
"""

import torch
from torch import nn
from transformers import Cache, {config}, {model}

try:
    from transformers import conversion_mapping
except ImportError:
    conversion_mapping = None

# Names and stacks of weights in files and in the model differ as they do in the family's own checkpoints.
if conversion_mapping is not None:
    renamed = conversion_mapping.get_checkpoint_conversion_mapping("{model}")
    renamed = renamed or conversion_mapping.get_checkpoint_conversion_mapping("{model_type}")
    if renamed is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(
            "{model_type}{TYPE_ENDING}", renamed, overwrite=True
        )


class LeftOut(nn.Module):
    """In the place of a block, which adds nothing: it returns zeros or, where the block itself would add its output to
    one of its arguments, that argument. An attention's cache is told how many tokens have passed."""

    def __init__(self, kind, outputs, layer, residual):
        super().__init__()
        self.kind, self.outputs, self.layer, self.residual = kind, outputs, layer, residual

    def forward(self, *args, **kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        for cache in (*args, *kwargs.values()):
            if self.kind == "attention" and isinstance(cache, Cache):
                if self.layer < len(cache.layers) and not hasattr(cache.layers[self.layer], "update"):
                    continue  # states of linear attention, which have no length
                nothing = states.new_zeros(states.shape[0], 1, states.shape[1], 1)
                cache.update(nothing, nothing, self.layer)
        held = args if isinstance(self.residual, int) else kwargs
        made = torch.zeros_like(states) if self.residual is None else held[self.residual]
        return (made, *[None] * (self.outputs - 1)) if self.outputs else made


class WithoutBlocksConfig({config}):
    model_type = "{model_type}{TYPE_ENDING}"


class WithoutBlocks({model}):
    config_class = WithoutBlocksConfig

    def __init__(self, config):
        super().__init__(config)
        for name, (kind, outputs, residual) in config.left_out.items():
            parent, _, child = name.rpartition(".")
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            setattr(self.get_submodule(parent), child, LeftOut(kind, outputs, layer, residual))
        for name, (rows, cols) in config.cut.items():
            parent, _, child = name.rpartition(".")
            before = self.get_submodule(name)
            if isinstance(before, nn.Linear):
                made = nn.Linear(cols, rows, bias=before.bias is not None)
            else:
                made = type(before)(rows, cols)
            setattr(self.get_submodule(parent), child, made)
        for name, mixture in config.fewer_experts.items():
            block = self.get_submodule(name)
            for path, shape in mixture["tensors"].items():
                parent, _, child = path.rpartition(".")
                module = block.get_submodule(parent)
                held = module._parameters if child in module._parameters else module._buffers
                made = held[child].new_empty(shape)
                held[child] = nn.Parameter(made) if held is module._parameters else made
            for path, number, left in mixture["numbers"]:
                setattr(block.get_submodule(path), number, left)
'''

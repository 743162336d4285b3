"""Which tensors of a checkpoint's files hold a component, by their names."""

from __future__ import annotations

from collections.abc import Mapping

# How files name the parts of a stacked matrix of one expert, above each other, and the module that holds the experts
# where it is not the model's: the families that transformers puts together when it loads them.
_EXPERT_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",), ("w3",)),
    "down_proj": (("down_proj",), ("w2",)),
}
_EXPERTS_ELSEWHERE = ("block_sparse_moe", "feed_forward")
Shapes = Mapping[str, tuple[int, ...]]


def tensor_of(parameter: str, shapes: Shapes) -> str:
    """The name in the files of a parameter that is a tensor there; its own name where there is none."""
    below_base = parameter.partition(".")[2]
    # Saved without the head, the files lack the name of what is below it.
    return below_base if parameter not in shapes and below_base in shapes else parameter


def tensors_of(component: str, shapes: Shapes) -> tuple[str, ...]:
    """The tensors that hold a component, several one above the other, or the one that holds it among other experts'
    (of three dimensions); none where the files hold it in another form."""
    whole = tensor_of(f"{component}.weight", shapes)
    if whole in shapes:
        return (whole,)
    experts, _, rest = component.rpartition(".experts.")
    expert, _, stack = rest.partition(".")
    if f"{experts}.experts.{stack}" in shapes:
        return (f"{experts}.experts.{stack}",)
    for parent in (experts, *(f"{experts.rpartition('.')[0]}.{other}" for other in _EXPERTS_ELSEWHERE)):
        for parts in _EXPERT_PARTS.get(stack, ()):
            tensors = tuple(f"{parent}.experts.{expert}.{part}.weight" for part in parts)
            if all(tensor in shapes for tensor in tensors):
                return tensors
    return ()

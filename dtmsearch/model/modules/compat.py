"""All that is used of torch, transformers, accelerate, bitsandbytes and compressed-tensors that is private there, or
that their releases have renamed. Nothing else under `model` and `export` names it; tests/test_compat.py says which name
a release has broken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as Operations
from torch.utils._pytree import tree_leaves as leaves_of
from transformers import Cache, StaticCache, masking_utils
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.pytorch_utils import Conv1D

from dtmsearch.core.library_versions import ForeignName

__all__ = ["NAMES", "Cache", "Conv1D", "Operations", "leaves_of"]

# Where transformers puts the modules that come with a checkpoint.
_CUSTOM_CODE = "transformers_modules"
# A module of bitsandbytes' 4-bit layers: whether it packs its weights anew for CPUs with AVX512-BF16.
_REPACKS = "support_avx512bf16_for_cpu"
# `python -m` with it starts a training in several processes.
LAUNCHER = "accelerate.commands.launch"


# torch


def exchange_child(parent: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module in a place of its parent's; the one that stood there. `setattr` would look through parameters and
    buffers first, at every layer of every pass. Raises `KeyError` where there is no such place."""
    before = parent._modules[name]
    assert before is not None, f"nothing stands at {name}"
    parent._modules[name] = module
    return before


def move_loaded(module: nn.Module, device: torch.device) -> None:
    """Move a module to a device, but what has no weights (on `meta`)."""
    module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def int8_product(shape: tuple[int, int], device: torch.device) -> Callable[[Tensor], Tensor]:
    """PyTorch's product of bfloat16 inputs [1, tokens, inputs] with a matrix of 8-bit codes, a scale a row."""
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    scales = torch.ones(shape[0], dtype=torch.bfloat16, device=device)
    return lambda inputs: torch.ops.aten._weight_int8pack_mm(inputs[0], codes, scales)


def int4_product(shape: tuple[int, int], group: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """PyTorch's product of bfloat16 inputs [1, tokens, inputs] with a matrix of 4-bit codes in groups of a row."""
    ops, (outputs, inputs) = torch.ops.aten, shape
    scales = torch.ones((inputs // group, outputs, 2), dtype=torch.bfloat16, device=device)
    if device.type == "cpu":
        packed = ops._convert_weight_to_int4pack_for_cpu(torch.randint(16, shape, dtype=torch.int32), 1)
        return lambda given: ops._weight_int4pack_mm_for_cpu(given[0], packed, group, scales)
    pairs = torch.randint(256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    tiled = ops._convert_weight_to_int4pack(pairs, 8)
    return lambda given: ops._weight_int4pack_mm(given[0], tiled, group, scales)


def allow_graphs(number: int) -> None:
    """Let `torch.compile` keep so many graphs of one layer."""
    torch._dynamo.config.recompile_limit = number
    torch._dynamo.config.accumulated_recompile_limit = 64 * number


class _Preceded:
    """A module's call, before which something else is done. Of a hook's doing a compiled call would make a part of its
    graph."""

    def __init__(self, before: Callable[[], None], call: Callable[..., Any]) -> None:
        self.before, self.call = before, call

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        self.before()
        return self.call(*inputs, **named)


def precede(module: nn.Module, before: Callable[[], None]) -> None:
    """Have something done before each call of a module, compiled or not."""
    module._compiled_call_impl = _Preceded(before, module._call_impl)


def compile_call(module: nn.Module) -> None:
    """Compile a module in place, for shapes as they come."""
    before = module._compiled_call_impl
    module.compile(dynamic=False)
    if isinstance(before, _Preceded):
        module._compiled_call_impl = _Preceded(before.before, module._compiled_call_impl)  # type: ignore


@contextmanager
def uncompiled(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within, compiled layers run eagerly."""
    compiled = [(layer, layer._compiled_call_impl) for layer in layers]
    for layer, call in compiled:
        layer._compiled_call_impl = None
        if isinstance(call, _Preceded):
            precede(layer, call.before)
    try:
        yield
    finally:
        for layer, call in compiled:
            layer._compiled_call_impl = call


def multiply_each(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply tensors in place, each by its own factor, in one call of the device."""
    torch._foreach_mul_(list(tensors), list(factors))


def storage_of(tensor: Tensor) -> int:
    """The identity of the memory that a tensor is a view of, with values in it or without."""
    return int(tensor.untyped_storage()._cdata)


# transformers


@dataclass
class BodyOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Of all else that a family's head asks of its body's output there is nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextmanager
def no_packed_sequences() -> Iterator[None]:
    """Rows are never several packed sequences here. transformers would ask the device so at every pass, and the host
    would wait for all work under way before it could hand out more."""
    own = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own


def fixed_cache(model: Any, length: int) -> Cache:
    """A cache for texts of so many tokens."""
    return StaticCache(model.config.get_text_config(), max_cache_len=length)


def unconverted_parameters(error: BaseException) -> list[str]:
    """The parameters that could not be made of a checkpoint's tensors. transformers prints them, but its error does not
    hold them: they are in the frames that it came through."""
    trace = error.__traceback__
    while trace is not None:
        found = getattr(trace.tb_frame.f_locals.get("loading_info"), "conversion_errors", None)
        if found:
            return sorted(found)
        trace = trace.tb_next
    return []


def keep_no_activations(model: nn.Module) -> None:
    """Let a model's layers compute their activations again in the backward pass. transformers calls it otherwise before
    release 5.20."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def attention_of(model: Any) -> str:
    """The attention that a loaded model runs."""
    return getattr(model.config, "_attn_implementation", None) or "sdpa"


def path_of(model: Any) -> str:
    """The folder or hub id that a model object was loaded from; empty where it was not."""
    return str(getattr(model.config, "_name_or_path", "") or "")


def loaded_by(auto: Any, config: Any) -> Any:
    """The class of models that one of transformers' automatic classes has for a configuration; None where none."""
    return auto._model_mapping.get(type(config), None)


def kept_in_float32(model: Any, dtype: torch.dtype) -> frozenset[str]:
    """Parts of the names of parameters that stay in 32 bits where the model is loaded in `dtype`."""
    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype.itemsize < 4 else set()
    return frozenset(kept | set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else kept)


def names_in_files(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of a model's parameters -> by those that they have in its checkpoints, put together or taken
    apart as there."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return reverted


def is_ignored(model: Any, name: str) -> bool:
    """Whether a model's class leaves out a tensor of its checkpoints, as it does with layers that predict further
    tokens."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, name) for pattern in patterns)


def mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
    """What MXFP4 blocks [experts, outputs, groups, bytes] with their scales stand for, [experts, inputs, outputs] in
    float32, as transformers' own quantizer has it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    values: Tensor = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return values


def gguf_settings() -> Any:
    """What tells transformers to unpack a GGUF file while it loads it. Releases before 5.20 do so anyway."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    return None if kind is None else kind(dequantize=True)


def is_custom_code(kind: type) -> bool:
    """Whether a class comes with a checkpoint."""
    return kind.__module__.startswith(_CUSTOM_CODE)


def tied_parameters(model: Any) -> set[str]:
    """Names of parameters that are another's, and need not be in a checkpoint."""
    return set(model.all_tied_weights_keys)


# accelerate


def is_configured() -> bool:
    """Whether accelerate's configuration on this machine says how trainings are spread."""
    from accelerate.commands.config.config_args import default_config_file

    return Path(default_config_file).is_file()


def flattens_parameters(accelerator: Any) -> bool:
    """Whether an accelerator shards by FSDP of version 1, under which parameters lose their shapes."""
    from accelerate.utils import DistributedType

    return accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2


def plain_names(named: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Parameters by the names that they have in the model itself, whatever wraps its layers."""
    from accelerate.utils import fsdp2_canonicalize_names

    names: dict[str, nn.Parameter] = fsdp2_canonicalize_names(dict(named))
    return names


def each_tensor(change: Callable[..., Any], values: Any, *arguments: Any, **options: Any) -> Any:
    """`values`, in whatever nesting, with `change` made to each tensor in it (or what `test_type` says)."""
    from accelerate.utils import recursively_apply

    return recursively_apply(change, values, *arguments, **options)


# bitsandbytes


def keep_scales(module: nn.Module) -> None:
    """Keep a 4-bit layer from rounding its scales once more, which bitsandbytes does on CPUs with AVX512-BF16."""
    if hasattr(module, _REPACKS):
        setattr(module, _REPACKS, False)


def repacks_4bit() -> bool:
    """Whether this CPU has AVX512-BF16, for which bitsandbytes packs 4-bit weights anew at their first use: scales are
    rounded to bfloat16, inputs too, and rows that are no multiple of 32 end in an error."""
    from bitsandbytes import functional

    return bool(functional.has_avx512bf16())


def restored_4bit(codes: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The weights of 4-bit codes, by the tensors that stand beside them in a checkpoint."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    weights: Tensor = dequantize_4bit(codes, QuantState.from_dict(state, codes.device))
    return weights


# compressed-tensors


def packed_to_int32(codes: Tensor, bits: int, packed_dim: int = 1) -> Tensor:
    """Codes of `bits` bits as that library packs them, in words of 32 bits along a dimension."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed: Tensor = pack_to_int32(codes, bits, packed_dim=packed_dim)
    return packed


def decompressed(tensors: dict[str, Tensor], scheme: Any) -> Tensor:
    """The weight that a scheme of a checkpoint's quantization config makes of a module's tensors."""
    from compressed_tensors.compressors import BaseCompressor

    weight: Tensor = BaseCompressor.get_value_from_registry(scheme.format).decompress(tensors, scheme)["weight"]
    return weight


def _children() -> object:
    return nn.Sequential(nn.Identity())._modules["0"]


def _repacks() -> object:
    from bitsandbytes.nn.modules import Linear4bit

    return getattr(Linear4bit(1, 1, device="meta"), _REPACKS)


def _config(name: str) -> Callable[[], object]:
    def find() -> object:
        from transformers import LlamaConfig

        return getattr(LlamaConfig(), name)

    return find


def _conversion_errors() -> object:
    from transformers.utils.loading_report import LoadStateDictInfo

    return LoadStateDictInfo.__dataclass_fields__["conversion_errors"]


def _tied() -> object:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        )
    return model.all_tied_weights_keys


def _checkpointing() -> object:
    from transformers import PreTrainedModel

    return getattr(PreTrainedModel, "activation_checkpointing_enable", PreTrainedModel.gradient_checkpointing_enable)


def _dynamic_modules() -> object:
    from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

    return {_CUSTOM_CODE: True}[TRANSFORMERS_DYNAMIC_MODULE_NAME]


def _model_mapping() -> object:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText._model_mapping.get


def _storage_identity() -> object:
    return torch.empty(1, device="meta").untyped_storage()._cdata


def _operation(name: str) -> Callable[[], object]:
    return lambda: getattr(torch.ops.aten, name)


_WRAPPED: set[str] = set()
SeesCache = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


def wrap_attention(name: str, through: SeesCache) -> bool:
    """Have all attentions of an implementation of transformers' read keys and values (both [prompts, heads, tokens,
    head_dim], of all tokens that are kept) as `through` gives them back; False where it has none of that name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if name in _WRAPPED:
        return True
    if name not in ALL_ATTENTION_FUNCTIONS:
        return False
    original = ALL_ATTENTION_FUNCTIONS[name]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(module, query, *through(module, key, value), *args, **kwargs)

    AttentionInterface.register(name, attention)
    _WRAPPED.add(name)
    return True


NAMES: tuple[ForeignName, ...] = (
    ForeignName("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS", "round what attention keeps of tokens"),
    ForeignName("transformers.modeling_utils.AttentionInterface.register", "round what attention keeps of tokens"),
    ForeignName("torch.nn.Module._modules", "put modules in a component's or a layer's place", _children),
    ForeignName("torch.nn.Module._apply", "move a stage's layers to its device"),
    ForeignName("torch.nn.Module._compiled_call_impl", "run compiled layers eagerly for a while"),
    ForeignName("torch.nn.Module._call_impl", "bring a layer's weights before it runs"),
    ForeignName("torch._dynamo.config.recompile_limit", "keep a graph for each batch shape"),
    ForeignName("torch._dynamo.config.accumulated_recompile_limit", "keep a graph for each batch shape"),
    ForeignName("torch.utils._python_dispatch.TorchDispatchMode", "watch how a model uses its parameters"),
    ForeignName("torch.utils._pytree.tree_leaves", "watch how a model uses its parameters"),
    ForeignName("torch.UntypedStorage._cdata", "watch how a model uses its parameters", _storage_identity),
    ForeignName(
        "torch.ops.aten._weight_int8pack_mm", "time products with 8-bit codes", _operation("_weight_int8pack_mm")
    ),
    ForeignName(
        "torch.ops.aten._weight_int4pack_mm_for_cpu",
        "time products with 4-bit codes",
        _operation("_weight_int4pack_mm_for_cpu"),
    ),
    ForeignName(
        "torch.ops.aten._convert_weight_to_int4pack_for_cpu",
        "time products with 4-bit codes",
        _operation("_convert_weight_to_int4pack_for_cpu"),
    ),
    ForeignName(
        "torch.ops.aten._weight_int4pack_mm", "time products with 4-bit codes", _operation("_weight_int4pack_mm")
    ),
    ForeignName(
        "torch.ops.aten._convert_weight_to_int4pack",
        "time products with 4-bit codes",
        _operation("_convert_weight_to_int4pack"),
    ),
    ForeignName("torch._foreach_mul_", "hold masks over gradients"),
    ForeignName("transformers.masking_utils.find_packed_sequence_indices", "spare the device a question at every pass"),
    ForeignName("transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions", "run the head alone"),
    ForeignName("transformers.pytorch_utils.Conv1D", "find GPT-2's matrices"),
    ForeignName("transformers.cache_utils.StaticCache", "generate without copying the cache"),
    ForeignName("transformers.PretrainedConfig._attn_implementation", "tell a model object's attention"),
    ForeignName("transformers.PretrainedConfig._name_or_path", "name a model object", _config("_name_or_path")),
    ForeignName("transformers.PreTrainedModel._keep_in_fp32_modules_strict", "export what stays in 32 bits"),
    ForeignName("transformers.PreTrainedModel._keep_in_fp32_modules", "export what stays in 32 bits"),
    ForeignName("transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected", "export layers that are not run"),
    ForeignName("transformers.core_model_loading.revert_weight_conversion", "name an export's tensors"),
    ForeignName("transformers.PreTrainedModel.all_tied_weights_keys", "load an export's tied weights", _tied),
    ForeignName("transformers.PreTrainedModel.activation_checkpointing_enable", "train in less memory", _checkpointing),
    ForeignName("transformers.utils.hub.TRANSFORMERS_DYNAMIC_MODULE_NAME", "tell custom code", _dynamic_modules),
    ForeignName("transformers.LoadStateDictInfo.conversion_errors", "say what a checkpoint lacks", _conversion_errors),
    ForeignName("transformers.AutoModelForImageTextToText._model_mapping", "load wrapped models", _model_mapping),
    ForeignName("transformers.integrations.mxfp4.convert_moe_packed_tensors", "read sources in MXFP4"),
    ForeignName("transformers.GgufConfig", "read GGUF files"),
    ForeignName("accelerate.commands.config.config_args.default_config_file", "see whether trainings are spread"),
    ForeignName("accelerate.commands.launch", "start a training in several processes"),
    ForeignName("accelerate.utils.fsdp2_canonicalize_names", "find parameters under FSDP"),
    ForeignName("accelerate.Accelerator.is_fsdp2", "refuse FSDP that flattens parameters"),
    ForeignName("accelerate.utils.recursively_apply", "send states between stages"),
    ForeignName("bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu", "measure what the file holds", _repacks),
    ForeignName("bitsandbytes.functional.has_avx512bf16", "tell CPUs that pack 4-bit weights anew"),
    ForeignName("bitsandbytes.functional.QuantState.from_dict", "read sources in 4 bits of bitsandbytes"),
    ForeignName("compressed_tensors.compressors.pack_quantized.helpers.pack_to_int32", "pack codes for an export"),
    ForeignName("compressed_tensors.compressors.BaseCompressor.get_value_from_registry", "check an export"),
)

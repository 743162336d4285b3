"""Tiny models of random weights of every family of the installed transformers, and a check of one: whether a search
finds its components, and whether what it measures equals plain code."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# As `dtmsearch.workflows.export_check.measure_apart`.
Measure = Callable[..., dict[str, list[float]]]

# What is small in every family that knows the key; text, vision and audio parts alike.
TINY: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "decoder_start_token_id": 0,
    "initializer_range": 0.2,
    # other words for the same
    "n_embd": 32,
    "d_model": 32,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "n_positions": 128,
    "n_ctx": 128,
    "ffn_dim": 48,
    "n_inner": 48,
    "max_seq_len": 128,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    # mixtures
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 48,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "o_groups": 2,
    "o_lora_rank": 8,
    "zero_expert_num": 4,
    "router_hidden_size": 24,
    # state spaces, linear attention
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 1,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "conv_L_cache": 3,
    "lru_width": 32,
    "sliding_window": 8,
    "attention_window_size": 8,
    # per-layer embeddings
    "vocab_size_per_layer_input": 258,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "altup_num_inputs": 2,
    "laurel_rank": 4,
    # towers
    "image_size": 16,
    "patch_size": 8,
    "depth": 1,
    "embed_dim": 32,
    "out_hidden_size": 32,
    "vision_output_dim": 32,
    "projector_hidden_size": 32,
    "spatial_merge_size": 1,
    "num_channels": 3,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
}

# What a family needs beyond that, by the name of its configuration.
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_HALF_MROPE = {
    "rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
}
SPECIAL: dict[str, dict[str, Any]] = {
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
    "mistral4": {"head_dim": 16},
    "glm46v": {"text_config": _HALF_MROPE},
    "glm4v": {"text_config": _HALF_MROPE},
    "glm4v_moe": {"text_config": _HALF_MROPE},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_topk": 4, "index_kpool": 2, "qk_rope_head_dim": 0}},
    "qwen2_vl": {"text_config": _MROPE},
    "qwen2_5_vl": {"text_config": _MROPE},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "llama4": {"vision_config": {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}},
    "cohere2_vision": {"alignment_intermediate_size": 64},
}

_CAUSAL = """
afmoe apertus arcee aria_text axk1 axk2 bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe
cpmant ctrl cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4
exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4
glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granite_swa granitemoe
granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax
inkling_text inkling2_text jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4_text
longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3
mistral mixtral modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt
persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlstm youtu zamba zamba2 zaya
"""
_WRAPPED = """
gemma3 gemma4 llama4 qwen3_5 qwen3_5_moe aya_vision cohere2_vision exaone4_5 glm46v glm4v
glm4v_moe glm5_next got_ocr2 idefics3 internvl kimi_k25 lfm2_vl llava llava_next minimax_m3_vl mistral3 mistral4
mistral_large4 paligemma qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe smolvlm step3p7
"""
CAUSAL, WRAPPED = _CAUSAL.split(), _WRAPPED.split()
FAMILIES = [*CAUSAL, *WRAPPED]


def tiny_settings(default: Any, special: dict[str, Any]) -> dict[str, Any]:
    """What to give a configuration's class for a tiny model, by a default instance of it."""
    known = vars(default)
    settings = {key: value for key, value in TINY.items() if key in known and known[key] is not None}
    for key in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types"):
        kinds = list(dict.fromkeys(known.get(key) or ()))
        if len(kinds) > 1:
            settings[key] = kinds
            settings |= {name: len(kinds) for name in ("num_hidden_layers",) if name in known}
    if "kv_lora_rank" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for name in type(default).sub_configs:
        inner = getattr(default, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            settings[name] = {"model_type": inner.model_type} | tiny_settings(inner, {})
    for key, value in special.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            settings[key] = settings[key] | value
        elif value is ...:
            settings.pop(key, None)
        else:
            settings[key] = value
    return settings


def tiny_config(family: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **tiny_settings(AutoConfig.for_model(family), SPECIAL.get(family, {})))


def empty_tiny_model(family: str) -> Any:
    """A tiny model, with weights wherever the caller's device is."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if family in WRAPPED else AutoModelForCausalLM
    return auto.from_config(tiny_config(family))


def tiny_model(family: str) -> Any:
    """A model of random weights that differ enough for its continuations to tell plans apart."""
    import torch

    torch.manual_seed(0)
    model = empty_tiny_model(family).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


# --- checking one family ---

_PROMPTS, _PROMPT, _CONTINUATION = 4, 8, 10


def _rounded(matrix: Any, bits: int) -> Any:
    """int`bits`-channel of [outputs, inputs], by the formula of docs."""
    scale = matrix.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2)
    scale[scale == 0] = 1
    return (matrix / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def matrix_of(model: Any, name: str) -> Any:
    """A component's matrix as a view [outputs, inputs] of a model's own parameter."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    try:
        module = model.get_submodule(name)
        if not hasattr(module, "weight"):
            raise AttributeError
        return module.weight.data.t() if isinstance(module, Conv1D) else module.weight.data
    except AttributeError:
        parent, expert, leaf = name.rsplit(".", 2)
        stack = getattr(model.get_submodule(parent), leaf)
        stack = stack if isinstance(stack, nn.Parameter) else stack.weight
        if stack.ndim == 2:  # experts one above the other
            stack = stack.view(4, -1, stack.shape[1])
        matrix = stack.data[int(expert)]
        hidden = 32
        leaf = parent.rpartition(".")[2] if leaf == "weight" else leaf
        into = leaf in ("down_proj", "w2", "output_linear") and leaf != "w2_t"
        if "dbrx" in type(model).__name__.lower() and leaf == "w2":
            return matrix.t()
        if "rg_lru" in parent:
            return matrix.t()
        if matrix.shape[0] == matrix.shape[1]:
            raise ValueError(f"{name} is square: give it another size") from None
        return matrix if (matrix.shape[0] == hidden) == into else matrix.t()


def _plain(model: Any, reference: Any, tokens: Any) -> tuple[Any, Any, Any]:
    """FDT and SDT of a model by one whole pass, and where its choice is not the reference's."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits
    start = reference.prompt_tokens
    logits = logits[:, start - 1 : -1].clone()
    logits[..., list(reference.suppressed)] = -torch.inf
    differs = logits.argmax(-1).numpy() != reference.continuation
    told = differs & reference.agrees
    fdt = [int(row.argmax()) if row.any() else len(row) for row in told]
    return fdt, told.sum(1).tolist(), differs


# What the names of matrices that choose among experts, or weigh one, end in.
_ROUTERS = ("router", "gate", "wg", "classifier", "shared_expert_gate")


class _Multiplied(TorchDispatchMode):
    """Notes the memory of all that is a factor of a matrix product, apart from how the package finds components."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "mm" in name or name in ("matmul", "linear", "dot", "mv"):
            self.storages |= {a.untyped_storage().data_ptr() for a in args if hasattr(a, "untyped_storage")}
        return func(*args, **(kwargs or {}))


def phantoms_and_missed(model: Any, manifest: Any, tokens: Any) -> tuple[list[str], list[str]]:
    """Components that are no matrix which tokens are multiplied with, or that route; linear layers inside the layers
    that are, and are neither components nor told to route."""
    import torch
    from torch import nn

    with torch.inference_mode(), _Multiplied() as seen:
        model(input_ids=tokens, use_cache=False)
    used = {name for name, p in model.named_parameters() if p.untyped_storage().data_ptr() in seen.storages}

    def parameter(component: str) -> str:
        if f"{component}.weight" in dict(model.named_parameters()):
            return f"{component}.weight"
        owner, _, leaf = component.rsplit(".", 2)
        return f"{owner}.{leaf}"

    phantoms = [
        c.name
        for c in manifest.components
        if parameter(c.name) not in used or c.shape[0] == 1 or c.name.endswith(tuple(f".{r}" for r in _ROUTERS))
    ]
    known = {parameter(c.name) for c in manifest.components} | {f"{name}.weight" for name in manifest.routers}
    layers = {parameter(c.name).split(".layers.")[0] for c in manifest.components if ".layers." in c.name}
    missed = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".layers.")[0] in layers and ".layers." in name
        and f"{name}.weight" in used - known
    ]  # fmt: skip
    return phantoms, missed


def check(family: str, measure: Measure | None = None) -> dict[str, Any]:
    """What is found of a family; where it is said how exports `measure`, of these too."""
    import numpy as np
    import torch
    from tiny import TEXT, write_tokenizer

    from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, ReplicaSettings
    from dtmsearch.core.plan import Plan
    from dtmsearch.model.replica.replica import Replica

    found: dict[str, Any] = {"family": family}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        tiny_model(family).save_pretrained(folder)
        write_tokenizer(folder)
        attention = "sdpa"
        spec = ModelSpec(str(folder), dtype="float32", attention=attention)
        try:
            replica = Replica(spec, ReplicaSettings(num_threads=1))
        except Exception as error:
            if "attention" not in str(error):
                raise
            attention = "eager"
            spec = ModelSpec(str(folder), dtype="float32", attention=attention)
            replica = Replica(spec, ReplicaSettings(num_threads=1))
        manifest = replica.manifest()
        kinds: dict[str, int] = {}
        for component in manifest.components:
            kinds[component.kind] = kinds.get(component.kind, 0) + 1
        found["kinds"] = kinds
        found["cuts"] = how_it_runs(replica)
        prompts, _ = replica.cut_prompts([TEXT], _PROMPTS, _PROMPT, _CONTINUATION, 0)
        reference = replica.make_reference(prompts)
        replica.use(reference)
        whole = (0, reference.num_prompts)
        firsts: dict[tuple[str, bool], str] = {}
        for component in manifest.components:
            firsts.setdefault((component.kind, component.layer == manifest.num_layers - 1), component.name)
        plans = [Plan.of({name: "int2-channel"}) for name in firsts.values()]
        plans.append(Plan.uniform(manifest.components, "int3-channel"))
        outcomes = replica.evaluate([EvalRequest(plan, reference.id, whole, ("kl",)) for plan in plans])
        bad = [getattr(o, "message", "") for o in outcomes if not isinstance(o, EvalResult)]
        found["ok"] = bad[0] if bad else True
        auto = type(tiny_model(family))
        fresh = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
        tokens = np.concatenate([reference.text[:, :_PROMPT], reference.continuation], axis=1)
        wrong = []
        if (_plain(fresh, reference, tokens)[2] != ~reference.agrees).any():
            wrong.append("reference")
        found["agrees"] = float(reference.agrees.mean())
        phantoms, missed = phantoms_and_missed(fresh, manifest, torch.from_numpy(tokens).long())
        found["components"] = phantoms or True
        found["missed"] = missed
        state = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
        moved = 0
        for plan, outcome in zip(plans, outcomes, strict=True):
            if not isinstance(outcome, EvalResult):
                continue
            for component, scheme in plan.entries:
                place = matrix_of(fresh, component)
                if tuple(place.shape) != manifest.by_name[component].shape:
                    wrong.append(f"{component} is {tuple(place.shape)}")
                place.copy_(_rounded(place, int(scheme[3])))
            fdt, sdt, _ = _plain(fresh, reference, tokens)
            moved += sum(sdt)
            if fdt != outcome.fdt.tolist() or sdt != outcome.sdt.tolist():
                wrong.append(f"{len(plan.entries)} x {plan.entries[0][0]}: {outcome.sdt.tolist()} not {sdt}")
            fresh.load_state_dict(state)
        found["right"] = wrong[0] if wrong else moved > 0 or "nothing moved"
        del replica
        if measure is not None:
            for format_name in ("dense", "compressed-tensors"):
                found[format_name] = _exported(folder, Path(name), manifest, format_name, attention, measure)
    return found


def how_it_runs(replica: Any) -> str:
    body = replica._body
    apart = "" if body.head_apart else ", head within"
    cache = "" if body._new_cache == body.new_cache else ", own cache" if body._new_cache else ", no cache"
    return ("all" if len(body.cuts) > body.num_layers else f"{len(body.cuts) - 1}/{body.num_layers}") + apart + cache


def _exported(folder: Path, where: Path, manifest: Any, to: str, attention: str, measure: Measure) -> Any:
    from exports import measured_plan

    from dtmsearch.errors import UserError
    from dtmsearch.export.job import Job
    from dtmsearch.workflows import export_check

    export_check.measure_apart = measure
    names = [c.name for c in manifest.components]
    if to != "dense":
        import torch

        from dtmsearch.core.plan import Plan

        linear = set(Job(folder, manifest, Plan(), torch.float32, torch.device("cpu")).linear)
        names = [n for n in names if n in linear and not manifest.by_name[n].transposed]
        if not names:
            return "-"
    try:
        plan = measured_plan(folder, where / f"store-{to}", dict.fromkeys(names, "int4-channel"), attention=attention)
        done = plan.export(to, where / f"out-{to}").check
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return True if done is not None and done.equal else "measures otherwise"

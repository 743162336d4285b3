"""Tiny checkpoints in the formats in which large models are released, written by those formats' definitions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import llama_config, write_model, write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig

# Tensors of a quantized matrix by the ending of their names, and the weight that they stand for.
Stored = tuple[Mapping[str, Tensor], Tensor]
GROUP = 16


def quantize_folder(folder: Path, store: Callable[[Tensor], Mapping[str, Tensor]], settings: Mapping[str, Any]) -> Path:
    """Put every linear layer inside the layers of a checkpoint into the form that `store` gives a matrix."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj.weight" in name:
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{ending}": part.contiguous() for ending, part in store(tensor).items()}
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": dict(settings), "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fp8_parts(weight: Tensor, block: tuple[int, int] = (16, 16)) -> dict[str, Tensor]:
    """As DeepSeek stores it: float8 codes and a scale of every block, those at the edges cut."""
    rows, cols = weight.shape
    grid = -(-rows // block[0]), -(-cols // block[1])
    scales = torch.zeros(grid)
    codes = torch.zeros_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}


def fp8_model(folder: Path, **changes: object) -> Path:
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic", "fmt": "e4m3"}
    return quantize_folder(write_model(folder, llama_config(**changes)), fp8_parts, settings)


def _codes(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15 [rows, cols], zero points and scales [rows, groups] of a matrix."""
    grouped = weight.reshape(len(weight), -1, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(1, 15)
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return codes.reshape(weight.shape).to(torch.int64), zeros.to(torch.int64), scales


def _words(codes: Tensor, bits: int = 4) -> Tensor:
    """Codes [rows, cols] into words of 32 bits along the columns, the first in the lowest bits."""
    per_word = 32 // bits
    shifts = torch.arange(per_word) * bits
    words = (codes.reshape(len(codes), -1, per_word) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq_parts(weight: Tensor) -> dict[str, Tensor]:
    """As AutoGPTQ stores it: codes packed along the inputs, zero points less one along the outputs."""
    codes, zeros, scales = _codes(weight)
    return {
        "qweight": _words(codes).t(),
        "qzeros": _words((zeros - 1).t().contiguous()),
        "scales": scales.t().half(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).to(torch.int32),
    }


def gptq_model(folder: Path) -> Path:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
    return quantize_folder(write_model(folder), gptq_parts, settings)


def awq_parts(weight: Tensor) -> dict[str, Tensor]:
    """As AutoAWQ's `gemm` stores it: all of inputs by outputs, eight outputs a word in the order 0, 2, 4, 6, 1, ..."""
    codes, zeros, scales = _codes(weight)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(values: Tensor) -> Tensor:
        return _words(values.reshape(len(values), -1, 8)[..., order].reshape(values.shape))

    return {"qweight": words(codes.t()), "qzeros": words(zeros.t()), "scales": scales.t().half()}


def awq_model(folder: Path) -> Path:
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    return quantize_folder(write_model(folder), awq_parts, settings)


def mxfp4_model(folder: Path) -> Path:
    """gpt-oss, its experts as released: blocks of 32 codes of e2m1, two a byte, and a power of two for each."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        sliding_window=32,
        initializer_range=0.2,
        eos_token_id=257,
        pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32, 16)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(121, 125, shape[:-1], dtype=torch.uint8)
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config_file = folder / "config.json"
    content = json.loads(config_file.read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    content |= {
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": skipped},
        "dtype": "bfloat16",
    }
    config_file.write_text(json.dumps(content))
    return folder


def gguf_model(folder: Path, kind: str = "Q8_0") -> Path:
    """A Llama as llama.cpp's converter writes it, its matrices in one type, and its tokenizer."""
    import gguf
    from gguf.quants import quantize

    plain = write_model(folder / "plain", llama_config(intermediate_size=64, vocab_size=259))
    config = json.loads((plain / "config.json").read_text())
    path = folder / f"model.{kind}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = json.loads((plain / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*sorted(vocabulary, key=lambda token: vocabulary[token]), "ab"])
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    wanted = gguf.GGMLQuantizationType[kind]
    for name, tensor in load_file(plain / "model.safetensors").items():
        place = names.get_name(name, try_suffixes=(".weight",))
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        for part, count in heads.items():
            if part in name:  # rotated by pairs side by side there, by halves in transformers
                rows, cols = tensor.shape
                tensor = tensor.reshape(config[count], 2, -1, cols).swapaxes(1, 2).reshape(rows, cols)
        values = tensor.float().numpy()
        if tensor.ndim > 1:
            writer.add_tensor(place, quantize(values, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(place, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.rmtree(plain)
    return path

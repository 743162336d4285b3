"""Exports of quantized tensors, bitsandbytes and compressed-tensors: transformers loads what was recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import RUN, Measured, in_process, measure_here, measured_plan
from safetensors.torch import load_file
from tiny import llama_config, write_model
from transformers import GPT2Config, PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from dtmsearch.core import holders
from dtmsearch.core.engine_rules import ENGINES
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.core.holders import LINEAR_ONLY, holders_of
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import ExportFailed, UserError
from dtmsearch.export.formats.bitsandbytes import check_modules
from dtmsearch.export.formats.compressed_tensors import check_packed
from dtmsearch.export.job import Job
from dtmsearch.model.compress.rounding import round_weight
from dtmsearch.model.modules.discovery import read_manifest
from dtmsearch.model.replica.exported import decompressed_model
from dtmsearch.workflows import export_check
from dtmsearch.workflows.export import Exported, export

LAYERS = "model.layers"
MIXED = {
    f"{LAYERS}.0.self_attn.q_proj": "int4-g16",
    f"{LAYERS}.0.mlp.down_proj": "int3-g16-asym",
    f"{LAYERS}.1.self_attn.v_proj": "int8-channel",
    f"{LAYERS}.1.mlp.gate_proj": "int8-channel-asym",
    f"{LAYERS}.1.mlp.up_proj": "int4-channel-asym",
    f"{LAYERS}.2.self_attn.o_proj": "int2-tensor",
    f"{LAYERS}.2.mlp.up_proj": "int6-tensor-asym",
    f"{LAYERS}.2.self_attn.k_proj": "int5-g32",
}
GATE = "model.layers.0.mlp.shared_expert_gate"
TIED = {
    f"{LAYERS}.{layer}.{name}_proj": scheme
    for layer, scheme in ((0, "int4-g32-asym"), (1, "int8-channel"), (2, "int4-g32"))
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
}


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("mixed")
    return measured_plan(write_model(folder / "model"), folder / "store", MIXED)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("half")
    config = llama_config(dtype="bfloat16", tie_word_embeddings=True)
    return measured_plan(write_model(folder / "model", config), folder / "store", TIED, "bfloat16", "bfloat16")


def test_every_kind_of_rounding_in_one_model_measures_as_recorded(mixed: Measured, tmp_path: Path) -> None:
    check = mixed.export("compressed-tensors", tmp_path / "out").check
    assert check is not None and check.equal and check.sdt_measured > 0


def test_the_librarys_own_decompression_gives_the_rounded_weights(mixed: Measured, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    mixed.export("compressed-tensors", tmp_path / "out", check=False)
    before = load_file(Path(mixed.manifest.model) / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    wrong = []
    for scheme in QuantizationConfig.model_validate(config).config_groups.values():
        for name in scheme.targets:
            own = {key.rpartition(".")[2]: value for key, value in after.items() if key.startswith(f"{name}.weight")}
            restored = BaseCompressor.get_value_from_registry(scheme.format).decompress(own, scheme)["weight"]
            wanted = round_weight(before[f"{name}.weight"], parse_scheme(MIXED[name]))
            wrong += [] if torch.equal(restored, wanted) else [name]
    assert wrong == []


def test_scales_of_16_bits_take_the_plans_bytes(half: Measured, tmp_path: Path) -> None:
    exported = half.export("compressed-tensors", tmp_path / "out", runtime="vllm")
    assert dict(exported.extra_bits) == {"shapes": 128 * len(TIED)}


def test_packed_zero_points_are_checked_by_the_librarys_decompression(half: Measured, tmp_path: Path) -> None:
    check = half.export("compressed-tensors", tmp_path / "out", runtime="vllm").check
    assert check is not None and check.equal


def test_short_scales_are_decompressed_in_the_models_own_dtype(tmp_path: Path) -> None:
    """A model in 32 bits with scales of 16: products are those of 32 bits."""
    name = f"{LAYERS}.0.self_attn.q_proj"
    path = write_model(tmp_path / "model")
    measured = measured_plan(path, tmp_path / "store", TIED, "float32", "bfloat16")
    measured.export("compressed-tensors", tmp_path / "out", runtime="vllm", check=False)
    model = decompressed_model(tmp_path / "out", ModelSpec("", dtype="float32"), torch.device("cpu"))
    before = load_file(path / "model.safetensors")[f"{name}.weight"]
    wanted = round_weight(before, parse_scheme(TIED[name]), torch.bfloat16)
    assert torch.equal(model.get_submodule(name).weight, wanted)


def test_scales_are_counted_where_they_take_32_bits(mixed: Measured, tmp_path: Path) -> None:
    extra = mixed.export("compressed-tensors", tmp_path / "out", check=False).extra_bits
    num_scales = sum(parse_scheme(s).num_scales(mixed.manifest.by_name[name].shape) for name, s in MIXED.items())
    assert extra["scales of 32 bits"] == 16 * num_scales


def test_files_take_what_is_told_of_a_plan_before_it_is_written(mixed: Measured, tmp_path: Path) -> None:
    extra = mixed.export("compressed-tensors", tmp_path / "out", check=False).extra_bits
    components = [mixed.manifest.by_name[name] for name in MIXED]
    num_weights = sum(component.num_weights for component in components)
    counted = sum(parse_scheme(MIXED[c.name]).stored_bits(c.shape, 32) for c in components)
    held = {each.holder: each for each in holders_of(Plan.of(MIXED), components, 32, 32)}
    told = held["compressed-tensors (transformers)"].bits_per_weight
    assert told == (counted + sum(bits for what, bits in extra.items() if what != "shapes")) / num_weights


TRANSPOSED = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64)
STACKED = Qwen3MoeConfig(
    vocab_size=258, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "more"),
    [(TRANSPOSED, set()), (STACKED, {("model.embed_tokens", "compressed-tensors (vllm)")})],
    ids=["transposed", "stacked"],
)
def test_what_is_told_of_a_component_before_it_is_written_is_what_the_exports_say(
    config: PretrainedConfig, more: set[tuple[str, str]], tmp_path: Path
) -> None:
    folder = write_model(tmp_path, config)
    manifest = read_manifest(ModelSpec(str(folder)))
    components = (*manifest.components, manifest.others[0])
    exports = [
        ("compressed-tensors (vllm)", "int4-channel", check_packed, "vllm"),
        ("compressed-tensors (transformers)", "int4-channel", check_packed, "transformers"),
        ("bitsandbytes (transformers)", "w8a8", check_modules, "transformers"),
    ]
    told, said = set(), set()
    for component in components:
        for holder, scheme, check, runtime in exports:
            plan = Plan.of({component.name: scheme})
            held = {each.holder: each for each in holders_of(plan, [component], 32, 32)}[holder]
            told |= {(component.name, holder)} if held.obstacle == LINEAR_ONLY else set()
            try:
                check(Job(folder, manifest, plan, torch.float32, torch.device("cpu"), runtime=runtime))
            except UserError as error:
                ours = [LINEAR_ONLY] + ([holders.TIED, ENGINES[runtime].embeddings] if component.layer < 0 else [])
                assert any(why and why in str(error) for why in ours), error
                said.add((component.name, holder))
    # A component does not say whether an embedding is the head as well: more is told of one that is not.
    assert (told - said, said - told) == (more, set()) and len(said) > 3


def test_schemes_that_are_no_integers_are_refused_by_name(tmp_path: Path) -> None:
    plan = {f"{LAYERS}.0.mlp.up_proj": "nf4", f"{LAYERS}.1.mlp.up_proj": "int8-channel"}
    measured = measured_plan(write_model(tmp_path / "model"), tmp_path / "store", plan)
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj: nf4: it stores integers"):
        measured.export("compressed-tensors", tmp_path / "out")


def test_groups_that_do_not_divide_the_inputs_are_refused(tmp_path: Path) -> None:
    plan = {f"{LAYERS}.0.mlp.up_proj": "int4-g24"}
    measured = measured_plan(write_model(tmp_path / "model"), tmp_path / "store", plan)
    with pytest.raises(ValueError, match="24 does not divide 32"):
        measured.export("compressed-tensors", tmp_path / "out")
    assert not list(tmp_path.rglob("*.partial"))


def test_widths_without_a_kernel_are_refused_with_the_smallest_that_has_one(tmp_path: Path) -> None:
    measured = measured_plan(write_model(tmp_path / "model"), tmp_path / "store", "int3-channel")
    said = r"kernel for CPUs reads 4 bits; the smallest that it takes here is int4-channel \(\+1.00 bits per weight\)"
    with pytest.raises(ValueError, match=said):
        measured.export("compressed-tensors", tmp_path / "out", runtime="vllm-cpu")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("untied")
    plan = {f"{LAYERS}.0.self_attn.q_proj": "int8-channel", f"{LAYERS}.0.self_attn.k_proj": "int4-g32"}
    return measured_plan(write_model(folder / "model"), folder / "store", plan)


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A mixture whose gate of the shared expert is in the plan."""
    folder = tmp_path_factory.mktemp("gated")
    config = Qwen2MoeConfig(
        **llama_config().to_diff_dict() | {"model_type": "qwen2_moe", "hidden_size": 64, "num_experts": 4},
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    return measured_plan(write_model(folder / "model", config), folder / "store", {GATE: "int8-channel"})


def test_what_routes_tokens_is_refused_for_vllm(gated: Measured, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{GATE}: int8-channel: it builds what routes tokens"):
        gated.export("compressed-tensors", tmp_path / "out", runtime="vllm")


def test_an_untied_plan_is_refused_for_vllm_with_what_is_untied(untied: Measured, tmp_path: Path) -> None:
    wanted = "layers.0.self_attn.q_proj: int8-channel, .*k_proj: int4-g32, .*v_proj: dense"
    with pytest.raises(ValueError, match=wanted):
        untied.export("compressed-tensors", tmp_path / "out", runtime="vllm")


def test_an_untied_plan_is_refused_with_the_measured_price_of_its_repair(untied: Measured, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"widest scheme: \+[0-9,]+ bytes, FDT 12.00 \([-+][0-9.]+\)"):
        untied.export("compressed-tensors", tmp_path / "out", runtime="vllm")


def test_the_repaired_plan_is_left_to_be_exported(untied: Measured, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cheapest repair"):
        untied.export("compressed-tensors", tmp_path / "out", runtime="vllm")
    schemes = json.loads((tmp_path / "out.repaired.json").read_text())["schemes"]
    assert len({schemes.get(f"{LAYERS}.0.self_attn.{kind}_proj") for kind in "qkv"}) == 1


def test_transformers_alone_loads_an_untied_plan(untied: Measured, tmp_path: Path) -> None:
    check = untied.export("compressed-tensors", tmp_path / "out").check
    assert check is not None and check.equal


@pytest.mark.parametrize("schemes", [["w8a8"], ["llm-int8"], ["nf4", "fp4"]], ids=["w8a8", "llm-int8", "4-bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitsandbytes_modules_measure_as_recorded(tmp_path: Path, schemes: list[str], dtype: str) -> None:
    config = llama_config(dtype=dtype, tie_word_embeddings=dtype == "bfloat16")
    names = [f"{LAYERS}.{layer}.{name}_proj" for layer in (0, 2) for name in ("self_attn.q", "mlp.gate", "mlp.down")]
    plan = {name: schemes[i % len(schemes)] for i, name in enumerate(names)}
    measured = measured_plan(write_model(tmp_path / "model", config), tmp_path / "store", plan, dtype)
    check = measured.export("bitsandbytes", tmp_path / "out").check
    assert check is not None and check.equal


def exported_in_4_bits(tmp_path: Path, component: str) -> Exported:
    plan = {f"{LAYERS}.1.{component}": "nf4"}
    return measured_plan(write_model(tmp_path / "model"), tmp_path / "store", plan).export(
        "bitsandbytes", tmp_path / "out"
    )


def card(tmp_path: Path) -> str:
    return (tmp_path / "out" / "README.md").read_text()


def test_a_4_bit_card_says_on_which_cpus_the_weights_are_packed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_check, "repacks_4bit", lambda: False)
    exported_in_4_bits(tmp_path, "self_attn.q_proj")
    assert "support_avx512bf16_for_cpu = False" in card(tmp_path)
    assert "on the CPU of that machine" not in card(tmp_path)


def test_a_cpu_that_packs_4_bit_weights_anew_is_measured_beside_what_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*arguments: Any) -> dict[str, list[float]]:
        found = measure_here(*arguments[:3])
        return {name: [value + 3 for value in values] for name, values in found.items()} if arguments[3:] else found

    monkeypatch.setattr(export_check, "repacks_4bit", lambda: True)
    monkeypatch.setattr(export_check, "measure_apart", measured)
    check = exported_in_4_bits(tmp_path, "self_attn.q_proj").check
    assert check is not None and check.equal and check.repacked is not None
    assert (check.repacked.fdt, check.repacked.differing) == (pytest.approx(check.fdt_recorded + 3), 6)
    assert f"FDT {check.repacked.fdt:.4f} and SDT {check.repacked.sdt:.4f}; 6 of 6 prompts differ" in card(tmp_path)


def test_rows_that_cannot_be_packed_anew_are_said(tmp_path: Path) -> None:
    if not export_check.repacks_4bit():  # asked here: it loads bitsandbytes
        pytest.skip("needs a CPU with AVX512-BF16")
    check = exported_in_4_bits(tmp_path, "self_attn.k_proj").check
    assert check is not None and check.equal and check.repacked is not None
    assert "it does not run: N must be divisible" in card(tmp_path)


def test_components_that_stay_dense_are_skipped_one_by_one(tmp_path: Path) -> None:
    plan = {f"{LAYERS}.1.mlp.up_proj": "nf4"}
    measured = measured_plan(write_model(tmp_path / "model"), tmp_path / "store", plan)
    measured.export("bitsandbytes", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert [name for name, tensor in after.items() if tensor.dtype == torch.uint8 and name.endswith(".weight")] == [
        f"{LAYERS}.1.mlp.up_proj.weight"
    ]


def test_bitsandbytes_of_8_and_4_bits_in_one_model_is_refused_with_the_list(tmp_path: Path) -> None:
    plan = {f"{LAYERS}.{layer}.mlp.up_proj": scheme for layer, scheme in enumerate(("nf4", "nf4", "w8a8"))}
    measured = measured_plan(write_model(tmp_path / "model"), tmp_path / "store", plan)
    with pytest.raises(ValueError, match=r"in 8 bits or in 4 bits[^$]*without\n  model.layers.2.mlp.up_proj: w8a8$"):
        measured.export("bitsandbytes", tmp_path / "out")


def test_plain_rounding_is_no_bitsandbytes(mixed: Measured, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stores w8a8, llm-int8, nf4 and fp4 only"):
        mixed.export("bitsandbytes", tmp_path / "out")


def test_an_export_of_another_scale_dtype_is_another_measurement(tmp_path: Path) -> None:
    config = llama_config(dtype="bfloat16")
    plan = dict.fromkeys(TIED, "int4-g32")
    measured = measured_plan(write_model(tmp_path / "model", config), tmp_path / "store", plan, "bfloat16")
    with pytest.raises(ExportFailed, match="prompts differ"):
        export(RUN, "compressed-tensors", tmp_path / "out", str(measured.store), runtime="vllm")


def test_the_plan_is_in_the_folder_as_it_was(mixed: Measured, tmp_path: Path) -> None:
    assert mixed.export("compressed-tensors", tmp_path / "out", check=False).plan == Plan.of(MIXED)


HEAD = {
    "model.embed_tokens": "int4-g32",
    "lm_head": "w8a8-channel",
    f"{LAYERS}.0.mlp.down_proj": "int4-g32",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_and_the_head_are_held_as_vllm_reads_them(tmp_path: Path, dtype: str) -> None:
    """Of a model whose head is its own; the check measures it by the library's own decompression."""
    base = write_model(tmp_path / "base", llama_config(hidden_size=64, intermediate_size=64, num_hidden_layers=1))
    made = measured_plan(base, tmp_path / "store", HEAD, dtype, dtype).export(
        "compressed-tensors", tmp_path / "out", runtime="vllm"
    )
    assert made.check is not None and made.check.equal and made.check.sdt_recorded > 0.0
    assert made.size.num_compressed == 3
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight_packed"].shape == (258, 64 // 8)
    assert tensors["lm_head.weight"].dtype == torch.int8
    on_disk = sum(tensor.nbytes for tensor in tensors.values())
    assert 8 * on_disk == made.plan_bits + sum(made.extra_bits.values())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("runtime", "scheme", "tied", "said"),
    [
        ("transformers", "int4-g32", False, "asks embeddings for their own weight as it loads"),
        ("vllm-cpu", "int4-g32", False, "by a Triton kernel, which CPUs do not have"),
        ("vllm", "int4-g32-asym", False, "of embeddings it stores integers of rows or groups, without zero points"),
        ("vllm", "int4-g32", True, "its weights are the head's too"),
    ],
)
def test_embeddings_that_nothing_reads_are_refused(
    tmp_path: Path, runtime: str, scheme: str, tied: bool, said: str
) -> None:
    config = llama_config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=288, tie_word_embeddings=tied
    )
    base = write_model(tmp_path / "base", config)
    spec = ModelSpec(str(base), dtype="float32")
    plan = Plan.of({"model.embed_tokens": scheme})
    job = Job(base, read_manifest(spec), plan, torch.float32, torch.device("cpu"), runtime=runtime)
    with pytest.raises(UserError, match=said):
        check_packed(job)

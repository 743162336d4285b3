from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fakes import toy_manifest
from safetensors.numpy import save_file

from dtmsearch.core.checkpoint_files import checkpoint_dtype, content_hash, read_header, weight_files
from dtmsearch.errors import UserError

WEIGHTS = {
    "model.layers.0.mlp.up_proj.weight": np.arange(12, dtype=np.float16).reshape(3, 4),
    "model.norm.weight": np.ones(4, np.float32),
}
CONFIG = {"model_type": "llama", "hidden_size": 4}


def checkpoint(folder: Path, weights: dict[str, np.ndarray] = WEIGHTS, config: dict[str, object] = CONFIG) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def hash_of(folder: Path) -> str:
    return content_hash(folder, weight_files(folder))


def test_a_header_gives_names_dtypes_and_shapes(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    assert read_header(folder / "model.safetensors") == {
        "model.layers.0.mlp.up_proj.weight": ("float16", (3, 4)),
        "model.norm.weight": ("float32", (4,)),
    }


def test_the_metadata_of_a_file_is_no_tensor(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert set(read_header(tmp_path / "model.safetensors")) == set(WEIGHTS)


def test_the_dtype_of_a_checkpoint_is_that_of_its_matrices(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    assert checkpoint_dtype(weight_files(folder)) == "float16"


def test_a_checkpoint_without_matrices_in_floating_point_is_an_error(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", {"codes": np.zeros((2, 2), np.int8)})
    with pytest.raises(ValueError, match="is the checkpoint quantized already"):
        checkpoint_dtype(weight_files(folder))


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the folder does not exist"):
        weight_files(tmp_path / "nowhere")


def test_a_folder_without_configuration_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it holds no config\.json"):
        weight_files(tmp_path)


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=f"pickled weights only \\({name}\\)"):
        weight_files(tmp_path)


def index(folder: Path, *names: object) -> None:
    weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    index(folder, "model.safetensors", "model-00002.safetensors")
    with pytest.raises(ValueError, match=r"its index names model-00002\.safetensors, which is not there"):
        weight_files(folder)


@pytest.mark.parametrize("name", ["adapter", "model_old", "pytorch_model", "a_model", "model.fp16"])
def test_only_the_file_that_transformers_loads_is_weights(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path / "model")
    save_file(WEIGHTS, folder / f"{name}.safetensors")
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]


def test_files_that_the_index_leaves_out_are_no_weights(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    save_file(WEIGHTS, folder / "consolidated.safetensors")
    index(folder, "model-1.safetensors")
    assert [path.name for path in weight_files(folder)] == ["model-1.safetensors"]


def test_a_file_beside_an_index_of_others_is_an_error_that_names_both(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    save_file(WEIGHTS, folder / "model-1.safetensors")
    index(folder, "model-1.safetensors")
    both = r"two sets of weights: model\.safetensors, .* model\.safetensors\.index\.json names \(model-1\.safetensors"
    with pytest.raises(ValueError, match=both):
        weight_files(folder)


def test_weights_under_another_name_are_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"it holds weights\.safetensors, but transformers loads model\.safetensors"):
        weight_files(folder)


def test_a_configuration_may_name_its_weights(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", config=CONFIG | {"transformers_weights": "best.safetensors"})
    save_file(WEIGHTS, folder / "best.safetensors")
    assert [path.name for path in weight_files(folder)] == ["best.safetensors"]


@pytest.mark.parametrize("name", ["../model/model.safetensors", "/etc/passwd", "", 7, ["model.safetensors"]])
def test_an_index_that_names_no_file_of_the_folder_is_an_error(tmp_path: Path, name: object) -> None:
    folder = checkpoint(tmp_path / "model")
    index(folder, name)
    with pytest.raises(UserError, match="weight_map must name files in the folder"):
        weight_files(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', "{", '"model"'])
def test_an_index_that_is_none_is_an_error(tmp_path: Path, text: str) -> None:
    folder = checkpoint(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        weight_files(folder)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it into its model"):
        weight_files(folder)


@pytest.mark.parametrize("num_bytes", [0, 4, 8, 40])
def test_a_cut_file_is_an_error_that_names_it(tmp_path: Path, num_bytes: int) -> None:
    whole = checkpoint(tmp_path / "model") / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file, or a cut one"):
        read_header(whole)


def test_a_file_cut_within_its_tensors_is_an_error_that_names_it(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path / "model") / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file, or a cut one"):
        read_header(whole)


def test_a_file_of_something_else_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        read_header(tmp_path / "model.safetensors")


def test_the_same_content_in_another_folder_is_the_same_model(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "here")
    shutil.copytree(folder, tmp_path / "far" / "away")
    assert hash_of(tmp_path / "far" / "away") == hash_of(folder)


def test_another_weight_is_another_model(tmp_path: Path) -> None:
    changed = {name: value.copy() for name, value in WEIGHTS.items()}
    changed["model.layers.0.mlp.up_proj.weight"][0, 0] = 7.0
    assert hash_of(checkpoint(tmp_path / "b", changed)) != hash_of(checkpoint(tmp_path / "a"))


def test_another_value_in_the_configuration_is_another_model(tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "b", config=CONFIG | {"rope_theta": 1e6})
    assert hash_of(other) != hash_of(checkpoint(tmp_path / "a"))


@pytest.mark.parametrize("key", ["transformers_version", "torch_dtype", "_name_or_path", "use_cache"])
def test_what_changes_no_logit_changes_no_identity(tmp_path: Path, key: str) -> None:
    assert hash_of(checkpoint(tmp_path / "b", config=CONFIG | {key: "other"})) == hash_of(checkpoint(tmp_path / "a"))


def test_everything_in_the_layers_is_selected_by_a_star() -> None:
    manifest = toy_manifest()
    assert manifest.select(("*",)) == manifest.components


def test_the_head_is_selected_by_name_only() -> None:
    assert [component.name for component in toy_manifest().select(("lm_head",))] == ["lm_head"]


def test_components_are_selected_by_kind() -> None:
    assert {component.kind for component in toy_manifest().select(("q", "k"))} == {"q", "k"}


def test_excluded_components_are_left_out() -> None:
    names = [component.name for component in toy_manifest().select(("*",), ("*layers.0.*", "up"))]
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]


def test_a_pattern_that_matches_nothing_is_an_error_that_shows_names_and_kinds() -> None:
    with pytest.raises(ValueError, match=r"'gate' matches none of the 6 components .* kinds \(k, q, up\)"):
        toy_manifest().select(("q", "gate"))


def test_excluding_everything_is_an_error() -> None:
    with pytest.raises(ValueError, match="leaves no component"):
        toy_manifest().select(("q",), ("*",))

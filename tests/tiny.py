"""Models of random weights, small enough to make in a test, with a tokenizer of bytes."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

import dtmsearch
from dtmsearch.core.evaluation import EvalResult, ModelSpec, Outcome, Reference, ReplicaSettings
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.forward.streamed_body import StreamedBody
from dtmsearch.model.pipeline_parallel.pipelined_replica import PipelineReplica, make_stage
from dtmsearch.model.replica.replica import Replica

DEMO_MODEL = Path(dtmsearch.__file__).parent / "demo" / "model"
VOCABULARY = 258
# Checkpoints that a process keeps, some 100 kB each.
_MOST_MADE = 64
_made: dict[tuple[type, str, int], dict[str, bytes]] = {}
_referred: dict[Hashable, Reference] = {}
LONG_TEXT = "".join(f"def f{i}(x):\n    return x + {i * 7919 % 1000}\n\n" for i in range(400))
# Enough for most tests, and tokenized in less time.
TEXT = LONG_TEXT[:5149]
# Text to train on, apart from that.
TRAINING = "".join(f"class C{i}:\n    size: int = {i * 7919 % 1000}\n\n" for i in range(400))


def llama_config(**changes: object) -> LlamaConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "eos_token_id": 257,
        "bos_token_id": 256,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**(settings | changes))


def write_model(folder: Path, config: PretrainedConfig | None = None, seed: int = 0) -> Path:
    """A checkpoint of random weights in `folder`, float32, with its tokenizer. Made once in a process."""
    config = config or llama_config()
    key = type(config), config.to_json_string(use_diff=False), seed
    torch.manual_seed(seed)
    if key not in _made:
        while len(_made) >= _MOST_MADE:
            del _made[next(iter(_made))]
        _made[key] = _files_of(AutoModelForCausalLM.from_config(config).save_pretrained)
        torch.manual_seed(seed)  # as where it was made before
    _write(folder, _made[key])
    return write_tokenizer(folder)


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of bytes, beside a checkpoint."""
    _write(folder, _tokenizer_files())
    return folder


@functools.cache
def _tokenizer_files() -> dict[str, bytes]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _files_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained)


def _files_of(save: Callable[[str], object]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def _write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def open_texts(folder: Path) -> None:
    """Have the begin token stand before every text of the tokenizer in a folder, and be known where it is written."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
    }
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": 256, "content": "<s>", "special": True} | plain)
    path.write_text(json.dumps(content))


def replica(folder: Path, **settings: int | str) -> Replica:
    return Replica(ModelSpec(str(folder), dtype="float32"), ReplicaSettings(**({"num_threads": 1} | settings)))


class PeerHere:
    """Another stage, in this process. What it promises it has done already."""

    def __init__(self, stage: Any) -> None:
        self.stage = stage

    def ask(self, method: str, *arguments: Any) -> Any:
        return getattr(self.stage, method)(*arguments)

    def answer(self, promise: Any) -> Any:
        return promise


def in_stages(folder: Path, num_stages: int, attention: str = "sdpa") -> PipelineReplica:
    """A replica in stages, all of them in this process."""
    spec = ModelSpec(str(folder), dtype="float32", attention=attention)
    first, *others = [ReplicaSettings(num_threads=1, num_stages=num_stages, stage=i) for i in range(num_stages)]
    made = make_stage(spec, first, peers=[PeerHere(make_stage(spec, settings)) for settings in others])
    assert isinstance(made, PipelineReplica)
    return made


def with_reference(model: Replica, count: int = 6, prompt: int = 10, continuation: int = 12) -> Reference:
    """A reference over TEXT, already in use by the replica. All that its identity consists of given, a file of tests
    makes it once for each kind of body; a replica in stages, or on several devices, makes its own each time. Not for
    tests of how one is made."""
    lengths = count, prompt, continuation
    body = type(model._body)
    if type(model) is not Replica or body not in (Body, StreamedBody) or model._num_devices > 1:
        reference = _reference(model, *lengths)
    else:
        file = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
        code = frozenset((type(module), type(module).forward) for module in model.model.modules())
        rows = model._batches.rows(prompt + continuation)
        key = file, body, model.manifest().id, str(model.conditions()), rows, code, lengths
        reference = _referred[key] if key in _referred else _reference(model, *lengths)
        while len(_referred) >= _MOST_MADE:
            del _referred[next(iter(_referred))]
        _referred[key] = reference
    model.use(reference)
    return reference


def _reference(model: Replica, *lengths: int) -> Reference:
    prompts, _ = model.cut_prompts([TEXT], *lengths, 0)
    return model.make_reference(prompts)


@functools.lru_cache(maxsize=1)
def measuring(folder: Path) -> tuple[Replica, Reference]:
    """A replica and a reference that it uses, which tests share that leave both as they are: what it did before changes
    nothing of what it measures."""
    model = replica(folder)
    return model, with_reference(model)


def result(outcome: Outcome) -> EvalResult:
    assert isinstance(outcome, EvalResult), outcome
    return outcome


def values(outcome: Outcome) -> list[list[float]]:
    """Everything measured, to compare bit by bit."""
    measured = result(outcome)
    arrays = (measured.fdt, measured.sdt, measured.dppl, measured.kl, measured.ppl)
    return [np.asarray(array).tolist() for array in arrays if array is not None]

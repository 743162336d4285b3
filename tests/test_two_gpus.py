"""A model spread over several GPUs answers what one GPU answers, every time. Runs where there are two, or four."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import DEMO_MODEL, TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtmsearch.core.decoding import GREEDY, Decoding
from dtmsearch.core.evaluation import EvalRequest, ModelSpec, Reference, ReplicaSettings, StatesKept
from dtmsearch.core.plan import Plan
from dtmsearch.model.forward.head_metrics import _score
from dtmsearch.model.replica.replica import Replica

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
REPETITIONS = 200
several = pytest.mark.parametrize("gpus", [number for number in (2, 4) if number <= max(2, torch.cuda.device_count())])


def busy(device: str) -> torch.Tensor:
    """[2,048, 2,048] on a device that is still being computed there when this returns."""
    matrix = torch.randn(2_048, 2_048, device=device, generator=torch.Generator(device).manual_seed(0))
    result = matrix
    for _ in range(20):
        result = torch.nn.functional.normalize(result @ matrix)
    return result


def test_logits_of_another_gpu_than_the_current_one_are_compared_after_they_are_made() -> None:
    from dtmsearch.model.forward.kernels import score

    targets = torch.arange(2_048, device="cuda:1")
    never = torch.zeros(2_048, dtype=torch.bool, device="cuda:1")
    plain = _score(busy("cuda:1").clone(), targets, None, never)
    for _ in range(REPETITIONS):
        diverged, nll, _ = score(busy("cuda:1"), targets, None, never)
        assert torch.equal(diverged, plain[0])
        torch.testing.assert_close(nll, plain[1], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return _reference(_replica(1))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with a head of its own, which lies on the last GPU."""
    folder = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


def _replica(
    num_devices: int, states: StatesKept = "auto", model: Path = DEMO_MODEL, batch_tokens: int = 0,
    decoding: Decoding = GREEDY,
) -> Replica:  # fmt: skip
    spec = ModelSpec(str(model), dtype="bfloat16", compile="never", decoding=decoding)
    return Replica(spec, ReplicaSettings(num_devices=num_devices, states=states, batch_tokens=batch_tokens))


def _reference(replica: Replica) -> Reference:
    prompts, _ = replica.cut_prompts([TEXT], 16, 32, 32, 0)
    return replica.make_reference(prompts)


def _values(replica: Replica, reference: Reference) -> list[str]:
    """What is found of the model as it is and of plans from low in the model to high, as text."""
    replica.use(reference)
    names = [component.name for component in replica.manifest().components]
    plans = [Plan(), *(Plan.of({name: "int4-channel"}) for name in (names[1], *names[::5], names[-1]))]
    requests = [EvalRequest(plan, reference.id, (0, reference.num_prompts), ("kl", "ppl")) for plan in plans]
    found = []
    for outcome in replica.evaluate(requests):
        found.append(repr([getattr(outcome, name).tolist() for name in ("fdt", "sdt", "dppl", "kl", "ppl")]))
    return found


@several
@pytest.mark.parametrize("states", ["device", "host", "sweep"])
def test_a_model_over_several_gpus_has_the_bits_of_one(states: StatesKept, gpus: int, reference: Reference) -> None:
    expected = _values(_replica(1), reference)
    spread = _replica(gpus, states)
    assert _reference(spread).id == reference.id
    for _ in range(REPETITIONS // 10):
        assert _values(spread, reference) == expected


@several
@pytest.mark.parametrize("decoding", [GREEDY, Decoding(0.8), Decoding(0.8, top_k=40, top_p=0.9)], ids=str)
def test_a_head_on_the_last_gpu_has_the_bits_of_one_in_several_batches(
    untied: Path, decoding: Decoding, gpus: int
) -> None:
    one, spread = (_replica(number, "device", untied, 256, decoding) for number in (1, gpus))
    reference = _reference(one)
    expected = _values(one, reference)
    for _ in range(REPETITIONS // 40):
        assert _values(spread, reference) == expected


@several
def test_weights_that_stand_out_are_found_on_all_gpus(gpus: int) -> None:
    found = []
    for number in (1, gpus):
        replica = _replica(number)
        text = replica.cut_calibration([TEXT], 4, 32, 0)
        replica.use_calibration(text)
        found.append(replica.outlier_shares(text.id))
    assert found[0] == pytest.approx(found[1])

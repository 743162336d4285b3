"""The two sides of a comparison, each a model on this machine or behind a server: BASE's reference, with what is known
of its distributions, and what OTHER makes of BASE's positions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dtmsearch.analysis.format import counted
from dtmsearch.core.evaluation import IntArray, ModelSpec, PromptTokens, Reference, ReplicaSettings, check_agreement
from dtmsearch.core.numeric_mode import ATTENTION, DTYPE, NumericMode
from dtmsearch.core.positions import Likeliest, Positions, common, least_kl
from dtmsearch.errors import UserError
from dtmsearch.model.replica.compared_replica import ComparedReplica, log_probabilities_at
from dtmsearch.model.replica.loaded_reference import BaseOutputs, greedy
from dtmsearch.workflows import served_model
from dtmsearch.workflows.server_requests import Progress, Served

OnStage = Callable[[str, str], None]


@dataclass(frozen=True)
class CompareSettings:
    """How two models are compared: `count` windows of text, cut and drawn as a search's prompts are; what models on
    this machine compute in; the tokenizer's folder, where a server's is not known otherwise; how long a server may take
    for one answer, of how many tokens it is asked for probabilities, and how many questions it gets at a time; how many
    of the most divergent prompts are written out."""

    count: int = 64
    prompt_tokens: int = 100
    continuation_tokens: int = 100
    seed: int = 0
    dtype: str = DTYPE
    attention: str = ATTENTION
    trust_remote_code: bool = ModelSpec.trust_remote_code
    batch_tokens: int = 0
    tokenizer: str | None = None
    timeout_seconds: float = 60.0
    top: int = 20
    threads: int = 4
    examples: int = 4


@dataclass(frozen=True)
class BaseSide:
    """BASE's side of the comparison: the reference, and what is known of its distributions: all (`outputs`), of the
    likeliest tokens, or nothing. `text_nll` [num_prompts, text positions]."""

    reference: Reference
    way: str
    outputs: BaseOutputs | None = None
    likeliest: Likeliest | None = None
    text_nll: Any = None


@dataclass(frozen=True)
class OtherSide:
    """OTHER's: what it makes of BASE's positions, and how it goes on itself from some prompts (tokens, margins)."""

    found: Positions
    way: str
    go_on: Callable[[Sequence[int]], tuple[Sequence[IntArray], Sequence[Any]]]
    notes: tuple[str, ...] = ()


def local_base(
    spec: ModelSpec, prompts: PromptTokens, settings: ReplicaSettings, on_stage: OnStage
) -> tuple[BaseSide, tuple[int, ...]]:
    """BASE on this machine: its reference and outputs, and the tokens that are never chosen. Its layers are let go."""
    on_stage("BASE: loading", spec.path)
    replica = ComparedReplica(spec, settings)
    on_stage("BASE: greedy continuations", counted(len(prompts.tokens), "prompt"))
    reference = replica.make_reference(prompts)
    replica.use_from(reference, None)
    on_stage("BASE: its probabilities", "")
    text_nll = replica.positions(reference, ("ppl",))["text"].nll
    outputs = replica.outputs(reference)
    replica.drop_layers()
    return BaseSide(reference, _way(replica), outputs, text_nll=text_nll), reference.suppressed


def _way(replica: ComparedReplica) -> str:
    return f"{replica.mode.dtype} on {replica.mode.device.upper()}, {replica.way}"


def local_other(replica: ComparedReplica, one: BaseSide, on_stage: OnStage) -> OtherSide:
    """What a model on this machine makes of BASE's positions. Raises `UserError` for logits that are not finite."""
    on_stage("OTHER: measuring", counted(one.reference.num_prompts, "prompt"))
    reference = one.reference
    replica.use_from(reference, one.outputs)
    scored = replica.positions(reference, ("ppl",) if one.outputs is None else ("ppl", "kl"))
    own = scored["continuation"]
    bad: Any = ~np.isfinite(own.nll).all(axis=1)
    if bad.any():
        raise UserError(
            f"OTHER gives logits that are not finite in {replica.mode.dtype}, on {int(bad.sum())} of {len(bad)} "
            "prompts: try --dtype float32"
        )
    kl, covered = own.kl, None
    if one.likeliest is not None:
        theirs = log_probabilities_at(replica.outputs(reference), one.likeliest.ids)
        kl, covered = least_kl(one.likeliest.log_probabilities, theirs)
    found = Positions(own.diverged, own.nll, kl, covered, scored["text"].nll)

    def go_on(rows: Sequence[int]) -> tuple[Sequence[IntArray], Sequence[Any]]:
        tokens, margins = replica.go_on(PromptTokens(reference.text[list(rows)], reference.prompt_tokens))
        return list(tokens), list(margins)

    notes = (_CUT.format(side="BASE", top=one.likeliest.ids.shape[-1]),) if one.likeliest is not None else ()
    return OtherSide(found, _way(replica), go_on, notes)


_CUT = (
    "{side}'s server tells up to {top} tokens of each position, so that KL is a lower bound: all other tokens count as "
    "one"
)
_UNTOLD = (
    "tokens of BASE that OTHER's server does not tell count as likely as they can be: DPPL and PPL are lower bounds"
)


def _told(served: Served) -> str:
    ways = {
        "prompt_logprobs": f"the {served.top} likeliest tokens of every position of a prompt",
        "echo": f"the {served.top} likeliest tokens of every position of a prompt",
        "next": f"the {served.top} likeliest next tokens, so that every position is a request",
        "text": "its text alone",
    }
    return f"by its own arithmetic; it tells {ways[served.tells]}"


def served_base(
    served: Served,
    prompts: PromptTokens,
    suppressed: tuple[int, ...],
    mode: NumericMode,
    settings: CompareSettings,
    on_stage: OnStage,
) -> BaseSide:
    """BASE behind a server: its continuations, and its distributions as far as it tells them. Raises `UserError` where
    it names no tokens, or ends texts early."""
    served = served_model.without_bias(served, suppressed)
    stage = "BASE: greedy continuations by its server"
    starts, length = prompts.tokens[:, : prompts.prompt_tokens], prompts.continuation_tokens

    def generate(said: str) -> IntArray:
        found = served_model.generated(served, starts, length, suppressed, settings.threads, _progress(on_stage, said))
        tokens = [each.tokens for each in found]
        if any(each is None for each in tokens):
            raise UserError(
                f"{served.url} does not name the tokens that it generates, so it can be OTHER but not BASE: as BASE, "
                "give a server that does (vLLM, llama.cpp) or the model's folder"
            )
        lengths = [len(each or ()) for each in tokens]
        if min(lengths) < length:
            raise UserError(
                f"{served.url} ended {sum(n < length for n in lengths)} of {len(lengths)} continuations before "
                f"{length} tokens, as early as after {min(lengths)}: it cannot be kept from end-of-text, so BASE has "
                "to be another server, or ask for fewer --continuation-tokens"
            )
        return np.array([(each or ())[:length] for each in tokens], np.int32)

    continuation = generate(stage)
    reference = Reference(
        "compared", "served", mode, prompts.tokens, continuation, np.ones(continuation.shape, np.bool_), suppressed
    )
    if served.tells == "text":
        again = generate("BASE: the same once more, for its own noise")
        first = (again != continuation) & (np.cumsum(again != continuation, axis=1) == 1)
        return BaseSide(_agreeing(reference, ~first), _told(served))
    told = _likeliest(served, greedy(reference, slice(None)), prompts.prompt_tokens, settings, on_stage, "BASE")
    agrees = told.best(suppressed) == continuation
    text_nll = _text_nll(served, prompts.tokens, settings, on_stage, "BASE")
    return BaseSide(_agreeing(reference, agrees), _told(served), likeliest=told, text_nll=text_nll)


def _agreeing(reference: Reference, agrees: Any) -> Reference:
    made = replace(reference, agrees=agrees)
    check_agreement(made)
    return made


def _likeliest(
    served: Served, rows: IntArray, first: int, settings: CompareSettings, on_stage: OnStage, role: str
) -> Likeliest:
    each = "positions" if served.tells == "next" else "prompts"
    told = _progress(on_stage, f"{role}: probabilities by its server", each)
    return served_model.likeliest(served, rows, first, settings.threads, told)


def _text_nll(served: Served, rows: IntArray, settings: CompareSettings, on_stage: OnStage, role: str) -> Any:
    """Nats of human text; None of a server that would take a request for each of its positions."""
    if served.tells not in ("prompt_logprobs", "echo"):
        return None
    told = _progress(on_stage, f"{role}: human text by its server")
    return served_model.nats_of(served_model.likeliest(served, rows, 1, settings.threads, told), rows[:, 1:])


def served_other(
    served: Served,
    one: BaseSide,
    tokenizer: Any,
    settings: CompareSettings,
    on_stage: OnStage,
    human_text: bool = True,
) -> OtherSide:
    """What a server makes of BASE's positions, and of `human_text`, and how it goes on itself."""
    reference = one.reference
    served = served_model.without_bias(served, reference.suppressed)
    notes = [] if served.takes_bias else ["OTHER's server cannot be kept from end-of-text: it counts as a divergence"]

    def go_on(rows: Sequence[int], said: str = "OTHER: continuations by its server") -> list[IntArray]:
        starts = reference.text[list(rows), : reference.prompt_tokens]
        lengths = reference.continuation_tokens, reference.suppressed, settings.threads
        found = served_model.generated(served, starts, *lengths, _progress(on_stage, said))
        return [_tokens(each, tokenizer, reference, row) for each, row in zip(found, rows, strict=True)]

    def go_on_without_margins(rows: Sequence[int]) -> tuple[Sequence[IntArray], Sequence[Any]]:
        written = go_on(rows)
        return written, [np.full(len(each), np.nan, np.float32) for each in written]

    if served.tells == "text":
        written = go_on(range(reference.num_prompts))
        first = np.array([_first_difference(*pair) for pair in zip(reference.continuation, written, strict=True)])
        diverged = np.arange(reference.continuation_tokens)[None] == first[:, None]
        notes.append("OTHER's server tells its text alone: FDT is all that can be said")
        return OtherSide(Positions(diverged, first_only=True), _told(served), go_on_without_margins, tuple(notes))
    rows, start = greedy(reference, slice(None)), reference.prompt_tokens
    told = _likeliest(served, rows, start, settings, on_stage, "OTHER")
    kl, covered = None, None
    if one.outputs is not None:
        kl, covered = least_kl(log_probabilities_at(one.outputs, told.ids), told.log_probabilities)
    elif one.likeliest is not None:
        kl, covered = least_kl(*common(one.likeliest, told))
    if kl is not None:
        notes.append(_CUT.format(side="OTHER", top=told.ids.shape[-1]))
    if np.isnan(told.of(reference.continuation)).any():
        notes.append(_UNTOLD)
    nll = served_model.nats_of(told, reference.continuation)
    text_nll = _text_nll(served, reference.text, settings, on_stage, "OTHER") if human_text else None
    diverged = told.best(reference.suppressed) != reference.continuation
    found = Positions(diverged, nll, kl, covered, text_nll)
    return OtherSide(found, _told(served), go_on_without_margins, tuple(notes))


def _tokens(written: served_model.Generated, tokenizer: Any, reference: Reference, row: int) -> IntArray:
    """The tokens of a continuation; where a server gives text alone, BASE's own as far as the text is theirs, so that
    another way to cut the same text is no divergence."""
    if written.tokens is not None:
        return np.array(written.tokens, np.int32)
    own = reference.continuation[row]
    kept = _num_written(tokenizer, reference.text[row, : reference.prompt_tokens], own, written.text)
    begun = _written(tokenizer, reference.text[row, : reference.prompt_tokens], own[:kept])
    rest = tokenizer(written.text[len(begun) :], add_special_tokens=False)["input_ids"]
    if rest and kept < len(own) and rest[0] == own[kept]:  # it begins as BASE's next, and goes on otherwise
        rest = rest[1:]
    return np.array([*own[:kept].tolist(), *rest][: len(own)], np.int32)


def _written(tokenizer: Any, prompt: IntArray, tokens: IntArray) -> str:
    before = str(tokenizer.decode(prompt.tolist()))
    return str(tokenizer.decode([*prompt.tolist(), *tokens.tolist()]))[len(before) :]


def _num_written(tokenizer: Any, prompt: IntArray, tokens: IntArray, text: str) -> int:
    """How many of `tokens` a text begins with."""
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high + 1) // 2
        if text.startswith(_written(tokenizer, prompt, tokens[:middle]).rstrip("\N{REPLACEMENT CHARACTER}")):
            low = middle
        else:
            high = middle - 1
    return low


def _first_difference(own: IntArray, other: IntArray) -> int:
    """The first position at which two continuations differ, or the other has ended; the length where nowhere."""
    length = min(len(own), len(other))
    differing = np.flatnonzero(own[:length] != other[:length])
    return int(differing[0]) if len(differing) else length


def end_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """End-of-text tokens of a model that only servers have: the tokenizer's, and those of a configuration beside it."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            found |= set(value) if isinstance(value, list) else {value}
    return tuple(sorted(token for token in {*found, tokenizer.eos_token_id} if token is not None))


def _progress(on_stage: OnStage, text: str, each: str = "prompts") -> Progress:
    return lambda done, total: on_stage(text, f"{done} of {total} {each}")

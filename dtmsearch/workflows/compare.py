"""Two models compared, whatever holds them: folders, GGUF files, servers. No search, no store, no Ray.

BASE's greedy continuations are the reference; OTHER is measured against it by a replica as plans are, or by what its
server tells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dtmsearch.analysis.format import counted
from dtmsearch.analysis.model_comparison import ComparedModel, ModelComparison, compared
from dtmsearch.core.components import is_gguf, read_model_config
from dtmsearch.core.documents import Document, Texts
from dtmsearch.core.evaluation import (
    Continuation,
    IntArray,
    ModelSpec,
    PromptTokens,
    Reference,
    ReplicaSettings,
    check_agreement,
)
from dtmsearch.core.metric_registry import first_divergent_token, share_of_divergent_tokens
from dtmsearch.core.numeric_mode import ATTENTION, DTYPE, NumericMode
from dtmsearch.core.positions import Likeliest, Positions, common, least_kl
from dtmsearch.errors import UserError
from dtmsearch.model.modules.loading import checkpoint_folder, load_tokenizer, own_folder
from dtmsearch.model.replica.compared_replica import (
    ComparedReplica,
    described,
    log_probabilities_at,
    margins_of,
)
from dtmsearch.model.replica.loaded_reference import BaseOutputs, greedy
from dtmsearch.model.replica.prompts import Cutter
from dtmsearch.model.replica.samples import written_out
from dtmsearch.workflows import served_model
from dtmsearch.workflows.served_model import Served

# Of two vocabularies that are one, at most this share of tokens are written otherwise (special ones, unused ones).
_MOST_OTHER_TOKENS = 0.01
# Texts by which a server's tokenizer is looked at, and tokens of each.
_LOOKED_AT, _LOOKED_AT_TOKENS = 4, 64
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
class _Side:
    """A model on this machine (`spec`), or one behind a server."""

    name: str
    spec: ModelSpec | None = None
    served: Served | None = None

    @property
    def at(self) -> Served:
        assert self.served is not None
        return self.served


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


def compare(
    base: str | Path,
    other: str | Path,
    texts: str | Sequence[str],
    *,
    on_stage: OnStage = lambda text, done: None,
    **settings: Any,
) -> ModelComparison:
    """FDT, SDT, DPPL, PPL and KL of `other` against `base`, each a folder that transformers loads (quantized or not), a
    hub id, a GGUF file, or a server of the OpenAI kind (`http://host:port`, `#MODEL` behind it where it has several).

    `texts` are documents, of which `count` windows of `prompt_tokens` + `continuation_tokens` tokens are drawn by
    `seed`: the first part of each is a prompt, from which BASE goes on greedily. Further `settings`: `dtype`,
    `attention`, `trust_remote_code`, `batch_tokens` of models on this machine; `tokenizer`, a folder, where both are
    servers; `timeout_seconds`, `top`, `threads` of servers; `examples`, the most divergent prompts that are written
    out. Of a server that tells the likeliest tokens alone, KL is a lower bound; of one that tells none, FDT is all.

    Raises `UserError` for models of different vocabularies, for what cannot be loaded, and for too little text;
    `ServerUnreachable` for a server that does not answer in time.
    """
    documents: list[Document] = [texts] if isinstance(texts, str) else list(texts)
    return compare_by(str(base), str(other), documents, CompareSettings(**settings), on_stage)


def compare_by(
    base: str, other: str, documents: Texts, settings: CompareSettings, on_stage: OnStage = lambda text, done: None
) -> ModelComparison:
    """As `compare`."""
    sides = [_side(name, role, settings, on_stage) for role, name in (("BASE", base), ("OTHER", other))]
    tokenizer, notes = _tokenizer(sides, settings)
    # A server answers with one token more than it is asked about.
    contexts = {side.name: side.served.context - 1 for side in sides if side.served is not None and side.served.context}
    contexts |= {side.name: context for side in sides if side.spec and (context := _context(side.spec))}
    shortest = min(contexts, key=lambda name: contexts[name], default=base)
    cutter = Cutter(tokenizer, shortest, contexts.get(shortest), len(tokenizer))
    lengths = settings.prompt_tokens, settings.continuation_tokens
    prompts = cutter.prompts(documents, settings.count, *lengths, settings.seed, (), "count")
    notes += [*prompts.notes, *_checked_servers(sides, tokenizer, prompts)]
    one, two = _measured(sides[0], sides[1], prompts, tokenizer, settings, on_stage)
    models = (_facts(sides[0], one.way), _facts(sides[1], two.way))
    found = compared(*models, one.reference, two.found, one.text_nll, settings.seed, (*notes, *two.notes))
    worst = _most_divergent(one.reference, two.found, settings.examples)
    if not worst:
        return found
    on_stage("writing out the most divergent prompts", "")
    return replace(found, texts=tuple(_texts(tokenizer, one, two, worst)))


def _side(name: str, role: str, settings: CompareSettings, on_stage: OnStage) -> _Side:
    if served_model.is_url(name):
        on_stage(f"{role}: asking {name}", "")
        served = served_model.connect(name, settings.timeout_seconds, settings.top)
        return _Side(served.name, served=served)
    spec = ModelSpec(
        name,
        dtype=settings.dtype,
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
        compile="never",
    )
    own_folder(spec)
    return _Side(name, spec)


def _context(spec: ModelSpec) -> int | None:
    """What a model on this machine reads at most, by its configuration; None where that does not say."""
    config = read_model_config(_folder(spec))
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) else None


def _facts(side: _Side, way: str) -> ComparedModel:
    return ComparedModel(side.name, "served" if side.spec is None else described(side.spec), way)


# One vocabulary.


def _folder(spec: ModelSpec) -> Path:
    folder = own_folder(spec)
    return checkpoint_folder(spec) if is_gguf(folder) else folder


def _tokenizer(sides: Sequence[_Side], settings: CompareSettings) -> tuple[Any, list[str]]:
    """The tokenizer that prompts are cut with, BASE's where it is known. Raises `UserError` where two models have
    different ones, or none is known."""
    named = [ModelSpec(settings.tokenizer, trust_remote_code=settings.trust_remote_code)] if settings.tokenizer else []
    roots = [
        ModelSpec(side.served.root) for side in sides if side.served is not None and Path(side.served.root).is_dir()
    ]
    local = [side.spec for side in sides if side.spec is not None]
    specs = [*named, *local] if local or named else roots[:1]
    if not specs:
        raise UserError(
            "both models are served, and neither server names a folder on this machine: say with --tokenizer which "
            "folder holds their tokenizer"
        )
    tokenizers = [load_tokenizer(_folder(spec) if spec in local else Path(spec.path), spec) for spec in specs]
    notes = []
    for spec, found in zip(specs[1:], tokenizers[1:], strict=True):
        notes += _check_same_vocabulary(specs[0].path, tokenizers[0], spec.path, found)
    return tokenizers[0], notes


def _check_same_vocabulary(name: str, tokenizer: Any, other_name: str, other: Any) -> list[str]:
    """Raises `UserError` where ids mean other tokens; a note where few do."""
    own, theirs = ({index: token for token, index in each.get_vocab().items()} for each in (tokenizer, other))
    shared = own.keys() & theirs.keys()
    differing = sorted(index for index in shared if own[index] != theirs[index])
    most = max(len(own), len(theirs))
    if len(differing) + most - len(shared) > _MOST_OTHER_TOKENS * most:
        shown = "; ".join(f"token {i} is {own[i]!r} and {theirs[i]!r}" for i in differing[:2])
        raise UserError(
            f"{name} and {other_name} have different vocabularies ({len(own):,} and {len(theirs):,} tokens"
            f"{f'; {shown}' if shown else ''}): only models of one vocabulary can be compared token by token"
        )
    if not differing:
        return []
    return [
        f"{counted(len(differing), 'token')} of the vocabularies are written otherwise, such as {own[differing[0]]!r}"
    ]


def _checked_servers(sides: Sequence[_Side], tokenizer: Any, prompts: PromptTokens) -> list[str]:
    texts = [
        tokenizer.decode(row[:_LOOKED_AT_TOKENS].tolist(), skip_special_tokens=True)
        for row in prompts.tokens[:_LOOKED_AT]
    ]
    notes = []
    for side in sides:
        if side.served is None:
            continue
        how = served_model.check_tokenizer(side.served, tokenizer, [text for text in texts if text.strip()])
        if not how:
            notes.append(f"{side.name} gives no way to look at its tokenizer: that it is the same is taken for granted")
    return notes


# Measuring.


def _measured(
    base: _Side, other: _Side, prompts: PromptTokens, tokenizer: Any, settings: CompareSettings, on_stage: OnStage
) -> tuple[BaseSide, OtherSide]:
    replicas = ReplicaSettings(batch_tokens=settings.batch_tokens)
    if base.spec is not None:
        one, suppressed = local_base(base.spec, prompts, replicas, on_stage)
        mode = one.reference.mode
    if other.spec is not None:
        on_stage("OTHER: loading", other.name)
        replica = ComparedReplica(other.spec, replicas, suppressed if base.spec is not None else None)
        if base.spec is None:
            mode, rules = replica.conditions()
            one = _served_base(base.at, prompts, rules.suppressed, mode, settings, on_stage)
        return one, local_other(replica, one, on_stage)
    if base.spec is None:
        folder = Path(settings.tokenizer or base.at.root or other.at.root)
        mode = NumericMode("unknown", "server", "unknown")
        one = _served_base(base.at, prompts, end_tokens(folder, tokenizer), mode, settings, on_stage)
    return one, served_other(other.at, one, tokenizer, settings, on_stage)


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


def _served_base(
    served: Served,
    prompts: PromptTokens,
    suppressed: tuple[int, ...],
    mode: NumericMode,
    settings: CompareSettings,
    on_stage: OnStage,
) -> BaseSide:
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


def _progress(on_stage: OnStage, text: str, each: str = "prompts") -> served_model.Progress:
    return lambda done, total: on_stage(text, f"{done} of {total} {each}")


# Side by side.


def _most_divergent(reference: Reference, found: Positions, most: int) -> list[int]:
    """Prompts that diverge first, among equals those that diverge more; none that never does."""
    masked = found.diverged & reference.agrees
    fdt, sdt = first_divergent_token(masked), share_of_divergent_tokens(masked)
    order = sorted(range(len(fdt)), key=lambda row: (fdt[row], -sdt[row], row))
    return [row for row in order if fdt[row] < reference.continuation_tokens][:most]


def _texts(tokenizer: Any, one: BaseSide, two: OtherSide, rows: Sequence[int]) -> list[Continuation]:
    reference = one.reference
    own = two.go_on(rows)
    base = reference.continuation[list(rows)]
    unknown = np.full(base.shape, np.nan, np.float32)
    margins = unknown if one.outputs is None else margins_of(one.outputs, rows, reference.suppressed)
    start = PromptTokens(reference.text[list(rows)], reference.prompt_tokens)
    return written_out(tokenizer, rows, start, (list(base), list(margins)), own)

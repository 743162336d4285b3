"""Plan files: the JSON that holds a plan, written and read, and what is wrong with one that cannot be."""

from __future__ import annotations

import json
import re
from typing import Any

from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import Scheme, parse_scheme
from dtmsearch.core.user_files import parse_json, shown
from dtmsearch.errors import UserError

_WEIGHTS_ID = re.compile("[0-9A-Za-z_-]{1,100}")


def plan_to_json(plan: Plan, manifest: ModelManifest, weights_id: str = "") -> str:
    """The plan file: model, manifest_id, the trained weights that the plan is over, if it is, the tokens and texts
    whose KV caches are components, if they are, and every compressed component's scheme, in order of name."""
    further: dict[str, Any] = {"weights_id": weights_id} if weights_id else {}
    if manifest.kv_cache is not None:
        further["kv_cache"] = list(manifest.kv_cache)
    content = {"model": manifest.model, "manifest_id": manifest.id, **further, "schemes": dict(plan.entries)}
    return json.dumps(content, indent=2) + "\n"


def plan_from_json(text: str, manifest: ModelManifest, source: str) -> Plan:
    """The plan in a plan file. Raises `UserError` when it is malformed or was made for another model."""
    content = _plan_content(text, source)
    manifest_id, schemes = content["manifest_id"], content["schemes"]
    if manifest_id != manifest.id:
        raise UserError(
            f"{source} was made for another model: its manifest is {manifest_id[:100]} "
            f"({shown(content.get('model'))}), that of {manifest.model} is {manifest.id}"
        )
    for component, scheme in schemes.items():
        if component not in manifest.by_name:
            raise UserError(f"{source} names {shown(component)}, which {manifest.model} does not have")
        check_takes(parse_scheme(scheme), manifest.by_name[component], source)
    plan = Plan.of(schemes)
    for name, parsed in plan.parsed.items():
        if parsed.width is None and plan.width_of(manifest.by_name[name]) is not None and _is_of_whole(parsed):
            raise UserError(
                f"{source} gives {name} the scheme {parsed.name}, which is solved or scaled for whole matrices, and "
                f"cuts {manifest.by_name[name].block}: leave one of both out"
            )
    _check_experts(plan, manifest, source)
    return plan


def _check_experts(plan: Plan, manifest: ModelManifest, source: str) -> None:
    """Raises `UserError` where some experts of a mixture go and its router, of which rows go, has a scheme, or experts
    have schemes of their own: what is left would be of no size that is known."""
    for router in manifest.routers if plan.widths else ():
        block = next((name for name in plan.widths if router.startswith(f"{name}.")), "")
        width = plan.widths[block].width if block else None
        if width is not None and width.takes_experts and router in plan.schemes:
            raise UserError(
                f"{source} gives the router {router} a scheme, {plan.schemes[router]}, and takes experts of {block}, "
                "of which its rows go: leave one of both out"
            )
    first: dict[tuple[str, str], str] = {}
    for component in manifest.components if plan.widths else ():
        width = plan.width_of(component)
        if width is None or not (width.takes_experts and component.mixture):
            continue
        own = plan.scheme_of(component.name)
        if first.setdefault((component.mixture, component.kind), own) != own:
            raise UserError(
                f"{source} gives {component.name} a scheme of its own, {own}, and takes experts of {component.block}: "
                "give all of its experts one"
            )


def _is_of_whole(scheme: Scheme) -> bool:
    """Whether a scheme takes whole matrices: it is solved by their inputs, or scales what several of them read."""
    return scheme.solved is not None or bool(scheme.scaled)


def check_takes(scheme: Scheme, component: Component, source: str) -> None:
    """Raises `UserError` for a scheme that is not one for such a component."""
    if component.is_block and not scheme.takes(component):
        width = scheme.width
        if width is not None and width.takes_experts and component.mixture:
            left, of = width.left(component.num_experts), component.num_experts
            chosen = component.experts_per_token
            why = f"{left} of {of} experts would be left, and a token is given to {chosen}"
            raise UserError(
                f"{source} gives {component.name} the scheme {scheme.name}: "
                f"{why if left < of else f'all {of} experts would stay'}"
            )
        raise UserError(
            f"{source} gives {component.name} the scheme {scheme.name}: a whole {component.kind} is dropped (drop), "
            "cut (channels-0.25-wanda of an MLP, heads-2:3-wanda of an attention, experts-0.25-reap of a mixture) or "
            "stays; name the matrices in it"
        )
    if scheme.width is not None and not scheme.takes(component):
        raise UserError(
            f"{source} gives {component.name} the scheme {scheme.name}, a width: these are for whole blocks "
            f"({scheme.width.block_kind}), such as {component.block}"
        )
    if not scheme.takes(component):
        raise UserError(
            f"{source} gives {component.name} the scheme {scheme.name}: schemes of KV caches (kv-fp8, kv-int8, "
            "kv-int4) are for caches, all others for weights"
        )


def schemes_from_json(text: str, source: str) -> dict[str, str]:
    """Component -> scheme of a plan file, whichever model it was made for. Raises `UserError`."""
    return {str(component): str(scheme) for component, scheme in _plan_content(text, source)["schemes"].items()}


def model_from_json(text: str, source: str) -> str | None:
    """Where a plan file's model lay when it was written; None where it does not say. Raises `UserError`."""
    model: str | None = _plan_content(text, source).get("model")
    return model


def weights_id_from_json(text: str, source: str) -> str:
    """The trained weights that a plan file's plan is over; empty for the base model's own. Raises `UserError`."""
    weights_id = str(_plan_content(text, source).get("weights_id", ""))
    if weights_id:
        check_weights_id(weights_id)
    return weights_id


def kv_cache_from_json(text: str, source: str) -> tuple[int, int]:
    """The tokens and texts whose KV caches are components of a plan file's model; (0, 1) where none are. Raises
    `UserError`."""
    found = _plan_content(text, source).get("kv_cache", [0, 1])
    if not (isinstance(found, list) and len(found) == 2 and all(type(n) is int and 0 <= n < 1 << 40 for n in found)):
        raise UserError(f"{source} is no plan file: kv_cache should be two numbers, tokens and texts")
    return found[0], found[1]


def check_weights_id(weights_id: str) -> None:
    """Raises `UserError` for what cannot name trained weights, such as a path."""
    if not _WEIGHTS_ID.fullmatch(weights_id):
        raise UserError(f"{shown(weights_id)} names no trained weights: their names are letters and digits")


def _plan_content(text: str, source: str) -> dict[str, Any]:
    content = parse_json(text, f"{source} is no plan file: it")
    if not isinstance(content, dict):
        raise UserError(f"{source} is no plan file: it should hold JSON with model, manifest_id and schemes")
    for key in ("model", "manifest_id", "weights_id"):
        if not isinstance(content.get(key, "" if key != "manifest_id" else None), str):
            raise UserError(f"{source} is no plan file: {key} should be a text, got {shown(content.get(key))}")
    schemes = content.get("schemes")
    if not isinstance(schemes, dict):
        raise UserError(f"{source} is no plan file: schemes should name a scheme for each component")
    for component, scheme in schemes.items():
        if not isinstance(scheme, str):
            raise UserError(f"{source}: the scheme of {shown(component)} should be a text, got {shown(scheme)}")
    return content

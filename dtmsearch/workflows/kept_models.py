"""The verb `cache`: the models that this machine keeps unquantized."""

from __future__ import annotations

from dataclasses import dataclass

from dtmsearch.model.sources.unquantized_cache import (
    UnquantizedModel,
    cache_folder,
    remove,
    unquantized_models,
)


@dataclass(frozen=True)
class KeptModels:
    """Those that lie in `folder`."""

    folder: str
    models: list[UnquantizedModel]


def kept_models(older_than: float = 0.0) -> KeptModels:
    """All that were not used for so many days."""
    models = [model for model in unquantized_models() if model.unused_days >= older_than]
    return KeptModels(str(cache_folder()), models)


def remove_kept(kept: KeptModels) -> list[UnquantizedModel]:
    """Remove models that are not in use; those that were removed. Raises `UserError` where that is not allowed."""
    return remove(kept.models)

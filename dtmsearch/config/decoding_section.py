"""How the base model's continuations are decoded: the section `search.decoding`."""

from __future__ import annotations

from pydantic import Field, model_validator

from dtmsearch.config.sections import Section
from dtmsearch.core.decoding import MOST_SEED, Decoding


class DecodingSection(Section):
    """How the base model's continuations, and the choices that are held against them, are decoded. Sampled ones are by
    noise of each prompt, position and token that is the same for every model, so that divergence stays defined."""

    temperature: float = Field(default=Decoding.temperature, ge=0)
    """What logits are divided by before a token is sampled; 0: every token is the likeliest."""
    top_k: int = Field(default=Decoding.top_k, ge=0)
    """Sample from so many of the likeliest tokens; 0: from all."""
    top_p: float = Field(default=Decoding.top_p, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability, of those that top_k leaves."""
    seed: int = Field(default=Decoding.seed, ge=0, le=MOST_SEED)
    """Chooses the noise."""

    @model_validator(mode="after")
    def _of_samples(self) -> DecodingSection:
        given = [name for name in ("top_k", "top_p", "seed") if getattr(self, name) != getattr(Decoding, name)]
        if self.temperature == 0.0 and given:
            raise ValueError(f"{given[0]} is for tokens that are sampled; give a temperature above 0, such as 0.8")
        return self

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.temperature, self.top_k, self.top_p, self.seed)

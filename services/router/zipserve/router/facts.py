"""What the router must know of a model to check requests while no worker is up: read from its configuration files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipserve.common.errors import InvalidRequestError

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


@dataclass(frozen=True)
class ModelFacts:
    """Limits of a model."""

    context_tokens: int
    """Most tokens of prompt and completion together."""
    vocab_tokens: int
    """Valid token ids lie below it."""
    eos_token_ids: frozenset[int]
    """Ids that end a sequence by the model's own configuration."""

    @classmethod
    def read(cls, folder: Path) -> "ModelFacts":
        """Reads config.json, and generation_config.json where there is one.

        Raises:
            InvalidRequestError: the configuration names no context length or no vocabulary size.
        """
        config = json.loads((folder / "config.json").read_text())
        # models of several modalities keep the numbers of the language model in a section of their own
        text_config = {**config, **config.get("text_config", {})}
        context_tokens = next((text_config[key] for key in _CONTEXT_KEYS if text_config.get(key)), 0)
        vocab_tokens = text_config.get("vocab_size") or 0
        if not (context_tokens and vocab_tokens):
            raise InvalidRequestError(
                f"{folder / 'config.json'} lacks vocab_size or one of {', '.join(_CONTEXT_KEYS)}", field="model"
            )
        generation = folder / "generation_config.json"
        eos = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
        return cls(context_tokens, vocab_tokens, _ids(text_config.get("eos_token_id") if eos is None else eos))


def _ids(value: Any) -> frozenset[int]:
    """One id, several, or none, as configurations write them."""
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset([value])

"""Penalties on tokens that a sequence has already: which they are, how often each was generated, and what it costs."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from zipserve.common.sampling import Sampling


class TokenCounts:
    """The tokens of one sequence, as penalties count them. Kept sparse: a vocabulary is far larger than a sequence."""

    def __init__(self, prompt: Iterable[int], generated: Iterable[int] = ()) -> None:
        self._places = {token_id: place for place, token_id in enumerate(dict.fromkeys(prompt))}
        self._token_ids = np.fromiter(self._places, np.int64)
        self._counts = np.zeros(len(self._places), np.float32)
        for token_id in generated:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Counts a generated token."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._token_ids):
            room = np.zeros(max(64, place), np.int64)  # doubles, so that adding costs the same on average
            self._token_ids = np.concatenate((self._token_ids, room))
            self._counts = np.concatenate((self._counts, room.astype(np.float32)))
        self._token_ids[place] = token_id
        self._counts[place] += 1

    def penalize(self, logits: npt.NDArray[np.float32], params: Sampling) -> None:
        """Changes the logits [vocab] of one position in place.

        The repetition penalty r counts prompt and generated tokens: a positive logit becomes l / r, another one l * r
        (Keskar et al. 2019, section 4.1, with the sign handled as everywhere since). The frequency and the presence
        penalty count generated tokens only: l - frequency * count - presence * (count > 0).
        """
        known = len(self._places)
        token_ids, counts = self._token_ids[:known], self._counts[:known]
        found = logits[token_ids]
        if params.repetition_penalty != 1.0:
            found = np.where(found > 0, found / params.repetition_penalty, found * params.repetition_penalty)
        found -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        logits[token_ids] = found

"""What Hugging Face says the right tokens are."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

NEAR_TIE_LOGIT = 1e-4
"""Two logits that differ by less may change places by rounding alone, when a batch is composed differently."""


class Oracle:
    """A plain Hugging Face model in float32."""

    def __init__(self, folder: Path) -> None:
        model: Any = AutoModelForCausalLM
        self.model = model.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    @torch.inference_mode()
    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """Greedy continuation by `generate`, with its own KV cache."""
        output = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        result: list[int] = output[0, len(prompt) :].tolist()
        return result

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """After each of the tokens: float32 [tokens, vocab]."""
        logits: torch.Tensor = self.model(torch.tensor([token_ids])).logits[0].float()
        return logits

    @torch.inference_mode()
    def first_wrong(self, prompt: list[int], tokens: list[int]) -> int | None:
        """Index of the first token that is not the greedy one after all before it, or None.

        By induction this is what `generate` would show, for the price of one forward pass. A token whose logit is
        within NEAR_TIE_LOGIT of the highest one counts as right.
        """
        logits = self.logits(prompt + tokens[:-1])[len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        wrong = (logits.amax(1) - chosen > NEAR_TIE_LOGIT).nonzero()
        return int(wrong[0, 0]) if len(wrong) else None

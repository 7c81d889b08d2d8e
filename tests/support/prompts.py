"""Forty real prompts of 1 to 2,000 tokens: questions as a chat, and passages of this repository's licence."""

from pathlib import Path
from typing import Any

LICENCE = Path(__file__).parents[2] / "LICENSE"
PASSAGE_TOKENS = (1, 2, 3, 7, 16, 31, 64, 100, 127, 128, 129, 200, 255, 256, 257, 384, 511, 700, 1000, 2000)
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about the sea.",
    "What is 17 plus 25?",
    "Translate 'good morning' into Spanish.",
    "Who wrote 'Romeo and Juliet'?",
    "List the planets of the solar system in order.",
    "What does a compiler do?",
    "Give me a recipe for pancakes.",
    "Why do leaves change colour in autumn?",
    "What is the difference between a virus and a bacterium?",
    "Summarize the story of Cinderella in three sentences.",
    "How does a bicycle stay upright?",
    "What is photosynthesis?",
    "Write a polite email that declines an invitation.",
    "What are the days of the week?",
    "How many legs does a spider have?",
    "Describe the taste of a lemon.",
    "What is a binary search?",
)


def real_prompts(tokenizer: Any) -> list[list[int]]:
    """The prompts as token ids, long and short ones alternating.

    Args:
        tokenizer: of transformers, with a chat template.
    """
    licence: list[int] = tokenizer(LICENCE.read_text(), add_special_tokens=False).input_ids
    starts = [min(17 * i, len(licence) - tokens) for i, tokens in enumerate(PASSAGE_TOKENS)]
    passages = [licence[start : start + tokens] for start, tokens in zip(starts, PASSAGE_TOKENS, strict=True)]
    chats = [
        tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            ),
            add_special_tokens=False,
        ).input_ids
        for question in QUESTIONS
    ]
    return [prompt for pair in zip(passages, chats, strict=True) for prompt in pair]

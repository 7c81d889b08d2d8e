"""A model's folder as the router needs it: a real tokenizer and configuration, and weights that nobody reads."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTEXT_TOKENS = 512
SPECIALS = ("<unk>", "<s>", "</s>")
EOS = 2
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
TOOLS_TEMPLATE = (
    "{% if tools %}<s>system:call with <tool_call>{% for t in tools %}{{ t | tojson }}{% endfor %}</s>{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}{% if m.name %}({{ m.name }}){% endif %}"
    "{% if m.tool_call_id %}[{{ m.tool_call_id }}]{% endif %}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}={{ c.function.arguments.city }}</tool_call>"
    "{% endfor %}</s>{% endfor %}{% if shout %}!{% endif %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
"""Knows tools, as Hermes does, and an argument of its own."""


def byte_tokenizer() -> Tokenizer:
    """One token for every byte: every character outside ASCII is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return tokenizer


def sentencepiece_tokenizer(words: list[str]) -> Tokenizer:
    """Pieces as sentencepiece makes them: `▁` for a space, <0xNN> for the bytes of what is not in the vocabulary."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    pieces = [*SPECIALS, *bytes_, "▁", *words]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return tokenizer


def write(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, context_tokens: int = CONTEXT_TOKENS) -> Path:
    """Writes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": EOS}
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context_tokens}))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    if chat_template is not None:
        names["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder

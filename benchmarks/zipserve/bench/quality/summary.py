"""The scores of a run, put together over windows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from zipserve.bench.quality.metrics import Estimate, Score, mean, perplexity_ratio, ratio
from zipserve.bench.quality.windows import RETRIEVAL
from zipserve.bench.report import table
from zipserve.common.kv.layout import Layout

Results = Mapping[str, Mapping[str, Sequence[Score]]]
"""Scores of each window by codec and genre; every codec has the same windows."""
BASES = ("int4", "zipcache")
"""Codecs that the others are compared with, window by window."""
FP16_BITS = 16


@dataclass(frozen=True)
class Summary:
    """One codec. Text is all genres but look-ups, each window counting once."""

    bits: float
    """Per K or V element of a sealed block of the measured model, all-in."""
    bits_context: float
    """Likewise of a whole context, sinks included."""
    bits_8x128: float
    """As `bits`, for 8 KV heads of 128 channels: Llama-3-8B, Mistral-7B."""
    kl: Estimate
    """On text, in nats per token, as all that follows unless it says otherwise."""
    kl_ratio: dict[str, Estimate]
    """`kl` over that of each measured codec of BASES."""
    ppl_ratio: Estimate
    top1: Estimate
    greedy: Estimate
    """Share of the generated tokens before the first that differs."""
    retrieval_kl: Estimate
    retrieval_match: Estimate
    """Exact match of look-ups, less the model's own."""
    genres: dict[str, Estimate]
    """KL of each genre."""


def summarize(results: Results, layouts: Mapping[str, Layout], context_tokens: int) -> dict[str, Summary]:
    """By codec; `layouts` are those of the measured model."""
    texts = {name: _text(of_codec) for name, of_codec in results.items()}
    return {
        name: Summary(
            bits=layouts[name].bits_per_value(),
            bits_context=layouts[name].bits_per_value(context_tokens),
            bits_8x128=bits_8x128(name),
            kl=mean([score.kl for score in texts[name]]),
            kl_ratio={
                base: ratio([score.kl for score in texts[name]], [score.kl for score in texts[base]])
                for base in BASES
                if base in texts
            },
            ppl_ratio=perplexity_ratio([score.nll_change for score in texts[name]]),
            top1=mean([score.top1 for score in texts[name]]),
            greedy=mean([score.greedy for score in texts[name]]),
            retrieval_kl=mean([score.kl for score in of_codec.get(RETRIEVAL, ())]),
            retrieval_match=mean([score.match_change for score in of_codec.get(RETRIEVAL, ())]),
            genres={genre: mean([score.kl for score in scores]) for genre, scores in of_codec.items()},
        )
        for name, of_codec in results.items()
    }


def bits_8x128(codec: str) -> float:
    """All-in bits per K or V element of a sealed block of Llama-3-8B or Mistral-7B."""
    layout = Layout(
        model="8x128", revision="", layers=32, kv_heads=8, key_dim=128, value_dim=128, dtype="float16", codec=codec
    )
    return layout.bits_per_value()


def tables(summaries: Mapping[str, Summary]) -> str:
    """All of it as text."""
    bases = [base for base in BASES if base in summaries]
    head = ("codec", "bits", "8×128", "fp16 ×", "KL", *(f"KL / {base}" for base in bases), "ppl ratio", "top-1",
            "greedy", "retrieval KL", "match − fp")  # fmt: skip
    rows = (
        (
            name,
            f"{of.bits:.2f}",
            f"{of.bits_8x128:.2f}",
            f"{FP16_BITS / of.bits_8x128:.2f}",
            str(of.kl),
            *(str(of.kl_ratio[base]) for base in bases),
            *map(str, (of.ppl_ratio, of.top1, of.greedy, of.retrieval_kl, of.retrieval_match)),
        )
        for name, of in summaries.items()
    )
    return f"{table(head, rows)}\n\n{_genres(summaries.items())}"


def _genres(summaries: Iterable[tuple[str, Summary]]) -> str:
    rows = [(name, *map(str, of.genres.values())) for name, of in summaries]
    genres = next(iter(of.genres for _, of in summaries))
    return table(("KL by genre", *genres), rows)


def _text(scores: Mapping[str, Sequence[Score]]) -> list[Score]:
    return [score for genre, of_genre in scores.items() if genre != RETRIEVAL for score in of_genre]

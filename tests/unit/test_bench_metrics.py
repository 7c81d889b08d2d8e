"""What `zipserve bench quality` computes: KL and its company per window, means and ratios, bars."""

import math
from dataclasses import replace

import pytest
import torch

from zipserve.bench.quality import bars
from zipserve.bench.quality.metrics import Exact, Score, agreement, mean, perplexity_ratio, ratio, score
from zipserve.bench.quality.summary import Summary, bits_8x128, summarize, tables
from zipserve.bench.quality.windows import RETRIEVAL
from zipserve.common.kv.layout import CODECS, Layout

HALF = math.log(0.5)


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    """Of distributions, with an offset that no distribution shows."""
    return torch.tensor(rows).log() + 3.0


def test_score_by_hand() -> None:
    exact = Exact.of(logits((0.5, 0.5, 0.0), (0.25, 0.5, 0.25)), [0, 2])
    found = score(logits((0.25, 0.75, 0.0), (0.5, 0.25, 0.25)), exact)
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.25 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 0.25)
    assert found.kl == pytest.approx((first + second) / 2)
    assert found.nll_change == pytest.approx((-HALF + 0.0) / 2)
    assert found.top1 == 0.0
    assert math.isnan(found.match_change)
    assert math.isnan(found.greedy)


def test_score_of_the_same() -> None:
    rows = torch.randn(20, 50, generator=torch.Generator().manual_seed(1))
    found = score(rows + 7.0, Exact.of(rows, list(range(20))))
    assert found.kl == pytest.approx(0.0, abs=1e-6)
    assert found.nll_change == pytest.approx(0.0, abs=1e-6)
    assert found.top1 == 1.0


def test_nan_is_not_hidden() -> None:
    exact = Exact.of(logits((0.5, 0.5, 0.0)), [0])
    assert math.isnan(score(torch.full((1, 3), math.nan), exact).kl)


def test_exact_match_wants_all_tokens_of_an_answer() -> None:
    answers = (slice(0, 2), slice(3, 5), slice(5, 6))
    targets = [0, 1, 0, 1, 1, 0]
    right = torch.eye(2)[targets]
    exact = Exact.of(right, targets, answers)
    assert exact.matched == 1.0
    wrong = right.clone()
    wrong[[2, 4]] = 1 - wrong[[2, 4]]  # row 2 is of no answer
    assert score(wrong, exact).match_change == pytest.approx(-1 / 3)


@pytest.mark.parametrize(
    ("found", "share"), [([1, 2, 3, 4], 1.0), ([9, 2, 3, 4], 0.0), ([1, 2, 9, 4], 0.5), ([1, 2, 3, 9], 0.75)]
)
def test_agreement(found: list[int], share: float) -> None:
    assert agreement([1, 2, 3, 4], found) == share


def test_estimates() -> None:
    assert mean([1.0, 3.0]) == mean([3.0, 1.0])
    assert (mean([1.0, 3.0]).value, mean([1.0, 3.0]).error) == (2.0, 1.0)
    assert mean([5.0]).value == 5.0
    assert math.isnan(mean([5.0]).error)
    assert math.isnan(mean([]).value)
    found = perplexity_ratio([0.0, 2 * math.log(2.0)])
    assert found.value == pytest.approx(2.0)
    assert found.error == pytest.approx(2.0 * math.log(2.0))


def test_ratio_is_paired() -> None:
    base = [1.0, 10.0, 100.0]
    always_half = ratio([0.5, 5.0, 50.0], base)
    assert always_half.value == pytest.approx(0.5)
    assert always_half.error == pytest.approx(0.0, abs=1e-12)
    mixed = ratio([2.0, 1.0], [1.0, 2.0])
    assert mixed.value == pytest.approx(1.0)
    assert mixed.error == pytest.approx(1.0 / 1.5)
    assert math.isnan(ratio([1.0], [0.0]).value)
    assert math.isnan(ratio([], []).value)


def a_layout(codec: str) -> Layout:
    return Layout("m", "0", layers=2, kv_heads=3, key_dim=64, value_dim=64, dtype="float32", codec=codec)


PERFECT = Score(kl=0.0, nll_change=0.0, top1=1.0, match_change=math.nan, greedy=1.0)


def summaries_of(**kl: float) -> dict[str, Summary]:
    """Of two windows of text and one of look-ups; `kl` by codec, `_` for `-` and `/`."""
    names = {name.replace("/", "_").replace("-", "_"): name for name in CODECS}
    results = {
        names[key]: {
            "prose": [replace(PERFECT, kl=value, nll_change=value / 2) for value in (of_codec / 2, of_codec * 3 / 2)],
            RETRIEVAL: [replace(PERFECT, kl=2 * of_codec, match_change=-of_codec)],
        }
        for key, of_codec in kl.items()
    }
    return summarize(results, {name: a_layout(name) for name in results}, 1024)


def test_summary() -> None:
    found = summaries_of(raw=0.0, int4=0.02, zip_43_32=0.01)["zip-43/32"]
    assert found.kl.value == pytest.approx(0.01)
    assert found.kl.error == pytest.approx(0.005)
    assert found.kl_ratio["int4"].value == pytest.approx(0.5)
    assert "zipcache" not in found.kl_ratio
    assert found.ppl_ratio.value == pytest.approx(math.exp(0.005))
    assert found.retrieval_kl.value == pytest.approx(0.02)
    assert found.retrieval_match.value == pytest.approx(-0.01)
    assert (found.top1.value, found.greedy.value) == (1.0, 1.0)
    assert found.bits == a_layout("zip-43/32").bits_per_value()
    assert found.bits_context > found.bits, "sinks count"
    assert found.bits_8x128 == bits_8x128("zip-43/32")
    assert set(found.genres) == {"prose", RETRIEVAL}


def test_tables_have_every_codec_and_genre() -> None:
    text = tables(summaries_of(raw=0.0, int8=0.1, zip_4_4=0.2))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if line] == [
        "codec", "raw", "int8", "zip-4/4", "KL", "raw", "int8", "zip-4/4",
    ]  # fmt: skip
    assert "int4" not in text, "nothing is compared with what was not measured"
    assert "0.2000 ±0.1000" in text


def failing(**kl: float) -> list[str]:
    return [check.name for check in bars.checks(summaries_of(**kl), decides=True) if not check.met]


def test_bars_of_good_codecs_are_met() -> None:
    assert failing(raw=0.0, int4=0.006, zipcache=0.03, zip_4_4=0.003, zip_4_3=0.004, zip_4_32=0.005, zip_43_32=0.006,
                   zip_4_2=0.007, zip_3_2=0.02) == []  # fmt: skip


def test_bars_that_are_not_met() -> None:
    assert failing(raw=0.001) == ["raw KL, any genre"]
    assert failing(zip_4_32=0.016) == ["zip-4/32 KL, text"]
    assert failing(zip_4_32=0.15) == [
        "zip-4/32 KL, text", "zip-4/32 perplexity ratio, text", "zip-4/32 exact match - fp, retrieval",
    ]  # fmt: skip
    assert failing(zip_43_32=0.02, zipcache=0.079, int4=0.019) == [
        "zip-43/32 KL / zipcache KL, text", "zip-43/32 KL / int4 KL, text",
    ]  # fmt: skip


def test_bar_of_top1() -> None:
    results = {"zip-4/4": {"prose": [replace(PERFECT, top1=0.95)], RETRIEVAL: [replace(PERFECT, match_change=0.0)]}}
    found = bars.checks(summarize(results, {"zip-4/4": a_layout("zip-4/4")}, 1024), decides=True)
    assert [check.name for check in found if not check.met] == ["zip-4/4 top-1 agreement, text"]


def test_a_smoke_run_decides_by_sizes_and_control_only() -> None:
    found = bars.checks(summaries_of(raw=0.0, zip_4_32=9.0, zip_43_32=9.0, zip_4_2=9.0, zip_4_4=9.0), decides=False)
    assert [check.name for check in found if check.decides] == [
        "raw KL, any genre",
        *(f"zip-{profile} {what}, 8x128" for profile in ("4/32", "43/32", "4/2")
          for what in ("bits per value", "compression of float16")),
    ]  # fmt: skip
    assert all(check.met for check in found if check.decides)


def test_sizes_against_the_formula() -> None:
    """The codes, 16 + 16 bits a key channel and block, 8 bits a token and head, the class bitmap, the header."""
    for codec, key_bits, value_bits in (("zip-4/32", 4, 2.5), ("zip-43/32", 3.5, 2.5), ("zip-3/2", 3, 2)):
        bits = (key_bits + 32 / 128 + value_bits + 8 / 128) / 2 + 1 / (2 * 8 * 128)
        header = 128 * 8 / (32 * 8 * 256 * 128)
        assert bits_8x128(codec) == pytest.approx(bits + header)

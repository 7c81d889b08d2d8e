"""`zipserve bench quality` on a tiny model: one prefill for all codecs, and a whole run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zipserve.bench.quality import texts
from zipserve.bench.quality.measure import Batch
from zipserve.bench.quality.metrics import Score
from zipserve.bench.quality.windows import Shape, text_windows
from zipserve.common import models
from zipserve.common.errors import KvValueError
from zipserve.engine import loader
from zipserve.engine.model import LoadedModel

SHAPE = Shape(context_tokens=256, scored_tokens=40)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LoadedModel:
    return loader.load(models.resolve(str(tiny_model)), "float32", "cpu")


def a_batch(model: LoadedModel, codecs: list[str], windows: int = 2, greedy_tokens: int = 4) -> Batch:
    ids = torch.randint(3, 250, (600 * windows,), generator=torch.Generator().manual_seed(2)).tolist()
    return Batch(model, text_windows("random", ids, SHAPE, 0, windows), codecs, greedy_tokens)


def known(scores: list[Score]) -> list[tuple[float, ...]]:
    """Without the look-ups, which are NaN in a window of text."""
    return [(score.kl, score.nll_change, score.top1, score.greedy) for score in scores]


def test_codecs_do_not_disturb_each_other(model: LoadedModel) -> None:
    names = ["zip-3/2", "int8", "zipcache", "zip-4/4"]
    batch = a_batch(model, names)
    scores = {name: batch.scores(name) for name in [*names, "raw"]}
    for name in reversed(names):
        assert known(batch.scores(name)) == known(scores[name])
        assert known(a_batch(model, [name]).scores(name)) == known(scores[name])
    for raw, int8, zipped, zipped_more in zip(*(scores[n] for n in ("raw", "int8", "zip-4/4", "zip-3/2")), strict=True):
        assert raw.kl == pytest.approx(0.0, abs=1e-6)
        assert (raw.top1, raw.greedy) == (1.0, 1.0)
        assert 0 < int8.kl < zipped.kl < zipped_more.kl


def test_generation_beyond_a_block(model: LoadedModel) -> None:
    """What is generated fills and seals a block of its own."""
    batch = a_batch(model, ["zip-4/4"], windows=1, greedy_tokens=140)
    (found,) = batch.scores("zip-4/4")
    assert 0 < found.greedy <= 1


def test_a_codec_that_refuses_is_named(model: LoadedModel) -> None:
    weight = model.module.model.layers[1].self_attn.k_proj.weight
    saved = weight.data.clone()
    try:
        weight.data *= 1e6
        with pytest.raises(KvValueError, match=r"codec zip-4/4 cannot seal a block of layer 1: K or V is too large"):
            a_batch(model, ["zip-4/4"])
    finally:
        weight.data.copy_(saved)


def test_whole_run(tiny_model: Path) -> None:
    play = str(texts.shipped() / "play.txt")
    codecs = ["raw", "int4", "zip-4/32", "zip-43/32"]
    command = [sys.executable, "-P", "-m", "zipserve.bench", "quality", "--quick", "--json", "--texts", play,
               "--model", str(tiny_model), "--threads", "1", "--codecs", *codecs]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert list(found["results"]) == codecs
    assert found["windows"] == {"play": 1, "retrieval": 1}
    assert found["results"]["int4"]["kl"]["value"] > 0
    assert found["results"]["raw"]["greedy"]["value"] == 1.0
    decide = {check["name"]: check["met"] for check in found["checks"] if check["decides"]}
    assert set(decide.values()) == {True}
    assert "raw KL, any genre" in decide

"""`zipserve bench engine`: what a step must do, turns, bars, gaps, vLLM's process, and a whole run on a tiny model."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_model as tiny
from zipserve.bench import limits
from zipserve.bench.engine import bars, contestants, measure, table
from zipserve.bench.engine.bars import EXACT, Found
from zipserve.bench.engine.contestants import HuggingFace, Own, Variant
from zipserve.bench.engine.gaps import Gaps, percentile
from zipserve.bench.engine.measure import Cell, Results
from zipserve.bench.engine.vllm import Vllm
from zipserve.bench.engine.work import Work, kv_bytes
from zipserve.bench.limits import Limits
from zipserve.bench.rows import Rows
from zipserve.bench.timing import Timing
from zipserve.common import models
from zipserve.common.errors import InternalError, InvalidRequestError
from zipserve.common.kv.layout import Layout
from zipserve.engine.model import LoadedModel

LLAMA = Work(linear_weights=106_168_320, head_weights=28_311_552, vocab_tokens=49152, layers=30, heads=9, head_dim=64)


def a_layout(codec: str) -> Layout:
    return Layout("m", "0", layers=30, kv_heads=3, key_dim=64, value_dim=64, dtype="float32", codec=codec)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LoadedModel:
    return contestants.load(models.resolve(str(tiny_model)), "packed", "float32")


def test_work_of_a_tiny_model(tiny_model: Path) -> None:
    work = Work.of(models.resolve(str(tiny_model)))
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    assert (work.linear_weights, work.head_weights) == (2 * layer, 64 * work.vocab_tokens)
    assert (work.layers, work.heads, work.head_dim) == (2, 4, 16)


def test_flops_and_bytes_by_hand() -> None:
    attended = 1 + 2 + 3
    assert LLAMA.prefill_flops(3) == 2 * (3 * 106_168_320 + 28_311_552) + 4 * 30 * 9 * 64 * attended
    assert LLAMA.weight_bytes("float32") == 4 * 134_479_872
    assert LLAMA.weight_bytes("int8") == 134_479_872
    token = 30 * 3 * 128 * 4
    raw, zipped = a_layout("raw"), a_layout("zip-4/32")
    assert kv_bytes(raw, 100) == kv_bytes(zipped, 100) == 100 * token
    assert kv_bytes(raw, 300) == pytest.approx(300 * token, rel=0.001)  # and two headers
    assert kv_bytes(zipped, 256) < kv_bytes(raw, 256) / 4
    assert LLAMA.decode_bytes("bfloat16", raw, 2, 300) == 2 * 134_479_872 + 2 * kv_bytes(raw, 300)


def test_limits_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    found = limits.measure(1)
    assert 1e8 < found.read_bytes_s < 1e13
    assert 1e8 < found.flops_s < 1e15
    monkeypatch.setattr("zipserve.kernels.native.library", lambda _: None)
    assert limits.measure(1).flops_s > 1e8, "without a compiler torch alone is asked"


def test_the_higher_limit_counts() -> None:
    assert Limits(5.0, 1.0).best(Limits(3.0, 2.0)) == Limits(5.0, 2.0)


class Paced:
    """A contestant whose times are known."""

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self._seconds, self._log = name, seconds, log

    def hold(self, count: int, context: int) -> None:
        self._log.append(f"{self.name} holds {count} × {context}")

    def steps(self, count: int) -> list[float]:
        self._log.append(self.name)
        return [math.inf, *itertools.repeat(self._seconds, count - 1)]

    def drop(self) -> None:
        self._log.append(f"{self.name} drops")

    def prefill(self, tokens: int) -> float:
        return self._seconds * tokens


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SETTLE_S", 0.0)
    log: list[str] = []
    field = [Paced("a", 1.0, log), Paced("b", 2.0, log)]
    found = measure.decode(field, Cell("decode", 128, 4), rounds=2, steps=3)
    assert log == ["a holds 4 × 128", "b holds 4 × 128", *["a", "b"] * 3]
    assert [found["a"].p90_s, found["b"].p90_s] == [1.0, 2.0], "a turn's first step does not count"
    assert measure.prefill(field, Cell("prefill", 10), 1)["b"].median_s == 20.0


def test_cells() -> None:
    step = Timing(0.5, 0.4, 0.6)
    assert (Cell("decode", 128, 8).name, Cell("decode", 128, 8).tokens_s(step)) == ("decode 8 × 128", 16.0)
    assert (Cell("prefill", 512).name, Cell("prefill", 512).tokens_s(step)) == ("prefill 512", 1024.0)


def test_own_rows_are_those_of_one_sequence(model: LoadedModel) -> None:
    """Rows get copies of one prompt's KV: all go on alike, whatever their codec, as Hugging Face's do."""
    rows = Rows(model, "zip-4/32", context=150, rows=3, steps=8)
    for _ in range(4):
        assert len(set(rows.step())) == 1
    assert len(rows.step(2)) == 2


def test_contestants_take_turns(model: LoadedModel, tiny_model: Path) -> None:
    module = contestants.load_huggingface(models.resolve(str(tiny_model)))
    for contestant in (
        Own(Variant("packed", "float32", "raw"), model, rows_max=2, steps_max=8),
        HuggingFace(module, "eager"),
        HuggingFace(module, "sdpa"),
    ):
        for count in (1, 2):
            contestant.hold(count, 40)
            assert all(seconds > 0 for seconds in contestant.steps(3))
        contestant.drop()
        contestant.hold(1, 20)
        assert contestant.prefill(30) > 0


def test_what_computes_something_else_is_not_timed(model: LoadedModel, tiny_model: Path, tmp_path: Path) -> None:
    found = measure.difference(model, contestants.load_huggingface(models.resolve(str(tiny_model))))
    measure.require_equal("a", found)
    other = contestants.load_huggingface(models.resolve(str(tiny.build(tmp_path / "other", seed=1))))
    with pytest.raises(InternalError, match="a: logits differ from Hugging Face's by"):
        measure.require_equal("a", measure.difference(model, other))
    with pytest.raises(InternalError):
        measure.require_equal("a", math.nan)


def found_with(results: Results, **changes: object) -> Found:
    layouts = {codec: a_layout(codec) for codec in ("raw", "zip-4/32")}
    fields = {"logits_differences": {}, "attention_gain": {}, "rival_context": 128, **changes}
    return Found(results, Limits(50e9, 200e9), LLAMA, layouts, **fields)  # type: ignore[arg-type]


def ms(**medians: float) -> dict[str, Timing]:
    return {name.replace("_", " "): Timing(value / 1e3, value / 1e3, value / 1e3) for name, value in medians.items()}


def values(found: Found) -> dict[str, float]:
    return {check.name: check.value for check in bars.checks(found, decides=True)}


def test_bars_against_rivals() -> None:
    results = {
        Cell("decode", 128, 1): ms(fused_float32_raw=12, fused_bfloat16_raw=6, packed_float32_raw=15, vLLM=30),
        Cell("decode", 128, 8): ms(fused_float32_raw=20, vLLM=30),
        Cell("decode", 1024, 1): ms(fused_float32_raw=20, vLLM=30),
        Cell("prefill", 1024): {
            **ms(fused_float32_raw=1000, vLLM=1300),
            **{f"Hugging Face {name}": Timing(seconds, 0, 0) for name, seconds in (("eager", 3.0), ("sdpa", 2.0))},
        },
    }
    found = values(found_with(results))
    assert found.pop("decode 1 × 128: share of the read bandwidth") == pytest.approx(
        (4 * 134_479_872 + kv_bytes(a_layout("raw"), 128)) / 12e-3 / 50e9
    )
    assert found.pop("prefill 1024: share of the multiply-add limit") == LLAMA.prefill_flops(1024) / 200e9
    assert found == pytest.approx({
        "decode 1 × 128: times vLLM's tokens/s": 2.5,
        "decode 1 × 128: packed path, times vLLM's tokens/s": 2.0,
        "decode 8 × 128: times vLLM's tokens/s": 1.5,
        "decode 1 × 128: bfloat16 weights, times vLLM's tokens/s": 5.0,
        "prefill 1024: times vLLM's tokens/s": 1.3,
        "prefill 1024: times Hugging Face's tokens/s": 2.0,
    })  # fmt: skip


def test_bars_of_codecs() -> None:
    results = {
        Cell("decode", 128, 16): ms(**{"fused_float32_raw": 1, "fused_float32_zip-4/32": 2}),
        Cell("decode", 1024, 16): ms(**{"fused_float32_raw": 60, "fused_float32_zip-4/32": 50}),
    }
    found = values(found_with(results, attention_gain={"attention of a case": 3.5}))
    assert found["decode 16 × 1024: zip-4/32, times raw's tokens/s"] == pytest.approx(1.2)
    assert found["decode 16 × 1024: zip-4/32, times smaller than raw"] > 4.5
    assert found["attention of a case: times as fast as SDPA"] == 3.5
    assert len(found) == 3
    assert values(found_with({})) == {}, "what was not measured has no bar"


def test_table_knows_limits() -> None:
    cell = Cell("decode", 128, 1)
    text = table.timings(found_with({cell: {EXACT.name: Timing(0.02, 0.02, 0.02), "vLLM": Timing(0.04, 0.04, 0.04)}}))
    lines = [line.split() for line in text.splitlines()]
    assert lines[1][-3:] == ["50.0", "1.00", "54%"]
    assert lines[2][-3:] == ["25.0", "0.50", "27%"]


def test_gaps() -> None:
    found = Gaps([0.02, 0.03, 0.04], [0.03] * 99 + [0.09], [1.0])
    assert found.median_ratio == pytest.approx(1.0)
    assert found.p99_ratio == pytest.approx(3.0)
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


STUB = """
class SamplingParams:
    def __init__(self, **fields): self.max_tokens = fields["max_tokens"]

class EngineArgs:
    def __init__(self, **fields): self.fields = fields

class LLMEngine:
    @classmethod
    def from_engine_args(cls, args):
        import os, sys
        print("vLLM says hello")
        assert args.fields["max_num_seqs"] == 16 and os.environ["OMP_NUM_THREADS"] == "1"
        if "zipserve" in sys.modules: raise SystemExit(9)
        return cls()

    def __init__(self):
        self.left, self.prompts, self.model_config = {}, [], self

    def get_vocab_size(self): return 300
    def has_unfinished_requests(self): return bool(self.left)
    def abort_request(self, names): [self.left.pop(name, None) for name in names]

    def add_request(self, name, prompt, params):
        assert prompt["prompt_token_ids"] not in self.prompts and max(prompt["prompt_token_ids"]) < 300
        self.prompts.append(prompt["prompt_token_ids"])
        self.left[name] = params.max_tokens

    def step(self):
        done = list(self.left)
        self.left = {name: left - 1 for name, left in self.left.items() if left > 1}
        return done
"""


@pytest.fixture
def stub_python(tmp_path: Path) -> Path:
    """An interpreter whose vLLM is a stub."""
    (tmp_path / "vllm.py").write_text(STUB)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexport PYTHONPATH="{tmp_path}"\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return script


def a_vllm(python: Path, folder: Path) -> Vllm:
    files = models.ModelFiles("m", folder, "0")
    return Vllm(python, files, threads=1, rows_max=2, context_tokens=100, kv_bytes=1 << 20)


def test_vllm_takes_turns(stub_python: Path, tmp_path: Path) -> None:
    with a_vllm(stub_python, tmp_path) as vllm:
        for count in (1, 2):
            vllm.hold(count, 32)
            assert len(vllm.steps(5)) == 5
        vllm.drop()
        assert vllm.prefill(64) >= 0
        vllm.hold(1, 90)
        with pytest.raises(InvalidRequestError, match="a step gave 0 tokens to 1 requests"):
            vllm.steps(11)


def test_vllm_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot run"), a_vllm(tmp_path / "python", tmp_path):
        pass
    no_vllm = pytest.raises(InvalidRequestError, match=r"(?s)status 1:.*No module named 'vllm'")
    with no_vllm, a_vllm(Path(sys.executable), tmp_path):
        pass


def test_whole_run(tiny_model: Path, stub_python: Path) -> None:
    command = [sys.executable, "-P", "-m", "zipserve.bench", "engine", "--quick", "--json", "--threads", "1",
               "--model", str(tiny_model), "--parts", "decode", "prefill", "attention", "memory",
               "--rival", "hf", "vllm", "--rival-python", str(stub_python)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(found["seconds"]) == {"decode 1 × 128", "decode 2 × 128", "prefill 64"}
    assert set(found["seconds"]["decode 2 × 128"]) == {
        *("fused float32 raw", "fused float32 zip-4/32", "fused bfloat16 raw", "packed float32 raw"),
        *("packed bfloat16 raw", "Hugging Face eager", "Hugging Face sdpa", "vLLM"),
    }
    assert max(found["logits_differences"][f"{path} float32"] for path in ("fused", "packed")) < 1e-3
    assert found["limits"]["flops_s"] > 0
    assert not any(check["decides"] for check in found["checks"])


def test_vllm_needs_its_python(capsys: pytest.CaptureFixture[str]) -> None:
    from zipserve.bench import __main__ as bench  # noqa: PLC0415

    threads = torch.get_num_threads()
    assert bench.main(["engine", "--rival", "vllm"]) == 2
    assert torch.get_num_threads() == threads
    assert "needs --rival-python" in capsys.readouterr().err

"""The CPU kernel of probe saliency against its reference; keys that no row sees are NaN."""

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerances import WEIGHTS_CPU
from zipserve.kernels import native
from zipserve.kernels.saliency import log_sum_exp, probe_scores, probe_scores_reference
from zipserve.kernels.saliency.cpu import runs_on_cpu
from zipserve.kernels.zipformat import probe_offsets


@dataclass
class Case:
    """Arguments of probe_scores."""

    query: torch.Tensor
    keys: torch.Tensor
    own: torch.Tensor
    first: torch.Tensor
    block: torch.Tensor
    starts: torch.Tensor
    block_tokens: int
    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    lse: torch.Tensor | None = None

    def run(self) -> torch.Tensor:
        return probe_scores(*self._arguments())

    def run_reference(self) -> torch.Tensor:
        return probe_scores_reference(*self._arguments())

    def check(self) -> None:
        """The kernel agrees with the reference."""
        assert runs_on_cpu(self.query)
        wanted = self.run_reference()
        assert wanted.isfinite().all()
        torch.testing.assert_close(self.run(), wanted, rtol=0, atol=WEIGHTS_CPU)

    def _arguments(self) -> tuple:  # type: ignore[type-arg]
        return astuple(self)


def case_of(
    kv_heads: int, group: int, dim: int, tokens: int, *, block_tokens: int = 128, before: int = 0, window: int = 10**6
) -> Case:
    """All blocks behind the first `before` tokens; those tokens only have keys."""
    generator = torch.Generator().manual_seed(tokens)
    starts = torch.arange(before, tokens, block_tokens)
    own = (starts[:, None] + torch.tensor(probe_offsets(block_tokens))).flatten()
    block = torch.arange(len(starts)).repeat_interleave(len(own) // len(starts))
    own, block = own[own < tokens], block[own < tokens]
    first = (own - window + 1).clamp_min(0)
    keys = torch.randn(kv_heads, tokens, dim, generator=generator)
    index = torch.arange(tokens)
    keys[:, ~((index >= first[:, None]) & (index <= own[:, None])).any(0)] = torch.nan
    query = torch.randn(kv_heads * group, len(own), dim, generator=generator)
    return Case(query, keys, own, first, block, starts, block_tokens, dim**-0.5)


def test_the_kernel_is_there() -> None:
    """Otherwise everything below would compare the reference with itself."""
    assert native.load() is not None


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 13])
def test_every_number_of_heads_per_kv_head(group: int) -> None:
    case_of(2, group, 32, 384).check()


@pytest.mark.parametrize("dim", [1, 8, 24, 64, 80, 128])
@pytest.mark.parametrize("tokens", [1, 4, 127, 128, 129, 300, 1024])
def test_every_length(dim: int, tokens: int) -> None:
    """The last block may be short."""
    case_of(1, 3, dim, max(tokens, probe_offsets(128)[0] + 1)).check()


@pytest.mark.parametrize("before", [1, 128, 200])
@pytest.mark.parametrize("window", [1, 2, 16, 128, 129, 300])
@pytest.mark.parametrize("block_tokens", [8, 64, 128])
def test_windows_and_earlier_keys(before: int, window: int, block_tokens: int) -> None:
    case_of(2, 2, 16, 460, block_tokens=block_tokens, before=before, window=window).check()


@pytest.mark.parametrize("softcap", [None, 0.7, 30.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_and_sinks(softcap: float | None, with_sinks: bool) -> None:
    plain = case_of(2, 3, 32, 300)
    case = replace(plain, softcap=softcap, sinks=torch.linspace(-3, 6, 6) if with_sinks else None)
    case.check()
    if with_sinks or softcap == 0.7:
        assert (case.run() - plain.run()).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    case = case_of(2, 2, 32, 200)
    replace(case, query=case.query.to(dtype), keys=case.keys.to(dtype)).check()


def test_any_strides() -> None:
    case = case_of(2, 2, 32, 200)
    query, keys = case.query.transpose(0, 1).contiguous().transpose(0, 1), case.keys.mT.contiguous().mT
    assert torch.equal(replace(case, query=query, keys=keys).run(), case.run())


def test_blocks_without_rows_have_no_scores() -> None:
    case = case_of(1, 2, 16, 512)
    kept = case.block % 2 == 1
    case = replace(case, query=case.query[:, kept], own=case.own[kept], first=case.first[kept], block=case.block[kept])
    case.check()
    assert (case.run()[[0, 2]] == 0).all()
    none = replace(case, query=case.query[:, :0], own=case.own[:0], first=case.first[:0], block=case.block[:0])
    assert torch.equal(none.run(), torch.zeros(4, 128))


def test_equal_scores_share_evenly() -> None:
    """Without the reference: a row whose scores are equal gives 1 / (own + 1) to each key that it sees."""
    case = case_of(2, 2, 16, 256)
    found = replace(case, query=torch.zeros_like(case.query)).run()
    for block in range(2):
        for token in (0, 3, 4, 121, 127):
            seen_by = [own for own in case.own.tolist() if own // 128 == block and own % 128 >= token]
            assert float(found[block, token]) == pytest.approx(sum(1 / (own + 1) for own in seen_by), rel=1e-5)


@pytest.mark.parametrize("factor", [20.0, 1000.0])
def test_sharp_softmax(factor: float) -> None:
    case = case_of(1, 3, 32, 300)
    case = replace(case, query=case.query * factor)
    # scores of size 1000 are known to 1e-4 in float32
    torch.testing.assert_close(case.run(), case.run_reference(), rtol=0, atol=2e-6 * factor)


def test_threads_change_nothing() -> None:
    case = case_of(3, 3, 64, 1000)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(case.run())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("window", [10, 130, 10**6])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_known_sums_need_no_earlier_keys(window: int, softcap: float | None, with_sinks: bool) -> None:
    case = case_of(2, 3, 32, 460, before=200, window=window)
    case = replace(case, softcap=softcap, sinks=torch.linspace(-3, 6, 6) if with_sinks else None)
    keys = case.keys.nan_to_num()  # of a row that sees no key, 0 * NaN is none
    lse = log_sum_exp(case.query, keys, case.own, case.first, case.scale, softcap, case.sinks)
    products = torch.einsum("hd,hkd->hk", case.query[:, -1], keys.repeat_interleave(3, 0)) * case.scale
    if softcap is not None:
        products = torch.tanh(products / softcap) * softcap
    seen = products[:, int(case.first[-1]) : int(case.own[-1]) + 1]
    seen = seen if case.sinks is None else torch.cat((seen, case.sinks[:, None]), 1)
    torch.testing.assert_close(lse[:, -1], seen.logsumexp(1))
    behind = replace(
        case, keys=case.keys[:, 200:], own=case.own - 200, first=case.first - 200, starts=case.starts - 200, lse=lse
    )
    behind.check()
    torch.testing.assert_close(behind.run(), case.run(), rtol=0, atol=WEIGHTS_CPU)


def test_one_overwhelming_score() -> None:
    """Rounding may put it above the logarithm of the whole sum."""
    case = case_of(1, 2, 16, 256)
    case = replace(case, query=case.query * 100)
    lse = log_sum_exp(case.query, case.keys.nan_to_num(), case.own, case.first, case.scale)
    torch.testing.assert_close(replace(case, lse=lse).run(), case.run(), rtol=0, atol=2e-4)  # scores of size 100


@pytest.mark.parametrize(
    "change",
    [
        lambda case: {"query": case.query[:3]},
        lambda case: {"keys": case.keys[..., :8]},
        lambda case: {"own": case.own[1:]},
        lambda case: {"first": case.first[1:]},
        lambda _: {"sinks": torch.zeros(5)},
        lambda _: {"lse": torch.zeros(4, 3)},
    ],
)
def test_shapes_that_do_not_fit(change: Callable[[Case], dict[str, Any]]) -> None:
    case = case_of(2, 2, 16, 256)
    with pytest.raises(ValueError, match=r"must be|does not fit"):
        replace(case, **change(case)).run()


@pytest.mark.parametrize(
    ("field", "row", "number"),
    [("own", 5, 256), ("own", 3, -1), ("own", 20, 0), ("own", 2, 128), ("block", 27, 2), ("block", 0, -1),
     ("block", 14, 0), ("block", 4, 1), ("first", 2, -1)],
)  # fmt: skip
def test_rows_that_do_not_exist(field: str, row: int, number: int) -> None:
    case = case_of(2, 2, 16, 256)
    index = getattr(case, field).clone()
    index[row] = number
    with pytest.raises(IndexError, match=r"row \d+: no token"):
        replace(case, **{field: index}).run()


@settings(max_examples=40)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 6),
    dim=st.integers(1, 40),
    tokens=st.integers(70, 400),
    block_tokens=st.sampled_from([16, 33, 64, 128]),
    before=st.integers(0, 60),
    window=st.integers(1, 500),
    softcap=st.none() | st.floats(0.5, 50),
)
def test_any_shape(
    kv_heads: int, group: int, dim: int, tokens: int, block_tokens: int, before: int, window: int, softcap: float | None
) -> None:
    case = case_of(kv_heads, group, dim, tokens, block_tokens=block_tokens, before=before, window=window)
    replace(case, softcap=softcap).check()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_reference_runs() -> None:
    case = case_of(1, 2, 16, 200)
    assert not runs_on_cpu(case.query)
    assert torch.equal(case.run(), case.run_reference())

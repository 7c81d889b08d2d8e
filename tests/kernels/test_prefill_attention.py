"""The CPU kernel of prefill attention against its reference; whatever must not be read is NaN."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sealed_blocks import blocks_of
from tolerances import ATTENTION_CPU
from zipserve.kernels import native
from zipserve.kernels.attention import RawFormat
from zipserve.kernels.prefill_attention import Prefix, prefill_attention, prefill_attention_reference
from zipserve.kernels.prefill_attention.cpu import runs_on_cpu
from zipserve.kernels.prefill_attention.dense import prefill_attention_dense
from zipserve.kernels.zipformat import PROFILES, ZipFormat


@dataclass
class Case:
    """Arguments of prefill_attention."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    start: int
    prefix: Prefix | None
    first: torch.Tensor | None = None
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None

    @property
    def key_start(self) -> int:
        """Position of the first key."""
        return self.start + self.query.shape[1] - self.key.shape[1]

    def windowed(self, width: int) -> "Case":
        """The same under a window that the prefix covers."""
        own = self.start + torch.arange(self.query.shape[1])
        begin = self.key_start - (self.prefix.tokens if self.prefix else 0)
        return replace(self, first=(own - width + 1).clamp_min(begin).int())

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._run(prefill_attention)

    def run_reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._run(prefill_attention_reference)

    def run_dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._run(prefill_attention_dense)

    def check(self) -> None:
        """The kernel agrees with the reference."""
        assert runs_on_cpu(self.query, self.prefix)
        for found, wanted in zip(self.run(), self.run_reference(), strict=True):
            assert wanted.isfinite().all()
            torch.testing.assert_close(found, wanted, rtol=0, atol=ATTENTION_CPU)

    def _run(self, function: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(self.query.shape[1] - 1, -1, -2)
        output, lse = function(
            self.query, self.key, self.value, self.start, scale=self.query.shape[2] ** -0.5, prefix=self.prefix,
            first=self.first, softcap=self.softcap, sink_logits=self.sink_logits, lse_rows=rows
        )  # fmt: skip
        return output, lse


def case_of(
    form: ZipFormat | RawFormat,
    group: int,
    tokens: int,
    *,
    blocks: int = 0,
    opened: int = 0,
    at_start: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """`tokens` new tokens behind `opened` tokens that are not sealed, behind `blocks` sealed blocks."""
    generator = torch.Generator().manual_seed(tokens + blocks)
    data, sinks = blocks_of(form)
    slabs, sink_slabs = ([4] if at_start else [6]) + [5, 6] * blocks, [3 if at_start else -1] + [-1] * blocks
    prefix = Prefix(form, data, torch.tensor(slabs[:blocks]), sinks, torch.tensor(sink_slabs[:blocks]))
    begin = 0 if at_start else 3 * form.block_tokens
    query, key, value = (
        torch.randn(heads, count, dim, generator=generator).to(dtype)
        for heads, count, dim in (
            (form.kv_heads * group, tokens, form.key_dim),
            (form.kv_heads, opened + tokens, form.key_dim),
            (form.kv_heads, opened + tokens, form.value_dim),
        )
    )
    start = begin + prefix.tokens + opened
    case = Case(query, key, value, start, prefix if blocks else None)
    return case if at_start else replace(case, first=torch.full((tokens,), begin, dtype=torch.int32))


def with_options(case: Case) -> Case:
    """The same with a window, a softcap and sink logits."""
    return replace(case.windowed(40), softcap=1.5, sink_logits=torch.linspace(-2, 3, len(case.query)))


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN."""
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        found = empty(*shape, **options)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty", poisoned)


def test_the_kernel_is_there() -> None:
    """Otherwise everything below would compare other code with the reference."""
    assert native.load() is not None


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 13])
@pytest.mark.parametrize("options", [False, True])
def test_every_number_of_heads_per_kv_head(group: int, options: bool) -> None:
    case = case_of(ZipFormat(2, 32, 48, 64, "4/32"), group, 50, blocks=2, opened=3)
    (with_options(case) if options else case).check()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize(
    ("kv_heads", "group", "key_dim", "value_dim", "block_tokens"),
    [(3, 3, 64, 64, 128), (1, 1, 16, 128, 64), (1, 4, 112, 80, 192)],
)
def test_every_profile(
    profile: str, options: bool, at_start: bool, kv_heads: int, group: int, key_dim: int, value_dim: int,
    block_tokens: int,
) -> None:  # fmt: skip
    form = ZipFormat(kv_heads, key_dim, value_dim, block_tokens, profile)
    case = case_of(form, group, 30, blocks=3, opened=7, at_start=at_start)
    (with_options(case) if options else case).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize(
    ("kv_heads", "group", "key_dim", "value_dim", "block_tokens"),
    [(3, 3, 64, 64, 128), (1, 5, 24, 40, 8), (2, 1, 128, 16, 20), (1, 2, 7, 3, 5), (1, 2, 1, 1, 300)],
)
def test_raw_blocks(
    dtype: torch.dtype, options: bool, kv_heads: int, group: int, key_dim: int, value_dim: int, block_tokens: int
) -> None:
    form = RawFormat(kv_heads, key_dim, value_dim, block_tokens, dtype)
    case = case_of(form, group, 37, blocks=4, opened=2, dtype=dtype)
    (with_options(case) if options else case).check()


@pytest.mark.parametrize("tokens", [1, 2, 4, 11, 12, 13, 64, 65, 127, 128, 129, 300, 517])
@pytest.mark.parametrize("opened", [0, 1, 31, 127])
def test_every_length(tokens: int, opened: int) -> None:
    case_of(RawFormat(2, 16, 24, 128, torch.float32), 3, tokens, opened=opened).check()


@pytest.mark.parametrize("width", [1, 2, 5, 31, 64, 65, 127, 128, 129, 200, 1000])
@pytest.mark.parametrize("form", [ZipFormat(1, 32, 32, 64), RawFormat(1, 32, 24, 64, torch.float32)])
def test_windows(form: ZipFormat | RawFormat, width: int) -> None:
    case_of(form, 2, 300, blocks=3, opened=5).windowed(width).check()


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("form", [ZipFormat(1, 32, 32, 64), RawFormat(1, 32, 24, 64, torch.float32)])
def test_a_long_prefix_in_spans(form: ZipFormat | RawFormat, tokens: int, at_start: bool) -> None:
    """They may be hidden as a whole, or in part; and sink logits count once."""
    case = case_of(form, 3, tokens, blocks=40, opened=5, at_start=at_start)
    sink_logits = torch.linspace(-2, 3, len(case.query))
    for of in (case, replace(case, softcap=1.5, sink_logits=sink_logits), *map(case.windowed, (40, 1100, 2000))):
        of.check()
        replace(of, sink_logits=sink_logits).check()


def test_spans_are_the_same_for_all_threads() -> None:
    case = case_of(ZipFormat(2, 32, 32, 64), 3, 9, blocks=40, opened=5)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # the fixture sets it back
        found.append(case.run()[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("chunk", [1, 7, 48, 64, 100, 192])
def test_chunks(chunk: int) -> None:
    case = case_of(ZipFormat(1, 32, 32, 64, "43/32"), 3, 150, blocks=3, opened=9)
    own = case.start + torch.arange(150)
    replace(case, first=(own - own % chunk).int()).check()


@pytest.mark.parametrize("first", [1, 2, 3, 4, 5, 63, 64, 65])
def test_windows_that_hide_sinks(first: int) -> None:
    case = case_of(ZipFormat(1, 32, 32, 64), 2, 20, blocks=2)
    replace(case, first=torch.full((20,), first, dtype=torch.int32)).check()


def test_hidden_blocks_are_not_read() -> None:
    """Slab 0 is NaN."""
    for form in (ZipFormat(2, 32, 32, 64), RawFormat(2, 32, 32, 64, torch.float32)):
        case = case_of(form, 2, 70, blocks=3).windowed(65)
        assert case.prefix is not None
        hidden = replace(case.prefix, slabs=torch.tensor([0, 0, 6]), sink_slabs=torch.tensor([-1, -1, -1]))
        case = replace(case, prefix=replace(case.prefix, slabs=torch.tensor([4, 5, 6])))
        assert torch.equal(replace(case, prefix=hidden).run()[0], case.run()[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_new_tokens_of_other_types(dtype: torch.dtype) -> None:
    case = case_of(ZipFormat(2, 48, 32, 64), 3, 33, blocks=1, opened=4, dtype=dtype)
    case.check()
    replace(case, query=case.query.float()).check()
    replace(case, key=case.key.float()).check()


def test_types_that_the_kernel_does_not_read() -> None:
    case = case_of(RawFormat(2, 16, 16, 8, torch.float64), 2, 20, blocks=2)
    assert not runs_on_cpu(case.query, case.prefix)
    torch.testing.assert_close(case.run()[0], case.run_reference()[0], rtol=0, atol=ATTENTION_CPU)


def test_any_strides() -> None:
    """Also views of wider rows, as a product of queries, keys and values in one gives."""
    case = case_of(ZipFormat(2, 32, 32, 64), 3, 40, blocks=1, opened=3)
    query = F.pad(case.query, (0, 0, 3, 0))
    fused = torch.cat([part.transpose(0, 1).flatten(1) for part in (case.key, case.value, query)], 1)
    heads = torch.unflatten(fused, 1, (10, 32)).transpose(0, 1)
    key, value, query = heads[:2], heads[2:4], heads[4:]
    views = replace(case, query=query[:, 3:], key=key, value=value)
    assert torch.equal(views.run()[0], case.run()[0])
    columns = replace(case, query=case.query.mT.contiguous().mT, key=case.key.mT.contiguous().mT)
    assert torch.equal(columns.run()[0], case.run()[0])


@pytest.mark.parametrize("option", ["first", "softcap", "sink_logits"])
def test_each_option_alone(option: str) -> None:
    """And that it does something."""
    plain = case_of(ZipFormat(2, 32, 32, 64, "43/32"), 2, 70, blocks=2, opened=10)
    case = replace(plain, **{option: getattr(with_options(plain), option)})
    case.check()
    assert (case.run()[0] - plain.run()[0]).abs().max() > 0.02


@pytest.mark.parametrize("factor", [0.0, 30.0, 1000.0])
def test_flat_and_sharp_softmax(factor: float) -> None:
    case = case_of(ZipFormat(2, 32, 32, 64, "4/4"), 3, 40, blocks=2, opened=2)
    case = replace(case, query=case.query * factor)
    # scores of size 1000 are known to 1e-4 in float32
    for found, wanted in zip(case.run(), case.run_reference(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=max(ATTENTION_CPU, 3e-6 * factor))


@pytest.mark.parametrize("form", [ZipFormat(2, 64, 64, 64, "43/32"), RawFormat(2, 64, 64, 64, torch.float32)])
def test_neighbours_and_threads_change_nothing(form: ZipFormat | RawFormat) -> None:
    case = case_of(form, 3, 200, blocks=6, opened=17)
    wanted = case.run()[0]
    threads = torch.get_num_threads()
    try:
        for number in (2, 3, 16):
            torch.set_num_threads(number)
            assert torch.equal(case.run()[0], wanted)
    finally:
        torch.set_num_threads(threads)
    few = replace(case, query=case.query[:, :50], key=case.key[:, :67], value=case.value[:, :67])
    assert torch.equal(few.run()[0], wanted[:50])


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_what_is_not_a_number_reaches_every_row_that_sees_it(part: str, softcap: float | None) -> None:
    case = replace(case_of(ZipFormat(1, 32, 32, 64), 2, 90, blocks=1, opened=5), softcap=softcap)
    changed = getattr(case, part).clone()
    changed[:, 40 if part == "query" else 45, 3] = torch.nan
    finite = replace(case, **{part: changed}).run()[0].isfinite()
    if part == "query":
        assert not finite[40].any()
        assert finite[:40].all()
        assert finite[41:].all()
    elif part == "key":
        assert not finite[40:].any()
        assert finite[:40].all()
    else:
        assert not finite[40:, :, 3].any()
        assert finite[:, :, :3].all()


@pytest.mark.parametrize("part", ["query", "key"])
def test_infinity_is_not_hidden(part: str) -> None:
    """Where it makes scores of positive infinity, there are no weights."""
    case = case_of(RawFormat(1, 8, 8, 4, torch.float32), 1, 30)
    case = replace(case, query=case.query.abs(), key=case.key.abs())
    changed = getattr(case, part).clone()
    changed[:, 20, 3] = torch.inf
    finite = replace(case, **{part: changed}).run()[0].isfinite()
    assert not finite[20 : 21 if part == "query" else None].any()
    assert finite[:20].all()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_in_raw_blocks(number: float) -> None:
    form = RawFormat(1, 8, 8, 4, torch.float32)
    case = case_of(form, 2, 10, blocks=2)
    assert case.prefix is not None
    data = case.prefix.data.clone()
    data[5].view(torch.float32)[8:16] = number  # the second key of the second block
    broken = replace(case, prefix=replace(case.prefix, data=data))
    output, lse = broken.run()
    assert not output.isfinite().any()
    assert not lse.isfinite().any()


def test_plain_attention() -> None:
    """Without the reference: torch's own."""
    case = case_of(RawFormat(2, 16, 24, 8, torch.float32), 3, 150)
    keys, values = (part.repeat_interleave(3, 0)[None] for part in (case.key, case.value))
    wanted = F.scaled_dot_product_attention(case.query[None], keys, values, is_causal=True)[0].transpose(0, 1)
    torch.testing.assert_close(case.run()[0], wanted, rtol=0, atol=ATTENTION_CPU)


def test_log_sum_exp_of_equal_scores() -> None:
    """Without the reference: of n keys with score 0 it is log n; a sink of log n is as much again."""
    case = case_of(ZipFormat(1, 16, 16, 64), 2, 3, blocks=1, opened=4)
    case = replace(case, query=torch.zeros_like(case.query))
    seen = torch.tensor([71.0, 69.0])  # of rows 2 and 0
    torch.testing.assert_close(case.run()[1], seen.log().expand(2, -1))
    sinks = torch.tensor([69.0, 71.0]).log()
    torch.testing.assert_close(replace(case, sink_logits=sinks).run()[1], (seen + torch.tensor([[69.0], [71.0]])).log())
    none = prefill_attention(case.query, case.key, case.value, case.start, scale=1.0, prefix=case.prefix)[1]
    assert none is None


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("form", [ZipFormat(2, 32, 48, 64), RawFormat(2, 24, 40, 8, torch.float32)])
def test_dense_attention(form: ZipFormat | RawFormat, options: bool) -> None:
    """Over several tiles of queries, and of a whole prompt."""
    later, whole = case_of(form, 3, 1100, blocks=3, opened=5), case_of(form, 3, 70)
    if options:
        later, whole = with_options(later), replace(whole, softcap=1.5, sink_logits=torch.linspace(-2, 3, 6))
    for case in (later, whole):
        for found, wanted in zip(case.run_dense(), case.run_reference(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=ATTENTION_CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: {"query": case.query[:3]}, "does not fit"),
        (lambda case: {"query": case.query[..., :8]}, "does not fit"),
        (lambda case: {"value": case.value[:, 1:]}, "does not fit"),
        (lambda case: {"key": case.key[:, -5:], "value": case.value[:, -5:]}, "does not fit"),
        (lambda case: {"start": case.start - 1}, "do not fit in the 63 positions"),
        (lambda case: {"start": case.start + 1}, "1 positions have no keys"),
        (lambda case: {"start": case.start + 64, "first": torch.zeros(20, dtype=torch.int32)}, "sees nothing"),
        (lambda _: {"first": torch.arange(20, 0, -1)}, "descends"),
        (lambda case: {"first": torch.full((20,), case.start + 1)}, "sees nothing"),
        (lambda _: {"first": torch.zeros(19, dtype=torch.int32)}, r"first must be \[20\]"),
        (lambda _: {"sink_logits": torch.zeros(3)}, r"sink_logits must be \[4\]"),
        (lambda case: {"prefix": replace(case.prefix, form=ZipFormat(2, 16, 32, 64))}, "do not fit"),
        (lambda case: {"prefix": replace(case.prefix, data=case.prefix.data[:, 1:])}, "do not fit"),
        (lambda case: {"prefix": replace(case.prefix, sink_slabs=torch.tensor([3, 3]))}, "do not fit"),
        (lambda case: {"prefix": replace(case.prefix, slabs=case.prefix.slabs.int())}, "indices of slabs"),
    ],
)
def test_arguments_that_do_not_fit(change: Any, message: str) -> None:
    case = case_of(ZipFormat(2, 32, 32, 64), 2, 20, blocks=1)
    with pytest.raises(ValueError, match=message):
        replace(case, **change(case)).run()


@pytest.mark.parametrize(("field", "slab"), [("slabs", 7), ("slabs", -1), ("sink_slabs", 7)])
def test_slabs_that_do_not_exist(field: str, slab: int) -> None:
    case = case_of(ZipFormat(2, 32, 32, 64), 2, 20, blocks=2)
    assert case.prefix is not None
    change: dict[str, Any] = {field: torch.tensor([5, slab])}
    with pytest.raises(IndexError, match=f"block 1: no slab .*{slab}"):
        replace(case, prefix=replace(case.prefix, **change)).run()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    if data.draw(st.booleans()):
        dims = st.sampled_from([16, 32, 48, 80])
        profile = data.draw(st.sampled_from(sorted(PROFILES)))
        form: ZipFormat | RawFormat = ZipFormat(kv_heads, data.draw(dims), data.draw(dims), 64, profile)
    else:
        dims = st.integers(1, 40)
        size = data.draw(st.sampled_from([1, 8, 33, 150]))
        form = RawFormat(kv_heads, data.draw(dims), data.draw(dims), size, torch.float32)
    case = case_of(
        form, group, data.draw(st.integers(1, 200)), blocks=data.draw(st.integers(0, 6)),
        opened=data.draw(st.integers(0, 140)), at_start=data.draw(st.booleans()),
    )  # fmt: skip
    if data.draw(st.booleans()):
        case = case.windowed(data.draw(st.integers(1, 500)))
    if data.draw(st.booleans()):
        case = replace(case, softcap=data.draw(st.floats(0.5, 50)))
    if data.draw(st.booleans()):
        case = replace(case, sink_logits=torch.linspace(-3, 3, len(case.query)))
    case.check()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_torch_attends() -> None:
    case = with_options(case_of(ZipFormat(1, 16, 16, 64), 2, 30, blocks=2))
    assert not runs_on_cpu(case.query, case.prefix)
    for found, wanted in zip(case.run(), case.run_reference(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=ATTENTION_CPU)

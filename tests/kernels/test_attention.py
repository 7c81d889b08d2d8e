"""The CPU kernel of decode attention against its reference; whatever must not be read is NaN."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from hypothesis import given, settings
from hypothesis import strategies as st

from sealed_blocks import NAN_BYTE, blocks_of
from tolerances import ATTENTION_CPU
from zipserve.kernels import native, rotation
from zipserve.kernels.attention import (
    DecodeStep,
    OpenBlocks,
    RawFormat,
    SealedBlocks,
    decode_attention,
    decode_attention_reference,
)
from zipserve.kernels.attention.cpu import runs_on_cpu
from zipserve.kernels.dequantize import dequantize_reference
from zipserve.kernels.quantize import quantize_reference
from zipserve.kernels.saliency import classify
from zipserve.kernels.zipformat import PROFILES, ZipFormat, probe_counts


@dataclass
class Case:
    """Arguments of decode_attention."""

    query: torch.Tensor
    sealed: SealedBlocks
    open_blocks: OpenBlocks
    first: torch.Tensor
    scale: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        output, weights = decode_attention(
            self.query, self.sealed, self.open_blocks, self.first, scale=self.scale, softcap=self.softcap,
            sink_logits=self.sink_logits, with_weights=True
        )  # fmt: skip
        assert weights is not None
        return output, weights

    def run_reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        output, weights = decode_attention_reference(
            self.query, self.sealed, self.open_blocks, self.first, scale=self.scale, softcap=self.softcap,
            sink_logits=self.sink_logits, with_weights=True
        )  # fmt: skip
        assert weights is not None
        return output, weights

    def check(self) -> None:
        """The kernel agrees with the reference."""
        assert runs_on_cpu(self.query, self.sealed, self.open_blocks)
        for found, wanted in zip(self.run(), self.run_reference(), strict=True):
            assert wanted.isfinite().all()
            torch.testing.assert_close(found, wanted, rtol=0, atol=ATTENTION_CPU)


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def case_of(form: ZipFormat | RawFormat, group: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Six rows: with 0, 1 and several blocks, at the start of a sequence and later, of all kinds of open blocks."""
    generator = torch.Generator().manual_seed(seed)
    size, counts = form.block_tokens, [1, 0, 4, 2, 0, 3]
    start = [0, 0, 0, 5 * size, 2 * size, size]
    table = torch.tensor([[2, 0, 0, 0], [0, 0, 0, 0], [4, 6, 5, 6], [5, 2, 0, 0], [0, 0, 0, 0], [6, 5, 6, 0]])
    data, sinks = blocks_of(form)
    sealed = SealedBlocks(form, data, table.int(), int32(*counts), int32(*start), sinks, int32(1, 99, 3, 99, 99, 99))
    slots, open_counts = [8, 3, 5, 0, 7, 2], [size, 1, size - 1, size // 2 + 1, size, 1]
    tensors = [torch.full((9, form.kv_heads, size, dim), torch.nan) for dim in (form.key_dim, form.value_dim)]
    for tensor in tensors:
        for slot, count in zip(slots, open_counts, strict=True):
            tensor[slot, :, :count] = torch.randn(tensor[slot, :, :count].shape, generator=generator)
    open_blocks = OpenBlocks(tensors[0].to(dtype), tensors[1].to(dtype), int32(*slots), int32(*open_counts))
    query = torch.randn(len(counts), form.kv_heads * group, form.key_dim, generator=generator)
    return Case(query, sealed, open_blocks, torch.zeros(len(counts), dtype=torch.int32), form.key_dim**-0.5)


def with_options(case: Case) -> Case:
    """The same with a window, whose first tokens lie in the first block or in the open one, a softcap and sinks."""
    size = case.sealed.form.block_tokens
    within = [size - 1, 0, 2, size // 2, size - 1, 5 % size]
    return replace(
        case,
        first=case.sealed.starts + int32(*within),
        softcap=1.5,
        sink_logits=torch.linspace(-2, 3, case.query.shape[1]),
    )


def test_the_kernel_is_there() -> None:
    """Otherwise everything below would compare the reference with itself."""
    assert native.load() is not None


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("options", [False, True])
def test_every_number_of_heads_per_kv_head(group: int, options: bool) -> None:
    case = case_of(ZipFormat(2, 32, 48, 64, "4/32"), group)
    (with_options(case) if options else case).check()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize(
    ("kv_heads", "group", "key_dim", "value_dim", "block_tokens"),
    [(3, 3, 64, 64, 128), (1, 1, 16, 128, 64), (1, 4, 112, 80, 192)],
)
def test_every_profile(
    profile: str, options: bool, kv_heads: int, group: int, key_dim: int, value_dim: int, block_tokens: int
) -> None:
    case = case_of(ZipFormat(kv_heads, key_dim, value_dim, block_tokens, profile), group)
    (with_options(case) if options else case).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize(
    ("kv_heads", "group", "key_dim", "value_dim", "block_tokens"),
    [(3, 3, 64, 64, 128), (1, 5, 24, 40, 8), (2, 1, 128, 16, 20), (1, 2, 7, 3, 5)],
)
def test_raw_blocks(
    dtype: torch.dtype, options: bool, kv_heads: int, group: int, key_dim: int, value_dim: int, block_tokens: int
) -> None:
    case = case_of(RawFormat(kv_heads, key_dim, value_dim, block_tokens, dtype), group, dtype=dtype)
    (with_options(case) if options else case).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_open_block_and_query_of_other_types(dtype: torch.dtype) -> None:
    case = case_of(ZipFormat(2, 48, 32, 64), 3, dtype=dtype)
    replace(case, query=case.query.to(dtype)).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits(dtype: torch.dtype) -> None:
    """The only token's values come out as they are: subnormal numbers, infinities and NaN too."""
    numbers = torch.arange(1 << 16).to(torch.uint16).view(dtype)[None, None, None]
    form = RawFormat(1, 1, 1 << 16, 1, dtype)
    nothing = torch.empty(0, form.layer_bytes, dtype=torch.uint8)
    sealed = SealedBlocks(form, nothing, int32()[None], int32(0), int32(0), nothing, int32(0))
    opened = OpenBlocks(torch.ones(1, 1, 1, 1, dtype=dtype), numbers, int32(0), int32(1))
    found, _ = Case(torch.ones(1, 1, 1), sealed, opened, int32(0), 1.0).run()
    torch.testing.assert_close(found[0, 0], numbers[0, 0, 0].float(), rtol=0, atol=0, equal_nan=True)


def test_types_that_the_kernel_does_not_read() -> None:
    case = case_of(RawFormat(2, 16, 16, 8, torch.float64), 2, dtype=torch.float64)
    assert not runs_on_cpu(case.query, case.sealed, case.open_blocks)
    found, _ = decode_attention(case.query, case.sealed, case.open_blocks, case.first, scale=case.scale)
    wanted, _ = case_of(RawFormat(2, 16, 16, 8, torch.float32), 2).run_reference()
    torch.testing.assert_close(found, wanted, rtol=0, atol=ATTENTION_CPU)


@pytest.mark.parametrize("option", ["first", "softcap", "sink_logits"])
def test_each_option_alone(option: str) -> None:
    """And that it does something."""
    plain = case_of(ZipFormat(2, 32, 32, 64, "43/32"), 2)
    case = replace(plain, **{option: getattr(with_options(plain), option)})
    case.check()
    assert (case.run()[0] - plain.run()[0]).abs().max() > 0.05


@pytest.mark.parametrize("form", [ZipFormat(2, 32, 32, 64), RawFormat(2, 32, 32, 8, torch.float32)])
def test_a_window_that_starts_behind_all_sealed_blocks(form: ZipFormat | RawFormat) -> None:
    case = case_of(form, 2)
    open_start = case.sealed.starts + case.sealed.counts * form.block_tokens
    case = replace(case, first=open_start + int32(2, 0, 3, 1, 0, 0))
    case.check()
    hidden = replace(case.sealed, data=torch.full_like(case.sealed.data, NAN_BYTE))
    assert torch.equal(replace(case, sealed=hidden).run()[0], case.run()[0])


@pytest.mark.parametrize("first", [1, 2, 3, 4, 5, 63, 64, 65])
def test_windows_that_hide_sinks(first: int) -> None:
    case = case_of(ZipFormat(1, 32, 32, 64), 2)
    rows = slice(2, 3)
    sealed, opened = case.sealed, case.open_blocks
    Case(
        case.query[rows],
        replace(
            sealed, table=sealed.table[rows], counts=sealed.counts[rows], starts=sealed.starts[rows],
            sink_slabs=sealed.sink_slabs[rows],
        ),
        replace(opened, slots=opened.slots[rows], counts=opened.counts[rows]),
        int32(first),
        case.scale,
    ).check()  # fmt: skip


@pytest.mark.parametrize("form", [ZipFormat(1, 64, 64, 64, "43/32"), RawFormat(2, 64, 64, 64, torch.float32)])
def test_long_rows_do_not_depend_on_threads(form: ZipFormat | RawFormat) -> None:
    """Rows of several spans of blocks."""
    case = case_of(form, 3)
    table = torch.cat((case.sealed.table[2:3], torch.tensor([[5, 6, 5]], dtype=torch.int32).repeat(1, 14)), 1)
    table = table.repeat(6, 1)
    table[3:] = table[3:].roll(-2, 1)
    counts = int32(34, 17, 16, 33, 1, 5)
    starts = int32(0, 0, 0, 64, 64, 64)
    sealed = replace(case.sealed, table=table, counts=counts, starts=starts, sink_slabs=int32(3, 3, 3, 0, 0, 0))
    case = replace(case, sealed=sealed)
    case.check()
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(case.run())
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert torch.equal(other[1], found[0][1])


@pytest.mark.parametrize("factor", [0.0, 30.0, 1000.0])
def test_flat_and_sharp_softmax(factor: float) -> None:
    case = case_of(ZipFormat(2, 32, 32, 64, "4/4"), 3)
    case = replace(case, query=case.query * factor)
    found, wanted = case.run(), case.run_reference()
    # logits of size 1000 are known to 1e-4 in float32
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=max(ATTENTION_CPU, 2e-6 * factor))
    assert found[1].isfinite().all()


def test_weights_are_shares() -> None:
    """With nothing sealed they sum to 1; with an overwhelming sink logit to 0; none of them is asked for in vain."""
    case = case_of(RawFormat(1, 16, 16, 8, torch.float32), 2)
    _, weights = case.run()
    for row in (1, 4):
        assert float(weights[row].sum()) == pytest.approx(1, abs=1e-5)
    assert weights[2].sum() < 0.9
    assert (weights[2, 7:] == 0).all()
    output, weights = replace(case, sink_logits=torch.tensor([200.0, 200.0])).run()
    assert output.abs().max() == weights.abs().max() == 0
    _, none = decode_attention(case.query, case.sealed, case.open_blocks, case.first, scale=case.scale)
    assert none is None


def test_raw_attention_is_plain_attention() -> None:
    """Without the reference: torch's own on the concatenated keys and values."""
    form = RawFormat(2, 16, 24, 8, torch.float32)
    case = case_of(form, 3)
    numbers = case.sealed.data[torch.tensor([4, 6, 5, 6])].contiguous().view(torch.float32).view(4, 2, -1)
    keys = numbers[..., : 8 * 16].reshape(4, 2, 8, 16).transpose(0, 1).flatten(1, 2)
    values = numbers[..., 8 * 16 :].reshape(4, 2, 8, 24).transpose(0, 1).flatten(1, 2)
    keys = torch.cat((keys, case.open_blocks.keys[5, :, :7]), 1)
    values = torch.cat((values, case.open_blocks.values[5, :, :7]), 1)
    wanted = F.scaled_dot_product_attention(case.query[2].view(2, 3, 16), keys, values)
    torch.testing.assert_close(case.run()[0][2], wanted.view(6, 24), rtol=0, atol=ATTENTION_CPU)


def within(case: Case, part: str, **changes: Any) -> Case:
    """With other fields of `sealed` or `open_blocks`."""
    holder: dict[str, Any] = {part: replace(getattr(case, part), **changes)}
    return replace(case, **holder)


@pytest.mark.parametrize(
    "change",
    [
        lambda case: replace(case, query=case.query[:, :3]),
        lambda case: replace(case, query=case.query[..., :16]),
        lambda case: replace(case, first=case.first[1:]),
        lambda case: replace(case, sink_logits=torch.zeros(3)),
        lambda case: within(case, "sealed", table=case.sealed.table[1:]),
        lambda case: within(case, "sealed", counts=case.sealed.counts[1:]),
        lambda case: within(case, "sealed", data=case.sealed.data[:, 1:]),
        lambda case: within(case, "sealed", sinks=case.sealed.sinks[:, 1:]),
        lambda case: within(case, "open_blocks", keys=case.open_blocks.keys[:, :1]),
        lambda case: within(case, "open_blocks", keys=case.open_blocks.keys[1:]),
        lambda case: within(case, "open_blocks", values=case.open_blocks.values[..., 1:]),
        lambda case: within(
            case, "open_blocks", values=case.open_blocks.values[:, :, ::2].repeat(1, 1, 2, 1)[..., :32]
        ),
    ],
)
def test_shapes_that_do_not_fit(change: Callable[[Case], Case]) -> None:
    with pytest.raises(ValueError, match=r"must be|does not fit"):
        change(case_of(ZipFormat(2, 32, 48, 64), 2)).run()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"query": torch.zeros(6, 8, 32)}, "query"),
        ({"query": torch.zeros(5, 4, 32)}, "query"),
        ({"fresh": (torch.zeros(6, 2, 16), torch.zeros(6, 2, 48))}, "fresh keys and values"),
        ({"fresh": (torch.zeros(6, 2, 32), torch.zeros(6, 1, 48))}, "fresh keys and values"),
        ({"sink_logits": torch.zeros(1)}, "sink_logits"),
        ({"weights": torch.zeros(6, 32)}, "weights"),
    ],
)
def test_layers_of_a_step_that_do_not_fit(change: dict[str, Any], name: str) -> None:
    """Not only in the first of them, whose call is kept for all."""
    case = case_of(ZipFormat(2, 32, 48, 64), 2)
    sealed, opened = case.sealed, case.open_blocks
    rows, heads, _ = case.query.shape
    step = DecodeStep(
        replace(sealed, data=sealed.data[:, None], sinks=sealed.sinks[:, None]),
        replace(opened, keys=opened.keys[None], values=opened.values[None]),
        case.first,
    )
    layer: dict[str, Any] = {
        "query": case.query,
        "fresh": (torch.zeros(rows, 2, 32), torch.zeros(rows, 2, 48)),
        "scale": 1.0,
        "softcap": None,
        "sink_logits": torch.zeros(heads),
        "weights": torch.zeros(rows, 64),
    }
    step.attend(0, **layer)
    with pytest.raises(ValueError, match=f"{name} must be"):
        step.attend(0, **layer | change)


@pytest.mark.parametrize(
    ("part", "field", "row", "number"),
    [
        ("sealed", "counts", 0, 5),
        ("sealed", "counts", 1, -1),
        ("sealed", "starts", 2, 32),
        ("sealed", "starts", 3, -64),
        ("sealed", "sink_slabs", 0, 7),
        ("sealed", "sink_slabs", 2, -1),
        ("open_blocks", "slots", 4, 9),
        ("open_blocks", "slots", 5, -1),
        ("open_blocks", "counts", 0, 0),
        ("open_blocks", "counts", 3, 65),
    ],
)
def test_rows_that_refer_to_nothing(part: str, field: str, row: int, number: int) -> None:
    case = case_of(ZipFormat(2, 32, 48, 64), 2)
    index = getattr(getattr(case, part), field).clone()
    index[row] = number
    with pytest.raises(IndexError, match=f"row {row} refers"):
        within(case, part, **{field: index}).run()


@pytest.mark.parametrize("slab", [-1, 7])
def test_slabs_that_do_not_exist(slab: int) -> None:
    case = case_of(ZipFormat(2, 32, 48, 64), 2)
    table = case.sealed.table.clone()
    table[2, 3] = slab
    with pytest.raises(IndexError, match="row 2 refers"):
        within(case, "sealed", table=table).run()


def test_a_row_that_sees_nothing() -> None:
    case = case_of(ZipFormat(2, 32, 48, 64), 2)
    first = case.first.clone()
    first[1] = 1
    with pytest.raises(IndexError, match="row 1 refers"):
        replace(case, first=first).run()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", [ZipFormat(1, 16, 16, 64), RawFormat(1, 16, 16, 8, torch.float32)])
def test_what_is_not_finite_is_not_hidden(form: ZipFormat | RawFormat, number: float, softcap: float | None) -> None:
    """Products of infinity and both signs make a NaN whose sign is another one than that of torch.nan."""
    case = case_of(form, 2)
    case.open_blocks.keys[2, 0, 0, 3:5] = number
    case.query[..., 4] = -case.query[..., 3]
    output, weights = replace(case, softcap=softcap).run()
    assert output[:5].isfinite().all()
    assert not output[5].isfinite().any()
    assert not weights[5, 0].isfinite()


VECTORS = {name: torch.from_numpy(array) for name, array in np.load(Path(__file__).parent / "zip_vectors.npz").items()}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("at_start", [False, True])
def test_golden_vectors(profile: str, at_start: bool) -> None:
    """An independent implementation's attention over one block; the open block's only token gets no weight."""
    form = ZipFormat(3, 64, 64, 128, profile)
    data = torch.empty(1, form.layer_bytes, dtype=torch.uint8)
    sinks = torch.empty(1, form.sinks_layer_bytes, dtype=torch.uint8)
    slab = torch.zeros(1, dtype=torch.int64)
    scores = VECTORS["hi"].float() * torch.tensor(probe_counts(128))
    hi = classify(scores[None], form, torch.tensor([at_start]))
    keys, values, query = VECTORS["K"], VECTORS["V"], VECTORS["q"]
    sink_slab = slab if at_start else slab - 1
    name = f"{profile.replace('/', '_')}_{'first' if at_start else 'next'}"
    for _ in range(2):
        quantize_reference(keys[None], values[None], hi, form, data, slab, sinks, sink_slab)
        # A key within 1e-3 of a cell's border may have got the other cell: the second time it is moved over.
        decoded, _ = dequantize_reference(data, slab, form, sinks, sink_slab)
        missing = rotation.rotate(VECTORS[f"{name}_K"] - decoded[0])
        keys = keys + rotation.unrotate(missing.where(missing.abs() > 1e-4, 0) * 0.01)
    zero = int32(0)
    sealed = SealedBlocks(form, data, int32(0)[None], int32(1), zero if at_start else int32(128), sinks, zero)
    away = (-1e4 * query / query.square().sum(-1, keepdim=True))[None, :, None]
    opened = OpenBlocks(away.expand(-1, -1, 128, -1).contiguous(), values[None], zero, int32(1))
    found, weights = Case(query[None], sealed, opened, zero, 64**-0.5).run()
    assert weights.abs().max() == 0
    torch.testing.assert_close(found[0], VECTORS[f"{name}_attention"], rtol=0, atol=1e-4)


@settings(max_examples=40)
@given(st.data())
def test_raw_blocks_of_any_shape(data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    dims, size = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70))), data.draw(st.integers(2, 40))
    form = RawFormat(kv_heads, *dims, size, torch.float32)
    case = case_of(form, group, seed=data.draw(st.integers(0, 9)))
    counts = case.sealed.counts
    lengths = counts * size + case.open_blocks.counts
    within = [data.draw(st.integers(0, min(int(length), size) - 1)) for length in lengths]
    case = replace(case, first=case.sealed.starts + int32(*within))
    if data.draw(st.booleans()):
        case = replace(case, softcap=data.draw(st.floats(0.5, 50)))
    if data.draw(st.booleans()):
        case = replace(case, sink_logits=torch.linspace(-3, 3, kv_heads * group))
    case.check()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_reference_runs() -> None:
    case = with_options(case_of(ZipFormat(1, 16, 16, 64), 2))
    assert not runs_on_cpu(case.query, case.sealed, case.open_blocks)
    found = case.run()
    for one, other in zip(found, case.run_reference(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_writes_the_rows_own_tokens_first(dtype: torch.dtype) -> None:
    """From strided rows, to the last places of the open blocks and nowhere else, rounded as torch does."""
    case = case_of(RawFormat(3, 24, 40, 16, dtype), 2, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    packed = torch.randn(6, 3 * (24 + 40), generator=generator)
    fresh = packed[:, : 3 * 24].view(6, 3, 24), packed[:, 3 * 24 :].view(6, 3, 40)
    before = case.open_blocks
    wanted = replace(before, keys=before.keys.clone(), values=before.values.clone())
    slots, places = before.slots.long(), before.counts.long() - 1
    wanted.keys[slots, :, places], wanted.values[slots, :, places] = (rows.to(dtype) for rows in fresh)
    output, _ = decode_attention(case.query, case.sealed, case.open_blocks, case.first, scale=case.scale, fresh=fresh)
    assert torch.equal(case.open_blocks.keys.nan_to_num(7), wanted.keys.nan_to_num(7))
    assert torch.equal(case.open_blocks.values.nan_to_num(7), wanted.values.nan_to_num(7))
    torch.testing.assert_close(output, case.run_reference()[0], rtol=0, atol=ATTENTION_CPU)


def test_queries_may_be_a_view() -> None:
    case = case_of(ZipFormat(3, 64, 64, 128, "4/32"), 2)
    wanted = case.run()[0]
    rows = torch.cat((case.query.flatten(1), torch.full((6, 5), torch.nan)), 1)
    view = rows[:, :-5].view(case.query.shape)
    assert torch.equal(replace(case, query=view).run()[0], wanted)

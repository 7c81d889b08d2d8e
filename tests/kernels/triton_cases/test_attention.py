"""Decode attention's Triton kernels against their reference; whatever must not be read is NaN."""

from dataclasses import astuple, dataclass, fields, replace

import pytest
import torch

from tolerances import ATTENTION, WEIGHTS
from zipserve.kernels.attention import OpenBlocks, RawFormat, SealedBlocks, decode_attention_reference
from zipserve.kernels.attention.triton_kernel import decode_attention_triton
from zipserve.kernels.quantize import quantize_reference
from zipserve.kernels.saliency import classify
from zipserve.kernels.zipformat import PROFILES, ZipFormat

pytestmark = pytest.mark.gpu
Format = ZipFormat | RawFormat


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


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

    def compare(self, device: torch.device) -> torch.Tensor:
        """The kernel's output, which is the reference's."""
        (wanted, wanted_weights), (found, weights) = self.run(torch.device("cpu"), reference=True), self.run(device)
        assert weights is not None
        assert wanted.isfinite().all()
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=ATTENTION[self.query.dtype])
        if self.query.dtype == torch.float32:
            torch.testing.assert_close(weights.cpu(), wanted_weights, rtol=0, atol=WEIGHTS)
        return found.cpu()

    def run(
        self, device: torch.device, *, reference: bool = False, with_weights: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tensors = (on(device, getattr(self.sealed, field.name)) for field in fields(self.sealed)[1:])
        return (decode_attention_reference if reference else decode_attention_triton)(
            self.query.to(device),
            SealedBlocks(self.sealed.form, *tensors),
            OpenBlocks(*(on(device, tensor) for tensor in astuple(self.open_blocks))),
            self.first.to(device),
            scale=self.scale,
            softcap=self.softcap,
            sink_logits=None if self.sink_logits is None else self.sink_logits.to(device),
            with_weights=with_weights,
        )


def on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """On a device, as a view with the same strides."""
    whole = tensor.new_empty(0).set_(tensor.untyped_storage()).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def blocks_of(form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer of an arena, and sinks: slabs 2 and 4 start a sequence, whose sinks are in 1 and 3; slab 1 does not."""
    generator = torch.Generator().manual_seed(form.key_dim)
    data = torch.full((5, form.layer_bytes + 192), 255, dtype=torch.uint8)[:, 128:-64]
    slabs, sink_slabs = torch.tensor([2, 4, 1]), torch.tensor([1, 3, -1])
    keys = torch.randn(3, form.kv_heads, form.block_tokens, form.key_dim, generator=generator)
    values = torch.randn(3, form.kv_heads, form.block_tokens, form.value_dim, generator=generator)
    if isinstance(form, RawFormat):
        data[slabs] = torch.cat((keys.flatten(2), values.flatten(2)), 2).to(form.dtype).flatten(1).view(torch.uint8)
        return data, torch.empty(0, 0, dtype=torch.uint8)
    sinks = torch.full((5, form.sinks_layer_bytes + 32), 255, dtype=torch.uint8)[:, 16:-16]
    hi = classify(torch.rand(3, form.block_tokens, generator=generator), form, sink_slabs >= 0)
    assert not quantize_reference(keys, values, hi, form, data, slabs, sinks, sink_slabs).any()
    return data, sinks


def case_of(form: Format, group: int, dtype: torch.dtype = torch.float32) -> Case:
    """Four rows: with 2, 0, 3 and 1 sealed blocks, at the start of a sequence and later; open blocks of all kinds."""
    generator = torch.Generator().manual_seed(group)
    size = form.block_tokens
    table = torch.tensor([[2, 1, 0], [0, 0, 0], [4, 1, 2], [1, 0, 0]], dtype=torch.int32)
    data, sinks = blocks_of(form)
    sealed = SealedBlocks(form, data, table, int32(2, 0, 3, 1), int32(0, 2 * size, 0, size), sinks, int32(1, 99, 3, 99))
    slots, counts = [3, 0, 4, 2], [1, size - 1, size // 2 + 1, size]
    keys, values = (torch.full((6, form.kv_heads, size, dim), torch.nan) for dim in (form.key_dim, form.value_dim))
    for slot, count in zip(slots, counts, strict=True):
        for rows in (keys, values):
            rows[slot, :, :count] = torch.randn(form.kv_heads, count, rows.shape[-1], generator=generator)
    open_blocks = OpenBlocks(keys.to(dtype), values.to(dtype), int32(*slots), int32(*counts))
    query = torch.randn(4, form.kv_heads * group, form.key_dim, generator=generator).to(dtype)
    return Case(query, sealed, open_blocks, sealed.starts, form.key_dim**-0.5)


def with_options(case: Case) -> Case:
    """The same with a window, which begins in the first block or in the open one, a softcap and sink logits."""
    size = case.sealed.form.block_tokens
    return replace(
        case,
        first=case.sealed.starts + int32(2, size // 2, size - 5, size // 3),
        softcap=1.5,
        sink_logits=torch.linspace(-2, 3, case.query.shape[1]),
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile(profile: str, device: torch.device) -> None:
    with_options(case_of(ZipFormat(1, 64, 32, 64, profile), 3)).compare(device)


@pytest.mark.parametrize("group", [1, 8, 17])
def test_every_number_of_heads_per_kv_head(group: int, device: torch.device) -> None:
    with_options(case_of(ZipFormat(2, 16, 32, 64), group)).compare(device)


@pytest.mark.parametrize(("key_dim", "value_dim", "tokens"), [(80, 48, 128), (16, 96, 192)])
def test_odd_shapes(key_dim: int, value_dim: int, tokens: int, device: torch.device) -> None:
    with_options(case_of(ZipFormat(1, key_dim, value_dim, tokens, "43/32"), 4)).compare(device)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_raw_blocks(stored: torch.dtype, device: torch.device) -> None:
    case = case_of(RawFormat(2, 48, 32, 40, stored), 3)
    case.compare(device)
    with_options(case).compare(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_raw", [False, True])
def test_half_precision(dtype: torch.dtype, is_raw: bool, device: torch.device, interpreted: bool) -> None:
    if interpreted and dtype == torch.bfloat16:
        pytest.xfail("the interpreter multiplies bfloat16 as integers")
    form = RawFormat(1, 64, 64, 64, dtype) if is_raw else ZipFormat(1, 64, 64, 64)
    with_options(case_of(form, 4, dtype)).compare(device)


@pytest.mark.parametrize("option", ["first", "softcap", "sink_logits"])
def test_each_option_does_something(option: str, device: torch.device) -> None:
    plain = case_of(ZipFormat(1, 32, 32, 64, "43/32"), 2)
    case = replace(plain, **{option: getattr(with_options(plain), option)})
    assert (case.compare(device) - plain.compare(device)).abs().max() > 0.03


@pytest.mark.parametrize("form", [ZipFormat(1, 16, 16, 64), RawFormat(1, 16, 16, 64, torch.float32)])
def test_a_window_that_starts_behind_all_sealed_blocks(form: Format, device: torch.device) -> None:
    case = case_of(form, 2)
    replace(case, first=case.sealed.starts + case.sealed.counts * 64 + int32(0, 9, 1, 63)).compare(device)


@pytest.mark.parametrize("first", [1, 3, 4, 5])
def test_windows_that_hide_sinks(first: int, device: torch.device) -> None:
    case = case_of(ZipFormat(1, 16, 16, 64), 2)
    replace(case, first=case.sealed.starts + first).compare(device)


@pytest.mark.parametrize("factor", [0.0, 100.0])
def test_flat_and_sharp_softmax(factor: float, device: torch.device) -> None:
    case = case_of(ZipFormat(1, 32, 32, 64, "4/4"), 2)
    replace(case, query=case.query * factor).compare(device)


def test_fewer_splits_than_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks share a split, and some splits have none."""
    case = with_options(case_of(ZipFormat(1, 16, 16, 64), 2))
    for programs in (1, 8):
        monkeypatch.setattr("zipserve.kernels.attention.triton_kernel._PROGRAMS", programs)
        case.compare(device)


def test_no_weights_unless_asked(device: torch.device) -> None:
    assert case_of(RawFormat(1, 16, 16, 64, torch.float32), 2).run(device, with_weights=False)[1] is None

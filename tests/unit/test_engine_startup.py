"""How a model gets ready: which path it takes, how its weights are stored, and that a wrong path is noticed."""

import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_model
from tiny_families import tiny
from zipserve.common.errors import InvalidRequestError
from zipserve.common.models import ModelFiles, resolve
from zipserve.engine import loader, startup
from zipserve.engine.fused import FusedModel
from zipserve.engine.model import LoadedModel
from zipserve.engine.packing import PackedEmbedding, PackedLinear, pack_linears
from zipserve.engine.startup import load_ready


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return resolve(str(tiny_model.build(tmp_path_factory.mktemp("model"))))


def stored_as(folder: Path, dtype: torch.dtype) -> ModelFiles:
    """The tiny model with a checkpoint of another dtype."""
    tiny_model.build(folder)
    path = folder / "model.safetensors"
    save_file({name: weight.to(dtype) for name, weight in load_file(path).items()}, path, {"format": "pt"})
    return resolve(str(folder))


def storages(model: LoadedModel) -> set[torch.dtype]:
    """Of the packed linear layers."""
    return {part.matrix.panels.dtype for part in model.module.modules() if isinstance(part, PackedLinear)}


def test_takes_the_fused_plan_first(files: ModelFiles) -> None:
    model = load_ready(files, "float32", "cpu")
    assert isinstance(model.forward, FusedModel)
    assert max(parameter.numel() for parameter in model.module.model.layers.parameters()) <= 64  # no weights but norms


def test_packs_what_it_does_not_recognize(files: ModelFiles) -> None:
    assert storages(load_ready(files, "float32", "cpu", paths=("packed",))) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stores_weights_as_the_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_ready(stored_as(tmp_path, dtype), "float32", "cpu", paths=("packed",))
    assert model.dtype == "float32"
    assert storages(model) == {dtype}


def test_stores_no_weights_narrower_than_the_checkpoint(tmp_path: Path) -> None:
    """Some checkpoints have layers of another dtype, here the last one."""
    tiny_model.build(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    last = max(name for name, weight in weights.items() if weight.dim() == 2)
    save_file(
        {name: weight if name == last else weight.bfloat16() for name, weight in weights.items()},
        path,
        {"format": "pt"},
    )
    model = load_ready(resolve(str(tmp_path)), "float32", "cpu", paths=("packed",))
    assert storages(model) == {torch.float32}


def test_rounds_nothing_where_nothing_is_packed(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipserve.engine.startup.runs_on_cpu", lambda: False)
    wanted, found = (load_ready(files, "float32", "cpu", weights=weights) for weights in ("float32", "int8"))
    for weight, same in zip(wanted.module.parameters(), found.module.parameters(), strict=True):
        assert torch.equal(weight, same)


@pytest.mark.parametrize("path", ["fused", "packed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_serves_in_half_precision(files: ModelFiles, path: startup.Path, dtype: str) -> None:
    """Whatever the plan computes in, blocks hold the model's dtype."""
    model = load_ready(files, dtype, "cpu", paths=(path,))
    assert model.dtype == dtype
    assert isinstance(model.forward, FusedModel) == (path == "fused")


@pytest.mark.parametrize("path", ["fused", "packed"])
def test_stores_weights_as_it_is_told(files: ModelFiles, path: startup.Path) -> None:
    """The probe compares with weights rounded alike, so even int8 must agree to the last digits."""
    for weights in ("int8", "bfloat16"):
        load_ready(files, "float32", "cpu", weights=weights, paths=(path,))


def test_loads_again_after_a_path_that_computes_something_else(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: LoadedModel, storage: torch.dtype) -> LoadedModel:
        fused = startup.fuse(model, storage)
        assert isinstance(fused.forward, FusedModel)
        fused.forward.scorings = tuple(replace(scoring, scale=2 * scoring.scale) for scoring in fused.forward.scorings)
        return fused

    monkeypatch.setitem(startup.PATHS, "fused", wrong)
    model = load_ready(files, "float32", "cpu")
    assert not isinstance(model.forward, FusedModel)
    assert storages(model) == {torch.float32}


def test_serves_on_another_path_where_one_breaks(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are gone before others are loaded."""
    given: list[weakref.ref[Any]] = []

    def broken(model: LoadedModel, storage: torch.dtype) -> LoadedModel:
        given.append(weakref.ref(startup.fuse(model, storage).module))
        raise AttributeError("'PackedLinear' object has no attribute 'weight'")

    def load(*arguments: Any) -> LoadedModel:
        assert all(module() is None for module in given)
        return loader.load(*arguments)

    monkeypatch.setitem(startup.PATHS, "fused", broken)
    monkeypatch.setattr("zipserve.engine.startup.loader", SimpleNamespace(load=load))
    assert storages(load_ready(files, "float32", "cpu")) == {torch.float32}
    assert given


def test_serves_the_module_where_no_path_will_do(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_model: LoadedModel, _storage: torch.dtype) -> LoadedModel:
        raise InvalidRequestError("the logits differ")

    for path in startup.PATHS:
        monkeypatch.setitem(startup.PATHS, path, refuse)
    assert storages(load_ready(files, "float32", "cpu")) == set()


@pytest.mark.parametrize("path", ["fused", "packed"])
def test_tied_weights_exist_once(tmp_path: Path, path: startup.Path) -> None:
    tiny_model.build(tmp_path, tied=True)
    model = load_ready(resolve(str(tmp_path)), "float32", "cpu", paths=(path,))
    if path == "packed":
        embedding: Any = model.module.get_input_embeddings()
        assert isinstance(embedding, PackedEmbedding)
        assert embedding.matrix is model.module.get_output_embeddings().matrix
    assert model.module.state_dict().get("model.embed_tokens.weight", torch.empty(0)).numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_embedding_is_looked_up_as_it_was(dtype: torch.dtype) -> None:
    """Its scale, here 48 ** 0.5, is rounded like the weights."""
    module = tiny("gemma3_text", hidden_size=48, tie_word_embeddings=True).to(dtype)
    module.get_input_embeddings().embed_scale = torch.tensor(48**0.5)  # which loading leaves in float32
    token_ids = torch.arange(97)[None]
    wanted = module.get_input_embeddings()(token_ids)
    pack_linears(module, dtype)
    assert isinstance(module.get_input_embeddings(), PackedEmbedding)
    assert torch.equal(module.get_input_embeddings()(token_ids), wanted)

"""From a model's files to a model that is ready to serve: loaded, packed for its device, and probed.

On the CPU the fused plan is tried first, then packed linear layers under the module as it is, then the module alone:
whichever is the first to give the logits of plain transformers. One that fails has given its weights away, so they are
loaded again.
"""

import ctypes
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from zipserve.common import log
from zipserve.common.models import ModelFiles
from zipserve.engine import loader
from zipserve.engine.codec import TORCH_DTYPES
from zipserve.engine.fused import FusedModel, NotRecognizedError, recognize
from zipserve.engine.model import LoadedModel
from zipserve.engine.packing import LINEARS, pack_linears
from zipserve.engine.parts import replace_parts
from zipserve.engine.probe import References, probe, take_references
from zipserve.engine.siblings import find_siblings
from zipserve.kernels.linear import pack, runs_on_cpu

Weights: TypeAlias = Literal["checkpoint", "float32", "float16", "bfloat16", "int8"]
Path: TypeAlias = Literal["fused", "packed"]

_STORAGES = {**TORCH_DTYPES, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_log = log.get()


def load_ready(
    files: ModelFiles,
    dtype: str,
    device: str,
    context_tokens: int | None = None,
    *,
    weights: Weights = "checkpoint",
    paths: tuple[Path, ...] = ("fused", "packed"),
) -> LoadedModel:
    """Loads, packs and probes a model.

    Args:
        dtype, device, context_tokens: see zipserve.engine.loader.load.
        weights: how the CPU kernel stores linear layers. "checkpoint" is exact: as the files do. int8, and what is
            narrower than the files, rounds.
        paths: what to try before the module as it is, in this order; nothing on other devices than CPUs.

    Raises:
        InvalidRequestError: it cannot be served; the message says why.
    """
    storage = _storage(files, dtype, weights)
    if device != "cpu" or not runs_on_cpu():
        paths = ()

    def load() -> LoadedModel:
        model = loader.load(files, dtype, device, context_tokens)
        if paths and weights != "checkpoint":
            _round(model.module, storage)
        return model

    model = load()
    references = take_references(model)
    for path in paths:
        try:
            ready = _on_path(path, model, storage, references)
        except NotRecognizedError as unknown:
            _log.info("model.not_recognized", model=files.name, what=str(unknown))
            continue
        except Exception as error:  # noqa: BLE001  # whatever a path does to a module, another one may serve it
            _log.warning("model.path_refused", model=files.name, path=path, why=repr(error))
        else:
            _let_go(ready.module)
            _log.info("model.packed", model=files.name, path=path, weights=str(storage).removeprefix("torch."))
            return ready
        del model  # weights are not to exist twice
        gc.collect()
        model = load()
    probe(model, references)
    return model


def _on_path(path: Path, model: LoadedModel, storage: torch.dtype, references: References) -> LoadedModel:
    ready = PATHS[path](model, storage)
    probe(ready, references)
    return ready


def fuse(model: LoadedModel, storage: torch.dtype) -> LoadedModel:
    """The fused plan of a model, which takes its weights.

    Raises:
        NotRecognizedError: there is none, and the model is as it was.
    """
    heads = (model.heads, model.kv_heads, model.key_dim, model.value_dim)
    decoder = recognize(model.module, heads)
    return replace(model, forward=FusedModel(decoder, heads, model.scorings, storage))


def pack_generic(model: LoadedModel, storage: torch.dtype) -> LoadedModel:
    """The model with what is recognized in it replaced, and its other linear layers packed."""
    replace_parts(model.module, storage)
    pack_linears(model.module, storage, find_siblings(model, LINEARS))
    return model


PATHS: dict[Path, Callable[[LoadedModel, torch.dtype], LoadedModel]] = {"fused": fuse, "packed": pack_generic}


def _storage(files: ModelFiles, dtype: str, weights: Weights) -> torch.dtype:
    if weights != "checkpoint":
        return _STORAGES[weights]
    if dtype != "float32":
        return _STORAGES[dtype]
    found = set()
    for path in files.folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            parts = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118  it is no dictionary
            found |= {part.get_dtype() for part in parts if len(part.get_shape()) == 2}
    return _STORAGES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _let_go(module: Any) -> None:
    """Gives back what loading took: the checkpoint's mapping, which the few weights left keep alive, and free memory
    that the C library holds."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc has it
        libc.malloc_trim(ctypes.c_size_t(0))


@torch.no_grad()
def _round(module: Any, storage: torch.dtype) -> None:
    """Rounds what will be packed as packing does, so that the probe compares equal weights."""
    for layer in module.modules():
        if type(layer) in LINEARS and layer.weight.dtype is torch.float32 and storage is not torch.float32:
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            weight.copy_(pack(weight, storage).unpack())

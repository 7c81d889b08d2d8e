"""Who is measured in this process: our engine on each of its paths, and Hugging Face's forward passes."""

import copy
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM

from zipserve.bench import rows
from zipserve.bench.rows import Rows
from zipserve.common.errors import InternalError
from zipserve.common.models import ModelFiles
from zipserve.engine import startup
from zipserve.engine.engine import Engine
from zipserve.engine.fused import FusedModel
from zipserve.engine.model import LoadedModel
from zipserve.engine.packing import PackedLinear

PATHS: tuple[startup.Path, ...] = tuple(startup.PATHS)


class Contestant(Protocol):
    """Takes its turns at the same work as the others. All tokens are the most likely ones."""

    name: str

    def hold(self, count: int, context: int) -> None:
        """Gets `count` rows of `context` tokens ready, each with KV of its own, where it has fewer of them."""

    def steps(self, count: int) -> list[float]:
        """Takes steps of one token for every row; returns the seconds of each."""

    def drop(self) -> None:
        """Forgets the rows."""

    def prefill(self, tokens: int) -> float:
        """Computes one prompt that was never seen, to its first new token; returns the seconds."""


@dataclass(frozen=True)
class Variant:
    """One way to run our engine."""

    path: startup.Path
    """fused: the native plan of the whole step; packed: the module of transformers with our operations."""
    weights: startup.Weights
    """How linear layers are stored; activations are float32."""
    codec: str

    @property
    def name(self) -> str:
        """Such as `fused float32 raw`."""
        return f"{self.path} {self.weights} {self.codec}"


def load(files: ModelFiles, path: startup.Path, weights: startup.Weights) -> LoadedModel:
    """A model for variants of this path and storage, as a worker loads it.

    Raises:
        InternalError: the path cannot serve this model, so that another one would be measured.
    """
    model = startup.load_ready(files, "float32", "cpu", weights=weights, paths=(path,))
    if path != _path_of(model):
        raise InternalError(f"the {path} path cannot serve {files.name} with {weights} weights")
    return model


def _path_of(model: LoadedModel) -> startup.Path | None:
    """None: the module of transformers as it is."""
    if isinstance(model.forward, FusedModel):
        return "fused"
    return "packed" if any(isinstance(part, PackedLinear) for part in model.module.modules()) else None


class Own:
    """Our engine."""

    def __init__(self, variant: Variant, model: LoadedModel, *, rows_max: int, steps_max: int) -> None:
        """
        Args:
            rows_max: most rows that it will hold.
            steps_max: most steps that a row will take.
        """
        self.name, self._codec, self._model = variant.name, variant.codec, model
        self._rows_max, self._steps_max = rows_max, steps_max
        self._rows: Rows | None = None
        self._count = 0
        self._prefilling: tuple[int, Engine] | None = None
        self._prompts = 0

    def hold(self, count: int, context: int) -> None:
        """See Contestant."""
        if self._rows is None:
            self._rows = Rows(self._model, self._codec, context=context, rows=self._rows_max, steps=self._steps_max)
        self._count = count

    def steps(self, count: int) -> list[float]:
        """See Contestant."""
        assert self._rows is not None
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            self._rows.step(self._count)
            seconds.append(time.perf_counter() - started)
        return seconds

    def drop(self) -> None:
        """See Contestant."""
        self._rows = None

    def prefill(self, tokens: int) -> float:
        """See Contestant."""
        if self._prefilling is None or self._prefilling[0] != tokens:
            self._prefilling = tokens, rows.engine(self._model, self._codec, tokens, 1)
        self._prompts += 1
        ids = rows.prompt(self._model.vocab_tokens, tokens, self._prompts)
        started = time.perf_counter()
        _, logits = rows.compute(self._prefilling[1], ids)
        logits.argmax().item()
        return time.perf_counter() - started


def load_huggingface(files: ModelFiles) -> Any:
    """The float32 module as transformers has it."""
    module: Any = AutoModelForCausalLM.from_pretrained(
        files.folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return module.eval()


class HuggingFace:
    """Forward passes as `generate` makes them, with its cache, without what `generate` does around them."""

    def __init__(self, module: Any, attention: str) -> None:
        """
        Args:
            module: float32; may be shared with one of another attention.
            attention: eager or sdpa.
        """
        self.name = f"Hugging Face {attention}"
        self._module, self._attention = module, attention
        self._prompt_cache: Any = None
        self._cache: Any = None
        self._tokens = torch.empty(0)
        self._count = 0
        self._prompts = 0

    def hold(self, count: int, context: int) -> None:
        """See Contestant. Rows start again from the prompt whenever their number changes."""
        if self._prompt_cache is None:
            self._tokens, self._prompt_cache = self._forward(self._prompt(context), None)
        if self._count != count:
            self._cache = copy.deepcopy(self._prompt_cache)
            self._cache.batch_repeat_interleave(count)
            self._tokens = self._tokens[:1].repeat(count, 1)
            self._count = count

    def steps(self, count: int) -> list[float]:
        """See Contestant."""
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            self._tokens, self._cache = self._forward(self._tokens, self._cache)
            seconds.append(time.perf_counter() - started)
        return seconds

    def drop(self) -> None:
        """See Contestant."""
        self._prompt_cache = self._cache = None
        self._count = 0

    def prefill(self, tokens: int) -> float:
        """See Contestant."""
        ids = self._prompt(tokens)
        started = time.perf_counter()
        self._forward(ids, None)
        return time.perf_counter() - started

    def _prompt(self, tokens: int) -> torch.Tensor:
        self._prompts += 1
        return torch.tensor([rows.prompt(self._module.config.get_text_config().vocab_size, tokens, self._prompts)])

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """The next tokens, int64 [rows, 1], and the cache."""
        if self._module.config._attn_implementation != self._attention:  # noqa: SLF001  has no public name
            self._module.set_attn_implementation(self._attention)
        output = self._module(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1), output.past_key_values

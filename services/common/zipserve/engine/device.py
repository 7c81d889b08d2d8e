"""The one thread that owns device, model and KV cache, and what the event loop may know of it."""

import asyncio
import contextvars
import functools
import secrets
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, ParamSpec, TypeVar

import torch
from pydantic import Field, field_validator
from transformers.utils.logging import disable_progress_bar

from zipserve.common import __version__, log, models
from zipserve.common.guide import Guide
from zipserve.common.guide_matcher import GuideMatcher, GuideTokenizer
from zipserve.common.kv.layout import CODECS, DEFAULT_CODEC, Layout, SlabKind
from zipserve.common.kv.refs import message_of
from zipserve.common.settings import ServiceSettings
from zipserve.common.threads import in_thread
from zipserve.common.transport import ArenaInfo
from zipserve.engine.cache import KvCache
from zipserve.engine.engine import Engine
from zipserve.engine.saturation import measure
from zipserve.engine.startup import Weights, load_ready
from zipserve.v1.worker_service_pb2 import Capabilities, WorkerRole

P = ParamSpec("P")
T = TypeVar("T")
_log = log.get()


class WorkerSettings(ServiceSettings):
    """Settings of a worker with a device."""

    model: str = models.DEFAULT_MODEL
    """Model to serve: a folder, a Hugging Face id, or the default model's name."""
    device: str = "cpu"
    """Torch device."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of weights, activations and unquantized KV."""
    weights: Weights = "checkpoint"
    """How the CPU stores linear layers: as the checkpoint does, which is exact, or as float32, float16, bfloat16 or
    int8. Whatever it is, the CPU computes in float32."""
    codec: str = DEFAULT_CODEC
    """How blocks are coded, the same in the whole cluster: raw, int8, int4, zipcache, zip-4/4, zip-4/3, zip-4/32,
    zip-43/32, zip-4/2 or zip-3/2."""
    block_tokens: int = Field(default=128, ge=16, le=1024, multiple_of=16)
    """Tokens per block; zip codecs need a multiple of 64."""
    kv_blocks: int = Field(default=256, ge=1)
    """Slabs of the block arena."""
    kv_tails: int = Field(default=64, ge=1)
    """Slabs of the tail arena."""
    kv_sinks: int | None = Field(default=None, ge=1)
    """Slabs of the sinks arena, zip codecs only: one for each sequence of a block or more, so that it bounds how many
    are held at once. Unset: as many as kv_tails or sequences_max, whichever is more."""
    sequences_max: int = Field(default=32, ge=1)
    """Most sequences computed in one step."""
    step_tokens: int = Field(default=0, ge=0)
    """Most tokens of prompts computed in one step; longer prompts are computed in chunks. 0: 256, unless it is measured
    at start that 64 or 128 are nearly as fast per token, or 512 is faster."""
    threads: int = Field(default=0, ge=0)
    """CPU threads for tensor operations. 0: one per available core."""
    queue_requests_max: int = Field(default=512, ge=1)
    """Most requests that wait; one more is refused."""
    queue_tokens_max: int = Field(default=1 << 18, ge=1)
    """Most tokens of all waiting requests together; a request beyond is refused."""
    deadline_default_s: float = Field(default=600.0, gt=0.0)
    """Time for a call whose caller sets no deadline, in seconds."""

    @property
    def sinks(self) -> int:
        """Slabs of the sinks arena, as set or by default."""
        return self.kv_sinks or max(self.kv_tails, self.sequences_max)

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, codec: str) -> str:
        if codec not in CODECS:
            raise ValueError(f"codec {codec!r} is unknown; known: {', '.join(CODECS)}")
        return codec


class Device:
    """A loaded model with its KV cache, behind a single thread.

    `engine` and `cache` may be touched by functions given to `run` only; everything else is constant.
    """

    engine: Engine
    cache: KvCache
    layout: Layout
    arenas: list[ArenaInfo]
    step_tokens: int
    """Most tokens of prompts in one step."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self.beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="beside-device")
        """For what goes into a step, and is found out while the device computes."""
        self.incarnation = secrets.randbits(64)

    async def start(self) -> None:
        """Loads and probes the model and allocates the cache.

        Raises:
            InvalidRequestError, ModelNotFoundError: the model cannot be served; the message says why.
        """
        await self.run(self._load)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a function in the device's thread, in the caller's context of log keys and spans. When cancelled, the
        function still runs to its end."""
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        return await loop.run_in_executor(self._thread, functools.partial(context.run, function, *args, **kwargs))

    def close(self) -> None:
        """Waits for the running function and ends the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.beside.shutdown(wait=True, cancel_futures=True)

    async def matchers(
        self, guide: Guide | None, sequences: SequenceOf[SequenceOf[int]], prompt_tokens: int
    ) -> list[GuideMatcher | None]:
        """Follows a guide to the end of each sequence of token ids; all None without a guide.

        Raises:
            InvalidRequestError: see `GuideTokenizer.matcher`.
        """
        if guide is None:
            return [None] * len(sequences)
        follow = self._guides.matcher
        return await in_thread(lambda: [follow(guide, token_ids, prompt_tokens) for token_ids in sequences])

    def slab_view(self, kind: SlabKind, slab: int) -> memoryview:
        """The bytes of a slab in host memory."""
        return self.cache.slab(kind, slab)

    def capabilities(self, role: WorkerRole.ValueType, address: str) -> Capabilities:
        """What this worker is, for the registry."""
        writes = role == WorkerRole.WORKER_ROLE_PREFILL
        return Capabilities(
            worker_id=self._settings.worker_id,
            incarnation=self.incarnation,
            role=role,
            address=address,
            model=self.layout.model,
            model_revision=self.layout.revision,
            context_tokens=self._model.context_tokens,
            vocab_tokens=self._model.vocab_tokens,
            eos_token_ids=self._model.eos_token_ids,
            readable_layouts=[self.layout.fingerprint],
            writable_layout=self.layout.fingerprint if writes else b"",
            layout_description=self.layout.description,
            block_tokens=self.layout.block_tokens,
            version=__version__,
            layout=message_of(self.layout),
            device=self._device_name(),
            threads=self._threads,
            weights=self._settings.weights,
            parameters=self._model.parameters,
            heads=self._model.heads,
            step_tokens=self.step_tokens,
            sequences_max=self._settings.sequences_max,
        )

    def _device_name(self) -> str:
        device = torch.device(self._settings.device)
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    @property
    def context_tokens(self) -> int:
        """Most tokens of a sequence."""
        return self._model.context_tokens

    @property
    def vocab_tokens(self) -> int:
        """Valid token ids lie below this."""
        return self._model.vocab_tokens

    def _load(self) -> None:
        settings = self._settings
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._threads = torch.get_num_threads()
        disable_progress_bar()  # type: ignore[no-untyped-call]
        files = models.resolve(settings.model)
        self._model = load_ready(files, settings.dtype, settings.device, weights=settings.weights)
        self._guides = GuideTokenizer.load(files.folder, self._model.vocab_tokens, self._model.eos_token_ids)
        self.layout = self._model.layout(codec=settings.codec, block_tokens=settings.block_tokens)
        self.cache = KvCache(
            self.layout,
            settings.kv_blocks,
            settings.kv_tails,
            settings.sequences_max,
            settings.sinks,
            settings.device,
        )
        self.engine = Engine(self._model, self.cache)
        memory_type = "DRAM" if settings.device == "cpu" else "VRAM"
        self.arenas = [
            ArenaInfo(kind, arena.data_ptr(), self.layout.slab_bytes(kind), len(arena), memory_type)
            for kind, arena in ((kind, self.cache.arenas.of(kind)) for kind in self.layout.kinds())
        ]
        _log.info("model.loaded", model=files.name, revision=files.revision[:12], layout=self.layout.description)
        self.step_tokens = settings.step_tokens or self._measure()

    def _measure(self) -> int:
        saturation = measure(self.engine)
        rate = saturation.tokens_per_s
        _log.info("step.measured", step_tokens=saturation.step_tokens, tokens_per_s=rate and round(rate, 1))
        return saturation.step_tokens

"""Clients of zipserve's gRPC interface, synchronous and asynchronous. Needs grpcio and protobuf only.

Failures are raised as `zipserve.common.errors`.
"""

from zipserve.client import guides
from zipserve.client.asynchronous import AsyncClient, AsyncStream
from zipserve.client.connection import Tls
from zipserve.client.events import Event
from zipserve.client.requests import Message, Parameters, Prompt, ToolCall
from zipserve.client.retry import Retry
from zipserve.client.synchronous import Client, Stream
from zipserve.v1.inference_service_pb2 import (
    Completion,
    Delta,
    Finished,
    GenerateUnaryResponse,
    Model,
    PromptLogprobs,
    Started,
)
from zipserve.v1.sampling_pb2 import FinishReason, Guide, TokenLogprobs

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Completion",
    "Delta",
    "Event",
    "FinishReason",
    "Finished",
    "GenerateUnaryResponse",
    "Guide",
    "Message",
    "Model",
    "Parameters",
    "Prompt",
    "PromptLogprobs",
    "Retry",
    "Started",
    "Stream",
    "Tls",
    "TokenLogprobs",
    "ToolCall",
    "guides",
]

"""gRPC for every service: error mapping, server bootstrap with drain, channels with deadlines."""

from typing import Any, TypeAlias

import grpc

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
"""The context of a call, whatever its messages."""

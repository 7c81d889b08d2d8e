"""Every error that crosses a service boundary, in one tree.

    ZipserveError
    ├── InvalidRequestError          INVALID_ARGUMENT     the request can never succeed as it is
    ├── UnauthenticatedError         UNAUTHENTICATED      the key is missing or unknown
    ├── ModelNotFoundError           NOT_FOUND
    ├── OverloadedError              RESOURCE_EXHAUSTED   come back after retry_after_s
    ├── SlowReaderError              RESOURCE_EXHAUSTED   the client does not read what is made for it
    ├── DeadlineError                DEADLINE_EXCEEDED
    ├── UnavailableError             UNAVAILABLE
    │   ├── NoWorkerError                                 nobody can serve this now
    │   ├── DrainingError                                 this worker is going away; another one may serve
    │   └── WorkerLostError                               the worker died or cannot be reached
    ├── HandoffError                 ABORTED              KV could not be handed over: prefill again
    │   ├── HandleForgedError        PERMISSION_DENIED    the signature of a handle is wrong
    │   ├── LayoutMismatchError      FAILED_PRECONDITION  the two ends disagree about the bytes of a block
    │   ├── IncarnationError         FAILED_PRECONDITION  the handle is of another life of the worker
    │   ├── LeaseExpiredError        FAILED_PRECONDITION  the right to read has ended
    │   ├── BlockStaleError          DATA_LOSS            the slab was given to another sequence
    │   ├── BlockSwappedError        DATA_LOSS            the slab holds other tokens than it should
    │   ├── BlockCorruptError        DATA_LOSS            the checksum does not match the bytes
    │   └── TransferError            ABORTED              the bytes did not arrive
    ├── KvValueError                 INTERNAL             the model's K or V cannot be stored: not finite, or too large
    └── InternalError                INTERNAL             a defect of ours

Each class has a stable `reason` (UPPER_SNAKE, also the metric label), a gRPC status `code` by name, and says whether
the router may replay the request on other workers. Domain code raises these and knows no gRPC;
`zipserve.common.rpc.status` maps both ways.
"""

from typing import ClassVar


class ZipserveError(Exception):
    """Base of all errors. `message` is for people and names the limit and the value.

    `metadata` are string pairs for machines; they travel in google.rpc.ErrorInfo.
    """

    reason: ClassVar[str] = "UNKNOWN"
    code: ClassVar[str] = "UNKNOWN"
    replayable: ClassVar[bool] = False

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata


class InvalidRequestError(ZipserveError):
    """The request can never succeed as it is. `field` names the offending field."""

    reason = "INVALID_REQUEST"
    code = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str = "", **metadata: str) -> None:
        super().__init__(message, field=field, **metadata)
        self.field = field


class UnauthenticatedError(ZipserveError):
    """The key of a request is missing or unknown."""

    reason = "UNAUTHENTICATED"
    code = "UNAUTHENTICATED"


class ModelNotFoundError(ZipserveError):
    """No such model is served."""

    reason = "MODEL_NOT_FOUND"
    code = "NOT_FOUND"


class OverloadedError(ZipserveError):
    """A queue or pool is full for now; `retry_after_s` says when to come back, in seconds."""

    reason = "OVERLOADED"
    code = "RESOURCE_EXHAUSTED"
    replayable = True

    def __init__(self, message: str, *, retry_after_s: float | str = 1.0, **metadata: str) -> None:
        self.retry_after_s = float(retry_after_s)
        super().__init__(message, retry_after_s=f"{self.retry_after_s:.3f}", **metadata)


class SlowReaderError(ZipserveError):
    """The client did not read what was made for it; all that the request held is free again."""

    reason = "SLOW_READER"
    code = "RESOURCE_EXHAUSTED"


class DeadlineError(ZipserveError):
    """The deadline passed, in a queue or on the way, or it certainly would."""

    reason = "DEADLINE_EXCEEDED"
    code = "DEADLINE_EXCEEDED"


class UnavailableError(ZipserveError):
    """The service cannot take this now; trying again is safe."""

    reason = "UNAVAILABLE"
    code = "UNAVAILABLE"
    replayable = True


class NoWorkerError(UnavailableError):
    """No worker of the needed role and layout is alive."""

    reason = "NO_WORKER"


class DrainingError(UnavailableError):
    """This worker is going away and takes no new work."""

    reason = "DRAINING"


class WorkerLostError(UnavailableError):
    """The worker died or cannot be reached."""

    reason = "WORKER_LOST"


class HandoffError(ZipserveError):
    """KV could not be handed over; computing it again elsewhere may help."""

    reason = "HANDOFF_FAILED"
    code = "ABORTED"
    replayable = True


class HandleForgedError(HandoffError):
    """The signature of a handle does not fit its content."""

    reason = "HANDLE_FORGED"
    code = "PERMISSION_DENIED"


class LayoutMismatchError(HandoffError):
    """The two ends disagree about the bytes of a block."""

    reason = "LAYOUT_MISMATCH"
    code = "FAILED_PRECONDITION"


class IncarnationError(HandoffError):
    """The handle or slab was issued by another life of the worker."""

    reason = "INCARNATION_MISMATCH"
    code = "FAILED_PRECONDITION"


class LeaseExpiredError(HandoffError):
    """The right to read the slabs has ended; what was read must be discarded."""

    reason = "LEASE_EXPIRED"
    code = "FAILED_PRECONDITION"


class BlockStaleError(HandoffError):
    """The slab was freed or given to another sequence since the handle was issued."""

    reason = "BLOCK_STALE"
    code = "DATA_LOSS"


class BlockSwappedError(HandoffError):
    """The slab is whole, but holds other tokens than the handle says."""

    reason = "BLOCK_SWAPPED"
    code = "DATA_LOSS"


class BlockCorruptError(HandoffError):
    """The bytes of the slab do not match its checksum."""

    reason = "BLOCK_CORRUPT"
    code = "DATA_LOSS"


class TransferError(HandoffError):
    """The bytes did not arrive: the peer is gone, or the transport failed."""

    reason = "TRANSFER_FAILED"


class KvValueError(ZipserveError):
    """The model computed a key or value that is not finite, or that the codec cannot hold; nothing of it was kept."""

    reason = "KV_VALUE"
    code = "INTERNAL"


class InternalError(ZipserveError):
    """A defect of ours."""

    reason = "INTERNAL"
    code = "INTERNAL"


def _tree(root: type[ZipserveError]) -> list[type[ZipserveError]]:
    return [root, *(cls for child in root.__subclasses__() for cls in _tree(child))]


BY_REASON: dict[str, type[ZipserveError]] = {cls.reason: cls for cls in _tree(ZipserveError)}
"""Every class of the tree by its reason."""

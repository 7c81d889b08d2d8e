"""KvStoreService: protos to domain and back."""

from collections.abc import Sequence

from zipserve.common.errors import InvalidRequestError
from zipserve.common.kv.handle import LEASE_ID_BYTES
from zipserve.common.kv.prefix import HASH_BYTES
from zipserve.common.rpc import Context
from zipserve.kvstore.directory import Directory
from zipserve.v1 import kv_store_service_pb2, kv_store_service_pb2_grpc

HASHES_MAX = 65_536
FINGERPRINT_BYTES = 32


class KvStoreServicer(kv_store_service_pb2_grpc.KvStoreServiceServicer):
    """What workers call."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def Lookup(
        self, request: kv_store_service_pb2.LookupRequest, context: Context
    ) -> kv_store_service_pb2.LookupResponse:
        run = self._run(request.layout_fingerprint, request.prefix_hashes)
        return kv_store_service_pb2.LookupResponse(blocks=len(run))

    async def Pin(self, request: kv_store_service_pb2.PinRequest, context: Context) -> kv_store_service_pb2.PinResponse:
        run = self._run(request.layout_fingerprint, request.prefix_hashes)
        return kv_store_service_pb2.PinResponse(blocks=len(run))

    async def Release(
        self, request: kv_store_service_pb2.ReleaseRequest, context: Context
    ) -> kv_store_service_pb2.ReleaseResponse:
        if len(request.lease_id) != LEASE_ID_BYTES:
            raise InvalidRequestError(
                f"the lease id has {len(request.lease_id)} bytes, must have {LEASE_ID_BYTES}", field="lease_id"
            )
        return kv_store_service_pb2.ReleaseResponse()

    def _run(self, fingerprint: bytes, prefix_hashes: Sequence[bytes]) -> list[int]:
        if len(fingerprint) != FINGERPRINT_BYTES:
            raise InvalidRequestError(
                f"the fingerprint has {len(fingerprint)} bytes, must have {FINGERPRINT_BYTES}",
                field="layout_fingerprint",
            )
        if len(prefix_hashes) > HASHES_MAX:
            raise InvalidRequestError(
                f"{len(prefix_hashes)} hashes were given, at most {HASHES_MAX}", field="prefix_hashes"
            )
        odd = next((h for h in prefix_hashes if len(h) != HASH_BYTES), None)
        if odd is not None:
            raise InvalidRequestError(f"a hash has {len(odd)} bytes, must have {HASH_BYTES}", field="prefix_hashes")
        return self._directory.longest_run(fingerprint, prefix_hashes)

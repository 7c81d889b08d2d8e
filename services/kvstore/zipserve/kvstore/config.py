"""Settings of the KV store."""

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from zipserve.common.settings import ServiceSettings


class KvStoreSettings(ServiceSettings):
    """`--field value` or `ZIPSERVE_KVSTORE_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix="ZIPSERVE_KVSTORE_")

    memory_bytes: int = Field(default=1 << 29, ge=1 << 12)
    """Host memory for blocks, in bytes; sinks come on top."""
    sinks_min: int = Field(default=64, ge=1)
    """Slabs of the sinks arena, zip codecs only, one for each different beginning of a prompt; a quarter of the blocks
    where that is more."""
    disk_path: str = ""
    """Folder of the disk tier, for this store alone. Empty: none."""
    disk_bytes: int = Field(default=8 << 30, ge=1 << 12)
    """Most bytes of blocks on disk."""
    lease_ttl_s: float = Field(default=10.0, gt=0.0)
    """Time for which blocks that a reader has asked for wait for it without a heartbeat, in seconds."""
    fetch_s: float = Field(default=10.0, gt=0.0)
    """Longest time for fetching blocks from a worker, in seconds."""

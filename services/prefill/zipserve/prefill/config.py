"""Settings of the prefill service."""

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from zipserve.engine.device import WorkerSettings


class PrefillSettings(WorkerSettings):
    """`--field value` or `ZIPSERVE_PREFILL_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix="ZIPSERVE_PREFILL_")

    lease_ttl_s: float = Field(default=10.0, gt=0.0)
    """Time for which finished KV waits for its reader without a heartbeat, in seconds."""
    prefix_blocks_max: int | None = Field(default=None, ge=0)
    """Most blocks that later prompts with the same prefix find, those in use included. They take no slab that a prompt
    needs. 0: none, every prompt is computed fully. Unset: as many as there are slabs."""
    fetch_s: float = Field(default=2.0, ge=0.0)
    """Longest wait for blocks of a prompt that other workers or stores hold, in seconds; what has not come by then is
    computed. 0: they are never asked."""

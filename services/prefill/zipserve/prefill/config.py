"""Settings of the prefill service."""

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from zipserve.engine.device import WorkerSettings


class PrefillSettings(WorkerSettings):
    """`--field value` or `ZIPSERVE_PREFILL_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix="ZIPSERVE_PREFILL_")

    batch_tokens_max: int = Field(default=2048, ge=1)
    """Prompts are computed together up to this many tokens; a longer one is computed alone."""
    lease_ttl_s: float = Field(default=10.0, gt=0.0)
    """Time for which finished KV waits for its reader without a heartbeat, in seconds."""

"""Settings of the decode service."""

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from zipserve.engine.device import WorkerSettings
from zipserve.engine.saturation import STEP_TOKENS_DEFAULT


class DecodeSettings(WorkerSettings):
    """`--field value` or `ZIPSERVE_DECODE_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix="ZIPSERVE_DECODE_")

    # Nothing measures it at start: most decode workers compute no prompts, and those that do pace them.
    step_tokens: int = Field(default=STEP_TOKENS_DEFAULT, ge=0)
    """Most tokens of prompts computed in one step. 0: measured at start, as on a prefill worker."""
    step_slowdown_max: float = Field(default=1.5, gt=1.0)
    """How many times longer a step may take for the prompts that are computed here beside it. They advance by 4 tokens
    all the same."""
    step_free_s: float = Field(default=0.1, ge=0.0)
    """With prompts a step may take so long in any case: nobody reads faster, and prompts wait less."""
    parked_bytes_max: int = Field(default=1 << 30, ge=0)
    """Most host memory for sequences that had to make room for older ones, in bytes; one beyond fails, and is replayed
    elsewhere."""
    lease_ttl_s: float = Field(default=10.0, gt=0.0)
    """Time for which blocks that a reader has asked for wait for it without a heartbeat, in seconds."""
    fetch_s: float = Field(default=2.0, ge=0.0)
    """Longest wait for blocks that other workers or stores hold of a prompt that is computed here, in seconds; what has
    not come by then is computed. 0: they are never asked."""
    prefix_blocks_max: int | None = Field(default=None, ge=0)
    """Most blocks that others find, or later sequences, those in use included. They take no slab that a sequence needs.
    0: none. Unset: as many as there are slabs."""

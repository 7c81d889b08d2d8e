"""Settings of the decode service."""

from pydantic_settings import SettingsConfigDict

from zipserve.engine.device import WorkerSettings


class DecodeSettings(WorkerSettings):
    """`--field value` or `ZIPSERVE_DECODE_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix="ZIPSERVE_DECODE_")

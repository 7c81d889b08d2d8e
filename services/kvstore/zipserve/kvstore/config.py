"""Settings of the KV store."""

from pydantic_settings import SettingsConfigDict

from zipserve.common.settings import ServiceSettings


class KvStoreSettings(ServiceSettings):
    """`--field value` or `ZIPSERVE_KVSTORE_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix="ZIPSERVE_KVSTORE_")

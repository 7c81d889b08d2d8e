"""Settings of the router."""

from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from zipserve.common.models import DEFAULT_MODEL
from zipserve.common.rpc.tls import TlsFiles
from zipserve.common.settings import ServiceSettings


class RouterSettings(ServiceSettings):
    """Settings of the router; see `ServiceSettings` for the shared ones."""

    model_config = SettingsConfigDict(env_prefix="ZIPSERVE_ROUTER_")

    model: str = DEFAULT_MODEL
    """Model to serve: a folder, a Hugging Face id, or the default model's name; the same as the workers'."""
    reflection: bool = True
    """Serve gRPC reflection, so that grpcurl and the like work without the protos."""
    http_listen: str = Field("", pattern=r"^([^\s:]\S*:\d{1,5})?$")
    """host:port of the OpenAI-compatible HTTP API; port 0 takes a free one. Empty: none."""
    http_body_bytes_max: int = Field(4 << 20, ge=1 << 10)
    """Largest body of an HTTP request, in bytes."""
    http_prompts_max: int = Field(128, ge=1)
    """Most prompts of one HTTP request; each is admitted as a request of its own."""
    http_connections_max: int = Field(1024, ge=1)
    """Most HTTP connections; more are answered with 503."""
    keys_file: str = ""
    """File of the API keys that callers must show, see the router's README; read again when it changes. Empty: anybody
    may call."""
    public_tls_cert: str = ""
    """PEM file of the certificate that clients see, over gRPC and HTTP. Empty: they come without TLS. The file may be
    exchanged at any time, as those below."""
    public_tls_key: str = ""
    """PEM file of its key."""
    public_tls_client_ca: str = ""
    """PEM file of the authorities of which clients must have a certificate. Empty: they need none."""
    requests_max: int = Field(256, ge=1)
    """Most requests in flight; more are refused with RESOURCE_EXHAUSTED."""
    queue_tokens_max: int = Field(1 << 19, ge=1)
    """Most tokens of all requests in flight, each counted as prompt plus max_tokens."""
    prompt_tokens_max: int | None = Field(None, ge=1)
    """Longest prompt, in tokens. Unset: what the model's context holds."""
    completion_tokens_max: int = Field(1 << 15, ge=1)
    """Largest max_tokens that a request may ask for."""
    completion_tokens_default: int = Field(1024, ge=1)
    """max_tokens of a request that leaves it unset; less where the model's context ends before."""
    stop_strings_max: int = Field(16, ge=0)
    """Most stop strings of a request."""
    stop_string_chars_max: int = Field(256, ge=1)
    """Longest stop string, in characters."""
    stop_token_ids_max: int = Field(256, ge=0)
    """Most stop token ids of a request."""
    guide_compile_s: float = Field(2.0, gt=0.0)
    """Longest time to compile what a request says of its output (a JSON Schema, a regular expression, a grammar), in
    seconds; one that takes longer is refused."""
    deadline_default_s: float = Field(600.0, gt=0.0)
    """Time for a request whose client sets no deadline, in seconds; at most deadline_max_s."""
    deadline_max_s: float = Field(3600.0, gt=0.0)
    """Longest time for a request, in seconds: its deadline where the client sets a later one."""
    slow_reader_s: float = Field(30.0, gt=0.0)
    """Time after which a request is cancelled whose client reads nothing of what waits for it, in seconds."""
    local_prefill_tokens_max: int = Field(0, ge=-1)
    """A prompt of at most so many tokens is computed on the decode worker, and none of its KV is moved. 0: never. -1:
    always; then no prefill worker is needed."""
    prefix_names_max: int = Field(1 << 16, ge=0)
    """Most blocks of prompts of which it is remembered which prefill workers were sent them, so that prompts that begin
    alike go there. 0: none; then only the directory of blocks and the load decide."""
    fetch_cost: float = Field(0.02, ge=0.0, le=1.0)
    """Time in which a prefill worker fetches a block from somebody else, as a share of the time to compute it."""
    worker_wait_s: float = Field(30.0, ge=0.0)
    """How long a request waits for a pair of workers that can serve it, in seconds."""
    attempts_max: int = Field(8, ge=1)
    """Most attempts of a request in a row that get no further than the prompt; then its last error is returned."""

    @model_validator(mode="after")
    def _public_tls_is_whole(self) -> Self:
        if bool(self.public_tls_cert) != bool(self.public_tls_key):
            raise ValueError("public_tls_cert and public_tls_key belong together: set both, or none")
        if self.public_tls_client_ca and not self.public_tls_cert:
            raise ValueError("public_tls_client_ca needs public_tls_cert and public_tls_key")
        return self

    @property
    def public_tls(self) -> TlsFiles | None:
        """Files of the TLS to clients; None: there is none."""
        if not self.public_tls_cert:
            return None
        return TlsFiles(self.public_tls_cert, self.public_tls_key, self.public_tls_client_ca)

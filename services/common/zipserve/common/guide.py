"""What an output must look like: the domain form of zipserve.v1.Guide, validated. Pure; `guide_matcher` follows it."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from zipserve.common.errors import InvalidRequestError
from zipserve.v1.decode_service_pb2 import DecodeRequest
from zipserve.v1.inference_service_pb2 import GenerateRequest
from zipserve.v1.prefill_service_pb2 import PrefillRequest
from zipserve.v1.sampling_pb2 import Guide as GuideMessage
from zipserve.v1.sampling_pb2 import GuideChoices

Kind: TypeAlias = Literal["json_schema", "json_object", "regex", "choices", "grammar"]

SOURCE_BYTES_MAX = {"json_schema": 64 << 10, "regex": 8 << 10, "choices": 64 << 10, "grammar": 32 << 10}
"""Of a guide's text in UTF-8, by kind; of all choices together."""
CHOICES_MAX = 256


@dataclass(frozen=True)
class Guide:
    """One way to say what an output must look like.

    Raises:
        InvalidRequestError: it is empty, or beyond a limit. Whether it means anything is for `guide_matcher` to say.
    """

    kind: Kind
    source: tuple[str, ...]
    """The schema, the regular expression, or the grammar; all choices; nothing for json_object."""

    def __post_init__(self) -> None:
        if self.kind == "json_object":
            return
        if self.kind == "choices" and not 1 <= len(self.source) <= CHOICES_MAX:
            raise InvalidRequestError(
                f"guide.choices has {len(self.source)} texts, must have 1 to {CHOICES_MAX}", field=self.field
            )
        for i, text in enumerate(self.source):
            if not text:
                field = f"guide.choices.texts[{i}]" if self.kind == "choices" else self.field
                raise InvalidRequestError(f"{field} is empty", field=field)
        size, limit = sum(len(text.encode()) for text in self.source), SOURCE_BYTES_MAX[self.kind]
        if size > limit:
            raise InvalidRequestError(f"{self.field} has {size} bytes, at most {limit} are allowed", field=self.field)

    @property
    def field(self) -> str:
        """Its field in a request."""
        return f"guide.{self.kind}"

    @classmethod
    def of(cls, request: GenerateRequest | PrefillRequest | DecodeRequest) -> "Guide | None":
        """The guide of a request, if it has one.

        Raises:
            InvalidRequestError: it is unset inside, empty, or beyond a limit.
        """
        return cls.from_proto(request.guide) if request.HasField("guide") else None

    @classmethod
    def from_proto(cls, message: GuideMessage) -> "Guide":
        """Reads a message.

        Raises:
            InvalidRequestError: it is unset inside, empty, or beyond a limit.
        """
        match message.WhichOneof("kind"):
            case "json_schema":
                return cls("json_schema", (message.json_schema,))
            case "regex":
                return cls("regex", (message.regex,))
            case "grammar":
                return cls("grammar", (message.grammar,))
            case "choices":
                return cls("choices", tuple(message.choices.texts))
            case "json_object" if message.json_object:
                return cls("json_object", ())
            case "json_object":
                raise InvalidRequestError(
                    "guide.json_object is false, must be true if it is set", field="guide.json_object"
                )
        raise InvalidRequestError(
            "the guide is empty: set json_schema, json_object, regex, choices or grammar", field="guide"
        )

    def to_proto(self) -> GuideMessage:
        """The message."""
        match self.kind:
            case "json_object":
                return GuideMessage(json_object=True)
            case "choices":
                return GuideMessage(choices=GuideChoices(texts=self.source))
            case "json_schema":
                return GuideMessage(json_schema=self.source[0])
            case "regex":
                return GuideMessage(regex=self.source[0])
            case "grammar":
                return GuideMessage(grammar=self.source[0])

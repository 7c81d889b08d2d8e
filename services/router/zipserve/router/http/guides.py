"""What the output must look like: the fields that say so, and the one guide that they make."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from zipserve.common.errors import InvalidRequestError
from zipserve.router.http.fields import Body, dumps
from zipserve.v1.sampling_pb2 import Guide, GuideChoices


def _schema(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (dict, bool)):
        return dumps(value)
    raise ValueError("must be a JSON Schema: an object, or a string of one")


Schema = Annotated[str | None, PlainValidator(_schema)]
"""A JSON Schema as text."""


class JsonSchema(Body):
    """A schema with a name."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Schema = Field(default=None, alias="schema")
    strict: bool | None = None
    """Whatever it says, the schema holds."""


class TextFormat(Body):
    """Anything."""

    type: Literal["text"]


class ObjectFormat(Body):
    """A JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class StructuredOutputs(Body):
    """vLLM's way to say it."""

    json_: Schema = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GuideFields(Body):
    """The fields of a request, of which at most one may be set."""

    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    guided_json: Schema = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None

    def guide(self) -> Guide | None:
        """What they say together.

        Raises:
            InvalidRequestError: more than one is set.
        """
        found = self._guides()
        if len(found) > 1:
            first, second, *_ = found
            raise InvalidRequestError(f"{first} and {second} are set, at most one of them may be", field=second)
        return next(iter(found.values()), None)

    @property
    def guide_field(self) -> str:
        """The name of the one that is set; empty: none is."""
        return next(iter(self._guides()), "")

    def _guides(self) -> dict[str, Guide]:
        texts = self.structured_outputs or StructuredOutputs()
        guides = {
            "response_format": _of_format(self.response_format),
            "guided_json": _of_schema(self.guided_json),
            "guided_regex": _of_regex(self.guided_regex),
            "guided_choice": _of_choices(self.guided_choice),
            "guided_grammar": _of_grammar(self.guided_grammar),
            "structured_outputs.json": _of_schema(texts.json_),
            "structured_outputs.regex": _of_regex(texts.regex),
            "structured_outputs.choice": _of_choices(texts.choice),
            "structured_outputs.grammar": _of_grammar(texts.grammar),
            "structured_outputs.json_object": Guide(json_object=True) if texts.json_object else None,
        }
        return {name: guide for name, guide in guides.items() if guide is not None}


def _of_format(asked: TextFormat | ObjectFormat | SchemaFormat | None) -> Guide | None:
    match asked:
        case ObjectFormat():
            return Guide(json_object=True)
        case SchemaFormat():
            schema = asked.json_schema.json_schema
            return Guide(json_object=True) if schema is None else Guide(json_schema=schema)
        case _:
            return None


def _of_schema(schema: str | None) -> Guide | None:
    return None if schema is None else Guide(json_schema=schema)


def _of_regex(regex: str | None) -> Guide | None:
    return None if regex is None else Guide(regex=regex)


def _of_choices(texts: list[str] | None) -> Guide | None:
    return None if texts is None else Guide(choices=GuideChoices(texts=texts))


def _of_grammar(grammar: str | None) -> Guide | None:
    return None if grammar is None else Guide(grammar=grammar)

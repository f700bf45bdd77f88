"""The base class of the pydantic models that describe graphcomb's JSON files (summary.py, device_results.py)."""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..graph.errors import BadInput

Read = TypeVar("Read", bound=BaseModel)


class Format(BaseModel):
    """A JSON object of a file. Keys that the model does not declare are accepted and kept."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def to_dict(self) -> dict[str, Any]:
        """Return the object as JSON-able values: the fields that were set, under their names in the file."""
        return self.model_dump(by_alias=True, exclude_unset=True)


def says(text: str, **options: Any) -> Any:
    """Declare a field. text is its description in docs/formats.md; options are passed to pydantic's Field."""
    return Field(description=text, **options)


def read(model: type[Read], values: Any, where: str) -> Read:
    """Validate JSON values and return them as an instance of the model. where: the file, for the message.

    Raises BadInput, which names the file and the first invalid field.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BadInput(
            f"{where}: {place}: {first['msg'].removeprefix('Input ')}, got {first['input']!r:.60}"
        ) from error

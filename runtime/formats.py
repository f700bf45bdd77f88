"""What the models of graphcomb's JSON files (summary.py, device_results.py) have in common."""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..graph.errors import BadInput

Read = TypeVar("Read", bound=BaseModel)


class Format(BaseModel):
    """Base of the models: fields that a model does not name are allowed, and kept."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able form: what was set, under the names that the file has."""
        return self.model_dump(by_alias=True, exclude_unset=True)


def says(text: str, **options: Any) -> Any:
    """Declare a field with what it means; options are those of pydantic's Field."""
    return Field(description=text, **options)


def read(model: type[Read], values: Any, where: str) -> Read:
    """Check values and return them as a model. Raises BadInput that names the file and the first field that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BadInput(
            f"{where}: {place}: {first['msg'].removeprefix('Input ')}, got {first['input']!r:.60}"
        ) from error

"""Fill in the templates of the HTML pages in this folder."""

from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import jinja2


def fill(name: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """Return the page of the template `name` as HTML text. Values are escaped; templates may include each other."""
    folder = resources.files(__package__)
    loader = jinja2.FunctionLoader(lambda file: folder.joinpath(file).read_text(encoding="utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters
    return environment.get_template(name).render(**values)

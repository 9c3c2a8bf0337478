"""Pages of HTML from templates, in which all inserted text is escaped."""

from __future__ import annotations

from pathlib import Path

from utils.errors import UserError
from utils.text import visible


def render(template: Path, **values: object) -> str:
    """A page. Control characters and unpaired surrogates are shown by their numbers.

    Raises UserError if jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install -r requirements.txt") from None
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: value if hasattr(value, "__html__") else visible(value),
    )  # fmt: skip
    return environment.get_template(template.name).render(values)

"""docs/api.md lists every public name as it is; ``python tests/test_public_api.py`` writes the page anew.

A change of a name or a signature shows up as a difference of that page.
"""

import inspect
import os
from pathlib import Path

import pytest

import vbcompile

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
HEAD = """# Public names of vbcompile

Made from the code by `python tests/test_public_api.py`; a test holds the page to it. Other pages name a few more
(checkpoints, counters, kernels, passes); everything else is internal.
"""


def page() -> str:
    rows = [f"\n## `{heading(name)}`\n\n{summary(name)}" for name in vbcompile.__all__ if name != "__version__"]
    return HEAD + "\n".join(rows) + "\n"


def heading(name: str) -> str:
    value = getattr(vbcompile, name)
    if inspect.isclass(value) and issubclass(value, BaseException):
        return f"vbcompile.{name}"
    return f"vbcompile.{name}{signature(value)}"


def signature(value: object) -> str:
    """Names, kinds and defaults of parameters, without annotations, whose text depends on the Python release."""
    found = inspect.signature(value)
    plain = [p.replace(annotation=inspect.Parameter.empty, default=default(p)) for p in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def default(parameter: inspect.Parameter) -> object:
    """The default, or a name for one whose text depends on the machine."""
    return _Named("os.environ") if parameter.default is os.environ else parameter.default


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def summary(name: str) -> str:
    """First paragraph of the docstring."""
    text = inspect.getdoc(getattr(vbcompile, name)) or ""
    return " ".join(text.partition("\n\n")[0].replace("``", "`").split())


def test_the_page_shows_the_names_and_signatures_of_today():
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("name", [n for n in vbcompile.__all__ if n != "__version__"])
def test_every_public_name_is_documented(name):
    assert len(summary(name)) > 15


if __name__ == "__main__":
    PAGE.write_text(page())

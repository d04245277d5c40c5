"""Which of a kernel's forms every run compiles, and which ``make test-all`` adds."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def forms(every: Iterable[tuple[Any, ...]], always: Callable[..., bool]) -> list[Any]:
    """Parameters of a test; those that ``always`` does not name are marked ``matrix``."""
    return [pytest.param(*form, marks=() if always(*form) else pytest.mark.matrix) for form in every]

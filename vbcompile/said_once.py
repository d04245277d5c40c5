"""What a process says once, however often it comes up."""

from collections.abc import Hashable

_said: set[Hashable] = set()


def is_first(message: Hashable) -> bool:
    """Whether nobody has asked this of a message, or of what stands for one, in this process."""
    first = message not in _said
    _said.add(message)
    return first

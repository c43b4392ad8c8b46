"""Assignments: how many there were so far to attributes of a class's objects.

What only assignments can change (the layers of a cache, parameters that live packed) is what it was
as long as nobody made one: one number to compare at each call, however many objects there are.

Thread-safe under the interpreter lock. Tested by tests/python/test_packed.py,
test_conversations.py.
"""

from __future__ import annotations

from typing import Any, ClassVar


class Assignments:
    """How many there were."""

    def __init__(self) -> None:
        self.made = 0


class CountsAssignments:
    """A base, before others, of classes whose objects' assignments are counted."""

    __slots__ = ()
    assignments: ClassVar[Assignments]

    def __setattr__(self, name: str, value: Any) -> None:
        counted = self.assignments
        super().__setattr__(name, value)  # it may become one of another class
        counted.made += 1  # afterwards: who counts meanwhile may still see what was

"""The examples in the docstrings of the lessons' modules hold."""

import doctest
import importlib
import pkgutil

import lessons


def test_examples_in_docstrings_hold():
    names = [found.name for found in pkgutil.walk_packages(lessons.__path__, "lessons.")]
    results = {name: doctest.testmod(importlib.import_module(name)) for name in names}
    assert not [name for name, result in results.items() if result.failed]
    assert sum(result.attempted for result in results.values()) > 5

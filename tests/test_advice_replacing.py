"""replaced(): another value for an attribute, inherited or own, of a class or of an object; and it comes back."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest

from effkit.advice.step_hooks import replaced


class Base:
    word = "inherited"


class Derived(Base):
    own = "own"


@pytest.mark.parametrize("owner", [Derived, Derived()])
@pytest.mark.parametrize("fails", [False, True])
def test_inherited_attributes_are_uncovered_again(owner, fails):
    with suppress(KeyError), replaced(owner, "word", "other"):
        assert owner.word == "other"
        assert Base.word == "inherited"
        if fails:
            raise KeyError
    assert owner.word == "inherited"
    assert "word" not in vars(owner)


@pytest.mark.parametrize("owner", [Derived, SimpleNamespace(own="own")])
def test_own_attributes_come_back(owner):
    with replaced(owner, "own", None):
        assert owner.own is None
    assert vars(owner)["own"] == "own"

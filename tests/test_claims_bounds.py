"""Study.claims(): how much each published idea could give at most, from the shares of one's own account."""

import importlib
import re

import pandas as pd
import pytest

import effkit as ek
from effkit.account import Account
from effkit.activations.timeline import CATEGORIES
from effkit.advice import families
from effkit.advice.overviews import NO_CEILINGS, Overview
from effkit.advice.studies import StudyOnFile
from effkit.claims import ceilings
from effkit.claims.bounds import NOTHING, STEPS, UNSEEN
from effkit.claims.table import rows
from effkit.decoder.accounting import ROWS as OF_A_GENERATION


def account(unit, rows):
    return Account.of("All of it", unit, rows, total=1000, source="this test")


def study_of(*accounts):
    return StudyOnFile("a step", Overview(accounts, NO_CEILINGS, (), ()), [], [])


def test_a_share_of_time_bounds_the_speed_and_a_share_of_memory_what_is_saved():
    table = study_of(
        account("ns", {"padding": 620, "matrix products": 200, "optimizer": 4}),
        account("bytes", {"saved activation": 630}),
    ).claims()
    papers = ["Canary-1B", "SPDF", "Mesa", "Deep Optimizer States", "LSH-MoE", "Conda"]
    at_most = ["2.63 times the speed", "1.25 times the speed", "63% less memory", NOTHING, UNSEEN, STEPS]
    assert table.loc[papers, "at_most"].tolist() == at_most
    assert table.at["Canary-1B", "share_frac"] == 0.62
    assert pd.isna(table.at["LSH-MoE", "share_frac"])


def test_what_could_give_most_stands_first_and_nothing_is_left_out():
    table = ceilings([account("ns", {"padding": 620, "optimizer": 4}), account("bytes", {"saved activation": 630})])
    told = table["at_most"].tolist()
    assert len(told) == len(ek.claims())
    assert told.index("63% less memory") < told.index("2.63 times the speed") < told.index(NOTHING) < told.index(UNSEEN)
    assert told[told.index(STEPS) :] == [STEPS] * told.count(STEPS)


def test_several_rows_that_an_idea_makes_cheaper_are_added():
    table = ceilings([account("ns", {"self-attention": 300, "feed-forward": 200, "encoder": 100})])
    assert table.at["SortedNet", "at_most"] == "2 times the speed"


def test_without_any_account_nothing_is_claimed():
    assert set(ceilings([])["at_most"]) == {UNSEEN, STEPS}


def test_every_bound_is_a_row_that_a_study_can_have():
    known = {*families.ROWS, *CATEGORIES, *OF_A_GENERATION}
    named = {item for row in rows().values() if row.bounded_by for item in row.bounded_by.split("; ")}
    assert named
    assert named <= known


@pytest.mark.parametrize("paper", [row.paper for row in rows().values() if row.lever])
def test_every_lever_can_be_called_by_the_name_it_is_given(paper):
    path = re.match(r"[\w.]+", rows()[paper].lever)[0].split(".")
    if path[0] in ("lessons", "torch"):
        assert path[0] == "torch" or importlib.import_module(".".join(path))
    else:
        assert callable(getattr(getattr(ek, path[0]), path[1]))


def test_what_has_a_bound_says_of_whom_and_for_what_price():
    for row in rows().values():
        assert bool(row.bounded_by) == bool(row.applies_if) == bool(row.price), row.paper

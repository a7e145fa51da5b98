"""GPU runs that others published, forecast without a GPU: the stored rows hold their bars, and are what is forecast."""

import importlib
import json
import statistics
import sys
from pathlib import Path

import pandas as pd
import pytest

from effkit.receipt import LEDGER_COLUMNS

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
ledger_recorded, ledger_rows = (importlib.import_module(name) for name in ("ledger_recorded", "ledger_rows"))
ROWS = pd.read_csv(ledger_rows.RECORDED)


def test_every_row_says_what_was_measured_on_what_by_whom():
    assert tuple(ROWS.columns) == LEDGER_COLUMNS
    assert len(ROWS) >= 30
    for text in ROWS["provenance"]:
        facts = json.loads(text)
        assert {"device", "torch", "counter", "source", "file", "recorded"} <= facts.keys()
        assert all(facts.values())


def test_the_stored_forecasts_hold_their_bars():
    errors = ROWS["predicted"] / ROWS["measured"] - 1
    assert errors.tolist() == pytest.approx(ROWS["error"].tolist(), abs=1e-6)
    known = errors[~ROWS["model"].str.contains(ledger_recorded.OWN_CODE)]
    assert len(known) >= 26
    assert statistics.median(known.abs()) <= ledger_recorded.MEDIAN_FRAC
    assert known.abs().max() <= ledger_recorded.WORST_FRAC
    assert known.min() >= ledger_recorded.LEAST_FRAC
    assert ROWS["measured"].between(ROWS["low"], ROWS["high"]).all()


def test_a_stored_forecast_is_what_is_forecast():
    """The smallest of each kind; ``make ledger LAB=recorded`` forecasts them all."""
    smallest = ROWS[ROWS["model"] == "decoder medium"].drop_duplicates("knob")
    assert set(smallest["knob"]) == {"training step", "forward pass"}
    for row in smallest.itertuples():
        account = ledger_recorded.forecast(json.loads(row.setting))
        assert ledger_recorded.counted(account, row.quantity).total == row.predicted


def test_the_table_names_gpu_counter_and_source_of_every_row():
    head, _, _, _, *table, last = ledger_rows.published(ROWS)
    assert head.startswith("GPU runs that others published")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert sum(int(row[3]) for row in cells) == len(ROWS)
    facts = {tuple(json.loads(text)[name] for name in ("device", "counter", "source")) for text in ROWS["provenance"]}
    assert {tuple(row[:3]) for row in cells} == facts
    worst = ROWS["error"].max()
    assert f"{worst:+.2%}" in last

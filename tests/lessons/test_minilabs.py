"""Stored seeds of the mini-labs: whole, as the table of claims says, with their intervals; and one that is run now."""

import importlib
import math
import re
import sys
from pathlib import Path

import pandas as pd
import pytest

from effkit.claims import check
from effkit.claims.table import rows
from lessons import meter, minilabs
from lessons.minilabs import Arm, Interval, MiniLab
from lessons.tokens.labs import LOOP_TOOL

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "data"))
recorded = importlib.import_module("recorded_minilabs")
STORED = minilabs.stored_rows()

pytestmark = pytest.mark.usefixtures("one_thread")


def test_intervals_are_students():
    found = Interval.of([1, 2, 3, 4, 5], ratios=False)
    half, one = 2.776 * math.sqrt(2.5 / 5), 2.776 * math.sqrt(2.5 + 2.5 / 5)
    assert found[:3] == pytest.approx((3, 3 - half, 3 + half))
    assert found[3:] == pytest.approx((3 - one, 3 + one))


def test_intervals_of_ratios_turn_over_with_the_ratio():
    values = [0.8, 1.1, 0.9, 1.3, 1.0]
    mean, low, high, run_low, run_high = Interval.of(values, ratios=True)
    turned = Interval.of([1 / value for value in values], ratios=True)
    assert turned == pytest.approx((1 / mean, 1 / high, 1 / low, 1 / run_high, 1 / run_low))
    with pytest.raises(ValueError, match="4 seeds, expected 5 to 8"):
        Interval.of(values[:4], ratios=True)


def test_every_lab_has_all_seeds_of_every_arm_with_date_machine_and_commit():
    assert list(STORED.columns) == list(minilabs.COLUMNS)
    assert list(dict.fromkeys(STORED["lab"])) == list(recorded.LABS)
    seeds = STORED.groupby(["lab", "arm"])["seed"].agg(list)
    assert all(found == list(minilabs.SEEDS) for found in seeds)
    assert minilabs.LIVE not in minilabs.SEEDS
    filled = STORED[["figure", "steps", "date", "machine", "commit"]]
    assert filled.notna().all(axis=None)
    assert (STORED["steps"] > 0).all()
    assert STORED["date"].str.fullmatch(r"\d{4}-\d\d-\d\d").all()
    assert STORED.groupby("lab")[["date", "commit", "unit"]].nunique(dropna=False).max(axis=None) == 1


def test_times_are_stored_from_several_conditions_of_one_machine_and_all_else_from_one():
    machines = STORED.groupby("lab")["machine"].unique()
    for name, lab in recorded.LABS.items():
        devices, conditions = zip(*(machine.rsplit(", ", 1) for machine in machines[name]), strict=True)
        assert len(set(devices)) == 1, name
        assert sorted(conditions) == sorted(recorded.CONDITIONS if lab.clocked else ["one thread"]), name
    bus = recorded.LABS["BUS"]
    assert bus.clocked
    assert minilabs.stored_on("BUS")[1].endswith(f", {len(recorded.CONDITIONS)} conditions")
    assert rows()["BUS"].stored_machine == minilabs.stored_on("BUS")[1]


def test_what_varies_has_stored_seeds():
    assert [row.paper for row in rows().values() if row.varies and not row.stored_seeds > 0] == []


def test_the_table_of_claims_says_what_is_stored():
    of_labs = {paper: lab for lab in recorded.LABS.values() for paper in lab.claims}
    assert {row.paper for row in rows().values() if row.stored_seeds > 0} == set(of_labs)
    for paper, lab in of_labs.items():
        row = rows()[paper]
        said = {name: value if isinstance(value, str) else f"{value:.3g}" for name, value in vars(row).items()}
        made = recorded.figures_of(lab, paper)
        assert {name: said[name] for name in made} == made, paper


def test_writing_the_claims_again_changes_no_byte(tmp_path, monkeypatch):
    before = recorded.CLAIMS.read_bytes()
    (tmp_path / "claims.csv").write_bytes(before)
    monkeypatch.setattr(recorded, "CLAIMS", tmp_path / "claims.csv")
    recorded.write_claims()
    assert (tmp_path / "claims.csv").read_bytes() == before


def test_a_lab_that_is_recorded_again_replaces_its_own_rows_alone(tmp_path, monkeypatch):
    for name in ("minilabs.csv", "claims.csv"):
        (tmp_path / name).write_bytes((REPO / "data" / name).read_bytes())
    monkeypatch.setattr(recorded, "STORED", tmp_path / "minilabs.csv")
    monkeypatch.setattr(recorded, "CLAIMS", tmp_path / "claims.csv")
    monkeypatch.setattr(recorded, "write_claims", lambda: None)
    name = LOOP_TOOL.name
    other = MiniLab(name, "f", "labels", lambda seed: seed, lambda seed: {"uniform": Arm(float(seed), 1)}, {})
    monkeypatch.setitem(recorded.LABS, name, other)
    monkeypatch.setattr(recorded, "everything", lambda: True)
    recorded.record(name)
    after = pd.read_csv(tmp_path / "minilabs.csv", dtype={"commit": str})
    own = after["lab"] == name
    assert after[own]["figure"].tolist() == list(minilabs.SEEDS)
    monkeypatch.setattr(recorded, "everything", lambda: False)
    recorded.record(name)
    assert pd.read_csv(tmp_path / "minilabs.csv", dtype={"commit": str}).equals(after), "nothing is missing"
    kept = STORED[STORED["lab"] != name].reset_index(drop=True)
    pd.testing.assert_frame_equal(after[~own].reset_index(drop=True), kept, check_dtype=False)
    assert list(dict.fromkeys(after["lab"])) == list(recorded.LABS)


def test_of_times_a_condition_runs_the_seeds_whose_turn_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "STORED", tmp_path / "minilabs.csv")
    monkeypatch.setattr(recorded, "write_claims", lambda: None)
    lab = MiniLab("BUS", "f", "ns", lambda seed: seed, lambda seed: {"a": Arm(float(seed), 1)}, {}, clocked=True)
    monkeypatch.setitem(recorded.LABS, "BUS", lab)
    for condition in ("AVX2", "one thread"):
        monkeypatch.setattr(recorded, "condition", lambda condition=condition: condition)
        recorded.record("BUS")
    found = pd.read_csv(tmp_path / "minilabs.csv")
    assert found["seed"].tolist() == [0, 2, 5, 7]
    assert [machine.rsplit(", ", 1)[1] for machine in found["machine"]] == ["one thread", "AVX2"] * 2
    assert recorded.to_run("BUS", "SSE4.1", again=False) == [3]
    assert recorded.to_run("BUS", "AVX2", again=False) == [], "no process is started for what is stored"
    assert recorded.to_run("BUS", "AVX2", again=True) == [2, 7]
    assert recorded.to_run(LOOP_TOOL.name, "AVX2", again=True) == []


def test_a_stored_seed_that_is_run_again_lies_where_its_kind_does():
    """To the digit on the machine that recorded it; another one rounds otherwise."""
    arms, stored = LOOP_TOOL.arms(LOOP_TOOL.run(0)), LOOP_TOOL.stored()
    assert set(arms) == set(stored)
    for name, arm in arms.items():
        found = Interval.of(stored[name], ratios=False)
        assert found.run_low <= arm.figure <= found.run_high, name


def test_what_a_cell_prints_has_both_by_their_names():
    lab = next(lab for lab in recorded.LABS.values() if lab.name == "Conda")
    made = {"AdamW": Arm(85.0, 85), "Muon": Arm(60.0, 60), "Conda": Arm(70.0, 70)}
    shown = MiniLab(lab.name, lab.figure, lab.unit, lab.run, lambda _: made, lab.claims)
    head, *lines = shown.beside(None).splitlines()
    assert re.fullmatch(r"steps to .+; stored: seeds 0 to 7 \(\d{4}-\d\d-\d\d, .+\)", head)
    assert [line.split()[0] for line in lines] == list(made)
    assert lines[0].endswith(f"; live, seed {minilabs.LIVE}: ≈85")
    assert shown.claim("Conda", None) == pytest.approx(85 / 70)
    run_now = MiniLab(lab.name, lab.figure, lab.unit, lambda seed: seed, lambda seed: made, lab.claims)
    assert run_now.row("Conda") == f"{shown.beside(None)}\n{check('Conda', 85 / 70)}\n"


class Falling:
    """A loss of 3 that falls by 1 a step; the first step is of another phase."""

    num_tokens = 10

    def __init__(self, seed):
        self.done = 0

    @property
    def phase(self):
        return "later" if self.done else "first"

    def step(self):
        self.done += 1

    def loss(self):
        return 3 - self.done


def test_arms_without_a_phase_are_the_rest_of_it():
    lab = minilabs.to_target("a", "b", lambda: {"all": Falling}, 0, {"P": ("all", "rest")}, every=1,
                             without={"rest": ("all", "first")})  # fmt: skip
    ways = lab.run(0)
    assert isinstance(ways["all"], meter.ToTarget)
    assert lab.arms(ways) == {"all": Arm(3, 3), "rest": Arm(2, 2)}
    assert lab.claim("P", ways) == 1.5
    with pytest.raises(ValueError, match=r"no run of 'a' is stored: python data/record\.py minilabs 'a'"):
        lab.stored()


def test_without_its_data_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(minilabs, "PATHS", (tmp_path / "minilabs.csv",))
    minilabs.stored_rows.cache_clear()
    with pytest.raises(FileNotFoundError, match="no runs are stored"):
        minilabs.stored_rows()
    monkeypatch.undo()
    minilabs.stored_rows.cache_clear()

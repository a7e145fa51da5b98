"""Every prediction of the ledger's held-out settings, and every account of the recorded captures, to the integer.

A net under changes that should move no figure. ``figures/<lab>.json.gz`` holds calibrations that were measured once,
and what was then predicted from them at each setting; ``figures/captures.json.gz``, what was said of each recording.
Nothing is timed and nothing fitted here, so that the machine does not matter. Recordings of others are looked at where
they lie beside the project (see test_recorded_by_others).

The activation lab replays whole steps, for two minutes and more in all: unless ``EFFKIT_WHOLE_GRID=1`` is set, settings
that take the most replays are left out.

Where a class or a field has another name now: change it in ``NAMES`` or ``RENAMED``, and leave the stored data alone.
``NAMES`` may also name a function that makes the new thing of the old fields. Where figures move on purpose, record
them anew, and say in the commit which and why::

    PYTHONPATH=notebooks python tests/test_unchanged_figures.py --record [padding activations moe decoder captures]

A lab named alone is measured anew; ``--figures`` in place of ``--record`` keeps the stored calibrations, and stores
what is predicted from them now.
"""

import gzip
import importlib
import json
import math
import os
import sys
import zlib
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from plain_data import decode, encode

import effkit as ek
from effkit import activations, decoder, moe, padding
from lessons import small_models, spiking

LABS = {"padding": padding, "activations": activations, "moe": moe, "decoder": decoder}
NAMES = {  # tag in the stored data -> module of effkit, and class
    "account": "account Account",
    "padding": "padding.calibration Calibration", "plan": "padding.plans Plan",
    "padding cost": "padding.calibration CostModel", "padding memory": "padding.calibration MemoryModel",
    "activations": "activations.live Calibration", "clock": "activations.time_model Clock",
    "hull": "lab Hull", "workspace": "activations.op_workspace Workspace",
    "signature": "activations.timeline Signature",
    "moe": "moe.calibration Calibration", "moe costs": "moe.costs Costs", "handing": "moe.costs Handing",
    "moe setting": "moe.setting Setting", "moe step": "moe.recorded Step", "of rank": "moe.recorded OfRank",
    "call": "moe.recorded Call",
    "decoder": "decoder.calibration Calibration", "decoder setting": "decoder.setting Setting",
    "decoder run": "decoder.costs Run", "decoder costs": "decoder.costs Costs", "step cost": "decoder.costs StepCost",
    "bulk cost": "decoder.costs BulkCost", "decoder memory": "decoder.memory Memory",
    "step size": "decoder.memory StepSize", "lattice": "decoder.costs Lattice",
    "product cost": "decoder.product_costs ProductCost",
}  # fmt: skip
RENAMED: dict[str, str] = {}  # "tag.field as stored" -> field now
FORECASTER, WORKSPACE = "forecaster", "workspace"  # of the activation lab's calibration, and of its forecaster

HERE = Path(__file__).resolve().parent
OWN = HERE.parent / "data" / "captures"
RECORDED = Path(os.environ.get("EFFKIT_RECORDED", HERE.parents[1] / "shared" / "data"))
WHOLE = bool(os.environ.get("EFFKIT_WHOLE_GRID"))
OTHERS = (
    "traces/dlrm_4_of_8_ranks", "traces/h100/Qwen_Qwen1.5-0.5B-Chat__1016005.json.gz",
    "traces/hta/rank-34.Jul_15_10_52_41.1074.pt.trace.json.gz", "traces/hta/sampled_rank-0.json.gz",
    "traces/resnet50/worker0.1623143089861.pt.trace.json.gz", "traces/sglang_qwen3_8b/sglang_Qwen3-8B_decode.json.gz",
    "snapshots/mem_snapshot.pickle", "snapshots/memory_forward_fp32_128.pickle",
)  # fmt: skip
VERSIONS = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = {tag: getattr(importlib.import_module(f"effkit.{where.split()[0]}"), where.split()[1])
           for tag, where in NAMES.items()}  # fmt: skip


def stored(name):
    path = HERE / "figures" / f"{name}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes())) if path.exists() else {}


def figures(account):
    """Item -> what an Account says of it, companions included."""
    rows = account.frame["value"].to_dict()
    found = {name: getattr(account, name) for name in ("title", "unit", "total", "low", "high", "in_range")}
    found |= {"rows": list(rows), "basis": list(account.frame["basis"])}
    found |= {f"row {item}": int(value) for item, value in rows.items()}
    for number, one in enumerate(account.companions):
        found |= {f"companion {number}, {item}": value for item, value in figures(one).items()}
    return found


def figures_of_frame(frame):
    """Sums of its numbers, which say what moved, and a checksum of all cells, which misses nothing."""
    numbers = frame.select_dtypes("number")
    sums = {f"sum of {name}": float(f"{math.fsum(column.dropna()):.9g}") for name, column in numbers.items()}
    cells = zlib.crc32(frame.to_csv(float_format="%.9g").encode())
    return {"columns": [str(name) for name in frame], "num_rows": len(frame), **sums, "cells": cells}


def built(model):
    """The model of ``[name, configuration]``; on the CPU, for replays depend on where it is."""
    name, configuration = model
    knobs = {**configuration, "device": "cpu"}
    return spiking.build(**knobs) if name == "spiking" else small_models.build(name, **knobs)


def not_stored(model, usual):
    """Fields that are made anew from the model, ``tag -> field -> value``, or that no prediction reads."""
    if model is None:
        return {"plan": {"planner": None}}
    if usual is None:
        memory = {"kind": type(model), "config": model.config, "_counted": {}}
        return {"decoder memory": memory, "decoder run": {"watched": ()}}
    forecaster = activations.forecasting.Forecaster(model, model.random_batch(*usual))
    return {"activations": {FORECASTER: forecaster, "observed": None}}


def rebuilt(one):
    """The measured account again."""
    model = built(one["model"]) if one["model"] else None
    given = not_stored(model, one["usual"])
    if one["workspace"]:
        setattr(given["activations"][FORECASTER], WORKSPACE, decode(one["workspace"], CLASSES, RENAMED, {}))
    return decode(one["base"], CLASSES, RENAMED, given)


def predictions(lab, one, whole=True):
    """Setting, figures as stored, figures now."""
    base = rebuilt(one)
    for text, before in one["predictions"]:
        setting = decode(json.loads(text), CLASSES, RENAMED, {})
        if whole or lab != "activations" or quick(one["model"][0], setting):
            yield setting, before, figures(LABS[lab].predict(base, **setting))


def quick(name, setting):
    """Whether few replays say it: of one model nearly all, of the others each lever alone."""
    if name == "gpt":
        return "batch_size" not in setting or not {"micro_batches", "compress"} & set(setting)
    return "batch_size" not in setting and len(set(setting) - {"group"}) == 1


def forecasts(one):
    """The same of peaks of which nothing was run; without the steps that would be, for libraries' memory differs."""
    model = built(one["model"])
    example = model.random_batch(*one["usual"])

    def make_batch(*size):
        return model.random_batch(*(number for number in size if number is not None))

    for text, before in one["forecasts"]:
        size = json.loads(text)
        now = activations.forecast(model, example, make_batch=make_batch, calibrate=False, **size)
        yield size, before, figures(now)


def compared(compared_figures, where=""):
    """A line for each (setting, item, stored, now) that differs."""
    return [
        f"{where} {setting}: {item}: stored {before.get(item, 'absent')}, now {now.get(item, 'absent')}"
        for setting, before, now in compared_figures
        for item in dict.fromkeys([*before, *now])
        if item not in before or item not in now or before[item] != now[item]
    ]


def told(lines):
    return f"{len(lines)} figures moved:\n" + "\n".join(lines[:60])


@pytest.mark.parametrize("lab", LABS)
def test_predictions(lab):
    kept = stored(lab)
    if lab == "activations" and kept["versions"] != VERSIONS:
        pytest.skip(f"other versions replay other operators: stored with {kept['versions']}, here {VERSIONS}")
    lines = []
    for name, one in kept["bases"].items():
        lines += compared(predictions(lab, one, WHOLE), name)
    for one in kept.get("forecasts", ()):
        if not WHOLE and one["model"][0] == "speech":  # slow, and among the predictions
            continue
        lines += compared(forecasts(one), f"forecast of {one['model']}")
    assert not lines, told(lines)


def panes(path):
    """Pane or account -> its figures."""
    seen = ek.load(path)
    study = ek.study(**{"snapshot" if path.suffix == ".pickle" else "trace": path})
    asked = {name: getattr(seen, name) for name in (
        "steps", "overview", "operators", "kernels", "collectives", "communication", "clocks", "rank_pairs", "memory",
        "memory_timeline",
    )}  # fmt: skip
    asked |= {f"{name}.account": lambda lab=lab: lab.account(seen) for name, lab in LABS.items()}
    asked |= {"memory by stack": lambda: seen.memory(by="stack")}
    for name, ask in asked.items():
        try:
            found = ask() if callable(ask) else ask
        except (ValueError, TypeError) as refused:
            yield name, {"refused": type(refused).__name__}
            continue
        yield name, figures(found) if isinstance(found, ek.Account) else figures_of_frame(pd.DataFrame(found))
    overview, advice = study.overview(), study.advise()
    for number, account in enumerate(overview.accounts):
        yield f"overview {number}", figures(account)
    yield "ceilings", figures_of_frame(overview.ceilings)
    for number, lever in enumerate([*advice, *advice.rejected]):
        yield f"advice {number}", {"kind": lever.kind, "title": lever.name} | figures(lever.predicted)


@pytest.mark.parametrize("name", stored("captures"))
def test_recordings(name):
    path = OWN / name if (OWN / name).exists() else RECORDED / name
    if not path.exists():
        pytest.skip(f"no {name} in {RECORDED}: set EFFKIT_RECORDED")
    before, now = stored("captures")[name], dict(panes(path))
    lines = compared((pane, before.get(pane, {}), now.get(pane, {})) for pane in dict.fromkeys([*before, *now]))
    assert not lines, told(lines)


# Recording: measures, and writes tests/figures.


def bases(lab):
    """Name, [model's name and configuration] or None, size of the example or None, base, settings: as the ledger's."""
    torch.set_num_threads(1)
    grid = importlib.import_module(f"ledger_{lab}")
    if lab == "padding":
        plan = padding.plan(grid.spoken(256), grid.BASE["strategy"], batch_size=grid.BASE["batch_size"])
        yield "speech", None, None, padding.measure(plan, ek.models.speech(), num_batches=8), grid.HELD_OUT
    elif lab == "moe":
        link, levers = grid.LINK_BYTES_PER_S, ("lsh", "bfloat16")
        settings = [*grid.HELD_OUT, *({"num_chunks": degree} for degree in grid.DEGREES)]
        yield "plain", None, None, moe.measure(link_bytes_per_s=link), settings
        alike = moe.measure(num_clusters=64, link_bytes_per_s=link, levers=levers)
        yield "alike", None, None, alike, grid.COMPRESSED
    elif lab == "decoder":
        deep = dict.fromkeys(("encoder_layers", "decoder_layers"), 24)
        moved = ({"encoder_layers": 32, "decoder_layers": 4}, {"decoder_layers": 4, "hold_parameters": "on"})
        for name, configuration, length, settings in (
            ("speech", {"encoder_layers": 8, "decoder_layers": 8, "hidden": 256, "heads": 4}, 400,
             grid.SPEECH + grid.LEVERS),
            ("text", {"layers": 8, "hidden": 256}, 64, grid.TEXT),
            ("speech", deep | {"hidden": 128}, 400, moved),
        ):  # fmt: skip
            model = [name, configuration]
            base = decoder.measure(built(model), num_steps=60, input_length=length)
            yield f"{name} {configuration}", model, None, base, settings
    else:
        for name, ((configuration, usual), _) in grid.MODELS.items():
            model = built([name, configuration])
            base = activations.measure(model, model.random_batch(*usual), time_levers=True, repeats=3)
            held_out = [setting | grid._sized(setting, usual) for group in grid.HELD_OUT.values() for setting in group]
            held_out = [{k: v for k, v in setting.items() if k in base.setting} for setting in held_out]
            for setting in held_out:  # operators that hide memory are run now, and kept: they differ with the machine
                activations.predict(base, **setting)
            yield name, [name, configuration], usual, base, held_out


def measured(lab):
    """What is stored of a lab, without figures."""
    kept = {"versions": VERSIONS, "bases": {}}
    for name, model, usual, base, settings in bases(lab):
        given = not_stored(built(model) if model else None, usual)
        of_replays = getattr(getattr(base.calibration, FORECASTER), WORKSPACE) if usual else None
        texts = [json.dumps(encode(dict(setting), CLASSES, {})) for setting in settings]
        kept["bases"][name] = {
            "model": model, "usual": usual, "base": encode(base, CLASSES, given),
            "workspace": encode(of_replays, CLASSES, {}), "predictions": [[text, {}] for text in texts],
        }  # fmt: skip
    if lab == "activations":
        grid = importlib.import_module("ledger_activations")
        kept["forecasts"] = [
            {"model": [name, configuration], "usual": usual,
             "forecasts": [[json.dumps(grid._sized(times, usual)), {}] for times in grid.SIZES]}
            for name, configuration, _, usual in grid.ARCHITECTURES
        ]  # fmt: skip
    return kept


def record(lab, anew):
    """Write a lab's calibrations, measured anew or as they are, and what is predicted from them now."""
    if lab == "captures":
        named = {path.name: path for path in sorted(OWN.glob("*.zip"))} | {name: RECORDED / name for name in OTHERS}
        kept = {name: dict(panes(path)) for name, path in named.items()}
    else:
        kept = measured(lab) if anew else stored(lab)
        kept = json.loads(json.dumps(kept)) | {"versions": VERSIONS}
        for one in kept["bases"].values():
            now = [found for _, _, found in predictions(lab, one)]
            one["predictions"] = [[text, found] for (text, _), found in zip(one["predictions"], now, strict=True)]
        for one in kept.get("forecasts", ()):
            now = [found for _, _, found in forecasts(one)]
            one["forecasts"] = [[text, found] for (text, _), found in zip(one["forecasts"], now, strict=True)]
    path = HERE / "figures" / f"{lab}.json.gz"
    path.write_bytes(gzip.compress(json.dumps(kept, separators=(",", ":")).encode(), mtime=0))
    print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    how, *labs = sys.argv[1:] or [""]
    if how not in ("--record", "--figures") or set(labs) - {*LABS, "captures"}:
        sys.exit(__doc__)
    sys.path.append(str(HERE.parent / "data"))
    for lab in labs or [*LABS, "captures"]:
        record(lab, anew=how == "--record")

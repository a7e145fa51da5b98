"""Re-create what is recorded under data/, on this machine.

    python data/record.py lengths     data/spoken_docs.csv (needs espeak-ng)
    python data/record.py captures    data/captures/*.zip, small reference captures of live steps and of two ranks
    python data/record.py ledger      data/ledger/<device>.csv and the accuracy table in README.md
    python data/record.py all         captures and ledger (the list of lengths is the same on every machine)

Everything runs on the GPU where there is one and on the CPU otherwise, by the same code; a few minutes each.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import wave
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch.profiler import record_function

import effkit as ek
from effkit import padding
from effkit.device import provenance
from effkit.padding.prediction import complete, plan_at

DATA = Path(__file__).resolve().parent
README = DATA.parent / "README.md"

# voice and words per minute of each speaker; sentences go round
SPEAKERS = (
    ("en-us", 175), ("en-us+f3", 150), ("en-gb", 200), ("en-gb+m3", 130),
    ("en-gb-scotland", 165), ("en-us+m7", 220), ("en-gb+f2", 185), ("en-029", 145),
)  # fmt: skip
PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()\-.]*\.")
TOKEN = re.compile(r"\w+|[^\w\s]")

# Settings that no calibration sees. Do not tune to them.
BASE = {"strategy": "random", "batch_size": 16}
HELD_OUT = (
    {"strategy": "sorted"},
    {"strategy": "bucket", "num_buckets": 8},
    {"strategy": "bucket", "num_buckets": 4, "batch_size": 24},
    {"strategy": "bucket2d", "num_buckets": 6},
    {"strategy": "optimal", "num_buckets": 6},
    {"strategy": "token_budget"},
    {"batch_size": 8},
    {"max_length": 800},
)
TRIES = 3
BAR = 0.05  # on the median over the settings of the error of a predicted speed-up


def record_lengths() -> None:
    """Paragraphs of the standard library's docstrings, spoken by espeak-ng: seconds, tokens, characters."""
    if shutil.which("espeak-ng") is None:
        sys.exit("espeak-ng is not installed; on Debian: apt-get install espeak-ng")
    rows = []
    for i, text in enumerate(sorted(_paragraphs())):
        voice, speed = SPEAKERS[i % len(SPEAKERS)]
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", text]
        sound = subprocess.run(command, capture_output=True, check=True).stdout
        with wave.open(io.BytesIO(sound)) as file:
            # a stream to a pipe states no length: count the bytes behind the header
            seconds = (len(sound) - 44) / (file.getframerate() * file.getsampwidth() * file.getnchannels())
        rows.append((f"{seconds:.2f}", len(TOKEN.findall(text)), len(text)))
    with (DATA / "spoken_docs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("duration_s", "tokens", "characters"), *rows])
    print(f"{len(rows):,} utterances -> data/spoken_docs.csv")


def _paragraphs() -> set[str]:
    found = set()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    text = " ".join(paragraph.split())
                    if PROSE.fullmatch(text):
                        found.add(text)
    return found


def spoken(num_examples: int) -> pd.DataFrame:
    """A fixed sample of the list, at most 16 s long."""
    lengths = padding.lengths(DATA / "spoken_docs.csv")
    return lengths[lengths["input_length"] <= 1600].sample(num_examples, random_state=0).reset_index(drop=True)


def record_captures() -> None:
    """One training step of each live model, with its allocations."""
    for name, model in {"speech": ek.models.speech(hidden=64), "text": ek.models.text(hidden=64)}.items():
        lengths = spoken(8)
        batch = model.make_batch([row[None] for row in lengths.index.to_numpy()], lengths)
        update = torch.optim.AdamW(model.parameters())

        def step(model=model, batch=batch, update=update) -> None:  # type: ignore[no-untyped-def]
            model(**batch).loss.backward()
            update.step()
            update.zero_grad(set_to_none=True)

        seen = ek.capture(step, steps=1, memory=True, what=f"training step, {name} model",
                          settings={"batches": [lengths["input_length"].tolist()], "hidden": 64})  # fmt: skip
        print(seen.save(DATA / "captures" / f"{name}_{_slug()}.zip").name, seen, sep="\n")
    record_alltoall()


def record_alltoall() -> None:
    """Two ranks that dispatch tokens, compute, and combine; rank 1 has three times the tokens of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_expert_rank, (2, folder), nprocs=2)
        ranks = ek.load(folder)
        made = provenance() | {"what": "two ranks of an expert-parallel layer in miniature, gloo"}
        seen = ek.Capture(ranks.events, None, {**ranks.provenance, **made, "files": None})
        print(seen.save(DATA / "captures" / f"alltoall_{_slug()}.zip").name, seen.communication(), sep="\n")


def _expert_rank(rank: int, num_ranks: int, folder: str) -> None:
    """One process: what torchrun would start on a cluster."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks
    )
    router, expert = torch.randn(256, num_ranks), torch.randn(256, 256)
    tokens = 1024 * (2 * rank + 1)
    of_ranks = [1024 * (2 * other + 1) // num_ranks for other in range(num_ranks)]

    def step() -> None:
        with record_function("gate"):
            x = torch.randn(tokens, 256)
            for _ in range(4):  # the layers before: more tokens, more work
                x = torch.relu(x @ expert) / 16
            (x @ router).softmax(-1)
        sent, received = [tokens // num_ranks] * num_ranks, torch.empty(sum(of_ranks), 256)
        with record_function("dispatch"):
            torch.distributed.all_to_all_single(received, x, of_ranks, sent)
        with record_function("experts"):
            y = torch.relu(received @ expert)
        with record_function("combine"):
            torch.distributed.all_to_all_single(x, y, sent, of_ranks)
        torch.distributed.all_reduce(expert.clone())

    activities = [torch.profiler.ProfilerActivity.CPU]
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=3, repeat=1)
    with torch.profiler.profile(activities=activities, record_shapes=True, schedule=schedule) as profiler:
        for _ in range(4):
            step()
            profiler.step()
    profiler.export_chrome_trace(f"{folder}/rank{rank}.json")
    torch.distributed.destroy_process_group()


def record_ledger() -> None:
    """Predict and measure every held-out setting; each measurement alternates with one of the base."""
    gpu = torch.cuda.is_available()
    torch.set_num_threads(1)  # on a shared machine, two threads that wait for each other are timed at their worst
    lengths = spoken(2048 if gpu else 256)
    model = ek.models.speech(**({"hidden": 512, "encoder_layers": 12, "decoder_layers": 6, "heads": 8} if gpu else {}))
    scale = 4 if gpu else 1
    base_plan = padding.plan(lengths, BASE["strategy"], batch_size=BASE["batch_size"] * scale)
    base = padding.measure(base_plan, model, num_batches=8)
    path = DATA / "ledger" / f"{_slug()}.csv"
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    errors, broken = [], []
    for setting in HELD_OUT:
        wanted = {k: v * scale if k == "batch_size" else v for k, v in setting.items()}
        predicted = padding.predict(base, **wanted)
        full = complete(base, wanted)
        ratios, measured = [], None
        for _ in range(TRIES):  # the machine's speed drifts: only neighbours in time are compared
            again = padding.measure(base_plan, model, num_batches=4, repeats=2, base=base)
            measured = padding.measure(plan_at(base, full), model, num_batches=8, repeats=2, base=base)
            ratios.append(measured.total / again.total)
        steady = replace(
            measured, total=round(statistics.median(ratios) * base.total),
            source=f"{measured.source}; relative to the base measured in turn, median of {TRIES}",
        )  # fmt: skip
        receipt = ek.Receipt(predicted, steady, setting=full, provenance=provenance())
        receipt.append_to(part, lab="padding", model="speech", knob=next(iter(setting)))
        errors.append(receipt.error)
        counted = receipt.frame[receipt.frame["unit"].isin(["cells", "steps"])]
        if not receipt.within_band or (counted["error"] != 0).any():
            broken.append(setting)
        print(setting, receipt, sep="\n", flush=True)
    part.replace(path)
    refresh_readme()
    median = statistics.median(map(abs, errors))
    print(f"time: median error {median:.1%}, worst {max(map(abs, errors)):.1%} over {len(errors)} held-out settings")
    if median > BAR or broken:
        sys.exit(
            f"the bar is a median of {BAR:.0%}, times in their bands, exact counts; outside: {broken or 'the median'}"
        )


def refresh_readme() -> None:
    """Rewrite the accuracy table between its two markers."""
    rows = [
        "| device | lab | quantity | settings | median error | worst error | inside band |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for path in sorted((DATA / "ledger").glob("*.csv")):
        ledger = pd.read_csv(path)
        inside = (ledger["low"] <= ledger["measured"]) & (ledger["measured"] <= ledger["high"])
        ledger = ledger.assign(absolute=ledger["error"].abs(), inside=inside)
        device = json.loads(ledger["provenance"].iloc[0])["device"]
        for (lab, quantity), group in ledger.groupby(["lab", "quantity"], sort=False):
            rows.append(
                f"| {device} | {lab} | {quantity} | {len(group)} | {group['absolute'].median():.1%} "
                f"| {group['absolute'].max():.1%} | {group['inside'].sum()} of {len(group)} |"
            )
    text = README.read_text(encoding="utf-8")
    begin, end = "<!-- accuracy: written by make ledger -->\n", "<!-- /accuracy -->"
    before, rest = text.split(begin)
    README.write_text(before + begin + "\n".join(rows) + "\n" + end + rest.split(end)[1], encoding="utf-8")


def _slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", provenance()["device"].lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = {"lengths": record_lengths, "captures": record_captures, "ledger": record_ledger}
    parser.add_argument("what", choices=[*steps, "all"])
    what = parser.parse_args().what
    for name in ("captures", "ledger") if what == "all" else (what,):
        steps[name]()


if __name__ == "__main__":
    main()

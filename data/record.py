"""Re-create what is recorded under data/, on this machine.

    python data/record.py lengths     data/spoken_docs.csv (needs espeak-ng)
    python data/record.py captures    data/captures/*.zip, small reference captures of live steps and of two ranks
    python data/record.py minilabs    data/minilabs.csv, the figures of eight seeds of each mini-lab of notebooks 06 to
                                      06e, times under several conditions, and the stored figures of data/claims.csv
                                      that are made from them: what is missing, or with --all anew; one lab alone,
                                      anew: minilabs Conda
    python data/record.py ledger      predictions beside measurements, without what is held back from whoever designs a
                                      model, and nothing written; one lab alone: ledger activations; the machine as
                                      another one: --condition "one core", or every. With --all, held back or not:
                                      data/ledger/<device>.csv, where other labs and conditions keep their rows, and
                                      the accuracy table in README.md
    python data/record.py all         captures and ledger --all (the list of lengths is the same on every machine)

Everything runs on the GPU where there is one and on the CPU otherwise, by the same code; a few minutes each. Every part
(a capture, a lab's rows) is a process of its own, and what it has recorded stays when it fails. With --minutes each has
an equal share of the time that is left, and what has not come to its end by then is cut off.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import wave
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import ledger_activations
import ledger_advice
import ledger_decoder
import ledger_moe
import ledger_padding
import ledger_recorded
import recorded_minilabs
import torch
from ledger_padding import spoken
from ledger_rows import CONDITIONS, CUT_OFF, DATA, HELD_BACK, USUAL, device_name, keep_rows, run_under
from torch.profiler import record_function

import effkit as ek
from effkit import moe
from effkit.device import provenance
from effkit.moe.live import WORK, run_settings
from effkit.ranks.forking import end_with_parent
from effkit.ranks.launching import Ranks

# voice and words per minute of each speaker; sentences go round
SPEAKERS = (
    ("en-us", 175), ("en-us+f3", 150), ("en-gb", 200), ("en-gb+m3", 130),
    ("en-gb-scotland", 165), ("en-us+m7", 220), ("en-gb+f2", 185), ("en-029", 145),
)  # fmt: skip
PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()\-.]*\.")
TOKEN = re.compile(r"\w+|[^\w\s]")

LABS = {  # in this order: the last, which takes longest, has all the time that is left
    "padding": ledger_padding.record,
    "moe": ledger_moe.record,
    "decoder": ledger_decoder.record,
    "advice": ledger_advice.record,
    "activations": ledger_activations.record,
    "recorded": ledger_recorded.record,
}
ELSEWHERE = "recorded"  # on other people's machines: by name alone


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


def record_step(name: str) -> None:
    """One training step of a live model, with its allocations."""
    model, lengths = getattr(ek.models, name)(hidden=64), spoken(8)
    batch = model.make_batch([row[None] for row in lengths.index.to_numpy()], lengths)
    update = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(**batch).loss.backward()
        update.step()
        update.zero_grad(set_to_none=True)

    seen = ek.capture(step, steps=1, memory=True, what=f"training step, {name} model",
                      settings={"batches": [lengths["input_length"].tolist()], "hidden": 64})  # fmt: skip
    print(seen.save(DATA / "captures" / f"{name}_{device_name()}.zip").name, seen, sep="\n")


def record_moe() -> None:
    """Two ranks of an expert-parallel layer, on a slow link where that can be made."""
    link = 0.0 if moe.why_no_links() else 50e6
    with tempfile.TemporaryDirectory() as folder, Ranks(2, WORK, link_bytes_per_s=link) as ranks_up:
        run_settings(ranks_up, [moe.Setting(num_tokens=512)], num_rounds=1, num_steps=2, profile=folder)
        ranks = ek.load(folder)
        on = f"a link of {link / 1e6:g} MB/s" if link else "loopback"
        made = provenance() | {"what": f"two ranks of an expert-parallel layer, forward and backward, {on}"}
        seen = ek.Capture(ranks.events, None, {**ranks.provenance, **made, "files": None})
        print(seen.save(DATA / "captures" / f"moe_{device_name()}.zip").name, moe.account(seen), sep="\n")


def record_alltoall() -> None:
    """Two ranks that dispatch tokens, compute, and combine; rank 1 has three times the tokens of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_expert_rank, (2, folder), nprocs=2)
        ranks = ek.load(folder)
        made = provenance() | {"what": "two ranks of an expert-parallel layer in miniature, gloo"}
        seen = ek.Capture(ranks.events, None, {**ranks.provenance, **made, "files": None})
        print(seen.save(DATA / "captures" / f"alltoall_{device_name()}.zip").name, seen.communication(), sep="\n")


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


CAPTURES = {
    "speech": partial(record_step, "speech"),
    "text": partial(record_step, "text"),
    "alltoall": record_alltoall,
    "moe": record_moe,
}


def run_parts(parts: Sequence[tuple[str, str, str]], everything: bool, minutes: float | None) -> None:
    """Each part, a condition and what it runs, in a process of its own; one that fails leaves what it recorded."""
    ended: list[str] = []
    end = time.monotonic() + 60 * (minutes or 0)
    for number, (condition, what, name) in enumerate(parts):
        limit_s = max(1.0, (end - time.monotonic()) / (len(parts) - number)) if minutes else None
        print(f"{name}, {condition}" + (f": at most {limit_s:.0f} s" if limit_s else ""), flush=True)
        command = [sys.executable, __file__]
        status = run_under(condition, [*command, what, name], everything=everything, limit_s=limit_s)
        if status:
            ended.append(f"{name}, {condition}{', which was cut off' if status == CUT_OFF else ''}")
        if status and what == "rows":
            run_under(condition, [*command, "keep", name], everything=everything)
    if ended:
        sys.exit(f"ended with an error, outside a bar, or before their time: {'; '.join(ended)}")


def parts_of(what: str, lab: str | None, conditions: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Captures, and the rows of one lab or of all under each condition."""
    if what in ("captures", "all"):
        yield from ((USUAL, "capture", name) for name in CAPTURES)
    if what in ("ledger", "all"):
        yield from (
            (condition, "rows", name)
            for condition in conditions
            for name in LABS
            if name == lab or (lab is None and name != ELSEWHERE)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lengths", "captures", "minilabs", "ledger", "all", "rows", "capture",
                                         "keep", "seeds"])  # fmt: skip
    parser.add_argument(
        "lab",
        nargs="?",
        choices=[*LABS, *CAPTURES, *recorded_minilabs.LABS],
        help="with ledger or minilabs: this lab's rows alone",
    )
    parser.add_argument("--condition", choices=[*CONDITIONS, "every"], default=USUAL, help="with ledger")
    parser.add_argument(
        "--all",
        action="store_true",
        help="with ledger: also what is held back, and write the rows; with minilabs: anew",
    )
    parser.add_argument("--minutes", type=float, help="of all parts together: what takes longer is cut off")
    given = parser.parse_args()
    if given.what in ("rows", "capture", "keep", "seeds"):  # what the others start, under a condition
        end_with_parent()
        run = {"rows": LABS, "capture": CAPTURES, "keep": {name: partial(keep_rows, name) for name in LABS},
               "seeds": {name: partial(recorded_minilabs.record, name) for name in recorded_minilabs.LABS}}  # fmt: skip
        sys.exit(run[given.what][given.lab]() or None)
    if given.what == "minilabs":
        again, names = given.lab is not None or given.all, [given.lab] if given.lab else recorded_minilabs.LABS
        parts = [(condition, "seeds", name) for name in names for condition in CONDITIONS
                 if recorded_minilabs.to_run(name, condition, again=again)]  # fmt: skip
        sys.exit(run_parts(parts, again, given.minutes))
    if given.lab and given.what != "ledger":
        parser.error(f"a lab goes with ledger; given: {given.what} {given.lab}")
    everything = given.all or given.what == "all"
    conditions = [given.condition] if given.condition != "every" else [
        name for name in CONDITIONS if everything or name not in HELD_BACK]  # fmt: skip
    if not everything and given.condition in HELD_BACK:
        parser.error(f"{given.condition} is held back until a design is done; then: --all")
    if given.what == "lengths":
        record_lengths()
    run_parts([*parts_of(given.what, given.lab, conditions)], everything, given.minutes)


if __name__ == "__main__":
    main()

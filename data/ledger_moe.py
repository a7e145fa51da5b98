"""The MoE lab's rows of the error ledger: a step of an expert-parallel layer on two ranks, over a slow link."""

from __future__ import annotations

from typing import Any

from ledger_rows import begun, condition, failed, going_on, outside_bars, replace_rows, unheld

import effkit as ek
from effkit import moe
from effkit.device import provenance

LINK_BYTES_PER_S = 100e6
# Settings that no calibration sees. Do not tune to them.
HELD_OUT: tuple[dict[str, Any], ...] = (
    {"num_tokens": 640},
    {"num_tokens": 896, "skew": 0.8},
    {"num_tokens": 1408},
    {"num_tokens": 1792, "top_k": 1},
    {"hidden": 192},
    {"hidden": 320},
    {"hidden": 384, "num_tokens": 768},
    {"ffn": 768},
    {"ffn": 384, "hidden": 320},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 3, "num_tokens": 768, "ffn": 640},
    {"capacity_factor": 0.8},
    {"capacity_factor": 1.25, "skew": 1.0},
    {"capacity_factor": 1.0, "top_k": 3, "num_tokens": 640},
    {"skew": 0.0},
    {"skew": 1.5},
    {"num_chunks": 2},
    {"num_chunks": 3},
    {"num_chunks": 4, "skew": 1.0},
    {"num_chunks": 4, "num_tokens": 1536},
    {"num_chunks": 2, "num_chunks_backward": 4, "hidden": 320},
    {"num_chunks": 4, "top_k": 1, "num_tokens": 1536},
    {"num_chunks": 2, "top_k": 3, "capacity_factor": 1.25},
)
COMPRESSED: tuple[dict[str, Any], ...] = (
    {"compress": "lsh", "num_clusters": 32},
    {"compress": "lsh", "num_clusters": 96},
    {"compress": "lsh", "num_clusters": 160, "num_tokens": 1408},
    {"compress": "lsh", "num_tokens": 768},
    {"compress": "lsh", "hidden": 320},
    {"compress": "lsh", "top_k": 1},
    {"compress": "lsh", "num_chunks": 2},
    {"message_dtype": "bfloat16", "num_tokens": 1280},
)
DEGREES = (1, 2, 3, 4, 6, 8)
BARS = {"setting": (0.06, 0.20), "compress": (0.12, 1.0)}  # median and worst error of the step's time
MISSED_FRAC = {"setting": 0.1, "compress": 1.0}  # of the totals, outside their band
SPEED_UP, REGRET = 1.28, 0.05


def record() -> str:
    """Predict and measure every held-out setting, each in turn with the base; returns what is outside its bar."""
    if why := moe.why_no_links():
        return f"moe: the rows want a slow link, which cannot be made here: {why}"
    if condition() == "two threads":
        print("moe: left out; ranks share the cores, and each has the threads that are its share")
        return ""
    part = begun("moe")
    plain = moe.measure(link_bytes_per_s=LINK_BYTES_PER_S)
    alike = moe.measure(num_clusters=64, link_bytes_per_s=LINK_BYTES_PER_S, levers=("lsh", "bfloat16"))
    broken = [_receipts(part, plain, HELD_OUT, "setting"), _receipts(part, alike, COMPRESSED, "compress")]
    with going_on("moe, LSH and degrees"):
        broken += [_speed_up(alike), _degrees(part, plain)]
    replace_rows("moe", part)
    return "; ".join(filter(None, [*broken, *failed()]))


def _receipts(part: Any, base: ek.Account, settings: tuple[dict[str, Any], ...], knob: str) -> str:
    print(base, base.calibration.band_frac, sep="\n", flush=True)
    receipts = []
    for setting in unheld(settings):
        with going_on(f"moe, {setting}"):
            receipt = ek.Receipt(
                moe.predict(base, **setting), moe.measure(base=base, **setting), setting=setting,
                provenance=provenance(),
            )  # fmt: skip
            receipt.append_to(part, lab="moe", model="expert-parallel layer, 2 ranks, 100 MB/s", knob=knob)
            print(setting, receipt, sep="\n", flush=True)
            receipts.append(receipt)
    return outside_bars("moe", knob, receipts, BARS[knob], MISSED_FRAC[knob])


def _speed_up(base: ek.Account) -> str:
    """LSH on tokens that are alike, where all-to-all is at least 40% of the step."""
    share = base.share[["dispatch waiting", "dispatch moving", "combine waiting", "combine moving"]].sum()
    gain = base.total / moe.measure(base=base, compress="lsh").total
    print(f"LSH: all-to-all {share:.0%} of the step, {gain:.2f}x quicker")
    return "" if share >= 0.4 and gain >= SPEED_UP else f"moe: LSH {gain:.2f}x with a share of {share:.0%}"


def _degrees(part: Any, base: ek.Account) -> str:
    """The step at the degree that predict finds best, over the best of those measured."""
    chosen = moe.best_degrees(base)
    measured = {degree: moe.measure(base=base, num_chunks=degree).total for degree in DEGREES}
    own = moe.measure(base=base, num_chunks=chosen[0], num_chunks_backward=chosen[1]).total
    regret = own / min(own, *measured.values()) - 1
    others = {degree: time_ns // 10**6 for degree, time_ns in measured.items()}
    print(f"degrees {chosen}: {own / 1e6:.0f} ms, others {others}, regret {regret:.1%}")
    return "" if regret <= REGRET else f"moe: the chosen degrees {chosen} lose {regret:.1%}"

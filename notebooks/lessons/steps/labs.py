"""The mini-labs of 06a: steps, tokens or FLOPs of small models until a held-out loss is low enough."""

from __future__ import annotations

from lessons.minilabs import to_target
from lessons.steps import distilling, growing, language, modalities, pretext

TARGET = 2.4  # nats per held-out letter

CONDA = to_target(
    "Conda", "steps to a held-out loss of 2.4 nats",
    lambda: {name: language.optimizing(name) for name in ("AdamW", "Muon", "Conda")},
    TARGET, {"Conda": ("AdamW", "Conda")},
)  # fmt: skip

LAMB = to_target(
    "LAMB", "steps to a held-out loss of 3 nats",
    lambda: {
        f"{name}, batch {size}": language.optimizing(name, batch_size=size)
        for size in (8, 32)
        for name in ("AdamW", "LAMB")
    },
    3.0, {}, every=10,
)  # fmt: skip

SALT = to_target(
    "SALT", "FLOPs to a held-out loss of 2.4 nats",
    lambda: {"alone": language.optimizing("AdamW"), "with a small teacher": distilling.salt()},
    TARGET, {"SALT": ("alone", "with a small teacher")}, by="flops",
    without={"its teacher for free": ("with a small teacher", "teacher's own training")},
)  # fmt: skip

NOISY_TARGET = 2.6  # nats
HALF, WHOLE = "half of the pool, chosen", "all of the pool"
MINIPLM = to_target(
    "MiniPLM", "FLOPs to a held-out loss of 2.6 nats, half of the pool is noise",
    lambda: {name: distilling.miniplm(name == HALF, noise_frac=0.5) for name in (HALF, WHOLE)},
    NOISY_TARGET, {"MiniPLM": (WHOLE, HALF)}, by="flops",
)  # fmt: skip
MINIPLM_CLEAN = to_target(
    "MiniPLM, no noise", "steps to a held-out loss of 2.6 nats",
    lambda: {name: distilling.miniplm(name == HALF) for name in (HALF, WHOLE)},
    2.6, {}, without={"half, scoring not counted": (HALF, "scoring")},
)  # fmt: skip

DEBERTA = to_target(
    "DeBERTaV3", "tokens to an unexplained variance of 0.57",
    lambda: {"masked": pretext.Masked, "replaced": pretext.Replaced},
    0.57, {"DeBERTaV3": ("masked", "replaced")}, by="num_tokens", every=10, max_steps=150,
)  # fmt: skip

AQUILA = to_target(
    "AquilaMoE", "FLOPs to a held-out loss of 2.25 nats",
    lambda: {
        "grown": growing.growing(80, 20),
        "experts from scratch": growing.growing(0, 0),
        "the small model alone": growing.growing(10_000, 0),
    },
    2.25, {"AquilaMoE": ("experts from scratch", "grown")}, by="flops", every=10,
)  # fmt: skip

MOMA = to_target(
    "MoMa", "FLOPs to a held-out loss of 2.9 nats",
    lambda: {name: modalities.learning_both(name) for name in modalities.DESIGNS},
    2.9, {"MoMa": ("dense", "grouped experts")}, by="flops",
)  # fmt: skip

LABS = (LAMB, CONDA, SALT, MINIPLM, MINIPLM_CLEAN, DEBERTA, AQUILA, MOMA)

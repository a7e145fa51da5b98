"""The mini-labs of 06c: data that are mixed, chosen, simplified or ordered."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import pandas as pd
import torch

from effkit import Account
from lessons import corpora
from lessons.minilabs import LIVE, Arm, Interval, MiniLab, ratio, to_target
from lessons.tokens import angles, densities, filtering, library_text, mixtures, sampling_loops, selecting, vocabularies
from lessons.tokens.next_letter import NextLetter


@cache
def english() -> tuple[torch.Tensor, torch.Tensor]:
    """Letters of English to train on, and held out."""
    return corpora.split(corpora.encode(corpora.english()))


@cache
def base() -> NextLetter:
    """The model of English from which mixtures continue."""
    return mixtures.seed_model(english()[0])


def _agreements(table: pd.DataFrame) -> dict[str, Arm]:
    correlations = mixtures.agreement(table)["all_mixtures"]
    return {str(name): Arm(float(value), 400) for name, value in [*correlations.items(), ("mean", correlations.mean())]}


MERGING = MiniLab(
    "Merged data ablations", "rank correlation of losses over 11 mixtures, by held-out text", "",
    lambda seed: mixtures.merging(base(), *library_text.halves(), seed=seed), _agreements,
    {"Merged data ablations": lambda arms: arms["mean"]},
)  # fmt: skip


class Continued(NamedTuple):
    """A law fitted to five ratios, the ratio that it names, and the run at that ratio."""

    runs: pd.DataFrame
    law: mixtures.MixtureLaw
    critical: float
    rise: float
    predicted: float


TOLERANCE, NUM_STEPS = 0.05, 450  # bits per letter; of continued training


def _continued(seed: int) -> Continued:
    code = corpora.split(corpora.encode(corpora.code()))
    runs = mixtures.continued(base(), english(), code, (0.1, 0.2, 0.4, 0.6, 0.8), seed=seed)
    law = mixtures.fit(runs)
    critical = law.critical_ratio(NUM_STEPS, tolerance=TOLERANCE)
    unseen = mixtures.continued(base(), english(), code, (critical,), seed=seed + 10)
    return Continued(runs, law, critical, unseen["general"].iloc[-1], law.change(critical, NUM_STEPS))


CMR = MiniLab(
    "CMR", "rise of the general loss [bits per letter] at the ratio that the law names", "", _continued,
    lambda found: {
        "critical ratio": Arm(found.critical, NUM_STEPS),
        "predicted": Arm(found.predicted, NUM_STEPS),
        "run": Arm(found.rise, NUM_STEPS),
    },
    {"CMR": lambda arms: abs(arms["predicted"] / arms["run"] - 1)},
)  # fmt: skip


def rerun(ratio: float) -> float:
    """The rise [bits per letter] of a training with that share of code, of a seed that no law is fitted to."""
    code = corpora.split(corpora.encode(corpora.code()))
    return float(mixtures.continued(base(), english(), code, (ratio,), seed=LIVE + 10)["general"].iloc[-1])


def fitted(found: Continued, ratio: float = 0.4) -> Account:
    """A run that the law is fitted to, carrying the law and how far the stored seeds lay from theirs."""
    stored = CMR.stored()
    miss = Interval.of(stored["run"] - stored["predicted"], ratios=False)
    forecast = mixtures.Forecast(found.law, NUM_STEPS, (miss.run_low, miss.run_high))
    return mixtures.risen(ratio, found.runs.loc[(ratio, NUM_STEPS), "general"], forecast)


class Choice(NamedTuple):
    """A pool, the trainings that weighed its scores, and what each way of choosing took, as places in the pool."""

    documents: pd.DataFrame
    proxies: pd.DataFrame
    chosen: Mapping[str, Any]


TARGET_TEXTS, PROXY_STEPS = ("prose", "comments"), 60


@cache
def choice() -> Choice:
    """Uniform, by equal weights of four scores, and by weights that two dozen proxy trainings gave."""
    text, held_out = library_text.halves()
    documents = selecting.pool(text)
    scores = selecting.scores(documents["text"])
    proxies = selecting.proxies(documents, scores, [held_out[kind] for kind in TARGET_TEXTS], num_steps=PROXY_STEPS)
    chosen = {
        "uniform": documents.index,
        "equal weights": selecting.selected(scores, [1, 1, 1, 1]),
        "learned weights": selecting.selected(scores, selecting.best_weights(proxies)),
    }
    return Choice(documents, proxies, chosen)


def _on_documents() -> dict[str, Any]:
    documents, _, chosen = choice()
    target = [library_text.halves()[1][kind] for kind in TARGET_TEXTS]
    letters = {way: selecting.joined(documents["text"].iloc[places].tolist()) for way, places in chosen.items()}
    return {way: partial(selecting.OnDocuments, text, target) for way, text in letters.items()}


META_RATER = to_target(
    "Meta-rater", "steps to a held-out loss of 3.3 bits per letter", _on_documents, 3.3,
    {"Meta-rater": ("uniform", "learned weights")}, every=20, max_steps=1000,
)  # fmt: skip

WORDS = {"300 words": 300, "1000 words": 1000, "all": None}


@cache
def reduced() -> dict[str, vocabularies.Reduced]:
    """English in its most common words, the others replaced by their outer form."""
    border = round(0.9 * len(corpora.english()))
    learn, held_out = corpora.english()[:border], corpora.english()[border:]
    return {name: vocabularies.reduced(learn, held_out, num_words) for name, num_words in WORDS.items()}


TINY_HELEN = MiniLab(
    "TinyHelen", "bits per letter at equal training FLOPs", "",
    lambda seed: pd.DataFrame(
        {name: vocabularies.trained(one, 1.5e10, seed=seed) for name, one in reduced().items()}
    ),
    lambda table: {name: Arm(table.loc["bits", name], int(table.loc["num_steps", name])) for name in table},
    {"TinyHelen": ratio("all", "300 words")},
)  # fmt: skip


def _densities(seed: int) -> dict[str, pd.DataFrame]:
    """Density and scores of all preprocessings, for two tasks of 400 documents."""
    kinds = {kind: library_text.kinds()[kind] for kind in ("prose", "comments")}
    sources = {"prose or comments": (kinds, 200, 200), "which module": (library_text.modules(), 40, 300)}
    tables = {}
    for task, (texts, num_each, letters) in sources.items():
        docs = selecting.pool({kind: corpora.encode(one) for kind, one in texts.items()}, num_each=num_each, seed=seed)
        labels = pd.factorize(docs["kind"])[0].tolist()
        tables[task] = densities.variants(docs["text"].str[:letters].tolist(), labels)
    return tables


def _correlation(table: pd.DataFrame) -> float:
    """Rank correlation of density and score, the mean over classifiers."""
    return float(table.corr(method=mixtures.rank_correlation)["density"].drop("density").mean())


DENSITY = MiniLab(
    "Feature density", "rank correlation of density and macro F1", "", _densities,
    lambda tables: {task: Arm(_correlation(table), 40) for task, table in tables.items()},
    {"Feature density": lambda arms: (arms["prose or comments"] + arms["which module"]) / 2},
)  # fmt: skip

ACCURACY, NUM_ROUNDS = 0.5, 7


@cache
def pieces() -> sampling_loops.Pool:
    """Pieces of source of ten modules."""
    return sampling_loops.by_module(library_text.modules())


LOOP_TOOL = MiniLab(
    "LoopTool", "labels to an accuracy of 50%", "labels",
    lambda seed: pd.DataFrame(
        {way: sampling_loops.accuracies(pieces(), way, num_rounds=NUM_ROUNDS, seed=seed) for way in sampling_loops.WAYS}
    ),
    lambda curves: {way: Arm(sampling_loops.labels_to(curves[way], ACCURACY), 30) for way in curves},
    {"LoopTool": ratio("uniform", "around errors")},
)  # fmt: skip


@cache
def reader(seed: int) -> Any:
    """A language model of prose."""
    return angles.language_model(library_text.halves()[0]["prose"], seed=seed)


def _replaced(seed: int) -> filtering.Replaced:
    """A classifier in the place of that reader, on 400 documents of all kinds."""
    docs = selecting.pool(library_text.halves()[0], num_each=100, seed=seed)
    return filtering.replaced(reader(seed), docs["text"].str[:256].tolist())


FILTERING = MiniLab(
    "Ultra-FineWeb", "documents per second", "", _replaced,
    lambda found: {name: Arm(float(rate), 150) for name, rate in found.per_s.items()},
    {"Ultra-FineWeb": ratio("classifier", "language model")}, clocked=True,
)  # fmt: skip


def _ranks(seed: int) -> pd.Series[float]:
    """Rank correlations with the concentration of angles, over pieces of three kinds of text."""
    held_out = library_text.halves()[1]
    several = torch.cat([corpora.windows(held_out[kind], 40, 64) for kind in ("prose", "comments", "code")])
    found = angles.examples(reader(seed), several).corr(method=mixtures.rank_correlation)["concentration"]
    return found.drop("concentration")


GAIN_RL = MiniLab(
    "GAIN-RL", "rank correlation with the concentration of angles", "", _ranks,
    lambda ranks: {str(name): Arm(float(value), 150) for name, value in ranks.items()},
    {"GAIN-RL": lambda arms: arms["gradient_norm"]},
)  # fmt: skip

LABS = (MERGING, CMR, META_RATER, TINY_HELEN, DENSITY, FILTERING, LOOP_TOOL, GAIN_RL)

"""What a token of data buys: the pieces of the experiments, against hand calculations."""

import copy
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from lessons import corpora
from lessons.tokens import densities, library_text, mixtures, next_letter, selecting, vocabularies

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pieces_come_from_texts_in_their_shares():
    first, second = torch.zeros(50, dtype=torch.long), torch.ones(50, dtype=torch.long)
    pieces = next_letter.draw([first, second], [1.0, 3.0], 4000, 9, torch.Generator().manual_seed(0))
    assert pieces.shape == (4000, 9)
    assert (pieces.min(dim=1).values == pieces.max(dim=1).values).all()
    assert pieces[:, 0].float().mean().item() == pytest.approx(0.75, abs=0.03)
    with pytest.raises(ValueError, match="one for each"):
        next_letter.draw([first], [0.5, 0.5], 2, 9, torch.Generator())
    with pytest.raises(ValueError, match="at least the 60"):
        next_letter.draw([first], [1.0], 2, 60, torch.Generator())


def test_every_place_of_a_text_can_be_drawn_and_none_beyond():
    pieces = next_letter.draw([torch.arange(12)], [1.0], 500, 9, torch.Generator().manual_seed(0))
    assert sorted(pieces[:, 0].unique().tolist()) == [0, 1, 2, 3]
    assert pieces.max() == 11


def test_bits_of_a_model_that_knows_nothing_are_the_logarithm_of_its_vocabulary():
    model = next_letter.NextLetter(vocabulary=32)
    torch.nn.init.zeros_(model.output.weight)
    torch.nn.init.zeros_(model.output.bias)
    assert next_letter.bits(model, torch.arange(200) % 32) == pytest.approx(5.0, abs=1e-5)


def test_training_repeats_and_learns():
    text = torch.arange(400) % 7
    torch.manual_seed(0)
    start = next_letter.NextLetter(vocabulary=8)
    one, two = (next_letter.train(copy.deepcopy(start), [text], num_steps=60, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert next_letter.bits(one, text) < 0.2 < next_letter.bits(start, text)


def test_kinds_of_text_are_apart():
    kinds = library_text.kinds()
    assert set(kinds) == {"prose", "comments", "code", "tables"}
    assert sum(line.lstrip().startswith("#") for line in kinds["code"].splitlines()) == 0
    assert kinds["code"].count("return ") > 10 * kinds["comments"].count("return self")
    source = 'def f():\n    """Says\n    this."""\n    # and that\n    return 1  # kept\n'
    said, code = library_text._apart(source)
    assert (said, code) == ("Says\n    this.\n# and that", "def f():\n    return 1  # kept")


def test_density_is_different_over_all():
    assert densities.density([["a", "b", "a"], ["b", "c"]]) == pytest.approx(3 / 5)
    assert densities.density([[], []]) == 0
    text = "The Parsers parsed read_file, HTMLParser 12!"
    assert densities.features(text, "tokens") == ["The", "Parsers", "parsed", "read_file", ",", "HTMLParser", "12", "!"]
    assert densities.features(text, "stems, no stop words") == ["parser", "pars", "read_file", "htmlparser"]
    assert densities.features(text, "stop words only") == ["the"]
    assert densities.features("read_file 12", "shapes") == ["a_a", "0"]
    assert densities.features("a bc", "three letters") == ["a b", " bc"]
    with pytest.raises(ValueError, match="expected one of tokens"):
        densities.features(text, "lemmas")


def test_macro_f1_by_hand():
    guess, truth = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 2])
    # class 0: 2·1/(2+1); class 1: 2·2/(3+3); class 2: 0
    assert densities.macro_f1(guess, truth) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("kind", ["logistic", "hinge"])
def test_a_linear_classifier_finds_what_one_word_says(kind):
    documents = [["x", "good"], ["x", "bad"]] * 20
    assert densities.linear_score(documents, [0, 1] * 20, kind=kind) == 1.0
    blind = densities.linear_score([["x"]] * 40, [0, 1] * 20, kind=kind)
    assert blind == pytest.approx(1 / 3)  # one class for all: its F1 is 2/3, the other's 0
    with pytest.raises(ValueError, match="'logistic' or 'hinge'"):
        densities.linear_score(documents, [0, 1] * 20, kind="tree")


def test_spared_trainings_are_those_beyond_the_best_on_the_shorter_side():
    table = pd.DataFrame({"density": [0.1, 0.4, 0.2, 0.3, 0.5], "logistic": [0, 1, 2, 9, 3]})
    assert densities.spared(table) == 2
    assert densities.spared(table.assign(logistic=[9, 1, 2, 3, 4])) == 0


def test_averaged_parameters():
    models = [torch.nn.Linear(2, 1) for _ in range(3)]
    mean = mixtures.averaged(models)
    assert torch.allclose(mean.weight, sum(model.weight for model in models) / 3)
    x = torch.randn(5, 2)
    assert torch.allclose(mean(x), sum(model(x) for model in models) / 3, atol=1e-6)  # exact only for a linear model
    with pytest.raises(ValueError, match="2 different shapes"):
        mixtures.averaged([torch.nn.Linear(2, 1), torch.nn.Linear(3, 1)])
    with pytest.raises(ValueError, match="at least one"):
        mixtures.averaged([])


def test_merging_tries_every_mixture_and_agreement_ranks_within_them():
    parts = {name: torch.full((60,), number) for number, name in enumerate("abc")}
    table = mixtures.merging(next_letter.NextLetter(8), parts, {"a": parts["a"]}, num_steps=1)
    names = {"+".join(s) for size in (2, 3) for s in itertools.combinations("abc", size)}
    assert set(table.index.get_level_values("mixture")) == names
    made = pd.DataFrame({"trained": [1.0, 2.0, 3.0, 9.0], "averaged": [3.0, 2.0, 1.0, 9.5]}, index=table.index)
    order = made.assign(averaged=[{"a+b": 1.0, "a+c": 2.0, "b+c": 9.0, "a+b+c": 3.0}[name] for name, _ in made.index])
    order["trained"] = [{"a+b": 3.0, "a+c": 2.0, "b+c": 9.0, "a+b+c": 1.0}[name] for name, _ in made.index]
    ranked = mixtures.agreement(order).loc["a"]
    assert ranked["with_it"] == pytest.approx(-1)
    assert ranked["all_mixtures"] == pytest.approx(0.2)  # 1 - 6·(4+0+0+4)/(4·15)
    assert ranked["gap"] == pytest.approx(0)
    assert mixtures.costs(4).loc["averaged"].tolist() == [4, 400]
    assert mixtures.costs(4).loc["trained"].tolist() == [15, 100 * (4 * 1 + 6 * 2 + 4 * 3 + 1 * 4)]


def test_the_law_is_found_again_and_solved():
    truth = mixtures.MixtureLaw(offset=-0.01, scale=0.02, s=2.0, t=0.5, error=0.0)
    index = pd.MultiIndex.from_product([(0.1, 0.2, 0.4, 0.8), (100, 200, 400)], names=["ratio_frac", "step"])
    table = pd.DataFrame({"general": [truth.change(*one) for one in index]}, index=index)
    law = mixtures.fit(table)
    assert (law.s, law.t) == pytest.approx((2.0, 0.5))
    assert law.error < 1e-12
    assert law.ratios == (0.1, 0.8)
    critical = law.critical_ratio(300, 0.05)
    assert law.change(critical, 300) == pytest.approx(0.05)
    assert critical == pytest.approx(math.sqrt(0.06 / (0.02 * math.sqrt(300))))
    assert law.critical_ratio(300, 99.0) == 1.0
    with pytest.raises(ValueError, match="even without the domain"):
        law.critical_ratio(300, -0.02)
    with pytest.raises(ValueError, match="at least 4"):
        mixtures.fit(table.iloc[:3])


def test_a_predicted_rise_has_the_band_of_one_more_seed():
    law = mixtures.MixtureLaw(0.0, 0.1, 1.0, 0.0, 0.004, (0.1, 0.8))
    base = mixtures.risen(0.4, 0.0381, mixtures.Forecast(law, 10, (-0.012, 0.02)))
    assert (base.total, base.residual, base.setting) == (38, 0, {"domain_frac": 0.4})
    assert mixtures.predict(base, domain_frac=0.4) is base
    account = mixtures.predict(base, domain_frac=0.5)
    assert (account.total, account.low, account.high, account.in_range) == (50, 38, 70, True)
    assert not mixtures.predict(base, domain_frac=0.9).in_range
    assert mixtures.risen(0.1, -0.0123).total == -12
    one_sided = mixtures.risen(0.4, 0.038, mixtures.Forecast(law, 10, (0.01, 0.02)))
    assert mixtures.predict(one_sided, domain_frac=0.5).low == 50  # a band encloses its total


def test_a_slider_over_the_share_predicts_and_trains():
    law = mixtures.MixtureLaw(0.0, 0.1, 1.0, 0.0, 0.004, (0.1, 0.8))
    base = mixtures.risen(0.4, 0.04, mixtures.Forecast(law, 10, (-0.012, 0.02)))
    panel = mixtures.whatif(base, lambda ratio: 0.2 * ratio)
    assert panel.setting == {"domain_frac": 0.4}
    panel.controls["domain_frac"].value = 60
    assert panel.result.total == 60
    receipt = panel.measure()
    assert (receipt.measured.total, receipt.error, receipt.within_band) == (120, -0.5, False)


def test_no_domain_text_is_read_at_ratio_zero():
    general, domain = torch.arange(300) % 5, torch.full((300,), 6)
    base = next_letter.train(next_letter.NextLetter(8), [general], num_steps=40)
    table = mixtures.continued(base, (general, general), (domain, domain), (0.0, 0.5), num_steps=20, every=10)
    assert table.loc[(0.5, 20), "domain"] < -1 < table.loc[(0.0, 20), "domain"]
    assert list(table.index.get_level_values("step").unique()) == [10, 20]


def test_scores_and_selection():
    texts = [" the dog and the cat ", "x=1;y=2;z=3;w=4;v=5", "aaaaaaaaaaaaaaaaaaaaa"]
    table = selecting.scores(texts)
    assert np.allclose(table.mean(), 0)
    assert np.allclose(table.std(ddof=0)[["letters", "common_words", "variety"]], 1)
    assert table["common_words"].idxmax() == 0
    assert table["letters"].idxmin() == 1
    assert table["variety"].idxmin() == 2
    assert selecting.selected(table[["letters", "variety"]], [0, -1]).tolist() == [2]  # a quarter of 3, at least one
    with pytest.raises(ValueError, match="one for each"):
        selecting.selected(table, [1.0])


def test_the_best_weights_of_a_known_loss():
    weights = np.random.default_rng(0).dirichlet(np.ones(3), 40)
    loss = ((weights - [0.2, 0.7, 0.1]) ** 2).sum(axis=1)
    proxies = pd.DataFrame(weights, columns=list("abc")).assign(bits=loss)
    found = selecting.best_weights(proxies)
    assert found.sum() == pytest.approx(1)
    assert np.allclose(found, [0.2, 0.7, 0.1], atol=0.04)


def test_a_pool_holds_as_many_of_each_kind_and_repeats():
    kinds = {"a": corpora.encode("ab" * 400), "b": corpora.encode("xy" * 400)}
    one, two = selecting.pool(kinds, num_each=5), selecting.pool(kinds, num_each=5)
    assert one.equals(two)
    assert one["kind"].value_counts().to_dict() == {"a": 5, "b": 5}
    assert (one["text"].str.len() == 400).all()
    assert (one["text"].str.contains("x") == (one["kind"] == "b")).all()


def test_words_give_the_text_back():
    text = "A  line, of_text\n\n  (with 12 marks)."
    assert "".join(vocabularies.words(text)) == text
    assert [vocabularies.kind(word) for word in ("walking", "Dog", "12", "a_b", "\n ", "dog")] == [
        "<ing>", "<Capital>", "<number>", "<name>", "<space>", "<word>"]  # fmt: skip


def test_left_out_words_are_paid_for_by_hand():
    # kept: "dog" (3) and " " ; left out: cat, cow (each once), of one kind
    made = vocabularies.reduced("dog dog dog cat cow", "dog cat", 2)
    assert made.vocabulary == 3
    assert made.held_out_ids.tolist() == [1, 0, 2] or made.held_out_ids.tolist() == [0, 1, 2]
    assert made.naming_bits == pytest.approx(2.0)  # one of 2 seen, 2 for the escape: 1 in 4
    unseen = vocabularies.reduced("dog dog dog cat cow", "dog pig", 2)
    escape = math.log2(4 / 2)
    counts = {"p": 0, "i": 0, "g": 3, " ": 4}
    spelled = -sum(math.log2((count + 1) / (19 + 256)) for count in counts.values())
    assert unseen.naming_bits == pytest.approx(escape + spelled)
    assert vocabularies.reduced("dog dog dog", "dog dog", 2).naming_bits == 0
    with pytest.raises(ValueError, match="at least 1"):
        vocabularies.reduced("dog", "dog", 0)


def test_shares_count_the_model():
    model = next_letter.NextLetter(500, vocabularies.CONTEXT, vocabularies.EMBEDDING, vocabularies.HIDDEN)
    table = vocabularies.shares(500)
    assert table["parameters"].sum() == sum(parameter.numel() for parameter in model.parameters())
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(10, vocabularies.CONTEXT, dtype=torch.long)).sum().backward()
    # the counter's backward of the first product includes its input: the embeddings learn
    assert counter.get_total_flops() == 10 * table["flops"].sum()


def test_equal_flops_buy_fewer_steps_of_a_larger_vocabulary():
    text = "dog cat. " * 200
    small, large = (vocabularies.reduced(text, text, num) for num in (1, None))
    runs = [
        vocabularies.trained(one, 64 * 10 * vocabularies.shares(small.vocabulary)["flops"].sum())
        for one in (small, large)
    ]
    assert runs[0]["num_steps"] == 10 >= runs[1]["num_steps"]
    assert runs[0]["bits"] == pytest.approx(runs[0]["seeming_bits"] + runs[0]["naming_bits"])

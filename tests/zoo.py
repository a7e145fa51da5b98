"""Models as people bring them: hand-written ones, and configurations of transformers, all tiny."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Kind(NamedTuple):
    """How to build a model, an example for it, its loss (``None``: its own) and its optimizer (``None``: AdamW)."""

    build: Callable[[], Any]
    batch: Callable[[], Any]
    loss: Callable[[Any], torch.Tensor] | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None


def square(output: Any) -> torch.Tensor:
    for name in ("logits", "last_hidden_state", "audio_values", "prediction_outputs"):
        output = getattr(output, name, output)
    return output.float().square().mean()


def made(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """A module of these parts, whose forward is ``forward(parts, ...)``."""

    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

    return Made()


def block(width: int = 32) -> nn.Module:
    return made(lambda m, x: x + m.inner(m.norm(x)), norm=nn.LayerNorm(width),
                inner=nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)))  # fmt: skip


def stack(num: int = 3, width: int = 32) -> nn.ModuleList:
    return nn.ModuleList(block(width) for _ in range(num))


def through(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for layer in m.layers:
        x = layer(x)
    return x


def wavenet_layer(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + m.out(torch.tanh(m.filter(x)) * torch.sigmoid(m.gate(x)))


def wavenet(width: int = 8) -> nn.Module:
    def conv(dilation: int) -> nn.Module:
        return nn.Conv1d(width, width, 3, dilation=dilation, padding=dilation)

    return nn.Sequential(
        nn.Conv1d(4, width, 1),
        *(made(wavenet_layer, filter=conv(d), gate=conv(d), out=nn.Conv1d(width, width, 1)) for d in (1, 2, 4)),
    )


def mixer(tokens: int = 16, width: int = 32) -> nn.Module:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x + m.across(x.transpose(1, 2)).transpose(1, 2)
        return x + m.along(x)

    return nn.Sequential(*(
        made(forward, across=nn.Linear(tokens, tokens), along=nn.Linear(width, width)) for _ in range(2)
    ))  # fmt: skip


def layer_drop(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for layer in m.layers:
        if torch.rand([]) >= 0.1:
            x = layer(x)
    return x


def coins(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for layer in m.layers:
        if random.random() >= 0.1:
            x = layer(x)
    return x


def routed(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A mixture of experts that computes each for its own tokens only."""
    chosen = m.gate(x).argmax(-1)
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        (rows,) = torch.where(chosen == i)
        out = out.index_add(0, rows, expert(x[rows]))
    return out


def dlrm(m: nn.Module, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return m.top(torch.cat([m.bottom(x), m.bag(ids)], 1))


def graph(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Edges of a ring in every graph of the batch."""
    sources = torch.arange(x.shape[1])
    for layer in m.layers:
        x = torch.relu(layer(x + torch.zeros_like(x).index_add(1, (sources + 1) % len(sources), x[:, sources])))
    return x.mean(1)


def vae(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mean, log_var = m.encoder(x).chunk(2, -1)
    again = m.decoder(mean + torch.randn_like(mean) * (0.5 * log_var).exp())
    return (again - x).square().mean() - 0.5 * (1 + log_var - mean.square() - log_var.exp()).mean()


def contrastive(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    first, second = (F.normalize(m.encoder(F.dropout(x, 0.1, m.training)), dim=-1) for _ in range(2))
    return F.cross_entropy(first @ second.T / 0.1, torch.arange(len(x)))


def unet(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    high = torch.relu(m.down(x))
    low = torch.relu(m.deep(F.max_pool2d(high, 2)))
    return m.last(torch.cat([m.up(low), high], 1))


def capsules(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    votes = torch.einsum("bid,ijdk->bijk", x, m.weight)
    routes = torch.zeros(votes.shape[:3])
    for _ in range(3):
        out = torch.tanh((routes.softmax(-1)[..., None] * votes).sum(1))
        routes = routes + (votes * out[:, None]).sum(-1)
    return out


def coupling(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    log_det = x.new_zeros(len(x))
    for net in m.nets:
        a, b = x.chunk(2, -1)
        scale, shift = net(a).chunk(2, -1)
        x = torch.cat([b * scale.tanh().exp() + shift, a], -1)
        log_det = log_det + scale.tanh().sum(-1)
    return (0.5 * x.square().sum(-1) - log_det).mean()


def locked(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with m.lock:
        return through(m, x)


def queue(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A memory bank: its buffer is replaced at every step."""
    keys = m.encoder(x)
    logits = keys @ m.bank.T
    m.bank = torch.cat([keys.detach(), m.bank])[: len(m.bank)]
    return logits


def quantised(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    codes = torch.cdist(x, m.book.weight).argmin(-1)
    nearest = m.book(codes)
    again = x + (nearest - x).detach()
    return m.decoder(again).square().mean() + (nearest - x.detach()).square().mean()


def masked(m: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return m.encoder(m.embed(ids), src_key_padding_mask=~mask.bool())


def with_buffer(module: nn.Module, **buffers: torch.Tensor) -> nn.Module:
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
    return module


def hyper(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight = m.makes(x.mean(0)).view(8, 32)
    return x @ weight.T


def ode(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for _ in range(5):
        x = x + m.slope(x) / 5
    return x


def conv(num_in: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(num_in, num_out, 3, padding=1), nn.BatchNorm2d(num_out), nn.ReLU())


def values(*shape: int) -> Callable[[], Any]:
    return lambda: torch.randn(*shape)


def tokens(rows: int = 4, cells: int = 24, top: int = 90, **more: Callable[[], torch.Tensor]) -> Callable[[], Any]:
    def batch() -> Any:
        ids = torch.randint(3, top, (rows, cells))
        return {"input_ids": ids, "labels": ids.clone()} | {name: make() for name, make in more.items()}

    return batch


def padded() -> torch.Tensor:
    return (torch.arange(24) < torch.tensor([[24], [20], [12], [7]])).long()


def hf(name: str, **sizes: Any) -> Callable[[], Any]:
    """A model of transformers of these sizes; its configuration's class is found by its own."""

    def build() -> Any:
        kind = getattr(transformers, name)
        return kind(kind.config_class(**sizes)).train()

    return build


def own_checkpointing(name: str, **sizes: Any) -> Callable[[], Any]:
    def build() -> Any:
        model = hf(name, **sizes)()
        model.gradient_checkpointing_enable()
        return model

    return build


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "pad_token_id": 0,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 100,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2,
        "decoder_start_token_id": 2}  # fmt: skip
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
SOUND = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "vocab_size": 20,
         "mask_time_length": 2, "mask_time_prob": 0.2}  # fmt: skip
SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
         "patch_size": 8}  # fmt: skip
PERCEIVER = {"num_latents": 8, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 2,
             "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "vocab_size": 100,
             "max_position_embeddings": 24}  # fmt: skip


def sentences() -> Any:
    return tokens(attention_mask=padded)()


def images() -> Any:
    return {"pixel_values": torch.randn(4, 3, 32, 32)}


ZOO = {
    "perceptron": Kind(lambda: nn.Sequential(block(), block(), nn.Linear(32, 5)), values(16, 32), square),
    "tabular": Kind(lambda: nn.Sequential(nn.Linear(26, 64), nn.ReLU(), nn.Linear(64, 1)), values(32, 26), square),
    "mixer": Kind(mixer, values(4, 16, 32), square),
    "WaveNet": Kind(wavenet, values(4, 4, 64), square),
    "residual net with batch norm": Kind(
        lambda: nn.Sequential(conv(3, 8), conv(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        values(6, 3, 16, 16), square),
    "3D convolution": Kind(
        lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv3d(4, 4, 3)),
        values(2, 1, 8, 8, 8), square),
    "U-Net": Kind(
        lambda: made(unet, down=nn.Conv2d(3, 8, 3, padding=1), deep=nn.Conv2d(8, 16, 3, padding=1),
                     up=nn.ConvTranspose2d(16, 8, 2, 2), last=nn.Conv2d(16, 1, 3, padding=1)),
        values(4, 3, 16, 16), square),
    "LSTM": Kind(
        lambda: made(lambda m, ids: m.out(m.rnn(m.embed(ids))[0]), embed=nn.Embedding(90, 16),
                     rnn=nn.LSTM(16, 32, batch_first=True), out=nn.Linear(32, 90)),
        lambda: torch.randint(0, 90, (4, 10)), square),
    "two-way GRU": Kind(
        lambda: made(lambda m, x: m.rnn(x)[0], rnn=nn.GRU(8, 16, 2, batch_first=True, bidirectional=True)),
        values(4, 6, 8), square),
    "padded encoder": Kind(
        lambda: made(masked, embed=nn.Embedding(90, 32),
                     encoder=nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2)),
        lambda: (torch.randint(0, 90, (4, 24)), padded()), square),
    "layer drop": Kind(lambda: made(layer_drop, layers=stack()), values(8, 32), square),
    "layer drop by Python": Kind(lambda: made(coins, layers=stack()), values(8, 32), square),
    "experts that drop nothing": Kind(
        lambda: made(routed, gate=nn.Linear(32, 3), experts=stack()), values(24, 32), square),
    "sparse embeddings": Kind(
        lambda: made(dlrm, bottom=nn.Linear(13, 16), bag=nn.EmbeddingBag(500, 16, sparse=True, mode="sum"),
                     top=nn.Linear(32, 1)),
        lambda: (torch.randn(16, 13), torch.randint(0, 500, (16, 26))), square,
        lambda parameters: torch.optim.SGD(parameters, 0.1)),
    "dense embedding bags": Kind(
        lambda: made(dlrm, bottom=nn.Linear(13, 16), bag=nn.EmbeddingBag(500, 16, mode="sum"), top=nn.Linear(32, 1)),
        lambda: (torch.randn(16, 13), torch.randint(0, 500, (16, 26))), square),
    "graph network": Kind(
        lambda: made(graph, layers=nn.ModuleList(nn.Linear(16, 16) for _ in range(2))), values(4, 12, 16), square),
    "variational autoencoder": Kind(
        lambda: made(vae, encoder=nn.Linear(32, 16), decoder=nn.Linear(8, 32)), values(16, 32), lambda loss: loss),
    "contrastive": Kind(
        lambda: made(contrastive, encoder=nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))),
        values(16, 32), lambda loss: loss),
    "capsules": Kind(
        lambda: made(capsules, weight=nn.Parameter(torch.randn(6, 4, 8, 8))), values(8, 6, 8), square),
    "normalizing flow": Kind(
        lambda: made(coupling, nets=nn.ModuleList(nn.Linear(8, 16) for _ in range(3))), values(32, 16), lambda x: x),
    "a lock inside": Kind(
        lambda: made(locked, layers=stack(), lock=threading.Lock(), library=math), values(8, 32), square),
    "memory bank": Kind(
        lambda: with_buffer(made(queue, encoder=nn.Linear(32, 16)), bank=torch.randn(64, 16)), values(8, 32), square),
    "vector quantised": Kind(
        lambda: made(quantised, book=nn.Embedding(20, 32), decoder=nn.Linear(32, 32)), values(8, 6, 32), lambda x: x),
    "hypernetwork": Kind(lambda: made(hyper, makes=nn.Linear(32, 256)), values(8, 32), square),
    "neural ODE": Kind(lambda: made(ode, slope=nn.Sequential(nn.Linear(32, 32), nn.Tanh())), values(8, 32), square),
    "sines": Kind(
        lambda: made(lambda m, x: m.b(torch.sin(30 * m.a(x))), a=nn.Linear(2, 64), b=nn.Linear(64, 3)),
        values(128, 2), square),
    "points": Kind(
        lambda: made(lambda m, x: m.out(m.each(x).amax(1)), each=nn.Linear(3, 64), out=nn.Linear(64, 5)),
        values(4, 50, 3), square),
    "spectral norm": Kind(
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32)), nn.ReLU(),
                              nn.utils.parametrizations.weight_norm(nn.Linear(32, 4))),
        values(8, 32), square),
    "Fourier": Kind(
        lambda: made(lambda m, x: m.out(torch.fft.fft2(m.embed(x)).real), embed=nn.Embedding(90, 32),
                     out=nn.Linear(32, 32)),
        lambda: torch.randint(0, 90, (4, 24)), square),
    "checkpoints itself": Kind(
        lambda: made(lambda m, x: checkpoint(m.blocks, x, use_reentrant=False),
                     blocks=nn.Sequential(block(), block(), block())), values(8, 32), square),
    "checkpoints itself, by reentering": Kind(
        lambda: made(lambda m, x: checkpoint(m.blocks, m.first(x), use_reentrant=True), first=nn.Linear(32, 32),
                     blocks=nn.Sequential(block(), block(), block())), values(8, 32), square),
    "BERT": Kind(hf("BertForMaskedLM", **SMALL), sentences),
    "DeBERTa": Kind(hf("DebertaV2ForMaskedLM", **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]),
                    sentences),
    "ALBERT": Kind(hf("AlbertForMaskedLM", **SMALL, embedding_size=16), sentences),
    "GPT-2": Kind(hf("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=64), tokens()),
    "GPT-2 that checkpoints": Kind(
        own_checkpointing("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=64), tokens()),
    "Llama": Kind(hf("LlamaForCausalLM", **SMALL), sentences),
    "Mixtral": Kind(hf("MixtralForCausalLM", **SMALL, num_key_value_heads=2, num_local_experts=4), tokens()),
    "Mamba": Kind(hf("MambaForCausalLM", hidden_size=16, num_hidden_layers=2, vocab_size=100, state_size=4),
                  tokens(4, 8)),
    "T5, Adafactor": Kind(
        hf("T5ForConditionalGeneration", d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, vocab_size=100,
           decoder_start_token_id=0),
        sentences, None, lambda parameters: transformers.optimization.Adafactor(parameters)),
    "BART": Kind(hf("BartForConditionalGeneration", **BART, encoder_layerdrop=0.1, decoder_layerdrop=0.1), sentences),
    "Whisper": Kind(
        hf("WhisperForConditionalGeneration", **WHISPER),
        lambda: {"input_features": torch.randn(4, 8, 32), "labels": torch.randint(3, 90, (4, 10))}),
    "Wav2Vec2": Kind(
        hf("Wav2Vec2ForCTC", **SOUND), lambda: {"input_values": torch.randn(4, 800),
                                               "labels": torch.randint(1, 20, (4, 6))}),
    "Perceiver": Kind(hf("PerceiverForMaskedLM", **PERCEIVER), lambda: {
        "inputs": torch.randint(3, 90, (4, 24)), "labels": torch.randint(3, 90, (4, 24)), "attention_mask": padded()}),
    "PatchTST": Kind(
        hf("PatchTSTForPrediction", num_input_channels=3, context_length=64, patch_length=8, patch_stride=8, d_model=32,
           num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, prediction_length=16),
        lambda: {"past_values": torch.randn(4, 64, 3), "future_values": torch.randn(4, 16, 3)}),
    "ViT": Kind(hf("ViTModel", **SIGHT), images, square),
    "Swin": Kind(
        hf("SwinModel", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4),
        images, square),
    "SegFormer": Kind(
        hf("SegformerForSemanticSegmentation", hidden_sizes=[16, 32], depths=[1, 1], num_encoder_blocks=2,
           num_attention_heads=[1, 2], decoder_hidden_size=16), images, square),
    "masked autoencoder": Kind(hf("ViTMAEForPreTraining", **SIGHT, decoder_hidden_size=32, decoder_num_hidden_layers=1,
                                  decoder_num_attention_heads=2, decoder_intermediate_size=64), images),
}  # fmt: skip

"""Every architecture of prism: one Transformer block with a few knobs.

    feed-forward   swiglu | polyglu (each neuron mixes four activations by a learned gate)
    attention      causal (arch=decoder) | bidirectional (encoder) | merged: decoder queries over encoder and own keys (encdec)
    linear         one call site, `Linear`, whose matmul fp8.py may replace

Tokens are flat: a batch is N tokens, cut into documents by `cu` (cumulative lengths); no linear layer ever sees padding and no
document sees another. `model(batch)` gives hidden states (N, D); `model.nll` the loss, without ever holding (N, vocabulary) logits;
`model.logits(ids)` is for people; `model.step` decodes with a cache. Nothing here knows of training.

    from model import ModelConfig, build
    model = build(ModelConfig(vocab_size=257, n_layer=4))
    model.logits(torch.tensor([[1, 2, 3]])).shape            # (1, 3, 257)

Read next: ops.py (the chunked loss), kernels.py (the fused PolyGLU), cache.py (decoding), data.py (batches), train.py (the loop).
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

import lean
import ops
import replay
from cache import Cache
from configurator import die, from_dict
from flash import varlen
from kernels import ACTIVATIONS, glu, gumbel, polyglu_mix
from ops import Gather, Thin, WindowMean, attend_segments, attention, full, linear_cross_entropy, matmul32, norm_rotate, rms_norm, rotate
from tokenizer import end_of

Gate = Literal["running", "lagged", "token", "static", "sequence"]


ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # of Llama 3


@dataclass(frozen=True)
class ModelConfig:
    # the model (model.py)
    arch: Literal["decoder", "encoder", "encdec"] = "decoder"
    vocab_size: int = 257  # logical ids; rows are padded in memory to a multiple of 128
    n_layer: int = 6  # per stack
    n_head: int = 6
    n_kv_head: int = 0  # grouped queries; 0: as many as n_head
    d_model: int = 384
    head_dim: int = 0  # 0: d_model / n_head
    d_ff: int = 0  # 0: 8/3 d_model, rounded up to a multiple of 64
    max_len: int = 1024  # longest document the model accepts
    norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama-3: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    rope_bf16: bool = False  # round the rotary tables through bf16, as the published PolyGLU weights were trained
    tie: bool = True  # the head is the embedding
    embed_rank: int = 0  # factorised embedding: vocab x rank, rank x d_model; 0: full width
    ffn: Literal["swiglu", "polyglu"] = "swiglu"
    act: str | tuple[str, ...] = "silu"  # swiglu's activation, or one per layer
    acts: tuple[str, ...] = ("relu", "tanh", "silu", "gelu")  # what a polyglu neuron chooses from
    gate: Gate = "running"  # what its context gate has seen; `sequence` (as published) sees the future
    gate_enc: Gate = "sequence"  # the same in a bidirectional encoder, where nothing is hidden anyway
    gate_block: int = 256  # tokens per block of the `lagged` gate
    gate_noise: bool = True  # Gumbel noise on the routing logits, in training only
    allow_noncausal: bool = False  # run a causal decoder with gate=sequence all the same; its losses are not likelihoods
    cross_rope: Literal["none", "enc", "continue"] = "none"  # positions of encoder keys in merged attention
    n_sentinels: int = 100  # encdec: the last ids of the vocabulary mark spans
    eos_id: int | None = None  # encdec: ends either side; None: as init_from or resume has it, else what ends a document
    init_std: float = 0.02
    remat: int = 0  # recompute every k-th block in the backward pass; 0: none
    seed: int = 1337

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def width_head(self) -> int:
        return self.head_dim or self.d_model // self.n_head

    @property
    def width_ff(self) -> int:
        return self.d_ff or -(-8 * self.d_model // (3 * 64)) * 64

    @property
    def vocab_rows(self) -> int:
        return -(-self.vocab_size // 128) * 128

    @property
    def causal(self) -> bool:
        """False when a decoder's gate sees later tokens: then no loss of it is a next-token likelihood."""
        return not (self.arch != "encoder" and self.ffn == "polyglu" and self.gate == "sequence")


def check(cfg: ModelConfig) -> None:
    """Refuse what cannot be built, in one line that says what to change."""
    from_dict(ModelConfig, {key: getattr(cfg, key) for key in ModelConfig.__dataclass_fields__}, "ModelConfig")  # ffn="polygu" is no SwiGLU
    if cfg.n_head % cfg.kv_heads:
        die(f"n_kv_head={cfg.kv_heads} does not divide n_head={cfg.n_head}; take one of its divisors, or 0 for as many")
    if not cfg.head_dim and cfg.d_model % cfg.n_head:
        die(f"d_model={cfg.d_model} is not a multiple of n_head={cfg.n_head}; change one of them or set head_dim")
    if cfg.width_head % 2:
        die(f"head_dim={cfg.width_head} is odd; rotary positions need it even")
    if (rope := cfg.rope_scaling) and not all(isinstance(rope.get(key), (int, float)) and 0 < rope[key] < math.inf for key in ROPE):
        die(f"rope_scaling={rope}: give each of {', '.join(ROPE)} a number above 0")
    if isinstance(cfg.act, tuple) and len(cfg.act) != cfg.n_layer:
        die(f"act names {len(cfg.act)} activations for n_layer={cfg.n_layer} layers; give one name or one per layer")
    if not cfg.acts:
        die("acts is empty: a polyglu neuron needs at least one activation, as acts=('silu',)")
    for name in (*((cfg.act,) if isinstance(cfg.act, str) else cfg.act), *cfg.acts):
        if name not in ACTIVATIONS:
            die(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    if not cfg.causal and not cfg.allow_noncausal:
        die("gate='sequence' lets a decoder see later tokens; use gate='running', or allow_noncausal=True to run it as published")


# ---- attention ----------------------------------------------------------------------------------------------------------


class Segments:
    """Which queries see which keys: segment i pairs queries cu_q[i]:cu_q[i+1] with keys cu_k[i]:cu_k[i+1].

    Causal means aligned at the end (the last query sees every key), which is what merged attention and caches need. On a GPU the
    variable-length flash kernel (half precision only) reads `cu` itself. Elsewhere segments of like length are padded together, a few
    SDPA calls per layer, planned once per forward. count: segments, where `cu` is longer than they; window: what no segment leaves.
    """

    def __init__(self, cu_q, max_q, cu_k=None, max_k=None, causal=True, count=None, window=0):
        self.cu_q, self.max_q, self.causal = cu_q, max_q, causal
        self.cu_k, self.max_k = (cu_q, max_q) if cu_k is None else (cu_k, max_k)
        self.count = len(cu_q) - 1 if count is None else count
        self.sizes = torch.tensor([self.max_q, self.max_k, self.count, window], device="cpu")  # numbers would each be compiled anew
        self.calls = None  # the plan, made when a layer first needs it

    def plan(self):
        device = self.cu_q.device
        cu_q, cu_k = (cu[: self.count + 1].tolist() for cu in (self.cu_q, self.cu_k))
        spans = [(a, b - a, c, d - c) for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False) if b > a]
        groups: dict = {}
        for a, nq, c, nk in spans:
            groups.setdefault(((nq - 1).bit_length(), (nk - 1).bit_length()), []).append((a, nq, c, nk))
        if len({(nq, nk) for _, nq, _, nk in spans}) == 1:
            groups = {None: spans}
        self.calls = []  # (segments, padded queries, padded keys, mask, is_causal)
        slots_q, slots_k = [], []
        for group in groups.values():
            a, nq, c, nk = torch.tensor(group).unbind(1)
            q, k = torch.arange(int(nq.max())), torch.arange(int(nk.max()))
            aligned = self.causal and bool((nq == nk).all())  # then padding sits after every real query and needs no mask
            mask = None
            if not aligned and (self.causal or int(nk.min()) < len(k)):
                mask = (k < nk[:, None])[:, None, None]  # (S, 1, 1, K)
                if self.causal:
                    mask = mask & (k <= q[:, None] + (nk - nq)[:, None, None])[:, None]
            self.calls.append((len(group), len(q), len(k), mask if mask is None else mask.to(device), aligned))
            slots_q.append(torch.where(q < nq[:, None], a[:, None] + q, -1).flatten())
            slots_k.append(torch.where(k < nk[:, None], c[:, None] + k, -1).flatten())
        self.q_slots = self.gather_plan(slots_q, cu_q[-1], device)
        self.k_slots = self.gather_plan(slots_k, cu_k[-1], device)

    @staticmethod
    def gather_plan(slots, n, device):
        """(slot -> token, token -> slot, empty slots, tokens of no slot or None); None when tokens already lie as the call wants them."""
        slots = torch.cat(slots) if slots else torch.empty(0, dtype=torch.long)
        if torch.equal(slots, torch.arange(n)):
            return None
        real = slots >= 0
        home = torch.full((n,), -1)
        home[slots[real]] = real.nonzero().squeeze(1)
        lost = (home < 0).nonzero().squeeze(1).to(device) if int(real.sum()) < n else None  # keys of a segment without queries
        return slots.clamp(min=0).to(device), home.clamp(min=0).to(device), (~real).nonzero().squeeze(1).to(device), lost

    def attend(self, q, k, v):
        """q (Nq, H, E), k and v (Nk, G, E) -> (Nq, H, E). Of three ways attend_padded is the plain one. Decoding: Cache.attend."""
        fits = q.dtype == torch.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
        if q.device.type != "cpu" and fits:  # `meta` too: tests trace it as a GPU would run it
            return varlen(q, k, v, self.cu_q, self.cu_k, self.sizes, self.causal)
        y = attend_segments(q, k, v, self)
        return self.attend_padded(q, k, v) if y is None else y

    def attend_padded(self, q, k, v):
        if self.calls is None:
            self.plan()
        if self.q_slots:
            slots, home, blank, _ = self.q_slots
            q = Gather.apply(q, slots, home, None)
        if self.k_slots:
            k, v = (Gather.apply(t, *self.k_slots[:2], self.k_slots[3]) for t in (k, v))
        outs, i, j = [], 0, 0
        for count, n, m, mask, causal in self.calls:
            heads = [
                t.unflatten(0, (count, -1)).transpose(1, 2) for t in (q[i : i + count * n], k[j : j + count * m], v[j : j + count * m])
            ]
            y = attention(*heads, mask, causal)
            outs.append(y.transpose(1, 2).flatten(0, 1))
            i, j = i + count * n, j + count * m
        y = outs[0] if len(outs) == 1 else torch.cat(outs) if outs else q
        return Gather.apply(y, home, slots, blank) if self.q_slots else y


class RMSNorm(nn.Module):
    """Those of queries and keys hold a weight and are not called: Attention.turn norms and rotates in one pass."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def matmul(x, weight, bias):
    """The default of `Linear.matmul`: fp32 masters (or bf16 weights) cast to the activation dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Linear(nn.Module):
    """The one call site of every matmul inside a block. `matmul` is what fp8.py, on the layers that its filter picks, and `lean` replace,
    so that what `forward` adds to it (an adapter, say) is there on every path. Merged attention reads encoder states by `some`."""

    def __init__(self, n_in: int, n_out: int, role: str, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.role = role
        self.matmul = matmul

    def forward(self, x):
        return self.matmul(x, self.weight, self.bias)

    def some(self, x, rows: slice):
        """Only these outputs."""
        return matmul(x, self.weight[rows], None if self.bias is None else self.bias[rows])


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv, self.width, self.normed, self.eps = cfg.n_head, cfg.kv_heads, cfg.width_head, cfg.qk_norm, cfg.norm_eps
        self.qkv = Linear(cfg.d_model, (self.n_head + 2 * self.n_kv) * self.width, "qkv", cfg.qkv_bias)
        self.out = Linear(self.n_head * self.width, cfg.d_model, "o")
        self.q_norm = RMSNorm(self.width, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.width, cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x, ctx):
        queries, keys = self.n_head, self.n_kv
        qk, v = self.qkv(x).view(-1, queries + 2 * keys, self.width).split_with_sizes((queries + keys, keys), 1)  # (N, heads, E)
        q, k = self.turn(qk, ctx.rope, ctx.dtype).split_with_sizes((queries, keys), 1)
        return self.out(ctx.attend(self, q, k, v).flatten(1))

    def turn(self, qk, rope, dtype):
        """Queries and keys are normed and rotated together: half the calls."""
        return norm_rotate(qk, self.qk_weight() if self.normed else None, self.eps, rope, dtype)

    def qk_weight(self):
        """(H + G, E)"""
        return torch.cat((self.q_norm.weight.expand(self.n_head, -1), self.k_norm.weight.expand(self.n_kv, -1)))

    def encoder_keys(self, hidden, rope):
        """Keys and values of encoder states for merged attention: this layer's own k and v weights, no norm_in, no query."""
        k, v = self.qkv.some(hidden, slice(self.n_head * self.width, None)).unflatten(-1, (-1, self.width)).split(self.n_kv, dim=1)
        k = self.k_norm(k)
        return (k if rope is None else rotate(k, rope)), v


# ---- feed-forward -------------------------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.act = cfg.act if isinstance(cfg.act, str) else cfg.act[layer]
        self.gate_up = Linear(cfg.d_model, 2 * cfg.width_ff, "gate_up")
        self.down = Linear(cfg.width_ff, cfg.d_model, "down")

    def forward(self, x, ctx):
        return self.down(glu(self.gate_up(x), self.act))


class PolyGLU(nn.Module):
    """Each neuron mixes K activations by softmax((alpha_j + s + noise) / tau): alpha its own taste, s the context's wish.

    s is computed from a pooled view of the normed input. By default the pool is a running mean of the document so far. The published
    model pools the whole row, so that position t hears of later tokens: its training loss, perplexity and log-likelihoods
    are not next-token likelihoods, and `gate='sequence'` is refused in a decoder unless allow_noncausal=True.
    """

    def __init__(self, cfg: ModelConfig, gate: str, layer: int):
        super().__init__()
        self.gate, self.gate_block, self.acts, self.layer = gate, cfg.gate_block, cfg.acts, layer
        self.gate_up = Linear(cfg.d_model, 2 * cfg.width_ff, "gate_up")
        self.down = Linear(cfg.width_ff, cfg.d_model, "down")
        self.alpha = nn.Parameter(torch.zeros(cfg.width_ff, len(cfg.acts)))
        self.register_buffer("number", torch.tensor(layer), persistent=False)  # the layer for its noise: one compilation serves them all
        if gate != "static":
            self.beta = nn.Parameter(torch.ones(len(cfg.acts)))
            self.gate_net = nn.Sequential(nn.Linear(cfg.d_model, 32), nn.ReLU(), nn.Linear(32, len(cfg.acts)))

    def route(self, x, ctx):
        """Routing logits before tau: per neuron (R, f, K), with noise in training, and per token (N, K) or None."""
        alpha = full(self.alpha)[None]
        noise = ctx.noise(self) if ctx.noise else None
        if noise is not None:
            alpha = alpha + noise
        if self.gate == "static":
            return alpha, None
        first, second = self.gate_net[0], self.gate_net[2]
        pooled = Thin.apply(x, first.weight)  # (N, 32)
        if self.gate != "token":
            pooled = ctx.pool(self, pooled)
        return alpha, ops.wish(pooled, first.bias, second.weight, second.bias, self.beta)

    def forward(self, x, ctx):
        alpha, s = self.route(x, ctx)
        return self.down(polyglu_mix(self.gate_up(x), alpha / ctx.tau, None if s is None else s / ctx.tau, self.acts))


# ---- the stacks ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int, gate: str):
        super().__init__()
        self.norm1 = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg, layer)
        self.norm2 = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.ffn = PolyGLU(cfg, gate, layer) if cfg.ffn == "polyglu" else SwiGLU(cfg, layer)

    def forward(self, x, ctx):
        x = x + self.attn(self.norm1(x), ctx)
        return x + self.ffn(self.norm2(x), ctx)


class Stack(nn.Module):
    """What training, decoding and embedding all go through, from token vectors to the final norm."""

    def __init__(self, cfg: ModelConfig, gate: str):
        super().__init__()
        self.remat = cfg.remat
        self.blocks = nn.ModuleList(Block(cfg, i, gate) for i in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)

    def forward(self, x, ctx):
        again = self.remat if self.training and torch.is_grad_enabled() else 0
        for i, block in enumerate(self.blocks):
            x = recompute(block, x, ctx, use_reentrant=False) if again and i % again == 0 else block(x, ctx)
        return self.norm(x)


def borders(pos, cu):
    """Of each token: its place in the batch, where its document begins, where that ends, and its number."""
    here = torch.arange(len(pos), device=pos.device)
    after = torch.searchsorted(cu, here.to(cu.dtype), right=True)
    return here, here - pos, cu.long()[after], after - 1


class Packed:
    """What the blocks share during one forward over flat documents: positions, attention, the gate's pool and noise."""

    def __init__(self, model, pos, cu, max_len, causal, rows=None, merge=None, count=None, window=0):
        if max_len > model.cfg.max_len:
            die(f"a document of {max_len} tokens is longer than max_len={model.cfg.max_len}; raise it or cut the text")
        self.pos, self.cu, self.tau, self.merge = pos, cu, model.tau, merge
        self.rope, self.dtype = model.rope(pos), model.dtype
        self.borders = borders(pos, cu) if model.cfg.ffn == "polyglu" else None
        self.segments = merge.segments if merge else Segments(cu, max_len, causal=causal, count=count, window=window)
        noisy = model.training and model.cfg.gate_noise and model.cfg.ffn == "polyglu"
        if noisy and rows is None:
            die("gate_noise needs the global row numbers of the batch (rows); data.py gives them")
        stack = 0 if causal else model.cfg.n_layer  # encoder layers draw their own noise
        self.noise = model.noise or ((lambda ffn: gumbel(model.cfg.seed, rows, stack + ffn.number, *ffn.alpha.shape)) if noisy else None)

    def attend(self, attn, q, k, v):
        if self.merge:
            ke, ve = attn.encoder_keys(self.merge.hidden, self.merge.rope)
            k, v = (Gather.apply(torch.cat(pair), self.merge.index, self.merge.back, None) for pair in ((ke, k), (ve, v)))
        return self.segments.attend(q, k, v)

    def pool(self, ffn, p):
        """Mean of p over the part of its document that each token's gate may see; a loud document before it leaves no trace."""
        here, start, stop, _ = self.borders
        if ffn.gate == "sequence":
            return WindowMean.apply(p, start, stop, None, None)
        if ffn.gate == "running":
            return WindowMean.apply(p, start, here + 1, here, stop)
        block = start + self.pos // ffn.gate_block * ffn.gate_block  # lagged: up to where this token's block begins
        return WindowMean.apply(p, start, block, torch.minimum(block + ffn.gate_block, stop), stop)


@dataclass
class Merge:
    """The encoder's side of merged attention: states, rotary tables of its keys (or None), and how keys are laid out."""

    hidden: torch.Tensor
    rope: tuple | None
    index: torch.Tensor  # cat(encoder, decoder)[index] = [enc_b ; dec_b] for every example b
    back: torch.Tensor  # its inverse
    segments: Segments


class Embedding(nn.Module):
    """Token vectors, full width or factorised into vocab x rank and rank x width; the tied head reads the same tensors."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.vocab_rows, cfg.embed_rank or cfg.d_model))
        self.proj = Linear(cfg.embed_rank, cfg.d_model, "proj") if cfg.embed_rank else None

    def forward(self, ids, dtype):
        x = F.embedding(ids, self.weight).to(dtype)
        return self.proj(x) if self.proj else x


class Transformer(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        check(cfg)
        self.cfg = cfg
        self.dtype = torch.float32  # of activations; weights may be fp32 masters all the same
        self.embed = Embedding(cfg)
        self.encoder = Stack(cfg, cfg.gate_enc) if cfg.arch != "decoder" else None
        self.decoder = Stack(cfg, cfg.gate) if cfg.arch != "encoder" else None
        self.head = None if cfg.tie else Linear(cfg.d_model, cfg.vocab_rows, "head")
        self.register_buffer("inv_freq", inverse_frequencies(cfg), persistent=False)
        self.register_buffer("tau", torch.tensor(1.0), persistent=False)  # filled in place, so that no graph depends on its value
        self.noise: Callable | None = None  # an experiment may inject its own routing noise: ffn -> (R, f, K)

    # -- reading text

    def rope(self, pos):
        angle = pos.to(self.inv_freq.dtype)[:, None, None] * self.inv_freq  # (N, 1, E/2)
        cos, sin = angle.cos(), angle.sin()
        tables = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return tuple(t.bfloat16().to(t.dtype) for t in tables) if self.cfg.rope_bf16 else tables

    def embed_tokens(self, ids):
        return self.embed(ids, self.dtype)

    def forward(self, batch: dict) -> torch.Tensor:
        """Hidden states (N, D) after the final norm: of the decoder, or of the encoder when there is nothing else.

        A batch holds ids (or embeds, (N, D)), pos, cu, max_len; docs: their number, if cu is longer; window: tokens of a row, which no
        document leaves. An encoder-decoder's: dec_ids, dec_pos, dec_cu, dec_max_len, too.
        """
        if self.encoder is None:
            return self.read(self.decoder, batch, causal=True)
        hidden = self.encode(batch)
        if self.decoder is None or "dec_ids" not in batch:
            return hidden
        cross, pos, cu, dec_cu, longest = self.cfg.cross_rope, batch["dec_pos"], batch["cu"], batch["dec_cu"], batch["dec_max_len"]
        enc, dec = borders(batch["pos"], cu), borders(pos, dec_cu)
        back = torch.cat((enc[0] + dec_cu[enc[3]], dec[0] + cu[dec[3] + 1]))  # behind the other side of the examples before; of its own
        index = torch.empty_like(back).scatter_(0, back, torch.arange(len(back), device=back.device))
        segments = Segments(dec_cu, longest, cu + dec_cu, batch["max_len"] + longest)
        merge = Merge(hidden, None if cross == "none" else self.rope(batch["pos"]), index, back, segments)
        ctx = Packed(self, pos, dec_cu, longest, True, batch.get("rows"), merge)
        if cross == "continue":  # rotary positions go on where the encoder's end; the gate counts the decoder's own tokens
            ctx.rope = self.rope(pos + cu.diff()[dec[3]])
        return self.decoder(self.embed_tokens(batch["dec_ids"]), ctx)

    def encode(self, batch):
        """Bidirectional states (N, D) of the encoder."""
        return self.read(self.encoder, batch, causal=False)

    def read(self, stack, batch, causal):
        x = batch["embeds"].to(self.dtype) if "embeds" in batch else self.embed_tokens(batch["ids"])
        more = {"count": batch.get("docs"), "window": batch.get("window", 0)}
        return stack(x, Packed(self, batch["pos"], batch["cu"], batch["max_len"], causal, batch.get("rows"), **more))

    # -- predicting tokens

    def head_input(self, hidden):
        """A factorised head reads hidden states in the embedding's rank: logits = E (P^T h)."""
        return matmul(hidden, self.embed.proj.weight.T, None) if self.factorised else hidden

    @property
    def factorised(self) -> bool:
        return self.head is None and self.embed.proj is not None

    @property
    def head_weight(self):
        return self.embed.weight if self.head is None else self.head.weight

    def nll(self, hidden, targets):
        """Summed negative log-likelihood, and each token's without gradient; logits exist a chunk at a time, and `predict` is not asked.
        The plain way: each = F.cross_entropy(self.predict(hidden), targets, reduction="none"); return each.sum(), each.detach()"""
        return linear_cross_entropy(self.head_input(hidden), self.head_weight, targets, self.cfg.vocab_size)

    @torch.no_grad()
    def hits(self, hidden, targets) -> int:
        """How many targets are the likeliest token; logits exist for 2,048 of them at a time."""
        real = targets != -100
        parts = zip(hidden[real].split(2048), targets[real].split(2048), strict=True)
        return int(sum((self.predict(h).argmax(-1) == t).sum() for h, t in parts))  # the host waits once

    def predict(self, hidden):
        """Logits (..., V) in fp32, padding rows left out. What changes them here (a cap, a bias) must change `nll`, too."""
        return self.head_product(self.head_input(hidden))

    def head_product(self, x):
        """`lean` replaces it; without gradients a GPU never rounds it to bf16."""
        weight = self.head_weight[: self.cfg.vocab_size]
        if torch.is_grad_enabled():
            return full(matmul(x, weight, None))
        return full(matmul32(x.flatten(0, -2), weight.to(x.dtype).t())).unflatten(0, x.shape[:-1])

    def logits(self, ids, enc_ids=None):
        """(B, T) ids -> (B, T, V); an encoder-decoder reads enc_ids (B, S) first."""
        batch = rectangle(ids) if enc_ids is None else merged_rectangle(enc_ids, ids)
        return self.predict(self(batch)).unflatten(0, ids.shape)

    def new_cache(self, batch: int, max_len: int) -> Cache:
        if self.decoder is None or not self.cfg.causal:
            die("a cache needs a causal decoder; an encoder, or gate='sequence', must read the whole text at every token")
        return Cache(self, batch, max_len)

    @torch.no_grad()
    def read_encoder(self, batch, cache: Cache):
        """Encode B examples and keep what every decoder layer reads of them in the cache."""
        hidden = self.encode(batch)
        rope = None if self.cfg.cross_rope == "none" else self.rope(batch["pos"])
        lengths = batch["cu"].diff()
        row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=len(hidden))
        cache.enc_mask = (torch.arange(batch["max_len"], device=lengths.device) < lengths[:, None])[:, None, None]
        cache.enc = []
        for block in self.decoder.blocks:
            padded = []
            for t in block.attn.encoder_keys(hidden, rope):  # (N, G, E)
                rect = t.new_zeros(len(lengths), t.shape[1], batch["max_len"], t.shape[2], dtype=cache.dtype)
                rect[row, :, batch["pos"]] = t.to(cache.dtype)
                padded.append(rect)
            cache.enc.append(padded)

    @torch.no_grad()
    def step(self, ids, cache: Cache, count: list[int] | None = None, embeds=None):
        """Read the next ids (B, T), the first count[b] of each row being real, and return hidden states (B, T, D)."""
        if ids.is_cuda and ids.shape[1] == 1 and count is None and embeds is None and replay.ready(self, cache):
            return cache.replay(ids, cache)
        cache.begin(self, ids, count)
        x = self.embed_tokens(ids.flatten()) if embeds is None else embeds.to(self.dtype).flatten(0, 1)
        hidden = self.decoder(x, cache).unflatten(0, ids.shape)
        cache.end()
        return hidden

    # -- as it is used

    def lean(self, rows: int = 1, head: bool = True):
        """Lay out the weights for reading `rows` tokens at once, for good: this model is not trained any more. head: it also predicts.

        Matmuls then read weights in the activation dtype (a fp32 master cast at every token costs most of the time of decoding).
        """
        fast = self.dtype != torch.float64 and self.embed.weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        parts = [module for module in self.modules() if isinstance(module, (Linear, Embedding))]
        for module in parts:
            module.weight.data = module.weight.data.to(self.dtype)
        for module in parts if fast else ():
            if isinstance(module, Linear):
                module.matmul = lean.in_place_of(matmul, module, rows)
        for module in self.modules():
            if isinstance(module, PolyGLU) and module.gate != "static" and module.alpha.is_cuda:
                module.gate_net[0].weight.data = module.gate_net[0].weight.data.to(self.dtype)  # as Thin would, at every token
            if isinstance(module, Attention):
                weight = module.qk_weight().detach() if module.normed else None
                module.qk_weight = lambda weight=weight: weight
        if fast and head:
            head = lean.laid_out(self.head_weight, rows)
            self.head_product = lambda x: head(x)[..., : self.cfg.vocab_size].float()
        if fast and lean.streams(self.embed.weight, rows):
            self.dtype = torch.float32  # of activations
        return self

    def set_dtype(self, dtype: torch.dtype):
        """The dtype of activations and matmuls; parameters keep theirs."""
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            die(f"dtype {dtype} is not supported; use float32 or bfloat16")
        self.dtype = dtype
        return self

    def num_params(self) -> int:
        """Parameters of the model as published: padding rows of the vocabulary are not counted."""
        padding = (self.cfg.vocab_rows - self.cfg.vocab_size) * (
            self.embed.weight.shape[1] + (0 if self.head is None else self.cfg.d_model)
        )
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self, length: int) -> float:
        """Of a decoder: forward and backward, causal attention counted at half, the embedding look-up not at all, the head included."""
        cfg = self.cfg
        linear = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear) and m is not self.head)
        head = cfg.vocab_size * self.head_weight.shape[1] + (self.embed.proj.weight.numel() if self.factorised else 0)
        return 6.0 * (linear + head) + 6.0 * cfg.n_layer * length * cfg.n_head * cfg.width_head


def inverse_frequencies(cfg: ModelConfig) -> torch.Tensor:
    width = cfg.width_head
    freq = cfg.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    if not cfg.rope_scaling:
        return freq
    # Llama 3: long wavelengths are stretched by `factor`, short ones left alone, a linear ramp in between
    s = cfg.rope_scaling
    turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
    ramp = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return freq * (ramp + (1 - ramp) / s["factor"])


def rectangle(ids: torch.Tensor) -> dict:
    """B whole documents of equal length as a flat batch."""
    rows, width = ids.shape
    pos = torch.arange(width, device=ids.device).repeat(rows)
    cu = torch.arange(rows + 1, dtype=torch.int32, device=ids.device) * width
    return {"ids": ids.flatten(), "pos": pos, "cu": cu, "max_len": width, "window": width, "rows": torch.arange(rows, device=ids.device)}


def merged_rectangle(enc_ids, dec_ids) -> dict:
    """B examples of S encoder and T decoder tokens each as a flat two-sided batch."""
    dec = rectangle(dec_ids)
    return rectangle(enc_ids) | {f"dec_{name}": dec[name] for name in ("ids", "pos", "cu", "max_len")}


def build(cfg: ModelConfig, device: str = "cpu") -> Transformer:
    """A freshly initialised model in training mode, fp32, the same for the same seed. device='meta' gives shapes without memory.
    Every matrix is drawn here, whatever its __init__ put into it: one that begins at zero is named below, as `alpha` is."""
    if device == "meta":
        with torch.device("meta"):
            return Transformer(cfg)
    model = Transformer(cfg)
    generator = torch.Generator().manual_seed(cfg.seed)
    residual = (2 * cfg.n_layer) ** -0.5  # 2 n_layer branches add up in the residual stream
    for name, p in model.named_parameters():
        with torch.no_grad():
            if name.endswith(("bias", "alpha")):
                p.zero_()
            elif p.dim() > 1:
                std = cfg.embed_rank**-0.5 if name == "embed.proj.weight" else cfg.init_std
                p.normal_(0.0, std * (residual if name.endswith(("attn.out.weight", "ffn.down.weight")) else 1.0), generator=generator)
    model.head_weight.data[cfg.vocab_size :] = 0
    model.embed.weight.data[cfg.vocab_size :] = 0
    return model.to(device)


def compile_blocks(model):
    """Compile every block, in place, by itself: one compilation of ten seconds serves all layers, and data parallel wrappers, which work
    between blocks, stay out of it. What a graph loses at a block's borders is one pass over the residual stream."""
    Segments.attend_padded = torch.compiler.disable(Segments.attend_padded)  # every batch has a plan of its own, each would be compiled
    torch._dynamo.config.recompile_limit = 64  # phases of precision, encoders and decoders; past torch's 8 it would go on uncompiled
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)
    return model


def pool(hidden, batch, how="mean", normalize=True):
    """One fp32 vector per document, (S, D): mean, weighted_mean (later tokens count more), cls (the first state) or last."""
    x, cu, pos = full(hidden), batch["cu"].long(), batch["pos"]
    length = cu.diff()[:, None]
    if how in ("cls", "last"):
        pooled = x[cu[:-1] if how == "cls" else cu[1:] - 1]
    else:
        weight = torch.ones_like(pos) if how == "mean" else pos + 1
        doc = torch.repeat_interleave(torch.arange(len(length), device=x.device), length[:, 0], output_size=len(x))
        pooled = x.new_zeros(len(length), x.shape[1]).index_add_(0, doc, x * weight[:, None])
        pooled = pooled / (length if how == "mean" else length * (length + 1) / 2)
    return F.normalize(pooled, dim=-1) if normalize else pooled


class Embedder(nn.Module):
    """Texts -> vectors: hidden states of a run's encoder (of a decoder-only run: causal ones), pooled over real tokens, in fp32.

    Embedder.load(RUN or sentence-transformers folder).encode(texts) -> numpy float32 (n, d). Texts are read without padding, by default
    in the dtype that the machine is fast in: bf16 moves a vector by a cosine of 1e-4 (LOG.md); dtype=torch.float32 is exact.
    """

    def __init__(self, model, tok, pooling="mean", normalize=True, max_length=512, append_eos=True, causal=None):
        super().__init__()
        if pooling not in ("mean", "cls", "last", "weighted_mean"):
            die(f"pooling={pooling!r}: known are mean, cls, last, weighted_mean")
        self.model, self.tok, self.pooling, self.normalize, self.append_eos = model, tok, pooling, normalize, append_eos
        self.max_length, self.eos = min(max_length, model.cfg.max_len), end_of(model.cfg, tok)
        self.causal = model.encoder is None if causal is None else causal  # False on a decoder: its mask removed

    @classmethod
    def load(cls, path, device="cpu", dtype=None, **settings):
        from machine import find
        from prepare.sentence import read  # knows both kinds of folders

        dtype = dtype or find(str(device)).dtype
        model, tok, found = read(path)
        if model.encoder is None and settings.get("causal") is None:
            print(f"{path}: a decoder, read causally as it was trained; causal=False removes its mask", file=sys.stderr)
        return cls(model.set_dtype(dtype).to(device).eval().lean(2048, head=False), tok, **found | settings)

    def forward(self, batch):
        """-> hidden (N, D), pooled (S, D) in fp32."""
        stack = self.model.decoder if self.model.encoder is None else self.model.encoder
        plain = self.causal == (stack is self.model.decoder)
        hidden = self.model(batch) if plain else self.model.read(stack, batch, causal=self.causal)
        return hidden, pool(hidden, batch, self.pooling, self.normalize)

    def rows(self, texts, max_length=0):
        """What the exported tokenizer makes of each text: cut, then EOS; an empty text is one EOS."""
        rows = [ids[: (max_length or self.max_length) - self.append_eos] for ids in self.tok.encode_many(texts)]
        return [[*ids, self.eos] if self.append_eos or not ids else ids for ids in rows]

    @torch.no_grad()
    def encode(self, texts, batch_size: int = 1 << 30, max_length: int = 0, batch_tokens: int = 0):
        batch_tokens = batch_tokens or (2048 if self.model.embed.weight.device.type == "cpu" else 8192)  # few enough for a CPU's last cache
        rows = self.rows([texts] if isinstance(texts, str) else texts, max_length)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        vectors, at = torch.empty(len(rows), self.model.cfg.d_model, device=self.model.embed.weight.device), 0
        while at < len(order):
            take = order[at : at + max(1, min(batch_size, batch_tokens // len(rows[order[at]])))]
            vectors[take] = self(flat([rows[i] for i in take], vectors.device))[1].float()
            at += len(take)
        vectors = vectors.cpu()
        return vectors[0].numpy() if isinstance(texts, str) else vectors.numpy()


def flat(rows: list[list[int]], device="cpu") -> dict:
    """Lists of ids of any lengths as one flat batch."""
    length = torch.tensor([len(row) for row in rows])
    cu = F.pad(length.cumsum(0), (1, 0))
    pos = torch.arange(int(cu[-1])) - cu[:-1].repeat_interleave(length)
    batch = {"ids": torch.tensor([i for row in rows for i in row]), "pos": pos, "cu": cu.int()}
    return {key: t.to(device, non_blocking=True) for key, t in batch.items()} | {"max_len": int(length.max())}

"""LatentWire: one encoder turns a text into a short packet of vectors that several frozen, different language models read instead.

    text --encoder--> Z (M, d_z) --codec--> Z' --adapter of model m--> P_m (M, d_m) --input embeddings--> frozen model m --> answer

    python train.py config/latent_toy.py          objective latent; `make latent` does all of it from nothing
    python sample.py --ckpt=out/latent            text in, one answer per frozen model out
    python -m eval.latent --ckpt=out/latent       every arm and control, in bytes and in tokens

The frozen models are run directories; they are neither trained nor saved, their fingerprints are. Everything is flat: packets of any
lengths lie behind one another, cut by `z_cu`. What was measured to matter: the reader starts from a pretrained model, and slots pool the
text in order. Read next: wire.py (bytes), latent_data.py (layouts, batches), eval/latent.py (what it is worth).
"""

import dataclasses
import hashlib
import math
import sys
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint
import configurator
import latent_data
import needs
import tokenizer
from beams import greedy
from configurator import die
from machine import to_device
from model import Embedding, Linear, ModelConfig, Segments, Transformer, full
from model import build as build_transformer
from wire import decode, encode, over_wire

# ---- the encoder --------------------------------------------------------------------------------------------------------


def reader_of(lm: Transformer, layers: int, causal: bool, blocks: int = 0, seed: int = 0) -> Transformer:
    """The first layers of a pretrained model as a model of its own, without a head; bidirectional unless `causal`.

    A decoder and an encoder have the same blocks, so only the mask is lifted. `blocks` more of the same shape are put on top.
    """
    side, gate = ("decoder", lm.cfg.gate) if lm.encoder is None else ("encoder", lm.cfg.gate_enc)
    if (keep := layers or lm.cfg.n_layer) > lm.cfg.n_layer:
        die(f"latent_layers={keep}, but the reader has {lm.cfg.n_layer}; use 0 for all")
    to = "decoder" if causal else "encoder"
    act = lm.cfg.act if isinstance(lm.cfg.act, str) else (*lm.cfg.act[:keep], *lm.cfg.act[-1:] * blocks)
    shape = dict(arch=to, n_layer=keep + blocks, act=act, tie=True, max_len=1 << 20, gate_enc=gate, gate_noise=False, seed=seed)
    reader = build_transformer(dataclasses.replace(lm.cfg, **shape))
    old = {k.replace(side + ".", to + ".", 1): v for k, v in lm.state_dict().items() if k.startswith((side, "embed"))}
    new = reader.state_dict()
    reader.load_state_dict({k: old[k].to(v) if k in old and block_number(k) < keep else v for k, v in new.items()})
    reader.tau.copy_(lm.tau)
    return reader


def block_number(name):
    return int(name.split(".")[2]) if ".blocks." in name else -1


class Encoder(nn.Module):
    """Source tokens -> Z. lm, pool: states pooled block by block; byte: queries read in front; query: cross-attention; sent: one mean."""

    def __init__(self, cfg, reader: Transformer, trained: bool, slots: int):
        super().__init__()
        self.kind, width, d_z = cfg.latent_encoder, reader.cfg.d_model, cfg.latent_dim
        if trained:
            self.reader = reader
        self.readers = [reader]  # a frozen reader is no part of the checkpoint
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, d_z)
        self.slot = nn.Parameter(torch.randn(slots, d_z) * 0.02)
        if self.kind in ("byte", "query"):
            self.queries = nn.Parameter(torch.randn(slots, width) * (0.02 if self.kind == "byte" else 1.0))
        if self.kind == "query":
            self.heads = reader.cfg.n_head
            self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
            self.gate = nn.Linear(width, width)

    def forward(self, batch):
        """-> shared slots Z (sum M, d_z), and the states (sum M, width) that they were made of"""
        reader, slot = self.readers[0], batch["slot"]
        if self.kind == "byte":
            ids = reader.embed_tokens(batch["ids"])
            embeds = ids.index_copy(0, batch["query_at"], self.queries[slot].to(ids))
            x = reader(batch | {"embeds": embeds})[batch["query_at"]]
        else:
            states = reader(batch)  # (N, width)
            if self.kind in ("lm", "pool"):
                x = mean_of(states[batch["pool"]], batch["pool_to"], len(slot))
            elif self.kind == "sent":
                mean = mean_of(states, batch["text_of"], len(batch["z_cu"]) - 1)
                x = mean.repeat_interleave(batch["z_cu"].diff(), dim=0, output_size=len(slot))
            else:
                asked = self.queries[slot]
                q = self.q(asked).unflatten(-1, (self.heads, -1))  # (sum M, H, E)
                k, v = self.kv(full(states)).unflatten(-1, (2, self.heads, -1)).unbind(1)
                see = Segments(batch["z_cu"], batch["z_max"], batch["cu"], batch["max_len"], causal=False)
                x = see.attend(q, k, v).flatten(1)
                x = asked + torch.sigmoid(self.gate(asked)) * x
        x = self.norm(full(x))
        return self.out(x) + self.slot[slot], x


class Private(nn.Module):
    """The slots of one model alone: each is a stretch of the shared slots' states, of which this model may need something else."""

    def __init__(self, cfg, width):
        super().__init__()
        self.out = nn.Linear(width, cfg.latent_dim)
        self.slot = nn.Parameter(torch.randn(cfg.latent_private, cfg.latent_dim) * 0.02)

    def forward(self, states, batch):
        n = len(batch["z_cu"]) - 1
        x = mean_of(states[batch["own"]], batch["own_to"], n * len(self.slot))
        return self.out(x) + self.slot.repeat(n, 1)  # (B k, d_z)


def mean_of(x, to, n):
    """Rows of x averaged into n bins: x (P, D), to (P,) -> (n, D)"""
    total = full(x).new_zeros(n, x.shape[1]).index_add(0, to, full(x))
    return total / total.new_zeros(n).index_add(0, to, total.new_ones(len(to))).clamp(min=1)[:, None]


# ---- adapters -----------------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """Z -> vectors that look like one model's word vectors: they begin as the mean word vector plus noise, at the words' own rms."""

    def __init__(self, cfg, lm: Transformer):
        super().__init__()
        with torch.no_grad():
            table = lm.embed_tokens(torch.arange(lm.cfg.vocab_size, device=lm.embed.weight.device)).float()  # (V, d_m)
            rms = float(table.square().mean().sqrt())  # once: a fresh sample every step would make the target wander
        d_z, d_m, hidden = cfg.latent_dim, table.shape[1], cfg.adapter_hidden or 4 * cfg.latent_dim
        if cfg.adapter == "mlp":
            self.net = nn.Sequential(nn.Linear(d_z, hidden), nn.GELU(), nn.Linear(hidden, d_m))
        else:
            self.net = nn.Sequential(nn.LayerNorm(d_z), nn.Linear(d_z, d_m))
        out = self.net[-1]
        nn.init.normal_(out.weight, std=float(table.std()) / math.sqrt(out.in_features / 4))
        out.bias.data.copy_(table.mean(0))
        self.words_rms, self.rms = rms, {"embed_rms": rms, "fixed": cfg.prefix_rms, "none": 0.0}[cfg.calibration]
        if self.rms:
            self.gain = nn.Parameter(torch.ones(()))
        else:  # nothing to learn or to save, but evaluation may turn it
            self.register_buffer("gain", torch.ones(()), persistent=False)

    def calibrate(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-12).rsqrt() * (self.rms * self.gain) if self.rms else x * self.gain

    def forward(self, z):
        return self.calibrate(self.net(z))


# ---- the losses ---------------------------------------------------------------------------------------------------------


def answer_sums(logits, goal, step, k: int, teacher=None, tau: float = 1.0) -> dict:
    """All answer terms from one set of logits (n, V): `goal` the targets, `step` each one's place in its answer. -> {term: sum}"""
    ce = F.cross_entropy(logits, goal, reduction="none")  # (n,)
    early = step < k
    out = {"ans": ce.sum(), "first": (ce * (step == 0)).sum(), "k": (ce * early).sum()}
    out["first_right"] = ((logits.detach().argmax(-1) == goal) & (step == 0)).float().sum()
    if teacher is not None:  # KL(teacher || student) of the first k steps; teacher logits come in the same order
        p, q = (teacher / tau).log_softmax(-1), (logits[early] / tau).log_softmax(-1)
        out["kd"] = tau * tau * F.kl_div(q, p, log_target=True, reduction="sum")
    return out


def weights(cfg) -> dict[str, float]:
    """What each term of each model counts in the loss; the share of right first tokens and the rms of slots are only logged."""
    terms = dict(ans=cfg.w_ans, first=cfg.w_first, k=cfg.w_k, kd=cfg.w_kd, ae=cfg.w_ae, ae_qa=cfg.w_ae_qa, lm=cfg.w_lm)
    terms |= dict.fromkeys(("first_right", "rms_raw", "rms_cal"), 0.0)
    return {f"{term}/{m}": w for term, w in terms.items() for m in range(len(cfg.lms))}


class Interlingua(nn.Module):
    """Encoder and adapters (trained, saved) around frozen models (neither)."""

    def __init__(self, cfg):
        super().__init__()
        latent_data.check(cfg)
        self.cfg = cfg
        self.lms = [frozen(path) for path in cfg.lms]
        for m, lm in enumerate(self.lms):  # a checkpoint fits these very models and no others: its tensors' names say so
            if lm.cfg.arch != "decoder":
                die(f"{cfg.lms[m]} is an {lm.cfg.arch}; packets are read by decoders (an encoder may be the latent_reader)")
            self.register_buffer(f"lm{m}_sha256_{fingerprint(lm).hex()}", torch.ones(1))
        self.register_buffer("tau", torch.ones(()), persistent=False)
        torch.manual_seed(cfg.seed)
        trained = cfg.latent_encoder in ("lm", "pool", "byte")
        if own_blocks(cfg):
            shape = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(ModelConfig)}
            shape |= {"arch": "encoder", "vocab_size": 257, "max_len": 1 << 20, "gate_noise": False}
            reader = build_transformer(configurator.from_dict(ModelConfig, shape, "config"))
        else:
            lm = dict(zip(cfg.lms, self.lms, strict=True)).get(path := cfg.latent_reader or cfg.lms[0]) or frozen(path)
            causal = not trained and lm.encoder is None
            reader = reader_of(lm, cfg.latent_layers, causal, cfg.latent_blocks, cfg.seed)
            old = reader.cfg.n_layer - cfg.latent_blocks
            for name, p in reader.named_parameters():
                p.requires_grad_(trained and (not cfg.latent_frozen or block_number(name) >= old or "coder.norm." in name))
        slots = -(-(cfg.seq_len + 1) // cfg.latent_ratio) if cfg.latent_ratio else cfg.latent_len
        self.encoder = Encoder(cfg, reader, trained, slots)
        if known := {name for name, p in reader.named_parameters() if not p.requires_grad}:  # no part of the checkpoint: their hash is
            self.encoder.register_buffer(f"reader_sha256_{fingerprint(reader, known).hex()}", torch.ones(1))

            def leave_out(module, state, prefix, info):
                for name in known:
                    del state[prefix + name]

            reader.register_state_dict_post_hook(leave_out)
        self.adapters = nn.ModuleList(Adapter(cfg, lm) for lm in self.lms)
        self.private = nn.ModuleList(Private(cfg, reader.cfg.d_model) for _ in cfg.lms if cfg.latent_private)
        self.sides, self.reader = layouts(cfg)
        if cfg.latent_from:
            take_encoder(self.encoder, cfg, None if own_blocks(cfg) else lm)

    def others(self):  # the frozen models: unregistered, they follow by hand
        return [*self.lms, *(r for r in self.encoder.readers if r is not getattr(self.encoder, "reader", None))]

    def _apply(self, fn, *args, **kwargs):
        for model in self.others():
            model._apply(fn)
        return super()._apply(fn, *args, **kwargs)

    def set_dtype(self, dtype):
        """Of activations; frozen matrices that no checkpoint holds take it too, for no step of an optimizer will ever need more of them."""
        for model in (*self.lms, *self.encoder.readers):
            saved = self.cfg.latent_from and model not in self.others()
            for module in model.set_dtype(dtype).modules():
                if isinstance(module, (Linear, Embedding)) and not (saved or module.weight.requires_grad):
                    module.weight.data = module.weight.data.to(dtype)
        return self

    @property
    def device(self):
        return self.tau.device

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    # -- forward

    def packets(self, batch):
        """Source batch -> of each model all its packets (P, d_z), cut by packet_cu: shared slots, then those that only it gets."""
        z, states = self.encoder(batch)
        if not self.private:
            return [z[batch["packet"]]] * len(self.lms)
        return [torch.cat((z, private(states, batch)))[batch["packet"]] for private in self.private]

    def embeds(self, m, ids, slot_at, vectors):
        """Input embeddings of model m: words, and what its adapter made of slots where these are."""
        words = self.lms[m].embed_tokens(ids)
        return words if vectors is None else words.index_copy(0, slot_at, vectors.to(words.dtype))

    def side_sums(self, m, z, part, teacher):
        """One forward of model m; answers, reconstruction and continuation are documents of the same flat batch."""
        lm, cfg, adapter = self.lms[m], self.cfg, self.adapters[m]
        vectors = adapter.calibrate(raw := adapter.net(z))  # (P, d_m), once for all documents of a packet
        hidden = lm(part | {"embeds": self.embeds(m, part["ids"], part["slot_at"], vectors[part["slot_z"]])})  # (N, d_m)
        out = {f"rms_{name}": x.detach().square().mean(-1).sqrt().sum() for name, x in (("raw", raw), ("cal", vectors))}
        for kind in ("ae", "ae_qa", "lm"):
            if f"{kind}.at" in part:
                out[kind] = lm.nll(hidden[part[f"{kind}.at"]], part[f"{kind}.goal"])[0]
        if "ans.at" in part:
            logits = lm.predict(hidden[part["ans.at"]])
            out |= answer_sums(logits, part["ans.goal"], part["ans.step"], cfg.first_k, teacher, cfg.kd_tau)
        return {f"{term}/{m}": value for term, value in out.items()}

    @torch.no_grad()
    def teacher(self, lm, part):
        """The same model reading the whole text, at the places that predict the first k answer tokens."""
        return lm.predict(lm(part)[part["kd.at"]])

    def forward(self, batch):
        out, packets = {}, self.packets(batch)
        sent = {id(z): over_wire(z, batch["packet_cu"], batch["bits"]) for z in packets}  # one for all, where nobody has slots of his own
        for m, (lm, z) in enumerate(zip(self.lms, packets, strict=True)):
            part = {k.removeprefix(f"{m}."): v for k, v in batch.items() if k.startswith(f"{m}.")}
            text = {k.removeprefix("teacher."): v for k, v in part.items() if k.startswith("teacher.")}
            teacher = self.teacher(lm, text) if text else None  # logits of the first k tokens: small enough to be kept
            given = m, sent[id(z)], part, teacher
            # sequential: activations of one model live at a time, kept as z, made again in its turn of the backward
            out |= recompute(self.side_sums, *given, use_reentrant=False) if self.cfg.sequential else self.side_sums(*given)
        return out

    # -- answering

    @torch.no_grad()
    def latents(self, sources):
        """Lists of source ids -> what their packets hold, for each model a list of (M, d_z)."""
        batch = to_device(self.reader.collate(sources), self.device)
        return [z.split(batch["packet_cu"].diff().tolist()) for z in self.packets(batch)]

    def sent(self, latents, bits, slots=None):
        """-> the payloads of these packets, or of their first slots, and what their decoder makes of them."""
        payloads = [encode(z[:slots], bits) for z in latents]
        return payloads, [decode(p).to(self.device) for p in payloads]

    @torch.no_grad()
    def prompt_embeds(self, m, ids, packet=None):
        """One prompt (-1 = slot) -> (T, d_m)"""
        ids = torch.tensor(ids, device=self.device)
        return self.embeds(m, ids.clamp(min=0), (ids < 0).nonzero()[:, 0], None if packet is None else self.adapters[m](packet))


@torch.no_grad()
def answers(model: Interlingua, context: str, question: str, bits: int = 16, max_new_tokens: int = 32, only=None):
    """Text in, (bytes on the wire, [answer of each frozen model, or of `only` that one]) out; what sample.py prints."""
    source = model.reader.source(context, question if model.cfg.compress == "all" else None)
    latents, texts = model.latents([source]), []
    for m, side in enumerate(model.sides):
        if only in (None, m):
            (payload,), (packet,) = model.sent(latents[m], bits)
            prompt = model.prompt_embeds(m, side.prompt(question, slots=len(packet)), packet)
            texts.append(side.tok.decode(greedy(model.lms[m], [prompt], side.stops, max_new_tokens)[0]).strip())
    return len(payload), texts


def say(path, prompt: str, max_new_tokens: int, where) -> None:
    """`sample.py` on a latent run: the last line of the prompt is the question, all before it the passage; answers are greedy."""
    context, _, question = prompt.strip().rpartition("\n")
    if not context:
        die("a latent run needs --prompt='the passage', a line break, and the question on the last line")
    model, state = load(path)
    model.set_dtype(where.dtype).to(where.device)
    size, texts = answers(model, context, question, max_new_tokens=max_new_tokens)
    if model.reader.cut:
        read = model.reader.fits(context, question if model.cfg.compress == "all" else None)
        print(f"of {len(context)} characters the first {read} were read: seq_len={model.cfg.seq_len}", file=sys.stderr)
    each = " to each model" if model.cfg.latent_private else ""
    print(f"{len(context.encode())} bytes of text, {size} on the wire at 16 bits{each}")
    for name, text in zip(state["config"]["lms"], texts, strict=True):
        print(f"{name}: {text}")


# ---- what train.py asks for ---------------------------------------------------------------------------------------------


def fingerprint(lm, names=None) -> bytes:
    """sha256 over the name and bytes of every tensor, or of those named."""
    digest = hashlib.sha256()
    for name, t in sorted((name, t) for name, t in lm.state_dict().items() if names is None or name in names):
        digest.update(name.encode() + str(tuple(t.shape)).encode())
        digest.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def frozen(path):
    """The model of a run directory, without gradients."""
    return checkpoint.load(path)[0].requires_grad_(False).eval()


def take_encoder(encoder, cfg, lm):
    """`latent_from`: another run's encoder, frozen. What makes its packets others than they were there is named first, then shapes."""
    state, weights = read(cfg.latent_from)
    keys = "latent_encoder latent_dim compress latent_ratio " + ("seq_len " if cfg.latent_ratio else "latent_len ")
    keys += needs.SHAPE.removesuffix("init_std remat") if own_blocks(cfg) else "latent_layers latent_blocks latent_frozen"
    other, lms = checkpoint.differing(state, cfg, keys), state["config"]["lms"]
    theirs, ours = state["config"]["latent_reader"] or lms[0], cfg.latent_reader or cfg.lms[0]
    if lm and theirs != ours and not any(p == theirs and f"lm{i}_sha256_{fingerprint(lm).hex()}" in weights for i, p in enumerate(lms)):
        other += [("latent_reader", theirs, ours)]  # the same one may have moved
    checkpoint.expect_same(other, cfg.latent_from, "--latent_from")
    mine = {name.removeprefix("encoder."): t for name, t in weights.items() if name.startswith("encoder.")}
    checkpoint.put_weights(encoder.requires_grad_(False), mine, cfg.latent_from)


def own_blocks(cfg) -> bool:
    return cfg.latent_encoder in ("pool", "byte")  # on bytes, from scratch; the others start from a model


def layouts(cfg):
    """-> one Side per frozen model, and the Reader: all of the text side, no weights."""
    reader = tokenizer.load("bytes" if own_blocks(cfg) else cfg.latent_reader or cfg.lms[0])
    return [latent_data.Side(tokenizer.load(path), cfg) for path in cfg.lms], latent_data.Reader(reader, cfg)


def read(path):
    """-> (state, weights) of a latent run."""
    state = checkpoint.read_state(folder := checkpoint.resolve(path))
    if (objective := state["config"].get("objective", "lm")) != "latent":
        die(f"{path}: a run of objective={objective}, not latent")
    return state, checkpoint.read_tensors(folder, checkpoint.FILES[0], state)


def load(path, device="cpu"):
    """A latent run -> (Interlingua in eval mode, state), as checkpoint.load does for the others."""
    state, weights = read(path)
    model = Interlingua(SimpleNamespace(**vars(latent_data.LatentConfig()) | state["config"] | {"latent_from": ""}))
    checkpoint.put_weights(model, weights, path)
    return model.to(device).eval(), state


build = Interlingua


def open_stream(cfg, plan, rank, world):
    return latent_data.Stream(cfg, plan, rank, world, *layouts(cfg), print if rank == 0 else lambda text: None)


def counts(batch) -> dict[str, float]:
    """Targets of each term and model in this micro-batch, known before the forward; every rank names every term."""
    out = {term: float(len(batch["packet"]) * term.startswith("rms_")) for term in batch["terms"]}
    for key in [key for key in batch if key.endswith(".goal")]:
        m, kind = key.removesuffix(".goal").split(".", 1)
        sizes = {kind: len(batch[key])}
        if kind == "ans":
            k, first = ((step := batch[f"{m}.ans.step"]) < batch["first_k"]).sum(), (step == 0).sum()
            sizes |= {"k": k, "kd": k, "first": first, "first_right": first}
        out |= {f"{term}/{m}": float(n) for term, n in sizes.items() if f"{term}/{m}" in out}
    return out


def sums(model, raw, batch):
    return model(batch), None

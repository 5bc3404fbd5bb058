"""objective=contrast: texts that belong together get near vectors, all other texts of the global batch far ones (InfoNCE).

    python train.py config/encdec_ul2.py config/encdec_contrast.py --init_from=out/encdec_ul2 --data=pairs.jsonl

Pairs are rows {"query", "positive", "negatives"?} of a jsonl file or, from a directory of shards, two random crops of one document. Only
the encoder is trained. Every query is compared with every positive and hard negative of all ranks and micro-batches, and yet one
micro-batch of activations exists at a time: `prepare` embeds everything without gradients and keeps d loss / d vector, `sums` embeds
again and pulls on it (gradient caching). The gradient is exactly that of the whole batch at once; contrast_micro = contrast_pairs, where
it fits, spares the first pass. Read next: model.py (Embedder, pool).
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import checkpoint
import data
import model as M
import needs
import tokenizer
from configurator import die
from machine import to_device
from prepare import sources


@dataclass(frozen=True)
class ContrastConfig:
    # objective=contrast (contrast.py)
    contrast_tau: float = 0.05  # temperature of the similarities
    contrast_pairs: int = 1024  # per step, over all ranks
    contrast_micro: int = 64  # pairs of one forward
    contrast_symmetric: bool = False  # positives must also find their queries
    contrast_pooling: Literal["mean", "cls", "last", "weighted_mean"] = "mean"
    eval_sts: str = ""  # a file of sentence1, sentence2, score: ranked at every evaluation; choose by best_metric="-val/sts/spearman"


def build(cfg):
    model = M.build(cfg)
    if model.encoder is None:
        die(f"objective=contrast trains an encoder; arch={cfg.arch} has none, use encoder or encdec")
    model.contrast = cfg
    if cfg.compile:
        die("compile wants batches of one shape, and pairs have every length: objective=contrast runs with --compile=False")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("encoder.", "embed.")))  # a decoder waits unchanged
    return model


def is_pair(row) -> bool:
    more = row.get("negatives", []) if isinstance(row, dict) else None  # a text here would be a negative per character
    return isinstance(more, list) and all(isinstance(text, str) for text in (row.get("query"), row.get("positive"), *more))


class PairStream:
    """Pair g of the run is row permute(g) of its epoch: the step is all the state there is."""

    def __init__(self, cfg, plan, rank, world):
        self.cfg, self.plan, self.rank, self.world, self.step, self.names = cfg, plan, rank, world, 0, []
        if not isinstance(cfg.data, str):
            die("data: objective=contrast reads one jsonl file or one directory of shards")
        if cfg.contrast_pairs % (unit := cfg.contrast_micro * world):
            way = f"set --contrast_pairs={-(-cfg.contrast_pairs // unit) * unit}"
            die(f"contrast_pairs={cfg.contrast_pairs} is no multiple of contrast_micro x ranks = {unit}; {way}")
        home = Path(cfg.init_from) if cfg.data.endswith(".jsonl") else Path(cfg.data)
        home = checkpoint.resolve(home).parent if cfg.data.endswith(".jsonl") and cfg.init_from else home
        self.tok = tokenizer.load(home)
        self.eos = tokenizer.end_of(cfg, self.tok)
        if self.tok.vocab_size > cfg.vocab_size:
            die(f"vocab_size={cfg.vocab_size} is too small for the {self.tok.vocab_size} ids of {home}")
        self.rows = self.shards = None
        if cfg.data.endswith(".jsonl"):
            if not Path(cfg.data).is_file():
                die(f"data: {cfg.data} is no file; give rows {{query, positive}}, one a line")
            self.rows = sources.read(cfg.data)
            if wrong := next((n for n, row in enumerate(self.rows or [{}], 1) if not is_pair(row)), 0):
                die(f"{cfg.data}: row {wrong} is not {{query: text, positive: text, negatives: [text, ...]}}, negatives being optional")
        else:
            self.shards = data.Shards(cfg.data, "train")
        self.size = len(self.rows) if self.rows else self.shards.n_documents
        known = self.shards.id if self.shards else hashlib.blake2b(Path(cfg.data).read_bytes(), digest_size=8).hexdigest()
        end = f" eos_id={self.eos}" * (self.eos != self.tok.eos_id)
        self.order = f"pairs={cfg.contrast_pairs} max_enc={cfg.max_enc} seed={cfg.seed} data={known}{end}"  # all that decides it
        self.state = {"step": 0, "order": self.order}

    def load(self, state):
        data.expect_order(state["order"], self.order)
        self.step, self.state = state["step"], dict(state)

    def texts(self, g):
        """Pair g -> (query, positive, negatives as lists of ids, key): candidates of the same key are never each other's negatives."""
        cfg, (epoch, place) = self.cfg, divmod(g, self.size)
        row = int(data.permute(np.array([place]), self.size, f"{cfg.seed}/pairs/{epoch}")[0])
        if self.rows:
            pair = self.rows[row]
            cut = lambda text: [*self.tok.encode(text)[: cfg.max_enc - 1], self.eos]  # noqa: E731
            return cut(pair["query"]), cut(pair["positive"]), [cut(t) for t in pair.get("negatives", ())], None
        (start,), (size,) = self.shards.documents(np.array([row]))
        rng, n, crops = np.random.default_rng([cfg.seed, g]), max(int(size) - 1, 1), []
        for _ in range(2):
            length = int(rng.integers(min(n, 16, cfg.max_enc - 1), min(n, cfg.max_enc - 1) + 1))
            at = int(start + rng.integers(0, n - length + 1))
            crops.append([*(self.shards.tokens(at, at + length) & 0x7FFFFFFF).tolist(), self.eos])
        return *crops, [], row

    def __iter__(self):
        return self

    def __next__(self):
        if self.step >= self.plan.steps:
            raise StopIteration
        n, first = self.cfg.contrast_micro, self.step * self.cfg.contrast_pairs
        starts = range(first + self.rank * n, first + self.cfg.contrast_pairs, self.world * n)
        batches = [self.micro([self.texts(g) for g in range(at, at + n)], first) for at in starts]
        self.step += 1
        self.state = {"step": self.step, "order": self.order}
        return batches

    def micro(self, pairs, number):
        rows = [q for q, *_ in pairs] + [p for _, p, *_ in pairs] + [t for *_, negatives, _ in pairs for t in negatives]
        digest = lambda row: int.from_bytes(hashlib.blake2b(np.array(row).tobytes(), digest_size=7).digest(), "big")  # noqa: E731
        keys = [
            digest(row) if key is None else key for row, key in zip(rows, [k for *_, k in pairs] * 2 + [None] * len(rows), strict=False)
        ]
        return M.flat(rows) | {
            "key": torch.tensor(keys),
            "queries": len(pairs),
            "tokens": sum(map(len, rows)),
            "rows": torch.tensor([number]),
        }


def ranking(cfg):
    """-> model -> how well cosines of its encoder's vectors rank the pairs of eval_sts as people do; None where needs.py knows no use for
    them. The file is read now, the tokenizer once the run has one. Every rank reads all texts, as in training."""
    if not cfg.eval_sts or "eval_sts" in needs.unused(cfg):
        return None
    from eval.embedding import STS, read_rows, score_pairs

    rows, tok = read_rows(Path(cfg.eval_sts), *STS), functools.cache(lambda: tokenizer.load(cfg.out))
    try:
        [float(row["score"]) for row in rows]
    except (TypeError, ValueError) as error:
        die(f"eval_sts={cfg.eval_sts}: {error}; a score is a number")

    def rank(model):
        embedder = M.Embedder(model.eval(), tok(), cfg.contrast_pooling, max_length=cfg.max_enc)
        score = score_pairs(embedder, rows)
        model.train()
        return {f"val/sts/{name}": score[name] for name in ("spearman", "pearson")}

    return rank


def open_stream(cfg, plan, rank, world):
    if str(cfg.data).endswith(".jsonl") and not cfg.init_from:
        die(f"data={cfg.data}: its texts are read with the tokenizer of the run that is trained on: set --init_from=RUN")
    return PairStream(cfg, plan, rank, world)


def info_nce(q, c, positive, q_key, c_key, tau, symmetric=False):
    """Loss of each query (Q,): q (Q, D) against candidates c (C, D), of which positive (Q,) is right; its twins are left out."""
    score = F.normalize(q, dim=-1) @ F.normalize(c, dim=-1).T / tau  # (Q, C)
    own = torch.zeros_like(score, dtype=torch.bool).scatter_(1, positive[:, None], True)
    twin = (c_key == c_key[positive][:, None]) | (c_key == q_key[:, None])
    loss = F.cross_entropy(score.masked_fill(twin & ~own, -torch.inf), positive, reduction="none")
    if not symmetric:
        return loss
    back = score[:, positive].T.masked_fill((twin & ~own)[:, positive].T, -torch.inf)  # each positive against all queries
    return (loss + F.cross_entropy(back, torch.arange(len(q), device=q.device), reduction="none")) / 2


def everywhere(x):
    """Rows of all ranks, in order of rank; gradients reach only one's own."""
    if not dist.is_initialized():
        return x, 0
    sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    sizes, rank = [int(n) for n in sizes], dist.get_rank()
    wide = x.detach().new_zeros(max(sizes), *x.shape[1:])
    wide[: len(x)] = x.detach()
    parts = [torch.empty_like(wide) for _ in sizes]
    dist.all_gather(parts, wide)
    parts = [part[:n] for part, n in zip(parts, sizes, strict=True)]
    parts[rank] = x
    return torch.cat(parts), sum(sizes[:rank])


def vectors(call, batch, pooling):
    return M.pool(call(batch), batch, pooling, normalize=False)


def prepare(call, raw, batches):
    """Embed all without gradients; leave in each micro-batch its share of the loss and of d loss / d vector."""
    cfg, device = raw.contrast, raw.embed.weight.device
    if len(batches) == 1 and not dist.is_initialized():
        return  # everything is in one micro-batch: nothing to remember
    with torch.no_grad():
        found = [vectors(call, to_device(b, device), cfg.contrast_pooling) for b in batches]
    n = [b["queries"] for b in batches]
    split = lambda xs, side: torch.cat([x[:k] if side == 0 else x[k:] for x, k in zip(xs, n, strict=True)])  # noqa: E731
    q, c = (split(found, side).requires_grad_() for side in (0, 1))
    q_key, c_key = (split([b["key"].to(device) for b in batches], side) for side in (0, 1))
    offsets = np.cumsum([0] + [len(x) - k for x, k in zip(found, n, strict=True)])
    positive = torch.cat([torch.arange(k, device=device) + int(at) for k, at in zip(n, offsets, strict=False)])
    all_c, shift = everywhere(c)
    (all_q, mine), (all_positive, _) = everywhere(q), everywhere(positive + shift)
    loss = info_nce(all_q, all_c, all_positive, everywhere(q_key)[0], everywhere(c_key)[0], cfg.contrast_tau, cfg.contrast_symmetric)
    grad_q, grad_c = torch.autograd.grad(loss.sum(), (q, c))
    own = loss.detach()[mine : mine + len(q)].split(n)
    for b, g, value, at, k in zip(batches, grad_q.split(n), own, offsets, n, strict=False):
        b["grad"], b["value"] = torch.cat((g, grad_c[int(at) : int(at) + len(b["key"]) - k])), value.sum()


def counts(batch) -> dict[str, float]:
    return {"loss": float(batch["queries"])}


def sums(call, raw, batch):
    """The second pass: its value is the loss of these queries, its gradient the whole batch's with respect to these texts."""
    cfg, x, n = raw.contrast, vectors(call, batch, raw.contrast.contrast_pooling), batch["queries"]
    if "grad" not in batch:
        own, key = torch.arange(n, device=x.device), batch["key"]
        return {"loss": info_nce(x[:n], x[n:], own, key[:n], key[n:], cfg.contrast_tau, cfg.contrast_symmetric).sum()}, None
    pull = (x * batch["grad"]).sum()
    return {"loss": pull - pull.detach() + batch["value"]}, None

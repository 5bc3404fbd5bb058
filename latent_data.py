"""LatentWire without its models: settings, what is read and what is asked, flat batches and their stream.

    [BOS?] [head] [P_1 .. P_M] [tail: question, anchor] [answer] [EOS]          one flat document per question and model

Position arithmetic happens once, in `pack`: the token that predicts each target is known by index, and nothing is ever shifted again.
A step is a pure function of (seed, step): any world size sees the same sources in the same order. Read next: latentwire.py.
"""

import hashlib
import random
import re
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

import data
from configurator import die
from prepare import prompts
from prepare.squad import read_rows
from wire import WIDTHS


@dataclass(frozen=True)
class LatentConfig:
    # ---- objective=latent: one packet of vectors that frozen language models read (latentwire.py). data names jsonl files of
    # {context, question, answers} and of {text}; seq_len is the longest source in the reader's tokens, a row is one source,
    # so tokens_per_step / seq_len sources make a step; mix in the stage table walks from text (reconstruction) to questions
    lms: tuple[str, ...] = ()  # run directories of the frozen models, any number
    latent_encoder: Literal["lm", "pool", "byte", "query", "sent"] = "lm"
    latent_reader: str = ""  # whose layers and tokens read the source (lm, query, sent); "": the first of lms
    latent_layers: int = 0  # its first layers only; 0: all
    latent_blocks: int = 0  # blocks of our own on top of it (lm)
    latent_frozen: bool = False  # lm: its layers stay as they are, only the blocks on top are trained
    latent_from: str = ""  # a latent run whose encoder is taken over, frozen; only adapters are trained (a further model joins)
    latent_len: int = 12  # slots M of a packet
    latent_ratio: int = 0  # instead: one slot per so many source tokens
    latent_private: int = 0  # further slots behind these for each model, which are sent to no other
    latent_dim: int = 16  # d_z of a slot
    adapter: Literal["mlp", "linear"] = "mlp"
    adapter_hidden: int = 0  # its inner width; 0: 4 x latent_dim
    calibration: Literal["embed_rms", "fixed", "none"] = "embed_rms"
    prefix_rms: float = 0.0  # of a slot, for calibration=fixed
    compress: Literal["context", "all"] = "context"  # what the packet carries; all: the question too
    anchor: Literal["auto", "text", "chat", "none"] = "auto"  # what calls for the answer; auto: chat if the model has a template
    bos: Literal["first", "after", "none"] = "first"  # where BOS stands, if the model has one
    latent_questions: int = 3  # questions of each passage per step, at most; 0: all
    first_k: int = 4  # answer tokens of w_k and w_kd
    kd_tau: float = 1.0
    w_ans: float = 1.0  # every answer token and EOS
    w_first: float = 0.5  # the first one again
    w_k: float = 0.5  # the first k again
    w_kd: float = 0.0  # KL to the same model reading the text
    w_ae: float = 1.0  # text: the source back from the packet
    w_lm: float = 0.5  # text: what follows the source
    w_ae_qa: float = 0.0  # questions: the source back from the packet
    wire_bits: tuple[int, ...] = ()  # straight-through quantisation at one of these widths per step; (): none
    wire_slots: tuple[int, ...] = ()  # nested packets: one of these numbers per step, only that many first slots are sent; (): all
    wire_start: float = 0.0  # both from this share of the run on
    sequential: bool = False  # one model's activations at a time: less memory, one more forward


def check(cfg):
    """Refuse what contradicts itself."""
    if not cfg.lms:
        die("objective=latent needs frozen models: --lms=\"('out/a', 'out/b')\"")
    if len(set(cfg.lms)) < len(cfg.lms):
        die(f"lms={cfg.lms} names one model twice")
    if cfg.parallel == "fsdp":
        die("parallel=fsdp does not shard frozen models; use --parallel=ddp, with --sequential and smaller micro_tokens if memory is short")
    if (cfg.calibration == "fixed") != (cfg.prefix_rms > 0):
        die(f"calibration={cfg.calibration}, prefix_rms={cfg.prefix_rms}: fixed needs --prefix_rms above 0, nothing else reads it")
    if cfg.latent_encoder in ("query", "sent") and (cfg.latent_blocks or cfg.latent_frozen):
        die(f"latent_encoder={cfg.latent_encoder} reads a model as it stands; drop latent_blocks and latent_frozen")
    if bad := set(cfg.wire_bits) - set(WIDTHS):
        die(f"wire_bits={sorted(bad)}: the codec has {WIDTHS}")
    most = 65535 if cfg.latent_ratio else cfg.latent_len + cfg.latent_private
    if bad := [n for n in cfg.wire_slots if not 0 < n <= most]:
        die(f"wire_slots={bad}: a packet has {most} slots at most, of which at least one is sent")
    if (cfg.wire_bits or cfg.wire_slots) and cfg.wire_start >= 1:
        die(f"wire_start={cfg.wire_start}: the run ends before packets change; set it below 1, or drop wire_bits and wire_slots")
    if not any(getattr(cfg, f.name) for f in fields(LatentConfig) if f.name.startswith("w_")):
        die("every weight of the loss (w_ans, w_first, w_k, ...) is 0: nothing would be learned")


# ---- what is asked ------------------------------------------------------------------------------------------------------

CONTEXT, QUESTION = "\x00", "\x01"  # the two holes of a template
TEXT = {  # anchor -> the question's part; the passage stands before it as "Context: ..."
    "text": f"\nQuestion: {QUESTION}\nAnswer:",
    "none": f"\nQuestion: {QUESTION}\n",
}
REPEAT = "\nText:"  # asks for the source back
LONGEST = 16  # characters to a token: of a book no more is tokenised than could be read


class Side:
    """One frozen model's way of putting things: its tokenizer, template, BOS and anchor."""

    def __init__(self, tok, cfg):
        self.tok, self.all, self.bos_mode = tok, cfg.compress == "all", cfg.bos
        self.anchor = ("chat" if tok.chat_template else "text") if cfg.anchor == "auto" else cfg.anchor
        if self.anchor == "chat" and not tok.chat_template:
            die(f"anchor=chat, but {tok.name} has no chat template; use --anchor=text")
        self.bos, chat = prompts.prefix_ids(tok), self.anchor == "chat"
        self.before, self.after = (self.bos if cfg.bos == mode else [] for mode in ("first", "after"))  # the packet
        self.stops = prompts.stop_ids(tok, chat)  # a chat model closes an answer with its end of turn, not with its end of text
        self.end = next((tok.special[name] for name in prompts.TURNS if chat and name in tok.special), tok.eos_id)
        if chat:
            message = {"role": "user", "content": f"Context: {CONTEXT}\nQuestion: {QUESTION}\nAnswer with a few words of the context."}
            eos = prompts.release(tok) or next(name for name, i in tok.special.items() if i == tok.eos_id)  # some close a turn with it
            words = dict(messages=[message], add_generation_prompt=True, bos_token="", eos_token=eos)
            text = prompts.compiled(prompts.template_of(tok)).render(**words)
        else:
            text = f"Context: {CONTEXT}" + TEXT[self.anchor]
        self.join = "" if self.anchor == "chat" or text.endswith("\n") else " "  # between anchor and answer
        self.text = self.cut(text)  # of the model that reads text
        head, tail = text.split(CONTEXT)
        if self.all:  # the packet ends with the question, and the anchor calls for the answer again
            tail = "Answer:" if self.anchor == "text" else tail.split(QUESTION)[1]
        self.head, self.tail = self.cut(head.removesuffix("Context: ")), self.cut(tail)
        self.short = lru_cache(maxsize=1 << 14)(lambda text: tuple(tok.encode(text)))

    def ids(self, text):  # questions come back in every epoch; so do passages, but keeping thousands of them takes gigabytes
        return self.short(text) if len(text) <= 256 else tuple(self.tok.encode(text))

    def cut(self, text):
        """Markers such as <|im_start|> become ids; they never can from the user's text, which is put in later."""
        markers = "|".join(map(re.escape, sorted(self.tok.special, key=len, reverse=True)))
        return [self.tok.special.get(part, part) for part in re.split(f"({markers})", text) if part] if markers else [text]

    def fill(self, parts, context="", question=""):
        out, holes = [], {CONTEXT: context, QUESTION: question}  # filled in one pass: what is put in has none
        for part in parts:
            out += [part] if isinstance(part, int) else self.ids(re.sub("[\0\1]", lambda hole: holes[hole[0]], part))
        return out

    def gold(self, question, answer):
        """As it follows the anchor: alone, a tokenizer may put a mark of its own in front of it (Llama 2's does)."""
        before, whole = self.around(question, answer)
        own = whole[len(before) :] if whole[: len(before)] == before else self.ids(self.join + answer)
        return [*own, self.end] if answer else [self.end]

    def aligned(self, question, answer):
        """Does the anchor keep its tokens when the answer follows? Hard check of the target at t = 0."""
        before, whole = self.around(question, answer)
        return not answer or whole[: len(before)] == before

    def around(self, question, answer):
        last = self.tail[-1] if self.tail else self.text[-1]
        last = "" if isinstance(last, int) else last.replace(QUESTION, question)
        return self.ids(last) if last else (), self.ids(last + self.join + answer)

    def prompt(self, question, context=None, slots=0):
        """Ids of a prompt; -1 stands for a slot. With a context the model reads text, else (slots or nothing) and the tail."""
        if context is not None:
            return (self.bos if self.bos_mode != "none" else []) + self.fill(self.text, context, question)
        return self.before + self.fill(self.head) + [-1] * slots + self.after + self.fill(self.tail, question=question)

    def bare(self, slots, tail=""):  # what reconstruction (tail = REPEAT) and continuation (none) are predicted from
        return self.before + [-1] * slots + self.after + list(self.ids(tail))


def pack(docs, prefix=""):
    """Documents (prompt ids with -1 for slots, first slot in Z, targets, kind) -> one flat batch.

    Inputs are prompt + targets[:-1]; target i is predicted at position len(prompt) - 1 + i. `at`, `goal`, `step` list them by kind.
    """
    ids, slot_at, slot_z, lengths, kinds = [], [], [], [], {}
    for prompt, z, targets, kind in docs:
        base = len(ids)
        slots = [base + i for i, t in enumerate(prompt) if t < 0]
        slot_at += slots
        slot_z += range(z, z + len(slots))
        ids += [max(t, 0) for t in prompt] + targets[:-1]
        at, goal, step = kinds.setdefault(kind, ([], [], []))
        at += range(base + len(prompt) - 1, base + len(prompt) - 1 + len(targets))
        goal += targets
        step += range(len(targets))
        lengths.append(len(ids) - base)
    out = flat(ids, lengths, prefix) | {prefix + "slot_at": slot_at, prefix + "slot_z": slot_z}
    for kind, lists in kinds.items():
        out |= {f"{prefix}{kind}.{name}": values for name, values in zip(("at", "goal", "step"), lists, strict=True)}
    return {k: torch.tensor(v, dtype=torch.long) if isinstance(v, list) else v for k, v in out.items()}


def flat(ids, lengths, prefix=""):
    lengths = np.array(lengths, np.int64)
    return {
        prefix + "ids": torch.tensor(ids, dtype=torch.long),  # (N,)
        prefix + "pos": torch.from_numpy(data.ramp(np.zeros_like(lengths), lengths)),  # (N,)
        prefix + "cu": torch.from_numpy(np.append(0, lengths.cumsum()).astype(np.int32)),  # (S + 1,)
        prefix + "max_len": int(lengths.max()),
    }


def blocks(n, m):
    """n[i] items in m[i] blocks, floor(jn/m) .. floor((j+1)n/m), at least one. -> of every block its number j, first item, items"""
    j, n, m = data.ramp(np.zeros_like(m), m), np.repeat(n, m), np.repeat(m, m)
    start = j * n // m
    return j, start, np.maximum((j + 1) * n // m - start, 1)


class Reader:
    """How sources become the encoder's input: tokens, packet lengths, and which tokens each slot pools."""

    def __init__(self, tok, cfg):
        self.tok, self.cfg, self.limit = tok, cfg, cfg.seq_len
        self.queries = cfg.latent_encoder == "byte"  # its slots are read as tokens in front of the text
        self.cut = 0  # sources that were too long

    def source(self, context, question=None):
        """(ids of the source, with EOS, so that an empty text has a token too; characters of the context are cut, never the question)."""
        text = context if question is None else f"Context: {context}\nQuestion: {question}\nAnswer: "
        ids = self.tok.encode(text)
        if len(ids) >= self.limit:
            self.cut += 1
            keep = self.tok.encode("Context: " + context if question is not None else context)
            tail = [] if question is None else self.tok.encode(f"\nQuestion: {question}\nAnswer: ")[: self.limit - 1]
            ids = keep[: self.limit - 1 - len(tail)] + tail
        return ids + [self.tok.eos_id]

    def fits(self, context, question=None):
        """-> how many characters of it are read. No token is shorter than a byte (but for a mark in front), few are longer than 16."""
        if question is None and len(context.encode()) + 1 < self.limit:
            return len(context)
        taken = 0 if question is None else len(self.tok.encode(f"Context: \nQuestion: {question}\nAnswer: "))
        room, context = max(0, self.limit - 1 - taken), context[: LONGEST * self.limit]
        ids = self.tok.encode(context)
        return len(context) if len(ids) <= room else len(self.tok.decode(ids[:room]))

    def slots(self, n):
        return -(-n // self.cfg.latent_ratio) if self.cfg.latent_ratio else self.cfg.latent_len

    def collate(self, sources, keep=None):
        """Lists of ids -> flat encoder input, and where packets of all their slots, or of the first `keep`, find them."""
        m = np.array([self.slots(len(s)) for s in sources])
        front = m if self.queries else np.zeros_like(m)
        lengths = np.array([len(s) for s in sources])
        base = np.cumsum(np.append(0, lengths + front))[:-1]
        j, start, size = blocks(lengths, m)  # (sum M,) each
        first, z, k = np.repeat(base + front, m), np.append(0, m.cumsum()), self.cfg.latent_private
        _, own, own_size = blocks(m, np.full_like(m, k))  # (B k,) each
        packets = [[*range(z[i], z[i + 1]), *range(z[-1] + i * k, z[-1] + (i + 1) * k)][:keep] for i in range(len(m))]
        batch = flat([t for s, f in zip(sources, front, strict=True) for t in [0] * f + list(s)], lengths + front)
        return (
            batch
            | {
                "z_cu": torch.from_numpy(z.astype(np.int32)),  # (B + 1,)
                "z_max": int(m.max()),
                "slot": torch.from_numpy(j),  # (sum M,)
                "query_at": torch.from_numpy(np.repeat(base, m) + j),  # (sum M,), where `byte` puts its queries
                "text_of": torch.from_numpy(np.repeat(np.arange(len(m)), lengths)),  # (tokens,) the source of each
                "pool": torch.from_numpy(data.ramp(first + start, size)),  # (P,) tokens ...
                "pool_to": torch.from_numpy(np.repeat(np.arange(len(j)), size)),  # (P,) ... and the slot that pools them
                "own": torch.from_numpy(data.ramp(np.repeat(z[:-1], k) + own, own_size)),  # (Q,) shared slots ...
                "own_to": torch.from_numpy(np.repeat(np.arange(len(own)), own_size)),  # (Q,) ... and the private slot that pools them
                "packet": torch.tensor(sum(packets, [])),  # a model's packets, in [shared slots; its own]
                "packet_cu": torch.tensor(np.cumsum([0, *map(len, packets)]), dtype=torch.int32),  # (B + 1,)
                "tokens": int(lengths.sum()),
            }
        )


def sources_of(rows, cfg, sides):
    """Rows -> (context, [(question, answer)]) with the questions of one passage together, or (text, None); and how many were dropped."""
    groups, out, dropped = {}, [], 0
    for row in rows:
        if "text" in row:
            out.append((row["text"], None))
            continue
        answer = row["answers"][0]  # trained on the first reference; evaluation takes the best over all
        if not all(side.aligned(row["question"], answer) for side in sides):
            dropped += 1
            continue
        key = row["context"] if cfg.compress == "context" else (row["context"], row["question"])
        if key not in groups:
            groups[key] = (row["context"], [])
            out.append(groups[key])
        groups[key][1].append((row["question"], answer))
    return out, dropped


def terms_of(cfg) -> list[str]:
    """Names of all loss terms that this config may ask for: the same on every rank, whatever a micro-batch happens to hold."""
    optional = dict(kd=cfg.w_kd, ae=cfg.w_ae, ae_qa=cfg.w_ae_qa, lm=cfg.w_lm)
    names = ["ans", "first", "k", "first_right", "rms_raw", "rms_cal", *(name for name, weight in optional.items() if weight)]
    return [f"{name}/{m}" for name in names for m in range(len(cfg.lms))]


class Stream:
    """next() -> this rank's micro-batches of the next step; a row of the plan is one source. Same interface as data.Stream."""

    def __init__(self, cfg, plan, rank, world, sides, reader, log=print):
        self.cfg, self.plan, self.rank, self.world, self.sides, self.reader = cfg, plan, rank, world, sides, reader
        files = cfg.data if isinstance(cfg.data, dict) else {"qa": cfg.data}
        self.log, self.sources, self.step, self.names = log, {}, 0, []  # no names: one loss per term, which says its source
        for name, path in files.items():
            self.sources[name], dropped = sources_of(read_rows(path), cfg, sides)
            if not self.sources[name]:
                die(f"data: {path} holds nothing that can be asked ({dropped} rows not aligned to the tokens of the answer)")
            log(f"data: {name}: {len(self.sources[name]):,} sources; {dropped} questions dropped, whose answer begins inside a token")
        for s in plan.stages:
            if s.seq_len != cfg.seq_len:
                die(f"stages: seq_len={s.seq_len} would cut no source: all are cut at --seq_len={cfg.seq_len}; leave it out of the stages")
            count, per_micro = s.tokens / s.seq_len, s.micro_tokens // s.seq_len
            if s.accum * world * per_micro != count or not per_micro:
                sizes = f"tokens_per_step={s.tokens}, micro_tokens={s.micro_tokens}: {count:g} sources in {s.accum} x {world} micro-batches"
                die(f"{sizes} of {per_micro}; make both multiples of seq_len={cfg.seq_len}, and the first of the second x {world}")
        texts = {questions is None for rows in self.sources.values() for _, questions in rows}
        for kind, what, keys in ((True, "text", "w_ae w_lm"), (False, "questions", "w_ans w_first w_k w_kd w_ae_qa latent_questions")):
            vain = [f"{key}={getattr(cfg, key)}" for key in keys.split() if getattr(cfg, key) != getattr(LatentConfig, key)]
            if vain and kind not in texts:
                log(f"data: without effect here: {', '.join(vain)} (needs {what} in --data)")
        self.taken = dict.fromkeys(self.sources, 0)
        known = [f"{name}={hashlib.blake2b(repr(rows).encode(), digest_size=8).hexdigest()}" for name, rows in self.sources.items()]
        keys = "seq_len compress latent_questions seed anchor bos calibration prefix_rms".split()
        self.order = " ".join([*(f"{key}={getattr(cfg, key)}" for key in keys), *known])  # all that decides it

    @property
    def state(self):
        return {"step": self.step, "taken": dict(self.taken), "order": self.order}

    def load(self, state):
        data.expect_order(state["order"], self.order)
        self.step, self.taken = state["step"], dict(state["taken"])

    def __iter__(self):
        return self

    def __next__(self):
        if self.step >= self.plan.steps:
            raise StopIteration
        row, rng = self.plan(self.step), random.Random(f"{self.cfg.seed}/{self.step}")
        count, per_micro = row.tokens // row.seq_len, row.micro_tokens // row.seq_len
        mix = row.mix or {name: float(len(rows)) for name, rows in self.sources.items()}
        if unknown := set(mix) - set(self.sources):
            die(f"mix names {sorted(unknown)[0]!r}, but data holds {', '.join(self.sources)}")
        names = sorted(rng.choices(list(mix), list(mix.values()), k=count))
        chosen = [(*self.take(name), rng.random()) for name in names]
        rng.shuffle(chosen)  # every micro-batch gets its share of each source
        late = row.eta >= self.cfg.wire_start
        bits = rng.choice(self.cfg.wire_bits) if self.cfg.wire_bits and late else 0
        keep = rng.choice(self.cfg.wire_slots) if self.cfg.wire_slots and late else None
        micros, cut, rest = [], self.reader.cut, {"bits": bits, "first_k": self.cfg.first_k, "terms": terms_of(self.cfg)}
        for i in range(row.accum):
            first = (i * self.world + self.rank) * per_micro
            micros.append(self.collate(chosen[first : first + per_micro], keep) | rest)
        if self.reader.cut and not cut:
            self.log(f"data: step {self.step}: a source is longer than seq_len={self.cfg.seq_len}; its end is not read, nor that of others")
        self.step += 1
        return micros

    def take(self, name):
        rows = self.sources[name]
        epoch, i = divmod(self.taken[name], len(rows))
        self.taken[name] += 1
        return rows[int(data.permute([i], len(rows), f"{self.cfg.seed}/{name}/{epoch}")[0])]

    def collate(self, chosen, keep=None):
        """[(context, questions or None, a random number)] -> one micro-batch for the encoder and every model."""
        cfg, texts, later = self.cfg, [], []
        for context, questions, u in chosen:
            rest, source, read = "", context, context
            if questions is None:  # continuation: from 40 to 70 % of what can be read, at a space
                border = context.find(" ", int((fits := self.reader.fits(context)) * (0.4 + 0.3 * u)), fits)
                rest = context[border : border + LONGEST * cfg.seq_len] if border > 0 else ""
                read = context[: border if rest else fits]
                source = read if rest else source  # what is too long is counted
            elif cfg.latent_questions and len(questions) > cfg.latent_questions:
                questions = random.Random(u).sample(questions, cfg.latent_questions)
            carried = questions[0][0] if questions and cfg.compress == "all" else None
            texts.append(self.reader.source(source, carried))
            if questions and cfg.w_ae_qa and len(texts[-1]) == self.reader.limit:  # nobody can repeat what was never read
                read = context[: self.reader.fits(context, carried)]
            later.append((context, questions, read, rest))
        batch = self.reader.collate(texts, keep)
        z = batch["packet_cu"].tolist()
        for m, side in enumerate(self.sides):
            docs, teacher = [], []
            for i, (context, questions, read, rest) in enumerate(later):
                slots, room = z[i + 1] - z[i], cfg.seq_len
                for question, answer in questions or ():
                    gold = side.gold(question, answer)
                    docs.append((side.prompt(question, slots=slots), z[i], gold, "ans"))
                    if cfg.w_kd:
                        teacher.append((side.prompt(question, context=context), 0, gold[: cfg.first_k], "kd"))
                if cfg.w_ae if questions is None else cfg.w_ae_qa:
                    back, kind = [*side.ids(read), side.tok.eos_id], "ae" if questions is None else "ae_qa"
                    docs.append((side.bare(slots, REPEAT), z[i], back[:room], kind))
                if rest and cfg.w_lm:
                    docs.append((side.bare(slots), z[i], list(side.ids(rest))[:room], "lm"))
            if not docs:
                die("a micro-batch of text with w_ae=0 asks nothing: give w_ae a weight, or drop the text from --data")
            batch |= pack(docs, f"{m}.") | (pack(teacher, f"{m}.teacher.") if teacher else {})
        return batch

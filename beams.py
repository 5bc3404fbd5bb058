"""Beam search: the likeliest text instead of a drawn one. `python sample.py --ckpt=out/RUN --beams=4 --temperature=0`
And what it shares with drawing: reading prompts, moving the rows of a cache; and `greedy`, for prompts of ids or of input embeddings.

Hypotheses of all prompts share one cache, whose rows are reordered as beams die and split. Finished ones compete by their mean
log-probability per token, the end token included; one beam is greedy decoding. Read next: sample.py, which calls this.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from configurator import die
from model import flat


def possible(o, dash=""):
    """Refuse the options (a dict) by which no text can be written; `dash`: as a command line names them."""
    good = {key: ("1 or more", o[key] > 0) for key in ("max_new_tokens", "num_samples", "beams")}
    good |= {"temperature": ("0 (always the likeliest) or more", o["temperature"] >= 0), "top_k": ("0 (no limit) or more", o["top_k"] >= 0)}
    good |= {"top_p": ("above 0 and at most 1 (no limit)", 0 < o["top_p"] <= 1), "seed": ("below 2**62", abs(o["seed"]) < 2**62)}
    good |= {"mode": ("R, X, S or I", o["mode"] in (None, "", *"RXSI"))}
    for key, (wanted, fine) in good.items():
        if not fine:
            die(f"{dash}{key}={o[key]}: must be {wanted}")
    if o["beams"] > 1 and (o["temperature"] or o["num_samples"] > 1):
        die(f"{dash}beams={o['beams']} looks for one likeliest text: add {dash}temperature=0 and no {dash}num_samples")


def keep_rows(cache, index):
    """The cache of rows `index`: repeated for several samples, dropped when finished, reordered for beams."""
    cache.k, cache.v, cache.sums = cache.k[:, index], cache.v[:, index], cache.sums[:, :, index]
    cache.lengths, cache.replay, cache.steady = [cache.lengths[i] for i in index], None, 0
    if cache.enc is not None:
        cache.enc, cache.enc_mask = [[t[index] for t in pair] for pair in cache.enc], cache.enc_mask[index]


def room(model, prompts, wanted):
    """How many of the `wanted` tokens fit behind the longest prompt."""
    longest, cap = max(map(len, prompts)), model.cfg.max_len
    return min(wanted, cap - longest) if longest < cap else die(f"a prompt of {longest} tokens: the model accepts {cap}; shorten it")


def read(model, prompts, count, enc=None):
    """Every prompt read once: a cache with room for `count` more, and the hidden state (P, D) behind each prompt."""
    device, longest = model.embed.weight.device, max(map(len, prompts))
    cache = model.new_cache(len(prompts), longest + count)
    if enc is not None:
        model.read_encoder(flat(enc, device), cache)
    ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
    hidden = model.step(ids, cache, [len(p) for p in prompts])  # (P, T, D)
    return cache, hidden[torch.arange(len(prompts)), torch.tensor([len(p) - 1 for p in prompts])]


@torch.inference_mode()
def search(model, prompts, max_new_tokens, stops, beams, allowed=None, enc=None):
    """The best continuation of each prompt, as ids: `stops` end it. allowed, enc: as in sample.tokens."""
    count = room(model, prompts, max_new_tokens)
    cache, hidden = read(model, prompts, count, enc)
    rows = torch.arange(len(prompts)).repeat_interleave(beams)
    keep_rows(cache, rows.tolist())
    hidden, vocab = hidden[rows], model.cfg.vocab_size
    score = torch.full((len(prompts), beams), -torch.inf, device=hidden.device)
    score[:, 0] = 0  # all beams of a prompt begin alike: only one may branch
    live, done = [[[] for _ in range(beams)] for _ in prompts], [[] for _ in prompts]  # ids; (mean log-probability, ids)
    for t in range(count):
        logits = model.predict(hidden)
        if allowed is not None:
            logits.masked_fill_(~allowed[rows.to(allowed.device)], -torch.inf)
        total = score.view(-1, 1) + logits.log_softmax(-1)  # (P B, V)
        best, at = total.view(len(prompts), -1).topk(beams * min(vocab, 1 + len(stops)))  # `beams` of them go on, whatever ends
        source, text, tail = [], [], []
        for p, (values, places) in enumerate(zip(best.tolist(), at.tolist(), strict=True)):
            going, ends = [], done[p] if len(done[p]) < beams else []  # a prompt that has its texts does not gain by waiting for others
            for rank, (value, place) in enumerate(zip(values, places, strict=True)):
                parent, i = divmod(place, vocab)
                ids = [*live[p][parent], i]
                if i in stops:
                    ends += [(value / len(ids), ids)] * (rank < beams)
                elif len(going) < beams:
                    going.append((value, p * beams + parent, ids))
            tail.append([value for value, *_ in going])
            source += [parent for _, parent, _ in going]
            text.append([ids for *_, ids in going])
        live, score = text, torch.tensor(tail, device=hidden.device)
        if t + 1 == count or all(len(ended) >= beams for ended in done):
            break
        keep_rows(cache, source)
        hidden = model.step(torch.tensor([[ids[-1]] for some in live for ids in some], device=hidden.device), cache)[:, 0]
    for p, values in enumerate(score.tolist()):
        done[p] += [(value / len(ids), ids) for value, ids in zip(values, live[p], strict=True)] if len(done[p]) < beams else []
    return [max(ended)[1] for ended in done]


def greedy(lm, prompts, stops, max_new: int) -> list[list[int]]:
    """Greedy continuations of prompts given as ids [(T_i,)] or as input embeddings [(T_i, d)], up to the first of `stops`."""
    lengths = [len(p) for p in prompts]
    cache = lm.new_cache(len(prompts), max(lengths) + max_new)
    x = pad_sequence(prompts, batch_first=True)  # (B, T) or (B, T, d)
    ids, embeds = (x, None) if x.dim() == 2 else (torch.zeros(x.shape[:2], dtype=torch.long, device=x.device), x)
    last = lm.step(ids, cache, lengths, embeds=embeds)[torch.arange(len(prompts)), torch.tensor(lengths) - 1]
    out, live = [[] for _ in prompts], set(range(len(prompts)))
    for n in range(max_new):
        last = lm.step(ids[:, None], cache)[:, 0] if n else last
        ids = lm.predict(last).argmax(-1)
        for i, t in enumerate(ids.tolist()):
            if t in stops:
                live.discard(i)
            elif i in live:
                out[i].append(t)
        if not live:
            break
    return out

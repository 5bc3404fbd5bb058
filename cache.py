"""Decoding with keys and values kept: what the blocks share during one step over B sequences, in the place of `Packed` in model.py.

    cache = model.new_cache(batch=2, max_len=64)
    hidden = model.step(ids, cache)          # ids (2, T), any T: (2, T, D), the same numbers as one forward over all of it

Read next: Transformer.step and read_encoder in model.py; replay.py and lean.py, how a step becomes fast on a GPU and on a CPU.
"""

import torch
import torch.nn.functional as F

import decode_triton
import lean
from configurator import die


class Cache:
    """Keys and values of B sequences, preallocated and written by index; any chunking of the input gives the same logits.

    Sequences may have different lengths: rows are padded on the right, a key is visible when its position is not after the
    query's, and the padding of one chunk is overwritten by the tokens of the next. `lengths` lives on the host: no sync.
    """

    def __init__(self, model, batch: int, max_len: int):
        cfg, weight = model.cfg, model.embed.weight
        shape = (cfg.n_layer, batch, cfg.kv_heads, max_len, cfg.width_head)
        # SDPA of one query takes a CPU seven times longer in bf16 than in fp32 (batch 8: 1156 us against 157)
        self.dtype = torch.float32 if model.dtype == torch.bfloat16 and weight.device.type == "cpu" else model.dtype
        self.k, self.v = (torch.zeros(shape, dtype=self.dtype, device=weight.device) for _ in "kv")
        self.lengths, self.max_len, self.out = [0] * batch, max_len, model.dtype
        self.replay, self.steady = None, 0  # of replay.py: the recorded step, and steps since the batch was last another one
        self.sums = torch.zeros(cfg.n_layer, 2, batch, 1, 32, dtype=torch.float64, device=weight.device)  # all; before this block
        self.tables = model.rope(torch.arange(max_len, device=weight.device))
        self.enc = None  # per layer: keys, values (B, G, S, E) of the encoder
        self.enc_mask = None  # (B, 1, 1, S)

    def begin(self, model, ids, count, keys=0):
        """keys: for a recorded step, which sees that many of them through a mask and finds `pos` and `last` already on the device."""
        rows, width = ids.shape
        self.count = count or [width] * rows
        if max(self.lengths) + width > self.max_len:
            die(f"{max(self.lengths) + width} tokens do not fit the cache of {self.max_len}; ask for a longer one")
        device, self.even = ids.device, not keys and len(set(self.lengths)) == 1
        if not keys:
            self.pos = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(width, device=device)  # (B, T)
            self.last = torch.tensor(self.count, device=device)[:, None]
        keys = keys or max(self.lengths) + width
        at = self.pos.flatten()
        self.rope = model.rope(at + self.offset(model)) if self.enc is not None else [table[at] for table in self.tables]
        self.tau, self.noise = model.tau, None
        self.seen = [store[:, :, :, :keys].unbind() for store in (self.k, self.v)]  # per layer (B, G, K, E)
        self.new = [store[:, :, :, keys - width : keys].unbind() for store in (self.k, self.v)]
        self.mask = None  # a single query of an even batch sees everything
        if not self.even or (width > 1 and self.lengths[0]) or (width > 1 and self.enc is not None):
            self.mask = (torch.arange(keys, device=device) <= self.pos[..., None])[:, None]  # (B, 1, T, K)
        if self.enc is not None:
            own = self.mask if self.mask is not None else torch.ones(rows, 1, width, keys, dtype=torch.bool, device=device)
            self.mask = torch.cat((self.enc_mask.expand(-1, -1, width, -1), own), dim=-1)

    def offset(self, model):
        """cross_rope=continue places the decoder after its own encoder text."""
        if self.enc is None or model.cfg.cross_rope != "continue":
            return 0
        return self.enc_mask.sum((1, 2, 3)).repeat_interleave(self.pos.shape[1])

    def attend(self, attn, q, k, v):
        """What Packed.attend is in training. Which keys are seen is said in `begin`; where it says no mask, one query sees all."""
        layer, (rows, width), groups, mask = attn.layer, self.pos.shape, k.shape[1], self.mask
        plain = mask is None or (mask.dtype == torch.bool and mask.shape[:2] == (rows, 1) and mask.stride(3) == 1)  # as `begin` makes it
        for way in (decode_triton, lean) if width == 1 and plain else ():
            if way.attends(q, self.k[layer]):
                return self.attend_one(way, layer, q, k, v).to(self.out)
        if width == 1:  # the queries of one key head as its rows: no key is read twice
            q, k, v = q.view(rows, groups, -1, q.shape[-1]), k.unsqueeze(2), v.unsqueeze(2)
        else:
            q, k, v = (t.unflatten(0, (rows, width)).transpose(1, 2) for t in (q, k, v))  # (B, heads, T, E)
        if self.even:
            self.new[0][layer].copy_(k)
            self.new[1][layer].copy_(v)
        else:
            for store, new in ((self.k[layer], k), (self.v[layer], v)):
                store[torch.arange(rows, device=q.device)[:, None], :, self.pos] = new.transpose(1, 2).to(store.dtype)
        k, v = self.seen[0][layer], self.seen[1][layer]
        if self.enc is not None:
            k, v = (torch.cat((e, own), dim=2) for e, own in zip(self.enc[layer], (k, v), strict=True))
        causal = mask is None and width > 1
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != groups)
        return (y.flatten(1, 2) if width == 1 else y.transpose(1, 2).flatten(0, 1)).to(self.out)

    def attend_one(self, way, layer, q, k, v):
        """One token of each row, whose own key and value the kernel adds to the cache."""
        mask, first, before = self.mask, 0, None
        if self.enc is not None:
            first = self.enc_mask.shape[-1]
            before = (*self.enc[layer], mask[:, 0, 0, :first])
        mask = mask if mask is None else mask[:, 0, 0, first:]
        return way.attend_one(q, k, v, self.seen[0][layer], self.seen[1][layer], self.pos, mask, before)

    def pool(self, ffn, p):
        rows, width = self.pos.shape
        seen, before = self.sums[ffn.layer].unbind()  # (B, 1, 32) each
        if width == min(self.count) == 1 and decode_triton.fits(p):
            return decode_triton.mean_so_far(p, seen, before, self.pos, ffn.gate_block if ffn.gate == "lagged" else 0)
        total = seen + F.pad(
            p.double().unflatten(0, (rows, width)).cumsum(1), (0, 0, 1, 0)
        )  # (B, T + 1, 32), from the start of the document
        take = lambda index: total.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, total.shape[-1]))  # noqa: E731
        count = self.pos + 1
        mean = total[:, 1:]
        first, last = self.pos[:, :1], self.last
        if ffn.gate == "lagged":
            count = self.pos // ffn.gate_block * ffn.gate_block  # tokens before this token's block
            mean = torch.where((count > first)[..., None], take(count - first), before)
            border = (first + last) // ffn.gate_block * ffn.gate_block
            before.copy_(torch.where((border > first)[..., None], take(border - first), before))
        seen.copy_(take(last))
        return (mean / count.clamp(min=1)[..., None]).flatten(0, 1).to(p.dtype)

    def end(self):
        self.lengths = [n + c for n, c in zip(self.lengths, self.count, strict=True)]

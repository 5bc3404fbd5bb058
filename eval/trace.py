"""What every layer saw: hidden states and attention maps of one forward pass, by a plain path that keeps everything.

    from eval.trace import trace;  found = trace(model, batch)          # batch: model.rectangle, merged_rectangle, a pack of a stream
    found["decoder"]["states"]     # n_layer + 1 tensors (N, D): what enters each block, and the stack's output after its final norm
    found["decoder"]["maps"]       # n_layer lists of one (heads, T, keys) tensor per document, rows summing to 1

Keys of an encoder-decoder's decoder are [encoder ; decoder]. Nothing of the model changes; a map costs T x keys numbers per head, so keep
texts short. Read next: Segments in model.py, which is what runs otherwise.
"""

import torch

from model import Segments


def maps_of(segments, q, k):
    """Attention probabilities of each document, in fp32 at least."""
    out = []
    for a, b, c, d in zip(*(cu[i:].tolist() for cu in (segments.cu_q, segments.cu_k) for i in (0, 1)), strict=False):
        queries, keys = q[a:b].transpose(0, 1), k[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1)  # (H, n, E)
        scores = (queries @ keys.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        if segments.causal:  # the last query sees every key
            later = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device).triu_(1 + (d - c) - (b - a))
            scores.masked_fill_(later, -torch.inf)
        out.append(scores.softmax(-1))
    return out


@torch.no_grad()
def trace(model, batch) -> dict:
    stacks = {name: stack for name in ("encoder", "decoder") if (stack := getattr(model, name)) is not None}
    found, hooks, plain = {name: {"states": [], "maps": []} for name in stacks}, [], Segments.attend
    now = []  # the stack that is running

    def attend(segments, q, k, v):
        found[now[-1]]["maps"].append(maps_of(segments, q, k))
        return plain(segments, q, k, v)

    for name, stack in stacks.items():
        hooks.append(stack.register_forward_pre_hook(lambda *_, name=name: now.append(name)))
        hooks.append(stack.register_forward_hook(lambda m, args, out, name=name: found[name]["states"].append(out)))
        for block in stack.blocks:
            hooks.append(block.register_forward_pre_hook(lambda m, args, name=name: found[name]["states"].append(args[0])))
    Segments.attend = attend
    try:
        model(batch)
    finally:
        Segments.attend = plain
        for hook in hooks:
            hook.remove()
    return found

"""One decoding step as a CUDA graph: the 140 to 200 kernels of a token (decode_triton.py), recorded once and launched as one.

A step that is recorded must always do the same work at the same addresses. So it sees a fixed number of keys (the cache up to the next
multiple of 256) through a mask made of the positions, which are a tensor; when the text outgrows them, or rows leave the batch, another
one is recorded. That costs two or three uncompiled steps: it is done once a batch has lasted for a few.
Hooks are recorded for what they do to tensors; one that keeps or prints is not heard again, unless `ready` says False. Used by
Transformer.step.
"""

import torch

BUCKET = 256  # keys
PATIENCE = 4  # steps of an unchanged batch before it is recorded


class Replay:
    def __init__(self, model, cache, keys):
        self.keys, rows, device = keys, len(cache.lengths), cache.k.device
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.pos, self.last = torch.tensor(cache.lengths, device=device)[:, None], torch.ones_like(self.ids)
        sums = cache.sums.clone()  # the gate's running sums hear every run; keys and values are written where the real ones will be
        if cache.k.is_cuda:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):  # handles and workspaces of the libraries are made before the recording
                self.run(model, cache)
            torch.cuda.current_stream().wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.hidden = self.run(model, cache)
        cache.sums.copy_(sums)

    @torch.no_grad()
    def run(self, model, cache):
        cache.pos, cache.last = self.pos, self.last
        cache.begin(model, self.ids, None, self.keys)
        return model.decoder(model.embed_tokens(self.ids.flatten()), cache).unflatten(0, self.ids.shape)

    def __call__(self, ids, cache):
        self.ids.copy_(ids)
        self.pos.copy_(torch.tensor(cache.lengths)[:, None])
        self.graph.replay()
        cache.count = [1] * len(ids)
        cache.end()
        return self.hidden.clone()


def ready(model, cache) -> bool:
    """Whether cache.replay stands for the next token of every row; it is recorded here when that will pay."""
    keys = min(cache.max_len, -(-(max(cache.lengths) + 1) // BUCKET) * BUCKET)
    cache.steady += 1
    if max(cache.lengths) >= cache.max_len or (cache.steady <= PATIENCE and cache.replay is None):
        return False
    if cache.replay is None or cache.replay.keys != keys:
        cache.replay = Replay(model, cache, keys)
    return True

"""What `hub export --to=sentence-transformers --verify` asks of the folder it has just written. Every answer counts in the exit code.

Here: tensors, hidden states, tokens, poolings, invariance to padding and to the batch. In a fresh, isolated process
(prepare/later_token.py): that SentenceTransformer loads it without us and that it is bidirectional. Read next: prepare/sentence.py.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import checkpoint
import hub
from model import Embedder, flat
from prepare import Checks, later_token
from prepare.sentence import POOLING, average, chosen

TEXTS = [
    "A man is eating food.", "The girl is carrying a baby.", "x", "", "Two men pushed carts through the woods. " * 40,
    "naïve café, 東京 and <|endoftext|> as text",
    "A monkey is playing drums, and nobody minds at all.", "def f(x):\n    return x",
]  # fmt: skip


def fresh_process(folder) -> tuple[dict | None, str]:
    """later_token.py on `folder`: isolated from this directory and its modules, offline, in an empty directory."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, "-I", str(Path(later_token.__file__).resolve()), str(Path(folder).resolve())]
        done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return (json.loads(lines[-1]) if lines else None), done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""


def verify(opt, folder) -> bool:
    import transformers

    check = Checks("verify")
    # the weights, read back the way anybody's folder is read
    stored, dtype = average(chosen(opt)), getattr(torch, opt.dtype)
    fields, state, _ = hub.read_model(folder)
    mine = {k: v for k, v in stored.items() if k == "embed.weight" or k.startswith("encoder.")}
    odd = [
        k for k, v in mine.items() if not torch.equal(v[: fields["vocab_size"]].to(dtype).float(), state[k][: fields["vocab_size"]].float())
    ]
    check(
        f"{len(mine)} tensors equal the checkpoint's",
        not odd and set(mine) == set(state) and fields["arch"] == "encoder",
        ", ".join(odd[:3]),
    )
    if opt.to != "sentence-transformers":
        moved = later_token.later_token(folder)
        check("a later token moves earlier states, and none under is_causal=true", later_token.holds(moved))
        return check.end()

    tok = transformers.AutoTokenizer.from_pretrained(folder)
    settings = {"max_length": opt.max_seq_length, "append_eos": opt.append_eos, "normalize": opt.normalize}
    # In fp64: thirty fp32 layers with loud channels are 1e-4 apart from themselves, padded and not. (Norms stay fp32 in transformers.)
    ours = {mode: Embedder.load(folder, dtype=torch.float64, **settings | {"pooling": mode}).double() for mode in POOLING}
    trained = Embedder.load(checkpoint.resolve(opt.ckpt), dtype=torch.float32, pooling=opt.pooling, **settings)
    texts = [text for text in TEXTS if text or opt.append_eos]
    rows = trained.rows(texts)
    theirs = tok(texts, truncation=True, max_length=opt.max_seq_length)["input_ids"]
    check(
        "tokens are the training side's, truncation and EOS included",
        rows == theirs,
        [t for t, a, b in zip(texts, rows, theirs, strict=True) if a != b] or "",
    )

    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    mine = ours["mean"]
    batch = flat(rows)
    with torch.no_grad():
        hidden = mine(batch)[0]
        padded = tok(texts, truncation=True, max_length=opt.max_seq_length, padding=True, return_tensors="pt")
        states = model(**padded).last_hidden_state
        real = states[padded["attention_mask"].bool()]
        gap = float((real - hidden).abs().max() / hidden.abs().max())
        check("hidden states of the transformers reload = ours", gap <= 1e-5, f"{gap:.1e}")
        alone = torch.cat([model(torch.tensor([row])).last_hidden_state[0] for row in rows])
        gap = float((real - alone).abs().max() / hidden.abs().max())
        check("padding and batch mates do not matter", gap <= 1e-5, f"{gap:.1e}")

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling

    for mode, name in POOLING.items():
        pool = Pooling(hidden.shape[1], pooling_mode=name)
        want = pool({"token_embeddings": states, "attention_mask": padded["attention_mask"]})["sentence_embedding"]
        want = torch.nn.functional.normalize(want, dim=-1) if opt.normalize else want
        gap = float((want - ours[mode](batch)[1]).detach().abs().max() / want.abs().max())
        check(f"{mode} pooling = sentence-transformers' {name}", gap <= 1e-5, f"{gap:.1e}")
    embedder = SentenceTransformer(str(folder), device="cpu")
    vectors, want = embedder.encode(texts), Embedder.load(folder, dtype=torch.float32, **settings, pooling=opt.pooling).encode(texts)
    gap = float(abs(vectors - want).max() / abs(want).max())
    tolerance = 1e-5 if opt.dtype == "float32" else 2e-2  # sentence-transformers runs in the stored dtype
    check("SentenceTransformer.encode = Embedder.encode", gap <= tolerance and (want == want).all(), f"{gap:.1e}")
    some = want[want.any(1)]  # where EOS pads, too, a fresh model knows it by a row of zeros, and "" has no direction
    check("unit norm", not opt.normalize or (len(some) > 1 and abs((some**2).sum(1) - 1).max() < 1e-5))

    fresh, error = fresh_process(folder)
    check(
        "a fresh process loads it with no code of ours and finds it bidirectional",
        fresh and fresh["ok"],
        fresh["shape"] if fresh else error,
    )
    if fresh:
        bidirectional = min(v for k, v in fresh["moved"].items() if not k.startswith("causal"))
        causal = max(v for k, v in fresh["moved"].items() if k.startswith("causal"))
        print(f"     a later token moved earlier states by at least {bidirectional:.2e}; with is_causal=true by at most {causal:g}")
    return check.end(f"; transformers {transformers.__version__} (needs >= 5.2)")

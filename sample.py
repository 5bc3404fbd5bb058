"""Text out of a checkpoint: completion, chat, infilling, many prompts and samples at once.

    python sample.py --ckpt=out/RUN --prompt="Once upon a time" --max_new_tokens=200 --temperature=0.8 --top_k=50
    python sample.py --ckpt=out/RUN --chat                          # a conversation, by the checkpoint's own template
    git log -3 | python sample.py --ckpt=out/RUN --num_samples=3    # or < FILE; --prompt=- waits for a pipe that is slow to begin
    python sample.py --ckpt=out/ENCDEC --prompt="It was <extra_id_0> in Paris."

--lines makes each line of the input a prompt, --system=TEXT opens a chat, --mode=R|X|S|I names the denoising mode of an encoder-decoder,
--allow_noncausal lets a decoder write whose gate hears later tokens; --tau=T and --gate_hard set PolyGLU's gates. --beams=4 --temperature=0
looks for the likeliest text (beams.py).
Decoding reads each token once through a KV cache. A row of a batch draws from its own random stream, so what a prompt yields does not
depend on its neighbours (exactly in fp32, in bf16 up to the rounding that a batch of another shape has), but for its length: the longest
prompt decides how much room all have. Only whole characters are printed.
In Python: `sample.generate(model, tokenizer, prompt)`.
Read next: step in model.py, cache.py.
"""

import prelude  # isort: skip

import sys
import time

import torch

import checkpoint
import configurator
import machine
import tokenizer as tokenizers
from beams import keep_rows, possible, read, room, search
from configurator import die
from eval import open_run
from model import flat
from prepare.prompts import HOLE, Printer, chat_ids, hole_ids, prefix_ids, splice, stop_ids


def pick(logits, temperature, top_k, top_p, u):
    """One id per row of logits (B, V), by inverting the distribution at u (B,) in [0, 1)."""
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    logits, ids = logits / temperature, None
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)
    elif top_p < 1:
        logits, ids = logits.sort(descending=True)
    probs = logits.double().softmax(-1)
    if top_p < 1:  # the smallest set of likeliest tokens that holds top_p; always at least one
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    mass = probs.cumsum(-1)
    choice = torch.searchsorted(mass, u[:, None].to(mass) * mass[:, -1:], right=True).clamp(max=probs.shape[-1] - 1)
    return (choice if ids is None else ids.gather(1, choice))[:, 0]


@torch.inference_mode()
def tokens(model, prompts, max_new_tokens, ended, temperature=0.0, top_k=0, top_p=1.0, seed=1337, num_samples=1, allowed=None, enc=None):
    """Draw ids row by row until `ended(row, id)` says so or `max_new_tokens` are there; row = prompt * num_samples + sample.

    prompts: lists of ids, each read once. allowed: a mask (P, V) of ids that may be drawn. enc: for an encoder-decoder, the
    encoder's ids of every prompt. A row's random numbers depend on seed and sample alone.
    """
    device, count = model.embed.weight.device, room(model, prompts, max_new_tokens)
    row = torch.arange(len(prompts)).repeat_interleave(num_samples).tolist()
    streams = [torch.Generator().manual_seed(seed + 1_000_003 * (i % num_samples)) for i in range(len(row))]
    u = torch.stack([torch.rand(count, generator=stream, dtype=torch.float64) for stream in streams]).to(device)
    cached, texts, live = model.cfg.causal, [list(prompts[i]) for i in row], list(range(len(row)))
    if cached:  # read every prompt once, then a row per sample
        cache, hidden = read(model, prompts, count, enc)
        hidden = hidden[row]
        if num_samples > 1:
            keep_rows(cache, row)
    for t in range(count):
        if not cached:  # a gate that hears later tokens changes everything at every token
            batch = flat([texts[r] for r in live], device)
            hidden = model(batch)[batch["cu"][1:].long() - 1]
        logits = model.predict(hidden)  # (B, V)
        if allowed is not None:
            logits.masked_fill_(~allowed[[row[r] for r in live]], -torch.inf)
        drawn = pick(logits, temperature, top_k, top_p, u[live, t])
        for r, i in zip(live, drawn.tolist(), strict=True):
            texts[r].append(i)
        going = [n for n, r in enumerate(live) if not ended(r, texts[r][-1])]
        if not going or t + 1 == count:
            return
        if len(going) < len(live):  # finished rows leave the batch
            live, drawn = [live[n] for n in going], drawn[going]
            if cached:
                keep_rows(cache, going)
        if cached:
            hidden = model.step(drawn[:, None], cache)[:, 0]


@torch.inference_mode()
def generate(model, tokenizer, prompt, max_new_tokens=128, temperature=0.0, top_k=0, top_p=1.0, num_samples=1, seed=1337, chat=False,
             stop=(), on_text=None, mode=None, beams=1):  # fmt: skip
    """The continuation of `prompt` (a text, a list of texts or, with `chat`, a list of messages), without the prompt.

    One text for one prompt and one sample; else a list: every sample of the first prompt, then of the second. `stop`: one text or several
    that end a continuation and are cut from it. `on_text(row, piece)` hears of text as it comes. An encoder-decoder fills `<extra_id_k>` in
    the prompt and gives the whole text; `mode` is its denoising mode.
    """
    possible(locals())
    stop = tuple(filter(None, [stop] if isinstance(stop, str) else stop))
    if not prompt and not isinstance(prompt, str):
        return []
    single = isinstance(prompt, str) or (chat and isinstance(prompt[0], dict))
    prompts, enc, vocab = [prompt] if single else list(prompt), None, model.cfg.vocab_size
    may = [range(min(vocab, tokenizer.vocab_size))] * len(prompts)  # a model may have rows that no text ever used
    expect_writer(model)
    if model.cfg.arch == "encdec":
        if chat:
            die("--chat: an encoder-decoder continues or fills holes; give a plain prompt")
        enc, ids, may = zip(*(hole_ids(model.cfg, tokenizer, p, mode) for p in prompts), strict=True)
    elif chat:
        ids = [chat_ids(tokenizer, [{"role": "user", "content": p}] if isinstance(p, str) else p) for p in prompts]
    else:
        ids = [prefix_ids(tokenizer) + tokenizer.encode(p) or [tokenizer.eos_id] for p in prompts]
    allowed = torch.zeros(len(ids), vocab, dtype=torch.bool)
    for mask, some in zip(allowed, may, strict=True):
        mask[torch.tensor(some)] = True
    holes = [enc is not None and bool(HOLE.search(p)) for p in prompts for _ in range(num_samples)]
    rows, stops = len(holes), stop_ids(tokenizer, chat) | {tokenizers.end_of(model.cfg, tokenizer)}
    printers, texts, drawn = [Printer(tokenizer) for _ in range(rows)], [""] * rows, [[] for _ in range(rows)]

    def say(row, piece):
        texts[row] += piece
        if on_text and piece and not holes[row]:
            on_text(row, piece)

    def ended(row, i):
        drawn[row].append(i)
        say(row, printers[row].end() if i in stops else printers[row](i))
        cut = min((at for s in stop if (at := texts[row].find(s)) >= 0), default=-1)
        if cut >= 0:
            texts[row], printers[row] = texts[row][:cut], None
        return cut >= 0 or i in stops

    allowed = None if bool(allowed.all()) else allowed.to(model.embed.weight.device)
    if beams > 1:
        for row, best in enumerate(search(model, ids, max_new_tokens, stops, beams, allowed, enc)):
            any(ended(row, i) for i in best)
    else:
        tokens(model, ids, max_new_tokens, ended, temperature, top_k, top_p, seed, num_samples, allowed, enc)
    for row, printer in enumerate(printers):
        say(row, printer.end() if printer else "")  # a character that the last token left unfinished
        if holes[row]:
            write = lambda some: "".join(map(Printer(tokenizer), some))  # noqa: E731
            texts[row] = splice(model.cfg, prompts[row // num_samples], [i for i in drawn[row] if i not in stops], write)
    return texts[0] if rows == 1 and single else texts


def expect_writer(model):
    if model.cfg.arch == "encoder":
        die("an encoder writes no text; use eval.embedding, or sample from a decoder")


def write(row, piece):
    print(end=piece, flush=True)


def converse(model, tok, messages, options):
    """Turn after turn, until the input ends (Ctrl-D)."""
    write(0, "> ")
    for line in sys.stdin or ():
        if line.strip():
            messages.append({"role": "user", "content": line.strip()})
            messages.append({"role": "assistant", "content": generate(model, tok, messages, chat=True, on_text=write, **options)})
        write(0, "\n> ")


def main(argv):
    defaults = {"ckpt": str, "prompt": None, "chat": False, "max_new_tokens": 256, "temperature": 0.8, "top_k": 0, "top_p": 1.0}
    defaults |= {"num_samples": 1, "seed": 1337, "device": "auto", "dtype": "auto", "lines": False, "system": "", "mode": None}
    opt = configurator.args(defaults | {"allow_noncausal": False, "beams": 1, "tau": 0.0, "gate_hard": False}, argv, __doc__)
    possible(vars(opt), "--")
    talk = opt.chat and opt.prompt is None  # turn after turn
    for key, need, vain in (("system", "--chat", not opt.chat), ("lines", "--prompt", talk), ("num_samples", "--prompt", talk)):
        if vain and getattr(opt, key) != defaults[key]:
            die(f"--{key}={getattr(opt, key)} would do nothing here: it needs {need}")
    where = machine.find(opt.device, opt.dtype)
    if checkpoint.read_state(checkpoint.resolve(opt.ckpt))["config"].get("objective") == "latent":
        import latentwire

        if idle := sorted({arg[2:].partition("=")[0] for arg in argv} - {"ckpt", "prompt", "max_new_tokens", "device", "dtype"}):
            die(f"--{idle[0]} would do nothing here: a latent run answers one question, greedily")

        return latentwire.say(opt.ckpt, prelude.listen(opt.prompt), opt.max_new_tokens, where)
    model, state, *_ = open_run(opt)
    expect_writer(model)  # before the prompt is printed
    tok = tokenizers.load(checkpoint.resolve(opt.ckpt).parent)
    start = [{"role": "system", "content": opt.system}] if opt.system else []
    if opt.chat and model.cfg.arch != "decoder":
        die(f"--chat: {opt.ckpt} has arch={model.cfg.arch!r}, and only a decoder converses; give a plain --prompt")
    if opt.chat:  # what the template refuses, it refuses before anybody has typed
        chat_ids(tok, [*start, {"role": "user", "content": "?"}])
    options = {key: getattr(opt, key) for key in ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "mode", "beams")}
    if opt.mode and model.cfg.arch != "encdec":
        die(f"--mode={opt.mode} would do nothing here: it needs an encoder-decoder")
    if opt.beams > 1 and not model.cfg.causal:
        die(f"--beams={opt.beams} needs a cache, and gate='sequence' allows none: leave it out, or import with --gate=running")
    options |= {} if opt.mode or state["config"].get("mode_tokens", True) else {"mode": ""}
    if talk:
        return converse(model.lean(), tok, start, options)
    prompt = prelude.listen(opt.prompt)
    prompts = (prompt.splitlines() if opt.lines else [prompt]) or die("--lines: the prompt has no line")
    filled = [model.cfg.arch == "encdec" and bool(HOLE.search(p)) for p in prompts]  # the answer is the whole text
    texts, alone = prompts, len(prompts) * opt.num_samples == 1 and not filled[0]
    if opt.chat:
        prompts = [start + [{"role": "user", "content": p}] for p in prompts]
    if model.cfg.arch == "encdec":  # which refuses what its encoder cannot read, before the prompt is printed
        begun = [hole_ids(model.cfg, tok, p, options["mode"])[1] for p in prompts]
    else:
        begun = [chat_ids(tok, p) if opt.chat else prefix_ids(tok) + tok.encode(p) for p in prompts]
    fits = room(model, begun, opt.max_new_tokens)
    model.lean(len(prompts) * opt.num_samples * opt.beams)
    write(0, texts[0] if alone and not opt.chat else "")
    began = time.perf_counter()
    answers = generate(model, tok, prompts, chat=opt.chat, num_samples=opt.num_samples, on_text=write if alone else None, **options)
    seconds = time.perf_counter() - began
    for row, answer in enumerate(() if alone else answers):
        text = row // opt.num_samples
        print(f"--- {row + 1}\n{'' if opt.chat or filled[text] else texts[text]}{answer}")
    write(0, "\n" if alone else "")
    given = [HOLE.sub("", text) for text, whole in zip(texts, filled, strict=True) if whole] * opt.num_samples
    n, m = (sum(len(tok.encode(text)) for text in some) for some in (answers, given))
    n, short = max(0, n - m), fits < opt.max_new_tokens
    more = f"; no more than {fits} tokens fit in max_len={model.cfg.max_len}" * short
    print(f"[about {n} tokens in {seconds:.1f} s, {n / seconds:.1f} tokens/s; {where.why}{more}]", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])

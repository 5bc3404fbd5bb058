"""Conversations -> shards for fine-tuning, in ChatML, with bit 31 set on every token whose prediction is not trained.

    python -m prepare.chat --from='gsm8k.jsonl' --out=data/sft --tokenizer=qwen.tiktoken --max_len=4096
    python -m prepare.chat --dataset=nvidia/Nemotron-Math-v2 --split=high_part00 --out=data/sft --tokenizer=DIR --max_examples=100000

A message is <|im_start|>role, newline, content, <|im_end|>, newline; the end-of-document token closes the conversation. Trained are the
assistant's content, its <|im_end|>, newline, and that last token when it follows an assistant. prompts.chat_parts makes the ids here and
for sample.py, so that what is trained is what will be asked. A conversation that does not fit max_len is dropped and counted, never cut.
Rows: {messages: [{role, content}]}, ShareGPT's conversations, or one of PAIRS. Read next: data.py (packing)."""

import functools
import itertools
import os
import sys

import numpy as np

import configurator
import tokenizer
from configurator import die
from prepare import prompts, shards, sources
from prepare.text import hash_of, is_val, read, report

UNTRAINED = np.uint32(1 << 31)
ROLES = ("system", "user", "assistant")
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}
PAIRS = (("instruction", "output"), ("query", "response"), ("problem", "solution"), ("question", "answer"), ("prompt", "completion"))
CHATML = (  # kept beside the shards, so that sample.py --chat asks in the form that was trained
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OPTIONS = {
    "from": "", "out": "", "tokenizer": str, "max_len": 4096, "max_examples": 0, "val": 0.01, "shard_tokens": 100_000_000, "workers": 0,
    "dataset": "", "config": "", "split": "train",
}  # fmt: skip


def messages(row):
    """-> [(role, content)], or the reason why there are none."""
    listed = row.get("messages") or row.get("conversations")
    if isinstance(listed, list):
        listed = [m if isinstance(m, dict) else {} for m in listed]
        found = [(m.get("role") or SHAREGPT.get(m.get("from")), m.get("content") or m.get("value", m.get("content"))) for m in listed]
    else:
        ask, answer = next(((a, b) for a, b in PAIRS if isinstance(row.get(a), str) and isinstance(row.get(b), str)), (None, None))
        if ask is None:
            return "no messages and no known pair of fields"
        prompt = "\n\n".join(part for part in (row[ask], row.get("input")) if part)  # the second is Alpaca's
        found = [("system", row["system"])] if row.get("system") else []
        found += [("user", prompt), ("assistant", row[answer])]
    if any(role not in ROLES for role, _ in found):
        return "a role outside " + ", ".join(ROLES)
    if any(not isinstance(content, str) for _, content in found):
        return "content that is no text"
    if not any(role == "assistant" and content.strip() for role, content in found):
        return "no assistant text"
    return [(role, tokenizer.scalar(content)) for role, content in found]


def render(tok, turns):
    """-> (ids uint32 with bit 31, bytes of text), by the very function that writes the prompts of sample.py."""
    parts = prompts.chat_parts(tok, [{"role": role, "content": content} for role, content in turns], reply=False)
    parts.append(([tok.eos_id], parts[-1][1]))
    ids = [np.array(ids, np.uint32) | (np.uint32(0) if said else UNTRAINED) for ids, said in parts]
    return np.concatenate(ids), sum(len(f"{role}\n{content}\n".encode()) for role, content in turns)


def encode(o, task, tok, out, count):
    """The job of a worker, see pool.work."""
    docs = []
    for row in sources.rows(task, count):
        turns = messages(row)
        if isinstance(turns, str):
            count[turns] += 1
            continue
        ids, nbytes = render(tok, turns)
        if len(ids) > o.max_len:
            count[f"over {o.max_len} tokens"] += 1
            continue
        key = read(text for turn in turns for text in turn)[0]
        docs.append((len(ids), nbytes, int(is_val(key, o.val * 2**64))))
        out.write(ids.tobytes())
    return docs


def banner(out, manifest):
    """How much of it is trained on; the manifest keeps it, so that the run can say it."""
    if "trained" not in manifest:
        manifest["trained"] = 0
        for shard in manifest["shards"]:
            ids = np.memmap(os.path.join(out, shard["name"] + ".bin"), "<u4", "r")
            manifest["trained"] += sum(int((ids[i : i + (1 << 22)] < UNTRAINED).sum()) for i in range(0, len(ids), 1 << 22))
        shards.write_json(os.path.join(out, "manifest.json"), manifest)
    trained, total = manifest["trained"], sum(shard["tokens"] for shard in manifest["shards"])
    print(f"trained: {trained:,} of {total:,} tokens ({trained / total:.1%}), the assistant's")


def main(argv):
    o = configurator.args(OPTIONS, argv, __doc__, positive="max_len shard_tokens")
    local = getattr(o, "from")
    if not o.out or bool(local) == bool(o.dataset):
        die("give --out=DIR and either --from=FILES or --dataset=NAME; --help lists every key")
    if o.val >= 1:
        die(f"--val={o.val} must be below 1: it is a share of the conversations")
    if local and (idle := [arg for arg in argv if arg.startswith(("--config=", "--split="))]):
        die(f"{idle[0]} would do nothing here: it needs --dataset")
    tok = tokenizer.load(o.tokenizer).configure(chat_template=CHATML)
    print(tok)
    if "<|im_start|>" not in tok.special or "<|im_end|>" not in tok.special:
        print(f"{tok.name} has no <|im_start|> or <|im_end|>: they are spelled out, and {tok.decode([tok.eos_id])} alone ends an answer")
    files = sources.find(local) if local else []
    if plain := [f for f, _ in files if not f.endswith(sources.LINES + sources.TABLES)]:
        die(f"{plain[0]}: conversations come from {', '.join(sources.LINES + sources.TABLES)} files")

    def tasks(done, rows):
        if o.dataset:
            return sources.hub(o.dataset, o.config, o.split, rows)
        return itertools.islice(sources.tasks(files), done, None)

    settings = {k: getattr(o, k) for k in ("from", "dataset", "config", "split", "max_len", "val")}
    settings |= {"kind": "chat", "tokenizer": tok.fingerprint, "files": hash_of(files)}
    job, total = functools.partial(encode, o), sum(size for _, size in files)
    result = shards.build(o.out, tok, tasks, job, settings, o.shard_tokens, 0, o.max_examples, o.workers, (0, 1), total)
    report(o.out, *result)
    banner(o.out, result[0])


if __name__ == "__main__":
    main(sys.argv[1:])

"""Benchmarks by lm-eval's own task definitions, metrics and prompts, on a checkpoint of ours.

    python -m eval.harness --ckpt=out/RUN --tasks=hellaswag,gsm8k [--num_fewshot=N] [--limit=N] [--batch_size=16] [--chat] [--out=FILE]
    python -m eval.harness --ckpt=out/RUN --suite=smoke|ten|gen|ppl|all
    python -m eval.harness --ckpt=out/RUN --tasks=mine --include=DIR          local task files (yaml), no network

Context and continuation are encoded together, contexts too long are cut on the left, an empty one is EOS; requests run in batches of
like length as flat documents, so nothing is padded; generation is greedy and cached. Every finished request is a line of
OUT.requests.jsonl at once: a killed run goes on where it stood. Base and chat checkpoints by the same command.
Needs lm_eval (pip install -e .[eval]). Read next: eval/perplexity.py; eval/plots.py --harness=result.json.
"""

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import checkpoint
import configurator
import sample
from configurator import die
from eval import OPEN, load_tokenizer, open_run, suffix, write_json
from eval.perplexity import pack
from eval.plots import CHANCE
from files import writable
from machine import to_device
from prepare.prompts import chat_ids, prefix_ids, stop_ids

OPTIONS = OPEN | {"tasks": "", "suite": "", "num_fewshot": -1, "limit": 0, "batch_size": 16}
OPTIONS |= {"max_gen_toks": 512, "chat": False, "include": ""}
TEN = "hellaswag,arc_easy,arc_challenge,piqa,winogrande,boolq,mmlu_stem,lambada_openai,openbookqa,sciq"
SUITES = {  # name: (tasks, shots or None for the task's own, limit or 0)
    "smoke": [("hellaswag,gsm8k,lambada_openai", None, 5)],
    "ten": [(TEN, None, 0), ("mmlu_stem", 5, 0)],  # the published "5-shot" mmlu_stem was most likely run with none: both are shown
    "gen": [("gsm8k,minerva_math,minerva_math500", None, 0)],
    "ppl": [],
}
SUITES["all"] = [run for name in ("smoke", "ten", "gen") for run in SUITES[name]]
HEADLINE = ("acc_norm", "acc", "exact_match", "math_verify", "f1", "bleu", "word_perplexity", "perplexity")
NUMBERED = 1000  # characters of a request kept in the log beside its answer


class PrismLM(TemplateLM):
    """A Transformer as lm-eval sees it. `log` (a path) keeps every answer; answers already there are not computed again."""

    def __init__(self, model, tok, batch_size=16, max_gen_toks=512, chat=False, log=None, name=""):
        super().__init__()
        self.model, self.tok, self.batch_size, self.max_gen_toks, self.chat, self.name = model, tok, batch_size, max_gen_toks, chat, name
        self._device = model.embed.weight.device
        self.prefix, self.stops, self.rendered = prefix_ids(tok), stop_ids(tok, chat), {}
        self.log, self.done = Path(log) if log else None, {}
        if self.log and self.log.exists():
            text = self.log.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
            if whole != text:
                self.log.write_text(whole, encoding="utf-8")
            for line in whole.split("\n")[:-1]:  # only a line feed: U+2028 may stand in an answer
                row = json.loads(line)
                self.done[row["key"]] = row["answer"]

    # -- what lm-eval asks of any model

    @property
    def eot_token_id(self):
        return self.prefix[0] if self.prefix else self.tok.eos_id

    @property
    def max_length(self):
        return self.model.cfg.max_len

    @property
    def tokenizer_name(self):
        return self.tok.fingerprint

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        if string in self.rendered:
            return self.rendered[string]
        return (self.prefix if add_special_tokens is not False else []) + self.tok.encode(string)

    def chat_template(self, chat_template=False):
        return str(self.tok.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The ids of the template are kept beside its text, because a marker that a message merely quotes must stay text."""
        if not add_generation_prompt:
            die("a task begins the assistant's answer itself (gen_prefix); run it without --chat")
        ids = chat_ids(self.tok, chat_history)
        text = self.tok.decode(ids)
        self.rendered[text] = ids
        return text

    def _encode_pair(self, context, continuation):
        if context in self.rendered:
            return self.rendered[context], self.tok.encode(continuation)
        return super()._encode_pair(context, continuation)

    # -- answers, kept

    def remember(self, key, request, answer):
        self.done[key] = answer
        if self.log:
            with open(self.log, "a", encoding="utf-8") as f:
                f.write(json.dumps({"key": key, "answer": answer, "request": str(request)[-NUMBERED:]}, ensure_ascii=False) + "\n")

    def batches(self, requests, length, what):
        """Those without an answer, longest first, in batches; identical requests once."""
        todo = {key: r for key, r in requests if key not in self.done}
        todo = sorted(todo.items(), key=lambda item: (-length(item[1]), item[0]))
        bar = tqdm(total=len(todo), desc=what, disable=not sys.stderr.isatty(), leave=False)
        for at in range(0, len(todo), self.batch_size):
            yield todo[at : at + self.batch_size]
            bar.update(min(self.batch_size, len(todo) - at))

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        asked = [(digest("loglikelihood", context, continuation), (context, continuation)) for _, context, continuation in requests]
        for batch in self.batches(asked, lambda r: len(r[0]) + len(r[1]), "log-likelihoods"):
            pieces, wanted, end = [], [], 0
            for i, (_, (context, continuation)) in enumerate(batch):
                ids = (context + continuation)[-(self.max_length + 1) :]
                pieces.append((i, ids, 0, 0))
                end += len(ids) - 1
                wanted.append(torch.arange(end - min(len(continuation), len(ids) - 1), end))
            flat = to_device(pack(pieces), self.device)
            index = torch.cat(wanted).to(self.device)
            hidden, targets = self.model(flat)[index], flat["targets"][index]
            logp = [torch.log_softmax(self.model.predict(h), -1) for h in hidden.split(512)]
            chosen = torch.cat([p.gather(1, t[:, None])[:, 0] for p, t in zip(logp, targets.split(512), strict=True)])
            greedy = torch.cat([p.argmax(-1) == t for p, t in zip(logp, targets.split(512), strict=True)])
            sizes = [len(w) for w in wanted]
            for (key, request), score, same in zip(batch, chosen.split(sizes), greedy.split(sizes), strict=True):
                self.remember(key, self.tok.decode(request[1]), [float(score.double().sum()), bool(same.all())])
        return [tuple(self.done[key]) for key, _ in asked]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        answers = []
        for request in requests:
            ids = self.tok.encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.eot_token_id, self.max_length, 1)
            parts = [("", *make_disjoint_window(window)) for window in windows]
            answers.append(float(sum(score for score, _ in self._loglikelihood_tokens(parts))))
        return answers

    def generate_until(self, requests, disable_tqdm=False):
        asked = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                die("a task asks for sampling (do_sample); this harness decodes greedily, so set do_sample: false in its yaml")
            until = options.get("until") or []
            most = int(options.get("max_gen_toks", min(self.max_gen_toks, self.max_length // 2)))
            until = [until] if isinstance(until, str) else list(until)
            if most >= self.max_length:
                die(f"a task generates up to {most} tokens, the model reads {self.max_length}; lower max_gen_toks in its yaml")
            asked.append((digest("generate", context, until, most, self.chat), (self.tok_encode(context), until, most)))
        for most in sorted({most for _, (_, _, most) in asked}):  # one budget a batch: it decides how much of a prompt fits
            same = [r for r in asked if r[1][2] == most]
            for batch in self.batches(same, lambda r: len(r[0]), "texts"):
                for (key, request), text in zip(batch, self.generate([r for _, r in batch]), strict=True):
                    self.remember(key, self.tok.decode(request[0]), text)
        return [self.done[key] for key, _ in asked]

    def generate(self, requests):
        """Greedy texts of [(ids, until, most)], each cut before the first of its stop strings."""
        drawn, texts = [[] for _ in requests], [None] * len(requests)

        def ended(row, i):
            _, until, most = requests[row]
            if i not in self.stops:
                drawn[row].append(i)
            text = self.tok.decode(drawn[row])
            cut = min((at for s in until if s and (at := text.find(s)) >= 0), default=-1)
            texts[row] = text if cut < 0 else text[:cut]
            return i in self.stops or cut >= 0 or len(drawn[row]) >= most

        prompts = [ids[-(self.max_length - most) :] for ids, _, most in requests]
        known = torch.arange(self.model.cfg.vocab_size, device=self.device) < self.tok.vocab_size  # a row without a token may be likely
        allowed = known.expand(len(prompts), -1)
        sample.tokens(self.model, prompts, max(most for _, _, most in requests), ended, allowed=allowed)
        return texts


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def evaluate(lm, tasks, shots=None, limit=None, include=None):
    """lm-eval's result dict; `include` is a folder of local task files, and then nothing else is looked up."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include or None, include_defaults=not include)
    if unknown := [t for t in tasks if t not in manager.all_tasks]:
        die(f"--tasks={','.join(unknown)}: lm_eval {version('lm_eval')} knows no such task{f' in {include}' if include else ''}")
    how = {"apply_chat_template": lm.chat, "fewshot_as_multiturn": lm.chat, "bootstrap_iters": 1000}
    try:
        return lm_eval.simple_evaluate(lm, tasks=tasks, num_fewshot=shots, limit=limit, task_manager=manager, **how)
    except ConnectionError as error:
        die(f"--tasks={','.join(tasks)}: {error}; run it once where there is a network, or take --include=DIR of local tasks")


def asked(results, task):
    """How many documents a task has; a group, all of its tasks together."""
    n = results.get("n-samples", {}).get(task)
    return n["effective"] if n else sum(asked(results, part) or 0 for part in results.get("group_subtasks", {}).get(task, ())) or None


def rows(results):
    """[{task, metric, value, stderr, n, chance, shots, all}] of an lm-eval result; the headline is acc_norm where there is one."""
    out = []
    for task, values in results["results"].items():
        metrics = {k: v for k, v in values.items() if isinstance(v, float | int) and "_stderr" not in k and not k.startswith("sample_")}
        ranks = {k: (HEADLINE.index(name) if (name := k.partition(",")[0]) in HEADLINE else 99, k) for k in metrics}
        if not metrics:
            continue
        best = min(metrics, key=ranks.get)
        error = values.get("_stderr,".join(best.split(",", 1)))
        row = {"task": task, "metric": best, "value": metrics[best], "stderr": error if isinstance(error, float) else None}
        row |= {"n": asked(results, task), "chance": CHANCE.get(task), "shots": results.get("n-shot", {}).get(task), "all": metrics}
        out.append(row)
    return out


def verdict(row):
    if row["chance"] is None or not row["stderr"]:
        return "" if row["chance"] is None or row["stderr"] is None else f"all {row['n']} answers alike: no interval"
    far = (row["value"] - row["chance"]) / row["stderr"]
    return f"{'above' if far > 1.96 else 'below' if far < -1.96 else 'not different from'} chance ({far:+.1f} standard errors)"


def main(argv):
    o = configurator.args(OPTIONS, argv, __doc__, positive="batch_size max_gen_toks")
    writable(o.out)
    if bool(o.tasks) == bool(o.suite) or o.suite not in ("", *SUITES):
        die(f"give --tasks=a,b or --suite=, one of {', '.join(SUITES)}; got tasks={o.tasks!r}, suite={o.suite!r}")
    if o.suite and o.num_fewshot >= 0:
        die(f"--num_fewshot={o.num_fewshot} would do nothing here: a suite has its own; name its tasks with --tasks")
    model, state, _, facts = open_run(o)
    if model.cfg.arch != "decoder":
        die(f"arch={model.cfg.arch!r}: the harness scores decoders")
    if model.cfg.causal:
        model.lean(o.batch_size)
    step = checkpoint.resolve(o.ckpt)
    out = o.out or str(step.parent / f"harness-{o.suite or o.tasks.replace(',', '-')[:60]}{'-chat' if o.chat else ''}.json")
    facts |= {"lm_eval": version("lm_eval"), "chat": o.chat, "weights": digest(checkpoint.read_state(step).get("sha256", str(step)))}
    lm = PrismLM(model, load_tokenizer(o.ckpt), o.batch_size, o.max_gen_toks, o.chat, log_of(out, facts), o.ckpt)
    table, end = [], suffix(model)
    for tasks, shots, limit in SUITES[o.suite] if o.suite else [(o.tasks, None if o.num_fewshot < 0 else o.num_fewshot, 0)]:
        results = evaluate(lm, tasks.split(","), shots, o.limit or limit or None, o.include)
        for row in rows(results):
            named = {"metric": row["metric"] + end, "all": {k + end: v for k, v in row["all"].items()}}
            table.append(row | named | {"suite": o.suite or None})
        write_json(out, facts | {"tasks": table})
    print(f"{'task' + end:<28} {'value':>8} {'stderr':>8} {'metric':<24} {'n':>6} {'chance':>6} {'shots':>5}")
    for r in table:
        error, chance = ("-" if r[k] is None else f"{r[k]:.4f}" for k in ("stderr", "chance"))
        head, tail = f"{r['task']:<28} {r['value']:8.4f} {error:>8}", f"{r['n'] or '-':>6} {chance:>6} {r['shots']!s:>5}  {verdict(r)}"
        print(f"{head} {r['metric']:<24} {tail}")
    print(out)
    if o.suite in ("ppl", "all"):
        from eval import perplexity

        same = [f"--{k}={getattr(o, k)}" for k in OPEN if k != "out"]
        perplexity.main([*same, f"--out={out.removesuffix('.json')}-perplexity.json"])


def log_of(out, facts):
    """The request log beside `out`; answers of another model or setting are never taken over."""
    path = Path(out.removesuffix(".json") + ".requests.jsonl")
    head = {k: v for k, v in facts.items() if k not in ("commit", "device", "torch")}
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = json.dumps({"key": "run", "answer": head, "request": ""}) + "\n"
    if path.exists() and not path.read_text(encoding="utf-8").startswith(mark):
        die(f"{path} holds answers of another checkpoint or setting; give another --out, or remove it")
    if not path.exists():
        path.write_text(mark, encoding="utf-8")
    return path


if __name__ == "__main__":
    main(sys.argv[1:])

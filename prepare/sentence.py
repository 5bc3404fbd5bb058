"""An encoder for everybody: a sentence-transformers folder that loads with no custom code, and proves itself.

    python -m hub export --ckpt=out/RUN --to=sentence-transformers --out=DIR [--pooling=mean|cls|last|weighted_mean] [--verify]
        [--normalize=True] [--average_last=N | --average_best=N --metric=val/mean/loss --higher_is_better=False]
        [--max_seq_length=N, else 512 or what the model takes] [--dtype=float32|bfloat16] [--append_eos=True]
    from sentence_transformers import SentenceTransformer;  SentenceTransformer("DIR").encode(["a", "b"])

The run is an encoder-decoder (its encoder goes out) or an encoder; without --pooling it is pooled as it was trained. The class is stock
(Qwen3Model, Qwen2Model, LlamaModel) with is_causal=false, which transformers honours from 5.2.0 only: older ones load the same folder
SILENTLY CAUSAL, and the card says so. --verify asks a fresh process that knows nothing of prism whether a later token moves an earlier
state. --to=transformers leaves the sentence files out. Read next: prepare/sentence_check.py (what --verify asks), model.py (Embedder),
eval/embedding.py (is it any good).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import checkpoint
import configurator
import hub
import tokenizer
from configurator import die
from model import ModelConfig
from prepare import no_bars
from prepare.tokenizer import convert

POOLING = {"mean": "mean", "cls": "cls", "last": "lasttoken", "weighted_mean": "weightedmean"}  # ours -> sentence-transformers
OPTIONS = {
    "ckpt": str, "to": str, "out": str, "pooling": "", "normalize": True, "average_last": 0, "average_best": 0,
    "metric": "val/mean/loss", "higher_is_better": False, "max_seq_length": 0, "dtype": "float32", "append_eos": True, "verify": False,
}  # fmt: skip


def read(path):
    """A run, a folder that `export` wrote, or a plain one of transformers -> (model, tokenizer, settings of Embedder)."""
    path = Path(path)
    if (path / "state.json").is_file() or not any(path.glob("*.safetensors")):
        model, state = checkpoint.load(path, build=hub.load_anyway)
        return model, tokenizer.load(checkpoint.resolve(path).parent), {"pooling": trained_pooling(state)}
    fields, state, _ = hub.read_model(path)
    model = hub.load_anyway(ModelConfig(**fields))
    model.load_state_dict(state, assign=True)
    if not (path / "modules.json").is_file():
        return model, tokenizer.load(path), {}
    modules, tok = [module["type"] for module in json.loads((path / "modules.json").read_text())], tokenizer.load(path)
    post = json.loads((path / "tokenizer.json").read_text())["post_processor"] or {}
    parts = [part for step in post.get("processors", [post]) if step.get("type") == "TemplateProcessing" for part in step["single"]]
    marks = [tok.special.get(part["SpecialToken"]["id"]) for part in parts if "SpecialToken" in part]
    if marks not in ([], [tokenizer.end_of(model.cfg, tok)]) or (marks and "SpecialToken" not in parts[-1]):
        die(f"{path}/tokenizer.json: puts other markers around a text than one EOS behind it; leave this folder to sentence-transformers")
    settings = {"pooling": stored_pooling(path), "append_eos": bool(marks), "normalize": any("Normalize" in m for m in modules)}
    limit = json.loads((path / "sentence_bert_config.json").read_text()).get("max_seq_length") or model.cfg.max_len
    return model, tok, settings | {"max_length": limit}


def stored_pooling(path) -> str:
    """Of a sentence-transformers folder; older ones have a flag per mode in place of its name, such as pooling_mode_mean_tokens."""
    found = json.loads((path / "1_Pooling/config.json").read_text())
    flags = [k[13:].removesuffix("s").removesuffix("_token") for k, v in found.items() if k.startswith("pooling_mode_") and v]
    modes = found.get("pooling_mode", flags)
    known = next((ours for ours, theirs in POOLING.items() if modes in (theirs, [theirs])), None)
    return known or die(f"{path}/1_Pooling: pooling {modes}: known are {', '.join(POOLING.values())}, one at a time")


def trained_pooling(state) -> str:
    return state["config"].get("contrast_pooling", "mean")


def average(folders: list[Path]) -> dict:
    """Mean of checkpoints, accumulated in fp64 and cast back to what is stored; integers are those of the last."""
    first, *rest = [load_file(folder / "model.safetensors") for folder in folders]
    for folder, other in zip(folders[1:], rest, strict=True):
        odd = next((k for k in {**first, **other} if k not in first or k not in other or first[k].shape != other[k].shape), None)
        if odd:
            die(f"{folder}: {odd} differs from {folders[0]}; only checkpoints of one architecture can be averaged")
    out = {}
    for name, tensor in first.items():
        whole = not tensor.is_floating_point()
        total = sum((other[name].double() for other in rest), tensor.double()) / (1 + len(rest))
        out[name] = (rest[-1][name] if rest else tensor) if whole else total.to(tensor.dtype)
    return out


def chosen(opt) -> list[Path]:
    """Step directories to average, in order of their steps: the last N, or the N best by a metric of their own state.json."""
    count = opt.average_last or opt.average_best
    if min(opt.average_last, opt.average_best) < 0 or (opt.average_last and opt.average_best):
        die(f"--average_last={opt.average_last}, --average_best={opt.average_best}: choose one, at least 1; 0 is none")
    if not count:
        return [checkpoint.resolve(opt.ckpt)]
    found = checkpoint.steps(Path(opt.ckpt))
    if opt.average_best:
        scores = {step: checkpoint.read_state(folder)["metrics"].get(opt.metric) for step, folder in found.items()}
        ranked = sorted((s for s in scores if scores[s] is not None), key=scores.get, reverse=opt.higher_is_better)
        if len(ranked) < count:
            die(f"--average_best={count}: {len(ranked)} of {len(found)} checkpoints carry {opt.metric}; try --average_last")
        found = {step: found[step] for step in ranked[:count]}
    if len(found) < count:
        way = f"ask for fewer than {count}" if found else "name the run, not one of its steps"
        die(f"--average_{'last' if opt.average_last else 'best'}={count}: {opt.ckpt} has {len(found)} checkpoints; {way}")
    return [found[step] for step in sorted(found)[-count:]]


def stock_tokenizer(raw: bytes, tok, end: int, limit: int, append_eos: bool) -> tuple[bytes, dict]:
    """The tokenizer without our markers, and with EOS in its post-processor if the model was trained with it."""
    data = json.loads(raw)
    ours = [t for t in data["added_tokens"] if t["content"].startswith(("<|unused_", "<|mode_", "<extra_id_"))]
    data["added_tokens"] = [t for t in data["added_tokens"] if t not in ours]
    eos, pad = ({i: name for name, i in tok.special.items()}[i] for i in (end, tok.eos_id))
    one, two = ([{"Sequence": {"id": i, "type_id": 0}}, {"SpecialToken": {"id": eos, "type_id": 0}}] for i in "AB")
    special = {eos: {"id": eos, "ids": [end], "tokens": [eos]}}
    post = {"type": "TemplateProcessing", "single": one, "pair": one + two, "special_tokens": special}
    data |= {"post_processor": post if append_eos else None, "truncation": None, "padding": None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": pad, "padding_side": "right"}
    config |= {"model_max_length": limit, "clean_up_tokenization_spaces": False, "split_special_tokens": True}  # markers in a text are text
    return json.dumps(data, ensure_ascii=False).encode(), config


CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
---
# {title} from {run}

{parameters:,} parameters, {width} dimensions, {pooled}up to {limit} tokens.

**Needs transformers >= 5.2.** Older versions ignore `is_causal: false` and load this folder silently causal: wrong vectors, no error.

    from sentence_transformers import SentenceTransformer
    SentenceTransformer("this folder").encode(["one text", "another"])

- trained with prism: objective {objective}{mixture}, step {step}{averaged}
- EOS is {eos}
- last metrics of the run: {metrics}
- started from: {source}
- quality was not measured by the export: `python -m eval.embedding --ckpt=FOLDER --run_all` does

The method follows T5Gemma 2 (arXiv 2512.14856), UL2 (arXiv 2205.05131) and the public UL2_5; the class is {kind}, the evaluation MTEB's.
"""


def card(state, run, parameters, width, kind, count, opt) -> str:
    config, st = state["config"], opt.to == "sentence-transformers"
    text = CARD if st else CARD[CARD.index("# {") :].replace(CARD[CARD.index("    from") : CARD.index("- trained")], "")  # no modules there
    source = (state.get("imported") or {}).get("source") or config.get("init_from") or "random weights"
    return text.format(
        run=run, parameters=parameters, width=width, limit=opt.max_seq_length, step=state["step"], kind=kind,
        title="Sentence embeddings" if st else "A bidirectional encoder", averaged=f", mean of {count} checkpoints" if count > 1 else "",
        pooled=f"{opt.pooling} pooling{', unit length' if opt.normalize else ''}, " if st else "",
        objective=config.get("objective", "none"), mixture=f", mixture {config['mixture']}" if config.get("objective") == "denoise" else "",
        eos="appended to every text, as in training" if opt.append_eos else "not appended, unlike in training",
        metrics=json.dumps(state.get("metrics") or "none recorded"), source=json.dumps(source),
    )  # fmt: skip


def export(opt) -> Path:
    folders, out, dtype = chosen(opt), Path(opt.out), getattr(torch, opt.dtype)
    model, state = checkpoint.load(folders[-1], build=hub.load_anyway)
    run, tok, opt.pooling = folders[-1].parent, tokenizer.load(folders[-1].parent), opt.pooling or trained_pooling(state)
    if model.cfg.ffn == "polyglu" or model.cfg.embed_rank:
        die(f"ffn={model.cfg.ffn}, embed_rank={model.cfg.embed_rank}: no stock class holds it; use model.Embedder")
    if model.encoder is None:
        die(f"{opt.ckpt}: a decoder has no bidirectional encoder; make one with python -m prepare.encdec, or export --to=transformers")
    if out.exists() and any(out.iterdir()):
        die(f"--out={out}: is not empty; name a new folder")
    opt.max_seq_length = opt.max_seq_length or min(512, model.cfg.max_len)
    if not 8 <= opt.max_seq_length <= model.cfg.max_len:
        die(f"--max_seq_length={opt.max_seq_length}: from 8 to the model's {model.cfg.max_len}")
    if opt.to == "sentence-transformers":
        import sentence_transformers  # noqa: F401  before anything is written
    weights = average(folders)
    rows = model.cfg.vocab_size - (model.cfg.n_sentinels if model.cfg.arch == "encdec" else 0)  # sentinels stay here
    c = hub.full_fields(model.cfg) | {"arch": "encoder", "vocab_size": rows, "tie": True}
    end = tokenizer.end_of(model.cfg, tok)
    config = hub.hf_config(c, dtype, {"eos_token_id": end, "pad_token_id": tok.eos_id})
    tensors = {k.removeprefix("model."): v for k, v in hub.to_theirs(weights, c, hub.HF, dtype).items()}
    raw, settings = stock_tokenizer(convert(tok), tok, end, opt.max_seq_length, opt.append_eos)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    hub.write_json(out / "config.json", config)
    (out / "tokenizer.json").write_bytes(raw)
    hub.write_json(out / "tokenizer_config.json", settings)
    count = sum(t.numel() for t in tensors.values())
    if len(folders) > 1:
        hub.write_json(out / "averaging.json", {"sources": [str(f) for f in folders], "metric": opt.metric if opt.average_best else None})
    kind = config["architectures"][0]
    (out / "README.md").write_text(card(state, run.name, count, c["d_model"], kind, len(folders), opt), encoding="utf-8")
    if opt.to == "sentence-transformers":
        write_modules(out, c["d_model"], opt)
    print(f"{out}: {kind}, {count:,} parameters in {opt.dtype}" + f", {opt.pooling} pooling" * (opt.to != "transformers"))
    print(f"from {', '.join(folder.name for folder in folders)} of {run}" + "; its encoder alone" * (model.cfg.arch == "encdec"))
    return out


def write_modules(out, width, opt):
    import sentence_transformers
    import transformers

    parts = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * opt.normalize
    name = "sentence_transformers.models"
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"{name}.{kind}"} for i, (path, kind) in enumerate(parts)]
    hub.write_json(out / "modules.json", modules)
    for path, _ in parts[1:]:
        (out / path).mkdir()
    pooling = {"embedding_dimension": width, "pooling_mode": POOLING[opt.pooling], "include_prompt": True}
    hub.write_json(out / "1_Pooling" / "config.json", pooling)
    hub.write_json(out / "sentence_bert_config.json", {"max_seq_length": opt.max_seq_length, "do_lower_case": False})
    versions = {m.__name__: m.__version__ for m in (sentence_transformers, transformers)} | {"pytorch": str(torch.__version__)}
    prompts = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    hub.write_json(out / "config_sentence_transformers.json", {"__version__": versions} | prompts)


def main(argv):
    opt = configurator.args(OPTIONS, argv, __doc__)
    if opt.to == "transformers" and (idle := [arg for arg in argv if arg.startswith(("--pooling", "--normalize"))]):
        die(f"{idle[0]}: would do nothing, --to=transformers leaves pooling to its reader; export --to=sentence-transformers")
    if not opt.average_best and (idle := [arg for arg in argv if arg.startswith(("--metric", "--higher_is_better"))]):
        die(f"{idle[0]}: would do nothing, it chooses among checkpoints; add --average_best=N")
    allowed = {"to": ("sentence-transformers", "transformers"), "dtype": ("float32", "bfloat16"), "pooling": ("", *POOLING)}
    for key, values in allowed.items():
        if getattr(opt, key) not in values:
            die(f"--{key}={getattr(opt, key)}: expected one of {', '.join(filter(None, values))}")
    no_bars()
    out = export(opt)
    if opt.verify:
        from prepare.sentence_check import verify

        if not verify(opt, out):
            raise SystemExit(1)

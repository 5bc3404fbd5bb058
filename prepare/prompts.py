"""Prompts as a model wants them: how a text begins and ends, chats by the checkpoint's own template, texts with holes; and back.

    ids = prompts.chat_ids(tokenizer, [{"role": "user", "content": "Hello"}])     up to where the assistant speaks
    stops = prompts.stop_ids(tokenizer, chat=True)
    enc, dec, allowed = prompts.hole_ids(model.cfg, tokenizer, "It was <extra_id_0> in Paris.")     for an encoder-decoder

Markers inside a message are text, so nobody can end a turn by writing <|im_end|>. Used by sample.py, eval/ and, so that what is asked is
what was trained, prepare/chat.py. Read next: sample.py.
"""

import codecs
import functools
import json
import re
from datetime import datetime

from configurator import die

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # of a text
TURNS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>")  # of one speaker's turn
CHATML = ("<|im_start|>", "<|im_end|>")  # split off even where a tokenizer has them only as characters
HOLE = re.compile("<extra_id_([0-9]+)>")  # in a text for an encoder-decoder
SHOWN = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # markers that are part of an answer


def stop_ids(tokenizer, chat=False):
    """Ids that end a text or, with `chat`, a turn; what the release itself calls its EOS is one of them."""
    names = {*ENDS, *(TURNS if chat else ()), release(tokenizer)}
    return {tokenizer.eos_id} | {tokenizer.special[name] for name in names if name in tokenizer.special}


@functools.lru_cache(maxsize=8)
def release(tokenizer):
    """The EOS that tokenizer_config.json names: chat models put their end of turn there."""
    eos = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}")).get("eos_token") or ""
    return eos if isinstance(eos, str) else eos["content"]


@functools.lru_cache(maxsize=8)  # a tokenizer.json is megabytes of text
def prefix_ids(tokenizer):
    """What every text of this model begins with: a BOS where its tokenizer.json says so."""
    post = json.loads(tokenizer.files.get("tokenizer.json", b"{}")).get("post_processor") or {}
    for rule in post.get("processors", [post]):
        if rule.get("type") == "TemplateProcessing" and "SpecialToken" in rule["single"][0]:
            return rule["special_tokens"][rule["single"][0]["SpecialToken"]["id"]]["ids"]
    return []


def template_of(tokenizer):
    template = tokenizer.chat_template
    if isinstance(template, list):  # several named ones
        return next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def chat_ids(tokenizer, messages, **options):
    """A conversation by the checkpoint's own template, up to where the assistant speaks."""
    return [i for ids, _ in chat_parts(tokenizer, messages, **options) for i in ids]


def chat_parts(tokenizer, messages, reply=True, **options):
    """[(ids, whether the assistant says them)] of a conversation; with `reply`, up to where the assistant speaks next.

    What is trained (prepare/chat.py) and what is asked (sample.py) both come from here. A turn is encoded as one piece between its markers,
    as transformers does, but what opens the assistant's is encoded apart from what he says: that is how he is asked to speak.
    """
    template = template_of(tokenizer)
    if not template:
        die("--chat: this checkpoint has no chat template; drop --chat, or fine-tune on chats (python -m prepare.chat)")
    names = sorted({*tokenizer.special, *CHATML}, key=len, reverse=True)
    quoted = {name: f"\ue000{i}\ue001" for i, name in enumerate(names)}  # private characters no template touches
    cut = re.compile("|".join(map(re.escape, names)))
    for i, m in enumerate(messages := list(messages)):  # the assistant's own thinking and calls stay markers, which templates look for
        own = SHOWN if m["role"] == "assistant" else ()
        messages[i] = m | {"content": cut.sub(lambda found: found[0] if found[0] in own else quoted[found[0]], m["content"])}
    text_of = {i: name for name, i in tokenizer.special.items()}
    words = {"bos_token": "".join(text_of[i] for i in prefix_ids(tokenizer)), "eos_token": release(tokenizer) or text_of[tokenizer.eos_id]}
    words |= {"messages": messages} | options
    text, asking = (compiled(template).render(add_generation_prompt=ask, **words) for ask in (False, True))
    opening = asking.removeprefix(text) if asking.startswith(text) else ""
    start, shown = cut.search(opening), asking if reply else text

    def encode(piece):
        if piece in tokenizer.special:
            return [tokenizer.special[piece]]
        for name, mark in quoted.items() if "\ue000" in piece else ():
            piece = piece.replace(mark, name)
        return tokenizer.encode(piece)

    parts, said = [], False
    for turn in re.split(f"({re.escape(opening)})", shown) if start else [shown]:
        for piece in filter(None, re.split(f"({cut.pattern})", turn)):
            said = said and piece != start[0]  # until another turn begins
            parts.append((encode(piece), said))
        said = said or turn == opening
    return parts


@functools.lru_cache(maxsize=8)
def compiled(template):
    """A template is its author's code: it runs in jinja's sandbox."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        die(f"the chat template refuses this conversation: {message}")

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return env.from_string(template)


class Printer:
    """Ids in, whole characters out: a character cut between two tokens waits for its rest. Special tokens are not text."""

    def __init__(self, tokenizer):
        self.tokenizer, self.hidden = tokenizer, {i for name, i in tokenizer.special.items() if name not in SHOWN}
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, i):
        return "" if i in self.hidden or i >= self.tokenizer.vocab_size else self.decoder.decode(self.tokenizer.token_bytes(i))

    def end(self):
        return self.decoder.decode(b"", final=True)


def hole_ids(cfg, tokenizer, text, mode=None):
    """-> (encoder ids, decoder ids to begin with, ids that may be drawn). Without `<extra_id_k>` the text is continued.

    mode: R, X, S or I, "" for a model trained without modes, None for what fits: S continues, I fills one hole, R several.
    """
    from denoise import MODES
    from denoise_stream import special_of

    sp = special_of(cfg, tokenizer)
    pieces = HOLE.split(text)  # text, number, text, number, ... text
    holes = [int(k) for k in pieces[1::2]]
    if holes != sorted(set(holes)) or max(holes, default=0) >= cfg.n_sentinels:
        die(f"holes {holes}: number them upwards, each once, below {cfg.n_sentinels}")
    if mode is None:
        mode = "S" if not holes else "I" if len(holes) == 1 else "R"
    ids = [sp.mode + MODES.index(mode)] if mode else []
    for i, piece in enumerate(pieces):
        ids += [sp.sentinel + int(piece)] if i % 2 else tokenizer.encode(piece) if piece else []
    holes, ids = (holes, ids) if holes else ([0], [*ids, sp.sentinel])
    if len(ids) >= cfg.max_len:
        die(f"a prompt of {len(ids) + 1} tokens: the model accepts {cfg.max_len}; shorten it")
    special = set(tokenizer.special.values())
    words = [i for i in range(min(tokenizer.vocab_size, sp.mode)) if i not in special]
    return [*ids, sp.eos], [sp.start, sp.sentinel + holes[0]], [*words, sp.eos, *(sp.sentinel + k for k in holes[1:])]


def splice(cfg, text, drawn, write):
    """The text with its holes filled: what was drawn up to the first sentinel goes into the first hole, and so on."""
    first, spans = cfg.vocab_size - cfg.n_sentinels, {}
    now = int(HOLE.search(text)[1])
    for i in drawn:
        now = i - first if i >= first else now
        spans.setdefault(now, []).extend([i] if i < first else [])
    return HOLE.sub(lambda m: write(spans.get(int(m[1]), [])), text)

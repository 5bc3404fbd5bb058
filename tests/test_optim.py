"""optim.py: the plan against worked values of the recipes, and the optimizer against torch's."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch

import optim
from model import ModelConfig, build
from optim import Plan, build_optimizer


@dataclass(frozen=True)
class Config(ModelConfig):  # the keys of train.Config that optim.py reads
    objective: str = "lm"
    data: str | dict = "data/x"
    mix: dict | None = None
    mix_end: dict | None = None
    mix_decay_start: float = 0.8
    seq_len: int = 256
    tokens_per_step: int = 2048
    micro_tokens: int = 0
    max_steps: int = 0
    max_tokens: int = 0
    epochs: float = 0
    stages: tuple = ()
    optimizer: str = "adamw"
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup: int = 100
    warmup_from: float = 0.0
    schedule: str = "cosine"
    decay_share: float = 0.2
    betas: tuple = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embed: bool = True
    clip: float = 1.0
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    tau_max: float = 1.0
    tau_min: float = 0.1


LENGTHS = (8, 16, 32, 64, 128, 256, 512, 768, 1536, 2048)
ULTRA_TOKENS = (8_192_000, 12_288_000, 20_480_000, 40_960_000, 61_440_000, 81_920_000, 102_400_000, 368_640_000, 368_640_000, 983_040_000)


# ---- the plan -----------------------------------------------------------------------------------------------------------


def test_encdec_schedule_worked_values():
    plan = Plan(Config(lr=2e-4, warmup=1000, warmup_from=0.01, max_steps=100_000), 1)
    for step, lr in ((0, 2e-6), (500, 1.01e-4), (1000, 2e-4), (50_500, 1.1e-4), (100_000, 2e-5)):
        assert plan(step).lr == pytest.approx(lr, rel=1e-12)


def test_polyglu_recipe():
    cfg = Config(
        lr=1e-4, warmup=2000, min_lr_ratio=0.0, seq_len=4096, max_len=4096, tokens_per_step=524_288, micro_tokens=32_768, max_steps=19_531,
        data={"math": "a", "stem": "b", "code": "c"},
        mix={"math": 70, "stem": 25, "code": 5},
        mix_end={"math": 0.85, "stem": 0.10, "code": 0.05},
    )  # fmt: skip
    plan = Plan(cfg, 1)
    assert plan(0).accum == 16 and plan.total == 10_239_868_928
    assert plan(0).lr == pytest.approx(1e-4 / 2000) and plan(1999).lr == plan(2000).lr == pytest.approx(1e-4)
    assert plan(19_531).lr == pytest.approx(0, abs=1e-15)
    assert plan(0).mix == plan(15_624).mix == pytest.approx({"math": 0.70, "stem": 0.25, "code": 0.05})
    assert plan(15_625).mix["math"] == pytest.approx(0.70 + 0.15 / (19_531 - 15_624))  # the very next step moves
    assert plan(19_531).mix == pytest.approx({"math": 0.85, "stem": 0.10, "code": 0.05})
    assert plan(0).tau == 1.0 and plan(19_531).tau == pytest.approx(0.1) and plan(1).tau == pytest.approx(1 - 0.9 / 19_531)
    assert plan(19_531 // 2).eta == pytest.approx(0.5, abs=1e-4)


def test_ultra_curriculum_by_tokens_begins_every_stage_at_the_published_step():
    stages = tuple({"tokens": t, "seq_len": n} for t, n in zip(ULTRA_TOKENS, LENGTHS, strict=True))
    plan = Plan(Config(stages=stages, tokens_per_step=98_304, max_len=2048), 1)
    assert [s.first for s in plan.stages] == [0, 84, 209, 417, 834, 1459, 2292, 3334, 7084, 10_834] and plan.steps == 20_834
    rows = [plan(s.first).tokens // plan(s.first).seq_len for s in plan.stages]
    assert rows == [12_288, 6_144, 3_072, 1_536, 768, 384, 192, 128, 64, 48]
    assert plan(83).seq_len == 8 and plan(84).seq_len == 16 and plan(84).stage == 1


def test_ultra_curriculum_by_steps():
    starts = (0, 2000, 5000, 10_000, 20_000, 35_000, 55_000, 80_000, 110_000, 140_000)
    rows, accums = (512, 256, 128, 64, 32, 16, 8, 16, 8, 8), (8, 4, 4, 4, 4, 4, 4, 3, 6, 4)
    mults = (0.3, 0.4, 0.5, 0.6, 0.75, 0.85, 0.95, 1.0, 1.0, 1.0)
    table = list(zip(starts, LENGTHS, rows, accums, mults, strict=True))
    stages = tuple({"start": s, "seq_len": n, "rows": r, "accum": a, "mult": m, "clip": 0.5} for s, n, r, a, m in table)
    plan = Plan(Config(stages=stages, max_len=2048, max_steps=200_000, warmup=2000), 1)
    assert plan.total == 8_593_408_000
    assert plan(0).tokens == 32_768 and plan(0).micro_tokens == 4096 and plan(0).accum == 8 and plan(0).clip == 0.5
    flat = Plan(Config(max_steps=200_000, warmup=2000), 1)
    for step in (0, 1999, 2000, 57_123, 199_999):  # lr is the schedule times the row's mult, nothing else
        mult = mults[max(i for i, s in enumerate(starts) if s <= step)]
        assert plan(step).lr == pytest.approx(flat(step).lr * mult, rel=1e-12)
    halves = Plan(Config(stages=stages, max_len=2048, max_steps=200_000), 2)  # the world only splits the rows
    assert halves.total == plan.total and halves(0).micro_tokens == 2048 and halves(0).accum == 8


def test_rows_are_those_of_a_micro_batch_and_divide_over_the_processes(dies):
    cfg = Config(stages=({"start": 0, "rows": 6, "accum": 4},), max_steps=9)
    assert Plan(cfg, 2).table().splitlines()[1].split()[:4] == ["0", "256", "6", "4"]
    dies(lambda: Plan(cfg, 4), "rows=6 do not divide over 4 processes")  # no micro_tokens could mend it: `rows` says what they are


def test_mult_moves_linearly_over_a_stage_warmup():
    stages = ({"start": 0, "mult": 2.0, "warmup": 4}, {"start": 10, "mult": 1.0, "warmup": 5}, {"start": 20, "mult": 3.0})
    plan = Plan(Config(stages=stages, warmup=0, schedule="constant", lr=1.0, max_steps=30), 1)
    assert [plan(s).lr for s in (0, 1, 3, 9)] == pytest.approx([0.5, 1.0, 2.0, 2.0])
    assert [plan(s).lr for s in (10, 11, 14, 19, 20)] == pytest.approx([1.8, 1.6, 1.0, 1.0, 3.0])


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cosine", {10: 1.0, 60: 0.55, 110: 0.1, 35: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2}),
        ("linear", {10: 1.0, 60: 0.55, 110: 0.1}),
        ("constant", {10: 1.0, 110: 1.0}),
        ("wsd", {10: 1.0, 80: 1.0, 99: 0.55, 110: 0.1}),
    ],
)
def test_decay_shapes(schedule, values):
    plan = Plan(Config(schedule=schedule, lr=1.0, warmup=10, max_steps=110), 1)
    for step, lr in values.items():
        assert plan(step).lr == pytest.approx(lr), step


def test_length_of_the_run():
    assert Plan(Config(max_tokens=10_000), 1).steps == 5
    assert Plan(Config(max_tokens=10_240), 1).steps == 5
    assert Plan(Config(epochs=1.5), 1, epoch_tokens=10_000).steps == 8
    open_end = ({"tokens": 4000}, {"seq_len": 128})
    plan = Plan(Config(stages=open_end, max_tokens=20_480), 1)
    assert [s.first for s in plan.stages] == [0, 2] and plan.steps == 10
    assert Plan(Config(stages=open_end, max_steps=7), 1).steps == 7
    rows = ({"start": 0, "rows": 4}, {"start": 3, "rows": 8})  # 1024 then 2048 tokens a step
    assert Plan(Config(stages=rows, max_tokens=3 * 1024 + 4097), 1).steps == 6


def test_a_plan_is_pure_and_picklable_free_of_state():
    cfg = Config(max_steps=50, stages=({"start": 0, "seq_len": 64}, {"start": 20}))
    plan, again = Plan(cfg, 1), Plan(cfg, 1)
    order = list(range(50))
    assert [plan(s) for s in reversed(order)] == [again(s) for s in order][::-1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan(0).lr = 1
    assert all(plan(s).accum * plan(s).micro_tokens == plan(s).tokens for s in order)


def test_batch_is_split_exactly():
    plan = Plan(Config(tokens_per_step=98_304, micro_tokens=12_288, max_steps=1), 2)
    assert (plan(0).accum, plan(0).micro_tokens) == (4, 12_288)
    assert Plan(Config(stages=({"start": 0, "accum": 4},), max_steps=1), 2)(0).micro_tokens == 256


@pytest.mark.parametrize(
    ("change", "world", "words"),
    [
        ({"max_steps": 1}, 3, ["2048", "world 3", "--tokens_per_step="]),
        ({"max_steps": 1, "tokens_per_step": 1000}, 1, ["tokens_per_step 1000", "try --tokens_per_step=1024"]),
        ({"max_steps": 1, "tokens_per_step": 1000}, 2, ["tokens_per_step 1000", "world 2", "try --tokens_per_step=1024"]),
        ({"max_steps": 1, "micro_tokens": 1536}, 1, ["micro_tokens", "--micro_tokens=512", "--tokens_per_step=3072"]),
        ({"max_steps": 1, "micro_tokens": 100}, 1, ["micro_tokens 100", "seq_len 256", "try --micro_tokens=256"]),
        ({"max_steps": 1, "micro_tokens": 256, "tokens_per_step": 2100}, 1, ["tokens_per_step 2100", "try --tokens_per_step=2304"]),
        ({"max_steps": 1, "seq_len": 768, "max_len": 2048, "tokens_per_step": 2048}, 1, ["seq_len 768"]),
        ({"max_steps": 1, "seq_len": 2048}, 1, ["max_len"]),
        ({}, 1, ["max_steps", "max_tokens", "epochs", "none"]),
        ({"max_steps": 1, "max_tokens": 1}, 1, ["exactly one"]),
        ({"max_steps": 0}, 1, ["--max_steps", "(0: unset)", "got none"]),
        ({"epochs": 1}, 1, ["epochs", "--max_steps"]),
        ({"max_steps": 9, "stages": ({"tokens": 2048},)}, 1, ["exactly one"]),
        ({"stages": ({"tokens": 2048, "lenght": 8},)}, 1, ["stages[0]", "'lenght'"]),
        ({"stages": ({"tokens": 2048, "seq_len": "8"},)}, 1, ["stages[0]", "seq_len", "int"]),
        ({"max_steps": 99, "stages": ({"tokens": 2048}, {"start": 9})}, 1, ["stages[1]", "tokens"]),
        ({"stages": ({"tokens": 2048}, {"start": 9, "tokens": 2048})}, 1, ["stages[1]", "not both"]),
        ({"max_steps": 9, "stages": ({"start": 1},)}, 1, ["stages[0]", "begins at step 1"]),
        ({"max_steps": 9, "stages": ({"start": 0}, {"start": 0})}, 1, ["stages[1]", "at least one step"]),
        ({"max_steps": 9, "stages": ({"start": 0}, {"start": 9})}, 1, ["ends at step 9"]),
        ({"max_steps": 9, "mix": {"a": 1}}, 1, ["a=1", "single folder"]),
        ({"max_steps": 9, "data": {"a": "x"}, "mix": {"b": 1}}, 1, ["b=1", "(a)"]),
        ({"max_steps": 9, "data": {"a": "x"}, "mix": {"a": -1}}, 1, ["a=-1"]),
        ({"max_steps": 9, "data": {"a": "x"}, "mix": {"a": 0}}, 1, ["sum to 0"]),
        ({"max_steps": 9, "data": {"a": "x"}, "mix": {"a": float("inf")}}, 1, ["a=inf"]),
        ({"max_steps": 9, "data": {"a": "x", "b": "x"}, "mix": {"a": 1e308, "b": 1e308}}, 1, ["sum to inf"]),
        ({"max_steps": 9, "data": {"a": "x"}, "mix_end": {"a": 1}}, 1, ["mix_end"]),
    ],
)
def test_refusals(dies, change, world, words):
    dies(lambda: Plan(Config(**change), world), *words)


def test_a_step_outside_the_plan_dies(dies):
    dies(lambda: Plan(Config(max_steps=5), 1)(6), "step 6", "5 steps")


def test_table_shows_every_stage():
    stages = ({"tokens": 4096, "seq_len": 8, "mult": 0.3, "note": "phrases"}, {"tokens": 8192, "mix": {"a": 3, "b": 1}})
    text = Plan(Config(stages=stages, data={"a": "x", "b": "y"}, warmup=5), 1).table()
    assert "phrases" in text and "a=0.75 b=0.25" in text and "33.3%" in text and text.endswith("total 6 steps, 12,288 tokens")
    assert Plan(Config(max_steps=5, warmup=5), 1).table().endswith("; warmup=5 is not over before the end")


# ---- the optimizer ------------------------------------------------------------------------------------------------------

TINY = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 32, "d_ff": 48, "vocab_size": 100, "max_steps": 1}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("arch", ["decoder", "encoder", "encdec"])
@pytest.mark.parametrize("tie", [True, False])
def test_groups_partition_the_parameters(arch, tie, optimizer, capsys):
    cfg = Config(**TINY, arch=arch, tie=tie, ffn="polyglu", gate="running", optimizer=optimizer)
    model = build(cfg)
    groups = {g["role"]: g for g in build_optimizer(model, cfg).param_groups}
    table = capsys.readouterr().out
    held = [p for g in groups.values() for p in g["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))  # parameters() yields a tied weight once
    assert groups["alpha"]["weight_decay"] == groups["vector"]["weight_decay"] == 0
    assert {n.rpartition(".")[2] for n in groups["alpha"]["names"]} == {"alpha"}
    assert all(p.ndim == 1 for p in groups["vector"]["params"])
    for kind in ("hidden", "embedding", "other matrix"):
        assert groups[kind]["weight_decay"] == 0.1 and all(p.ndim >= 2 for p in groups[kind]["params"])
    assert bool(groups["hidden"]["muon"]) == (optimizer == "muon") and not any(groups[k]["muon"] for k in groups if k != "hidden")
    assert not any("gate_net" in n or n.startswith(("embed", "head")) for n in groups["hidden"]["names"])
    assert ("head.weight" in groups["other matrix"]["names"]) == (not tie)
    assert f"{sum(p.numel() for p in groups['hidden']['params']):,}" in table


def test_role_is_no_substring():
    weight = torch.empty(2, 2)
    assert optim.role("decoder.blocks.0.ffn.alphabet", weight) == "hidden"
    assert optim.role("decoder.blocks.0.ffn.alpha", weight) == "alpha"
    assert optim.role("lingua.embed.weight", weight) == "other matrix"


def test_decay_embed_exempts_the_shared_embedding():
    cfg = Config(**TINY, arch="encdec", decay_embed=False)
    groups = {g["role"]: g for g in build_optimizer(build(cfg), cfg).param_groups}
    assert groups["embedding"]["weight_decay"] == 0 and groups["embedding"]["names"] == ["embed.weight"]
    assert groups["hidden"]["weight_decay"] == 0.1


def test_frozen_parameters_are_left_out():
    cfg = Config(**TINY)
    model = build(cfg)
    model.embed.requires_grad_(False)
    assert "embedding" not in {g["role"] for g in build_optimizer(model, cfg).param_groups}


def test_polyglu_600m_decays_what_the_publication_decayed():
    cfg = Config(
        vocab_size=151_669,
        n_layer=28,
        n_head=16,
        n_kv_head=8,
        d_model=1024,
        head_dim=64,
        d_ff=4096,
        ffn="polyglu",
        gate="running",
        max_steps=1,
    )
    with torch.device("meta"):
        model = build(cfg, device="meta")
    groups = {optim.role(n, p): 0 for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        groups[optim.role(n, p)] += p.numel()
    padding = (cfg.vocab_rows - cfg.vocab_size) * cfg.d_model  # rows that exist for the matmul only
    assert groups["vector"] + groups["alpha"] == 521_824
    assert sum(groups.values()) - padding - 521_824 == 596_632_064


def one_step(make, seed=0):
    torch.manual_seed(seed)
    cfg = Config(**TINY)
    model = build(cfg)
    for p in model.parameters():
        p.grad = torch.randn(p.shape) * 0.01
    optimizer = make(model)
    for _ in range(3):
        optimizer.step()
    return dict(model.named_parameters())


def test_muon_equals_torch_on_whole_matrices_and_adamw_elsewhere():
    cfg = Config(**TINY, optimizer="muon", lr=1e-3, muon_lr=0.02)
    ours = one_step(lambda model: build_optimizer(model, cfg))

    class Both:
        def __init__(self, model):
            named = dict(model.named_parameters())
            hidden = [p for n, p in named.items() if optim.role(n, p) == "hidden"]
            vectors = [p for p in named.values() if p.ndim < 2]
            rest = [p for n, p in named.items() if p.ndim >= 2 and optim.role(n, p) != "hidden"]
            groups = [{"params": rest, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
            self.parts = [torch.optim.Muon(hidden, lr=0.02, momentum=0.95), torch.optim.AdamW(groups, lr=1e-3, betas=cfg.betas, fused=True)]

        def step(self):
            for part in self.parts:
                part.step()

    theirs = one_step(Both)
    split = 0
    for name, p in ours.items():
        if name.endswith(("qkv.weight", "gate_up.weight")):  # each part is orthogonalised by itself here
            split += not torch.allclose(p, theirs[name], rtol=1e-3, atol=1e-5)
        else:
            torch.testing.assert_close(p, theirs[name], rtol=2e-2 if p.ndim > 1 else 0, atol=1e-4 if p.ndim > 1 else 0)
    assert split == 4


def test_muon_splits_fused_matrices_into_their_own_parts():
    model = build(Config(**TINY, optimizer="muon"))
    fused = torch.nn.Parameter(torch.randn(64, 32))
    parts = optim.fused_parts(model, "decoder.blocks.0.attn.qkv.weight")
    assert parts == [32, 16, 16] and optim.fused_parts(model, "decoder.blocks.0.ffn.gate_up.weight") == [48, 48]
    assert optim.fused_parts(model, "decoder.blocks.0.ffn.down.weight") == [32]
    whole = [torch.nn.Parameter(part.clone()) for part in fused.detach().split(parts)]
    fused.grad = torch.randn(64, 32)
    for p, g in zip(whole, fused.grad.split(parts), strict=True):
        p.grad = g.clone()
    common = {"muon": 20.0, "momentum": 0.95, "weight_decay": 0.1, "lr": 1e-3}
    optim.Muon([{"params": [fused], "parts": [parts], **common}]).step()
    optim.Muon([{"params": whole, "parts": [[len(p)] for p in whole], **common}]).step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in whole]), rtol=0, atol=0)


def test_newton_schulz_orthogonalises():
    update = optim.newton_schulz(torch.randn(3, 40, 24)).float()
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.5 and values.max() < 1.35


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_optimizer_learns_and_follows_the_plans_lr(optimizer):
    cfg = Config(**TINY, optimizer=optimizer, muon_lr=0.02, lr=1e-2)
    model = build(cfg)
    ids = torch.arange(24) % 7
    batch = {
        "ids": ids,
        "pos": torch.arange(24),
        "cu": torch.tensor([0, 24], dtype=torch.int32),
        "max_len": 24,
        "rows": torch.zeros(1).long(),
    }
    opt, losses = build_optimizer(model, cfg), []
    for _ in range(30):
        loss, _ = model.nll(model(batch), (ids + 1) % 7)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item() / 24)
    assert losses[-1] < 0.5 * losses[0]
    before = [p.clone() for p in model.parameters()]
    for group in opt.param_groups:
        group["lr"] = 0.0
    model.nll(model(batch), ids)[0].backward()
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))  # lr 0 stops every group

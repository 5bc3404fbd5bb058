"""PolyGLU for transformers, complete in one file: AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).

Written beside exported weights by `python -m hub export --to=transformers`; it needs torch and transformers, nothing of prism.
Inference only (no routing noise), the whole prefix at every token (no cache): for speed, sample with prism itself. Padding on either
side is masked in attention and in the gate. Each feed-forward neuron mixes K activations by softmax((alpha + s) / tau).
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "silu": F.silu, "gelu": F.gelu, "relu2": lambda x: F.relu(x).square()}
ACTIVATIONS["identity"] = lambda x: x


class PolyGLUConfig(PretrainedConfig):
    model_type = "prism_polyglu"

    def __init__(self, prism=None, tau=0.1, step=0, vocab_size=0, hidden_size=0, num_hidden_layers=0, num_attention_heads=0, **rest):
        self.prism, self.tau, self.step = prism or {}, tau, step  # prism: the model's own configuration, every field
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        super().__init__(**rest)


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.gama, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, self.gama.shape, self.gama.to(x.dtype), self.eps)


def rotate(x, cos, sin):  # x (B, H, T, E), tables (B, 1, T, E/2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.width, d, bias = c["head_dim"], c["d_model"], c["qkv_bias"]
        self.W_q = nn.Linear(d, c["n_head"] * self.width, bias=bias)
        self.W_k = nn.Linear(d, c["n_kv_head"] * self.width, bias=bias)
        self.W_v = nn.Linear(d, c["n_kv_head"] * self.width, bias=bias)
        self.W_o = nn.Linear(c["n_head"] * self.width, d, bias=False)
        self.rmsnorm_q = Norm(self.width, c["norm_eps"]) if c["qk_norm"] else nn.Identity()
        self.rmsnorm_k = Norm(self.width, c["norm_eps"]) if c["qk_norm"] else nn.Identity()

    def forward(self, x, rope, mask):
        q, k, v = (w(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for w in (self.W_q, self.W_k, self.W_v))
        q, k = rotate(self.rmsnorm_q(q), *rope), rotate(self.rmsnorm_k(k), *rope)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return self.W_o(y.transpose(1, 2).flatten(2))


class PolyGLU(nn.Module):
    def __init__(self, c, tau):
        super().__init__()
        d, f, k = c["d_model"], c["d_ff"], len(c["acts"])
        self.W_gate, self.W_up, self.W_down = (nn.Linear(i, o, bias=False) for i, o in ((d, f), (d, f), (f, d)))
        self.alpha = nn.Parameter(torch.zeros(f, k))
        self.gate, self.gate_block, self.acts, self.tau = c["gate"], c["gate_block"], c["acts"], tau
        if self.gate != "static":
            self.beta = nn.Parameter(torch.ones(k))
            self.gate_net = nn.Sequential(nn.Linear(d, 32), nn.ReLU(), nn.Linear(32, k))

    def pool(self, p, real):
        """Mean of p (B, T, 32) over the real tokens that the gate of each position may see."""
        if self.gate == "token":
            return p
        total = F.pad((p * real[..., None]).double().cumsum(1), (0, 0, 1, 0))  # (B, T + 1, 32)
        count = F.pad(real.cumsum(1), (1, 0))  # (B, T + 1)
        end = torch.arange(1, p.shape[1] + 1, device=p.device).expand(len(p), -1)
        if self.gate == "sequence":
            end = torch.full_like(end, p.shape[1])
        if self.gate == "lagged":  # the last index where the count is a whole number of blocks
            whole = (count[:, 1:] - 1).clamp(min=0) // self.gate_block * self.gate_block
            end = torch.searchsorted(count, whole, right=True) - 1
        mean = total.gather(1, end[..., None].expand(-1, -1, p.shape[-1])) / count.gather(1, end).clamp(min=1)[..., None]
        return mean.to(p.dtype)

    def forward(self, x, real):
        a, u = self.W_gate(x), self.W_up(x)
        z = self.alpha.float()
        if self.gate != "static":
            first, second = self.gate_net[0], self.gate_net[2]
            p = F.linear(x.float(), first.weight.float())
            h = F.relu(self.pool(p, real) + first.bias.float())
            s = F.linear(h, second.weight.float(), second.bias.float()) * self.beta.float()
            z = z + s[:, :, None]  # (B, T, f, K)
        g = (z / self.tau).softmax(-1)
        mixed = sum(g[..., k] * ACTIVATIONS[name](a.float()) for k, name in enumerate(self.acts))
        return self.W_down((mixed * u.float()).to(x.dtype))


class Block(nn.Module):
    def __init__(self, c, tau):
        super().__init__()
        self.rmsnorm_1, self.gqa = Norm(c["d_model"], c["norm_eps"]), Attention(c)
        self.rmsnorm_2, self.polyglu = Norm(c["d_model"], c["norm_eps"]), PolyGLU(c, tau)

    def forward(self, x, rope, mask, real):
        x = x + self.gqa(self.rmsnorm_1(x), rope, mask)
        return x + self.polyglu(self.rmsnorm_2(x), real)


class PolyGLUForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = PolyGLUConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        c = config.prism
        self.embeddings = nn.Embedding(c["vocab_size"], c["d_model"])
        self.model_core = nn.ModuleList(Block(c, config.tau) for _ in range(c["n_layer"]))
        self.rmsnorm = Norm(c["d_model"], c["norm_eps"])
        self.output_head = None if c["tie"] else nn.Linear(c["d_model"], c["vocab_size"], bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def rope(self, pos):  # (B, T) -> tables (B, 1, T, E/2)
        c = self.config.prism
        freq = c["rope_theta"] ** -(torch.arange(0, c["head_dim"], 2, dtype=torch.float32, device=pos.device) / c["head_dim"])
        if c["rope_scaling"]:
            s = c["rope_scaling"]
            turns = s["original_max_position_embeddings"] * freq / (2 * torch.pi)
            ramp = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
            freq = freq * (ramp + (1 - ramp) / s["factor"])
        angle = pos[:, None, :, None].float() * freq
        cos, sin = angle.cos(), angle.sin()
        return (cos.bfloat16().float(), sin.bfloat16().float()) if c["rope_bf16"] else (cos, sin)

    def forward(self, input_ids, attention_mask=None, labels=None, **unused):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()  # (B, T)
        pos = (real.cumsum(1) - 1).clamp(min=0)
        here = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = (here <= here[:, None]) & (real[:, None, None] > 0) | (here == here[:, None])  # padding sees itself: no NaN
        rope = self.rope(pos)
        x = self.embeddings(input_ids)
        for block in self.model_core:
            x = block(x, rope, mask, real)
        head = self.embeddings if self.output_head is None else self.output_head
        logits = F.linear(self.rmsnorm(x), head.weight).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **unused):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

"""Qwen3 from scratch on packed tokens, and its kin Qwen2 and Llama by two flags. Hugging Face names and files.

A batch is one row of tokens (T,): sequences end to end, their borders in cu_seqlens (S + 1,). No padding is stored and
no mask is passed around. Parameters carry Hugging Face names, so that a state dict is a checkpoint.

One function runs the layers; what differs between training, prefill and decoding is only how a layer attends, and that
is passed in: `attend(layer, q, k, v)` over packed sequences, or over a KV cache.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import linear_logprob
from ranks import fill, full

QK_NORM = {"qwen3": True, "qwen2": False, "llama": False}
QKV_BIAS = {"qwen3": False, "qwen2": True, "llama": False}
WEIGHT_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # what a snapshot from the hub needs


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of config.json that shape the model, by their Hugging Face names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int

    @classmethod
    def from_hf(cls, hf: dict) -> "ModelConfig":
        """Reads a config.json of either generation of transformers; refuses what this model does not do."""
        kind = hf.get("model_type")
        if kind not in QK_NORM:
            raise ValueError(f"model_type {kind!r} is not supported; supported are {sorted(QK_NORM)}")
        ropes = [hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}]
        thetas = {theta for place in (hf, *ropes) if (theta := place.get("rope_theta")) is not None}
        if len(thetas) > 1:
            raise ValueError(f"config.json has rope_theta twice, {' and '.join(map(str, sorted(thetas)))}: remove the "
                             "one that the model was not trained with")
        for what, present in {
            "rope scaling": any(rope.get("rope_type", rope.get("type", "default")) != "default" for rope in ropes),
            "attention_bias": kind != "qwen2" and hf.get("attention_bias", False),
            "mlp_bias": hf.get("mlp_bias", False),
            "sliding window attention": hf.get("use_sliding_window") or (kind == "llama" and hf.get("sliding_window")),
            "partial rotary embedding": {place.get("partial_rotary_factor") for place in (hf, *ropes)} - {None, 1},
            "an activation other than silu": hf.get("hidden_act", "silu") != "silu",
            "quantised weights (take it in bfloat16)": "quantization_config" in hf,
        }.items():
            if present:
                raise ValueError(f"this checkpoint's config.json asks for {what}, which this model does not do")
        defaults = {"rope_theta": next(iter(thetas), 10_000.0), "tie_word_embeddings": False,
                    "num_key_value_heads": hf.get("num_attention_heads"), "head_dim": None}
        values = defaults | {name: hf[name] for name in cls.__dataclass_fields__ if hf.get(name) is not None}
        if missing := cls.__dataclass_fields__.keys() - values.keys():
            raise ValueError(f"config.json has no {', '.join(sorted(missing))}")
        values["head_dim"] = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
        return cls(**values)

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        return cls.from_hf(json.loads((folder / "config.json").read_text()))

    def to_hf(self, dtype: torch.dtype) -> dict:
        """A config.json that transformers (both rope spellings) and vLLM read."""
        return {
            **self.__dict__,
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_cache": True,
            "dtype": str(dtype).removeprefix("torch."), "torch_dtype": str(dtype).removeprefix("torch."),
        }

    def limits(self, prompt: int, response: int, most: tuple[int, int] = (1024, 1024)) -> tuple[int, int]:
        """Tokens of a prompt and of a response at most. 0 = half of the context, and what the prompt leaves of it, each
        up to `most`. Raises ValueError where they may not fit together."""
        context = self.max_position_embeddings
        prompt = prompt or min(most[0], context // 2)
        response = response or min(most[1], max(1, context - prompt))
        if prompt + response > context:
            raise ValueError(f"--max_prompt_tokens + --max_response_tokens is {prompt + response} and the model's "
                             f"context is {context}")
        return prompt, response

    def num_parameters(self) -> int:
        """Parameters of the model, counted without allocating one."""
        with torch.device("meta"):
            return sum(p.numel() for p in Transformer(self).parameters())


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        bias = QKV_BIAS[c.model_type]
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.qk_norm = QK_NORM[c.model_type]
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) -> q (T, H, d), k and v (T, Hkv, d)"""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: "Attend", layer: int, recompute: bool) -> Tensor:
        """`recompute`: in backward, instead of keeping what it needs. Inside the module, so that what gathers a sharded
        block's weights, outside, treats both passes alike."""

        def run(x: Tensor) -> Tensor:
            return self.after(x, attend(layer, *self.before(x, cos, sin)))

        return checkpoint(run, x, use_reentrant=False) if recompute else run(x)

    # What stands before and after the attention, in which `Transformer.compile_blocks` has elementwise work fused.

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.qkv(self.input_layernorm(x), cos, sin)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended.flatten(-2))  # (T, H, d) -> (T, D)
        return x + self.mlp(self.post_attention_layernorm(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (T, H, d) with cos, sin (T, 1, d/2): the two halves of a head are the coordinates of d/2 planes."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class PackedAttention:
    """Causal attention inside each of S packed sequences; keeps the keys and values of every layer when asked to.

    CUDA in half precision takes PyTorch's varlen flash attention. Elsewhere the sequences are padded on the right:
    causality alone keeps every real token from seeing the padding, so no mask is needed and the result is the same.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, *, keep_kv: bool = False):
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen
        self.kv: list[tuple[Tensor, Tensor]] | None = [] if keep_kv else None
        owner = torch.repeat_interleave(cu_seqlens.diff())  # (T,) which sequence each token is of
        self.positions = torch.arange(len(owner), device=cu_seqlens.device) - cu_seqlens[owner]  # (T,)
        self._slot = owner * max_seqlen + self.positions  # where token t stands among S * max_seqlen padded ones

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kv is not None:
            self.kv.append((k, v))
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            from torch.nn.attention.varlen import varlen_attn  # here, for it imports the compiler: a second and a half

            cu, longest = self.cu_seqlens.int(), self.max_seqlen
            return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), enable_gqa=True)
        out = F.scaled_dot_product_attention(self._pad(q), self._pad(k), self._pad(v), is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)[self._slot]

    def _pad(self, x: Tensor) -> Tensor:
        sequences = len(self.cu_seqlens) - 1
        padded = x.new_zeros(sequences * self.max_seqlen, *x.shape[1:]).index_copy(0, self._slot, x)
        return padded.view(sequences, self.max_seqlen, *x.shape[1:]).transpose(1, 2)  # (S, H, L, d)


class KVCache:
    """Keys and values of `slots` sequences of up to `max_len` tokens, each at a length of its own."""

    def __init__(self, config: ModelConfig, slots: int, max_len: int, *, dtype: torch.dtype, device: torch.device):
        self.max_len = max_len
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, max_len, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)  # (layers, slots, Hkv, L, d)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = torch.zeros(slots, dtype=torch.long, device=device)
        self.longest = 0  # max of self.length, on the host

    def fill(self, slots: Tensor, source: Tensor, packed: PackedAttention) -> None:
        """Puts prompt `source[i]` of a prefill into slot `slots[i]`, (n,) each; one prompt may fill many slots."""
        t = torch.arange(packed.max_seqlen, device=source.device)
        token = packed.cu_seqlens[source][:, None] + t  # (n, L)
        token = token.clamp(max=int(packed.cu_seqlens[-1]) - 1)  # never read past the end
        for layer, (k, v) in enumerate(packed.kv):
            for cache, x in ((self.k, k), (self.v, v)):
                cache[layer, slots, :, : packed.max_seqlen] = x[token].transpose(1, 2)  # (n, Hkv, L, d)
        self.length[slots] = packed.cu_seqlens.diff()[source]
        self.longest = int(self.length.max())

    def release(self, slots: Tensor) -> None:
        """Empties these slots; they go on being fed and attending until they are filled again, to no effect."""
        self.length[slots] = 0
        self.longest = int(self.length.max())

    def keep(self, slots: Tensor) -> None:
        """Forgets all slots but these, which become slots 0, 1, ..."""
        self.length = self.length[slots]
        self.longest = int(self.length.max())
        for cache in (self.k, self.v):  # in place: indexing has copied before the write
            cache[:, : len(slots), :, : self.longest] = cache[:, slots, :, : self.longest]
        self.k, self.v = self.k[:, : len(slots)], self.v[:, : len(slots)]


class CachedAttention:
    """One decoding step: one new token a slot attends to what the cache holds of it, to which it is appended."""

    def __init__(self, cache: KVCache):
        if cache.longest >= cache.max_len:
            raise ValueError(f"the KV cache is full: {cache.max_len} tokens")
        self.cache, self.positions = cache, cache.length  # (slots,)
        self.slots = torch.arange(len(cache.length), device=cache.length.device)
        future = torch.arange(cache.longest + 1, device=cache.length.device) > cache.length[:, None]  # (slots, L)
        self.mask = torch.zeros(future.shape, device=future.device).masked_fill_(future, -torch.inf)[:, None, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (slots, H, d), k and v (slots, Hkv, d) -> (slots, H, d)."""
        keys, values = self.cache.k[layer], self.cache.v[layer]  # (slots, Hkv, L, d)
        keys[self.slots, :, self.positions], values[self.slots, :, self.positions] = k, v
        seen, groups = self.mask.shape[-1], q.unflatten(1, (k.shape[1], -1))  # (slots, Hkv, G, d)
        scores = groups @ keys[:, :, :seen].transpose(2, 3) * q.shape[-1] ** -0.5
        p = (scores.float() + self.mask).softmax(dim=-1).to(v.dtype)  # (slots, Hkv, G, L)
        return (p @ values[:, :, :seen]).flatten(1, 2)


Attend = PackedAttention | CachedAttention  # of (layer, q (T, H, d), k and v (T, Hkv, d)) -> (T, H, d)

class Transformer(nn.Module):
    """The language model. `gradient_checkpointing` is the share of its layers, the first ones, that are recomputed in
    backward instead of kept."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.gradient_checkpointing = config, 0.0
        self.model = nn.Module()  # the name that Hugging Face gives the trunk
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def compile_blocks(self, **options) -> None:
        """Has torch.compile fuse norms, RoPE, SwiGLU and residuals, about two thirds of the tensors that a layer moves.
        All layers and lengths share a graph; what attends stays outside, and so does what gathers a sharded block."""
        for block in self.model.layers:
            block.before = torch.compile(block.before, dynamic=True, fullgraph=True, **options)
            block.after = torch.compile(block.after, dynamic=True, fullgraph=True, **options)

    @property
    def head(self) -> Tensor:
        """The output matrix, (V, D)."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        """tokens (T,), packed or one a slot -> hidden states after the last norm (T, D)."""
        x = self.model.embed_tokens(tokens)  # (T, D)
        half = self.config.head_dim // 2
        plane = torch.arange(half, device=x.device, dtype=torch.float32)
        angle = attend.positions.float()[:, None] * self.config.rope_theta ** (-plane / half)  # (T, d/2), float32
        cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]  # (T, 1, d/2)
        recomputed = round(self.gradient_checkpointing * len(self.model.layers)) if torch.is_grad_enabled() else 0
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, attend, i, recompute=i < recomputed)
        return self.model.norm(x)

    def logprobs(self, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int, targets: Tensor, *,
                 temperature: float = 1.0, entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probs of the tokens at indices `targets` (N,) of the packed row, each given what precedes it.

        tokens (T,) int64; cu_seqlens (S + 1,) int64; no target is the first of its sequence. Returns (N,) float32, and
        with `entropy` the entropy of the same distributions. Logits of all rows and the whole vocabulary never exist.
        """
        hidden = self(tokens, PackedAttention(cu_seqlens, max_seqlen))
        return linear_logprob(hidden[targets - 1], self.head, tokens[targets], temperature=temperature, entropy=entropy)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V) float32, accumulated and kept in float32; for the few rows that decoding needs, no grad."""
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, self.head.T, out_dtype=torch.float32)
        return F.linear(hidden.float(), self.head.float())

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Feeds one token a slot, (slots,), and returns the logits of the next, (slots, V) float32."""
        hidden = self(tokens, CachedAttention(cache))
        cache.length, cache.longest = cache.length + 1, cache.longest + 1
        return self.logits(hidden)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal(0, 0.02) for matrices, smaller for what adds to the residual stream, ones for norms, zero biases."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                p.normal_(0.0, 0.02 / (2 * self.config.num_hidden_layers) ** (0.5 * residual), generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu",
                        shard: Callable[["Transformer"], object] = lambda model: None) -> "Transformer":
        """Loads a Hugging Face folder (one or many safetensors files). Every name and shape must fit. `shard`, of the
        model before it has memory, says which part of it this process holds."""
        path = Path(path)
        config = ModelConfig.from_folder(path)
        with torch.device("meta"):
            model = cls(config).to(dtype)
        shard(model)
        model.to_empty(device=device)
        derived = ("rotary_emb.inv_freq", *(["lm_head.weight"] if config.tie_word_embeddings else []))
        model.load_weights((x for x in iterate_safetensors(path) if not x[0].endswith(derived)), source=path)
        return model

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], source: str | Path) -> None:
        """Copies whole tensors in, drawn one at a time; each must come, once, by its name and in its shape.

        Raises ValueError, naming the tensor and the `source`, for one that does not.
        """
        wanted = dict(self.named_parameters())
        for name, tensor in named_tensors:
            if name not in wanted:
                raise ValueError(f"{source}: unexpected or repeated tensor {name!r} (quantised? take it in bfloat16)")
            if tensor.shape != wanted[name].shape:  # a copy would broadcast
                raise ValueError(f"{source}: {name!r} is {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}")
            fill(wanted.pop(name), tensor)
        if wanted:
            raise ValueError(f"{source}: tensors missing: {sorted(wanted)[:5]}")

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype | None = None, write: bool = True) -> None:
        """Writes config.json and safetensors (shards of 5 GB with their index) as transformers and vLLM read them, in
        `dtype` or as the weights are. Collective for a sharded model, of which one rank writes: the others, too, call
        it. Weights go to the host one by one."""
        from huggingface_hub import save_torch_state_dict

        whole = {}
        for name, p in self.named_parameters():
            tensor = full(p, dtype)
            if write:
                whole[name] = tensor.to("cpu", copy=True)
        if not write:
            return
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        kept = next(iter(whole.values())).dtype
        (path / "config.json").write_text(json.dumps(self.config.to_hf(kept), indent=2) + "\n")
        save_torch_state_dict(whole, path)


def check_head(path: Path, config: ModelConfig) -> None:
    """Raises ValueError for a stored head that is not the embedding to which config.json ties it."""
    names = ("lm_head.weight", "model.embed_tokens.weight") if config.tie_word_embeddings else ()
    found = dict(iterate_safetensors(path, names))
    if len(found) == 2 and not torch.equal(*(tensor.float() for tensor in found.values())):
        raise ValueError(f"{path}: config.json ties lm_head to the embedding, and the weights hold another "
                         "lm_head.weight: set tie_word_embeddings to false there to use it, as transformers does, or "
                         "remove it from the weights")


def iterate_safetensors(path: Path, only: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a checkpoint folder, one at a time, or of `only` some; a missing or truncated file is named."""
    from safetensors import SafetensorError, safe_open

    index, single = path / "model.safetensors.index.json", {"model.safetensors"}
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else single
    beside = {file.name for file in path.glob("*.safetensors")} - files
    if beside and (files == single or beside >= single):  # of more files vLLM, too, takes those of the index
        raise ValueError(f"{path} has {', '.join(sorted(beside))} beside {', '.join(sorted(files))}: which are the "
                         "weights? Move the others away")
    for file in sorted(files):
        if not (path / file).exists():
            raise FileNotFoundError(f"{path} has no {file}: not a Hugging Face checkpoint in safetensors format")
        try:
            with safe_open(path / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                    if only is None or name in only:
                        yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path / file} is damaged or cut short: {error}") from error


def fetch(model: str, revision: str | None = None) -> Path:
    """The local folder of `model`: a folder as it is, or a hub id downloaded (safetensors, config and tokenizer).

    A hub id may name a commit, branch or tag, owner/name@revision; `revision` wins over it.
    """
    if Path(model).is_dir():
        return Path(model)
    repo, _, named = model.partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {model!r}, and it is not a hub id of the form owner/name[@revision]")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision or named or None, allow_patterns=WEIGHT_FILES))
    except OSError as error:  # the root of the hub's refusals
        raise FileNotFoundError(f"{model!r} is neither a folder nor to be had from the hub ({error}); log in with "
                                "`hf auth login` if it is gated, or pass a local folder") from error

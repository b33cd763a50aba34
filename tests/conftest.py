"""Where the kernels run, ranks on the CPU, tiny random Hugging Face checkpoints for the tests of the model and of the
engine, and a small base model that has learned something, for the tests of training and evaluation."""

import faulthandler
import functools
import itertools
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that wait spin (docs/speed.md)
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

if not torch.cuda.is_available():  # the kernels go through Triton's interpreter, which the first import decides;
    with pytest.MonkeyPatch.context() as environment:  # what the tests start as processes must not inherit that
        environment.setenv("TRITON_INTERPRET", "1")
        import kernels  # noqa: F401

import tasks  # noqa: E402  (it imports the kernels)
from model import Transformer  # noqa: E402
from reward import _decide, extract  # noqa: E402

VOCAB = 61
two_ranks = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks would share one GPU")


def equivalent(answer: str | None, gold: str) -> bool:
    """Is `answer` the same as `gold`? In this process and without time-out, as a worker decides it."""
    return _decide(None, [(answer, gold)]) == [1.0]


def score(response: str, answer: str, style: str = "math") -> float:
    """+1.0 if `response` gives `answer`, else -1.0."""
    return 1.0 if equivalent(extract(response, style), answer) else -1.0


def gloo(world: int, function, *args, limit: float = 30) -> list:
    """What function(*args), which stands at the top of a module, returns on each of `world` ranks: processes on the CPU
    that see what torchrun sets, and one group of gloo where they are several.

    Raises with the traceback of the first rank that raises, or with the signal that ended it, and ends the others. Each
    rank has `limit` seconds; one that needs more prints where it stands and ends.
    """
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        environment.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        mp.set_forkserver_preload(["conftest", "torch.distributed.checkpoint", "torch.distributed.fsdp",
                                   "torch._dynamo"])  # once for all, the last for a first step of AdamW
        mp.start_processes(_rank, (world, function, args, folder, limit), world, start_method="forkserver")
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world)]


def _rank(rank: int, world: int, function, args: tuple, folder: str, limit: float) -> None:
    faulthandler.dump_traceback_later(limit, exit=True)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)})
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    result = function(*args)
    if dist.is_initialized():
        dist.destroy_process_group()
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A model that adds two digits, right in some rollouts and wrong in others; beside it the problems, sums.jsonl.

    Odd sums it writes twice: responses have 2 to 10 tokens, and some are cut by a limit of 8.
    """
    settings = tasks.BaseSettings(steps=20, lines_per_step=8, hidden_size=64, layers=2)
    folder = tasks.base_model("arithmetic", settings, cache=tmp_path_factory.mktemp("cache"))
    model, words = Transformer.from_pretrained(folder, dtype=torch.float32), tasks.tokenizer("arithmetic")
    problems, parts = [], []
    for a, b in itertools.product(range(10), repeat=2):
        problems.append(json.dumps({"question": f"{a}s{b}=", "answer": a + b}))
        response = f"{a}s{b}={a + b}:{a + b}" if (a + b) % 2 else f"{a + b}"
        parts.append(torch.tensor([*words.encode(f"{a}s{b}={response}"), words.eos_token_id]))
    (folder.parent / "sums.jsonl").write_text("\n".join(problems))
    ends = torch.tensor([0, *map(len, parts)]).cumsum(0)
    targets = torch.cat([torch.arange(start + 4, end) for start, end in itertools.pairwise(ends.tolist())])
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(torch.inf)
    while loss > 0.25:  # two rollouts in five are right
        loss = -model.logprobs(torch.cat(parts), ends, max(map(len, parts)), targets).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory):
    """tiny_hf(kind, tied) -> a folder that transformers wrote in float32, one a combination.

    Nothing in it is neutral: norms are not 1, biases not 0, rope_theta and the epsilon not the defaults, hidden_size is
    not heads * head_dim where the architecture allows it, and matrices are large enough for a wrong one to show.
    """
    transformers = pytest.importorskip("transformers", reason="transformers makes the reference models")

    @functools.cache
    def make(kind: str, tied: bool) -> Path:
        sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=256, rms_norm_eps=1e-3,
                     bos_token_id=None, eos_token_id=None, pad_token_id=None,
                     rope_parameters={"rope_type": "default", "rope_theta": 500.0})
        if kind == "qwen2":  # no head_dim of its own
            config = transformers.Qwen2Config(**{**sizes, "hidden_size": 128})
        else:
            config = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}[kind](**sizes, head_dim=32)
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in hf.named_parameters():
                p.normal_(0.0, 0.15 if p.ndim == 2 else 0.3, generator=generator)
                if name.endswith("norm.weight"):
                    p.add_(1.0)
        path = tmp_path_factory.mktemp(f"{kind}-{'tied' if tied else 'untied'}")
        hf.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def hf_model(tiny_hf):
    """hf_model(kind, tied) -> the same checkpoint as transformers runs it."""
    transformers = pytest.importorskip("transformers", reason="transformers makes the reference models")

    @functools.cache
    def load(kind: str, tied: bool):
        return transformers.AutoModelForCausalLM.from_pretrained(tiny_hf(kind, tied), dtype=torch.float32).eval()

    return load

"""A policy's folder: which weights lie in it, how long its context is, what is said when they are saved."""

import json
import shutil

import pytest
import torch

from data import Problem, encode_prompts
from model import Transformer
from policy import Policy

CPU = torch.device("cpu")


def opened(folder) -> Policy:
    return Policy.open(folder, dtype="float32", device=CPU)


def test_the_hash_of_weights_is_of_every_byte_of_every_shard_and_of_nothing_else(base, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(base, folder)
    (folder / "z.safetensors").write_bytes(b"a shard")
    policy = opened(folder)
    before = policy.weights_hash()
    (folder / "README.md").write_text("words")
    shutil.move(folder, tmp_path / "elsewhere")
    assert opened(tmp_path / "elsewhere").weights_hash() == before
    (tmp_path / "elsewhere" / "z.safetensors").write_bytes(b"A shard")
    assert opened(tmp_path / "elsewhere").weights_hash() != before != opened(base).weights_hash()


def test_limits_that_are_not_given_come_from_the_context(base):
    policy = opened(base)  # a context of 256
    assert policy.config.limits(0, 0) == (128, 128) and policy.config.limits(200, 0) == (200, 56)
    assert policy.config.limits(0, 0, (100, 20)) == (100, 20) and policy.config.limits(0, 8) == (128, 8)
    for prompt, response in ((250, 8), (300, 0)):
        with pytest.raises(ValueError, match="context is 256"):
            policy.config.limits(prompt, response)


def test_a_folder_whose_parts_do_not_go_together_is_refused_with_the_remedy(base, tmp_path):
    runs = shutil.copytree(base, tmp_path / "out" / "run" / "best").parents[1]
    with pytest.raises(FileNotFoundError, match=r"no config.json and no \*.safetensors .*models in it: .*run/best"):
        opened(runs)
    for part, message in (("tokenizer.json", "no tokenizer"), ("model.safetensors", "safetensors; models in it: none")):
        folder = shutil.copytree(base, tmp_path / part)
        (folder / part).unlink()
        with pytest.raises(FileNotFoundError, match=message):
            opened(folder)
    quantised = shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="quantised weights .*bfloat16"):
        opened(quantised)
    grown = shutil.copytree(base, tmp_path / "grown")
    tokenizer = opened(base).tokenizer
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    tokenizer.save_pretrained(grown)
    with pytest.raises(ValueError, match=r"no embedding of \['<new>'\], ids \[(\d+)\] of \1 rows.*--stop_tokens"):
        opened(grown)
    policy = Policy.open(grown, dtype="float32", device=CPU, stop_tokens="<end>")
    with pytest.raises(ValueError, match="problem a: the model has no embedding of '<new>', id .*--chat_template"):
        encode_prompts([Problem("a", "1<new>1", "1", "math")], policy.tokenizer, suffix="", chat_template="never",
                       max_tokens=9, rows=policy.config.vocab_size)


def test_a_kill_while_a_policy_is_saved_leaves_the_one_before_it_whole(base, tmp_path, monkeypatch):
    policy = opened(base)
    model = Transformer.from_pretrained(base, dtype=policy.dtype)
    policy.save(model, tmp_path / "best")
    before = opened(tmp_path / "best").weights_hash()
    model.model.norm.weight.data += 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(policy.tokenizer), "save_pretrained", interrupted)
        policy.save(model, tmp_path / "best")
    assert opened(tmp_path / "best").weights_hash() == before
    policy.save(model, tmp_path / "best")
    assert opened(tmp_path / "best").weights_hash() != before and [p.name for p in tmp_path.iterdir()] == ["best"]


def interrupted(*args):
    raise KeyboardInterrupt

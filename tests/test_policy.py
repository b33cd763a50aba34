"""A policy's folder: which weights lie in it, how long its context is, what is said when they are saved."""

import shutil

import pytest
import torch

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

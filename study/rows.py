"""The study as data: every run behind results/study is a `Trial`, a row of this file at a learning rate from a base."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parents[1]

BOTH_TASKS = ("arithmetic", "permutations")
Rates = dict[str, tuple[float, ...]]  # task -> learning rates
THREE: Rates = dict.fromkeys(BOTH_TASKS, (1e-4, 2e-4, 4e-4))
ARENA: Rates = {**THREE, "permutations": (1e-4, 2e-4, 4e-4, 8e-4)}  # there 4e-4 was the best of three in every row
BEST: Rates = {"arithmetic": (2e-4,), "permutations": (4e-4,)}  # in every row of the arena; as in config.RATES
HALF: Rates = {"arithmetic": (1e-4,), "permutations": (2e-4,)}  # what longer runs want, as it turned out
ONE: Rates = {task: (rate, 2 * rate) for task, (rate,) in BEST.items()}  # for one optimiser step a batch
TWO: Rates = {task: (*HALF[task], *BEST[task]) for task in BOTH_TASKS}


@dataclass(frozen=True)
class Row:
    name: str
    flags: dict[str, object] = field(default_factory=dict)  # what differs from the preset of the task; may be by task
    against: str = "grpo"  # the row that it is compared with, base by base
    rates: Rates = field(default_factory=lambda: ARENA)
    bases: range = range(8)  # their numbers
    seeds: range = range(1)  # of the runs from each base
    decoded: bool = False  # evaluate the last policy as the paper decodes, too
    disguised: str = "1"  # share of the base's textbook that stands under any sign (tasks.BaseSettings)

    @property
    def shape(self) -> str:
        """Prompts of a step and rollouts of each in the mean, of a row that says them."""
        return f"{self.flags['prompts_per_step']} x {self.flags['rollouts_per_prompt']}"


def at_best(name: str, flags: dict[str, object], against: str = "grpo", bases: int = 4, disguised: str = "1") -> Row:
    """A row at one rate, that which was the best of its task in the arena."""
    return Row(name, flags, against, BEST, range(bases), disguised=disguised)


MAXRL = {"mode": "grpo", "rule": "maxrl"}
ROLLOUT_MAXRL = {"mode": "rollout", "rule": "maxrl"}
WEIGHTS_MAXRL = {**ROLLOUT_MAXRL, "allocation": "weights"}
RANK_MAXRL = {**ROLLOUT_MAXRL, "rollout_utility": "rank"}
RANK_WEIGHTS = {**RANK_MAXRL, "allocation": "weights"}
BOTH_MAXRL = {"mode": "both", "rule": "maxrl", "averaging": "prompt"}
PAPER = {"adversary": "paper", "kl_beta": 0.001}
COMMON = {"engine": "torch", "eval_problems": 600, "eval_every": 0, "save_every": 0}
FRESH = "On fresh bases: rollouts by rank"
SHAPE = "The shape of the batch"
WAY = "What the way costs"  # at the shapes and the rate of the least cost in SHAPE: its table, development's
SHAPES = {"64x4": (64, 4), "32x8": (32, 8), "16x16": (16, 16)}  # prompts and rollouts of each: 256 rollouts a step
METHODS = {"grpo-way": "GRPO", "maxrl-way": "maxrl", "moved-way": "rank with maxrl",
           "weights-way": "its counts as weights"}
LENGTH = {"arithmetic": 300, "permutations": 150}  # steps where the way there is looked at
ALONG = {"steps": LENGTH, "eval_every": 25}


def shaped(flags: dict[str, object], prompts: int, rollouts: int) -> dict[str, object]:
    """A row at another shape of the batch, in four mini-batches."""
    moves = {"n_min": 2, "n_max": 3 * rollouts} if flags["mode"] == "rollout" else {}
    return {**flags, **moves, "prompts_per_step": prompts, "minibatch_prompts": prompts // 4,
            "rollouts_per_prompt": rollouts}


def on_the_way(name: str, flags: dict[str, object], shape: str, seeds: range = range(1)) -> Row:
    """A row of WAY, on bases and problems that no other row has seen, but for 80 of the training problems."""
    fresh = {"train_data": {task: f"{task}:train:561" for task in BOTH_TASKS},
             "eval_data": {task: f"{task}:heldout:601" for task in BOTH_TASKS}}
    flags = {**shaped(flags, *SHAPES[shape]), **ALONG, **fresh}
    return Row(f"{name}-way", flags, "maxrl-way", HALF, range(16, 24), seeds, True)


# Parts of the study -> rows, in the order in which they run. The preset's adversary is "tuned"; every row but `base`
# trains on the same number of rollouts.
PARTS = {
    "The arena": (
        Row("base", {"steps": 0}, "base", dict.fromkeys(BOTH_TASKS, (1e-4,))),
        Row("grpo", {"mode": "grpo"}),
        Row("maxrl", MAXRL),
        Row("rollout-maxrl", ROLLOUT_MAXRL, "maxrl"),
        Row("weights-maxrl", WEIGHTS_MAXRL, "maxrl"),
        Row("rollout", {"mode": "rollout"}),
        Row("prompt", {"mode": "prompt"}, "tilt"),
        Row("tilt", {"mode": "grpo", "rule": "tilt"}),
        Row("both-maxrl", BOTH_MAXRL, "maxrl"),
    ),
    "The paper's settings": tuple(
        Row(f"paper-{mode}", {"mode": mode, **PAPER}, "paper-grpo", THREE, range(4))
        for mode in ("grpo", "prompt", "rollout")),
    FRESH: tuple(
        Row(f"{row}-fresh", flags, "maxrl-fresh", BEST, range(8, 16))
        for row, flags in (
            ("maxrl", MAXRL), ("rank-maxrl", RANK_MAXRL),
            ("rank-weights-maxrl", RANK_WEIGHTS), ("rollout-maxrl", ROLLOUT_MAXRL))),
    "Rivals": (
        at_best("dr-grpo", {"mode": "grpo", "rule": "dr_grpo"}),
        *(at_best(f"rollout-{utility}{suffix}", {"mode": "rollout", "rule": rule, "rollout_utility": utility}, against,
                  8 if utility == "rank" else 4)  # on four it was no worse than gain
          for rule, suffix, against in (("grpo", "", "rollout"), ("maxrl", "-maxrl", "rollout-maxrl"))
          for utility in ("rank", "variance", "surrogate")),
        at_best("rollout-maxrl-32", {**ROLLOUT_MAXRL, "n_max": 32}, "rollout-maxrl"),
    ),
    SHAPE: tuple(
        Row(f"{row}-{shape}", {**shaped(flags, *sizes), **ALONG}, f"grpo-{shape}",
            TWO if flags["mode"] == "grpo" and shape == "64x4" else HALF, range(4))
        for row, flags in (("grpo", {"mode": "grpo"}), ("maxrl", MAXRL), ("rank-maxrl", RANK_MAXRL),
                           ("rollout-maxrl", ROLLOUT_MAXRL))
        for shape, sizes in SHAPES.items()),
    WAY: (
        on_the_way("grpo", {"mode": "grpo"}, "16x16", seeds=range(2)),
        on_the_way("maxrl", MAXRL, "16x16"),
        on_the_way("moved", RANK_MAXRL, "32x8"),
        on_the_way("weights", RANK_WEIGHTS, "32x8"),
    ),
    "What else could turn it over": (  # the arena's bases, steps and best rate
        *(at_best(f"{row}-50-{shape}", shaped(flags, *SHAPES[shape]), f"{against}-50-{shape}", 8)
          for shape in ("32x8", "16x16")
          for row, flags, against in (("grpo", {"mode": "grpo"}, "grpo"), ("maxrl", MAXRL, "grpo"),
                                      ("rank", RANK_MAXRL, "maxrl"), ("weights", RANK_WEIGHTS, "maxrl"))),
        at_best("rank-weights-maxrl", RANK_WEIGHTS, "maxrl", 8),
        at_best("rank-tilt", {**RANK_MAXRL, "rule": "tilt"}, "tilt", 8),
        at_best("weights", {"mode": "rollout", "allocation": "weights"}, "rollout", 8),
        *(Row(f"{row}-again", flags, row, BEST, seeds=range(1, 2))
          for row, flags in (("maxrl", MAXRL), ("rollout-rank-maxrl", RANK_MAXRL),
                             ("rank-weights-maxrl", RANK_WEIGHTS))),
        *(Row(f"{row}-one", {**flags, "minibatch_prompts": 64}, f"{against}-one", ONE, range(4))
          for row, flags, against in (("grpo", {"mode": "grpo"}, "grpo"), ("maxrl", MAXRL, "grpo"),
                                      ("rank", RANK_MAXRL, "maxrl"))),
    ),
    "The dial: skills that spread between kinds": tuple(
        at_best(f"{row}-disguised-{share}", flags, f"{against}-disguised-{share}", disguised=share)
        for share in ("0", "0.5")
        for row, flags, against in (
            ("grpo", {"mode": "grpo"}, "grpo"), ("maxrl", MAXRL, "grpo"), ("rollout-maxrl", ROLLOUT_MAXRL, "maxrl"))),
}


@dataclass(frozen=True)
class Trial:
    """One training of a row."""

    task: str
    row: Row
    rate: float
    base: int
    seed: int = 0  # counts the runs of a base

    @property
    def name(self) -> str:
        return f"{self.task}/{self.row.name}-{written(self.rate)}-{self.base}" + f".{self.seed}" * bool(self.seed)

    def flags(self) -> list[str]:
        """With which train.py is called, but for the folder."""
        model = f"{self.task}:{self.base}" + (f":{self.row.disguised}" if self.row.disguised != "1" else "")
        settings = {"preset": self.task, **COMMON, "model": model, "learning_rate": written(self.rate),
                    **self.row.flags, "seed": self.base + 100 * self.seed}
        return [str(x) for k, v in settings.items() for x in (f"--{k}", v[self.task] if isinstance(v, dict) else v)]

    def command(self, folder: Path) -> list[str]:
        """What trains it into `folder`, or goes on there."""
        resume = ["--resume"] if (folder / "config.json").exists() else []
        return [sys.executable, str(HERE / "train.py"), *self.flags(), "--out_dir", str(folder), *resume]


def trials(only: str = "") -> list[Trial]:
    """All whose name contains `only`."""
    every = [Trial(task, row, rate, base, seed) for rows in PARTS.values() for row in rows for task in row.rates
             for rate in row.rates[task] for base in row.bases for seed in row.seeds]
    return [t for t in every if only in t.name]


def written(rate: float) -> str:
    """0.0002 -> 2e-4"""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"

"""Every setting of a run: `Config`, the presets, the command lines. The only file that knows flags.

Nothing here imports torch before a command line is whole: `--help` and a wrong flag are answered in half a second.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path

from data import BUILT_IN, HUB_SETS, SUFFIXES
from gdro import BUDGETS, RULES, SIGNALS, UTILITIES
from reward import STYLES

PROMPT_SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."  # of the launch scripts


def arg(default, help: str, choices=None, *, low=None, high=None, above=None, heading=None):
    """A setting: inclusive bounds `low` and `high`, or an exclusive lower one, `above`; `heading` begins a group."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high, above=above,
                                                heading=heading))


@dataclass(frozen=True)
class Config:
    """Every setting of a run: the command line and config.json. The defaults are the paper's (appendix A); a preset and
    an adversary, below, set other values."""

    mode: str = arg("grpo", "which adversaries act", ("grpo", "prompt", "rollout", "both"), heading="the run")
    steps: int = arg(1000, "training steps, one batch each; 0 only evaluates the base", low=0)
    seed: int = arg(0, "seeds the order of prompts and every rollout, alike in every mode", low=0)
    out_dir: str = arg("", "run folder; empty = out/PRESET-MODE-SEED, or out/MODEL-DATA-MODE-SEED for own ones")
    save_every: int = arg(50, "steps between checkpoints; 0 = only at the end", low=0)
    stall_seconds: float = arg(1800.0, "end a run in which no rank moves for so long (docs/log.md); 0 = never", low=0)
    tracker: str = arg("none", "also log to this; pip install it", ("none", "tensorboard", "wandb"))

    model: str = arg("Qwen/Qwen3-1.7B-Base", "Hugging Face folder or hub id[@revision]; arithmetic, permutations[:3] = "
                                             "a base model (0, or 3) of a built-in task",
                     heading="what is trained on what")
    train_data: str = arg("dapo", "arithmetic, permutations, dapo, hub:owner/name[:config[:split]][@revision], or a "
                                   ".jsonl, .json or .parquet file")
    train_problems: int = arg(0, "use so many training problems (of a file by hash); 0 = all (built-in: 640)", low=0)
    eval_data: str = arg("math500", "the same, of the hub with a split; empty = a tenth of train_data (by hash), at "
                                    "most 200, held out")
    eval_problems: int = arg(0, "use so many, likewise; 0 = all (built-in: 600)", low=0)
    answer_style: str = arg("auto", "where a response states its answer (reward.py); auto = as the data set says",
                            ("auto", *STYLES))
    reward: str = arg("", "FILE.py:function, your own: (response: str, problem: data.Problem) -> float in [-1, 1], "
                          "above 0 is right; a name in _batch: two lists -> list (docs/log.md); empty = +1 for "
                          "the right answer, else -1")
    allow_bad_golds: float = arg(0.02, "largest share of golds that no response could match", low=0, high=1)
    allow_overlap: float = arg(0.02, "largest share of eval_data that may stand in train_data, too", low=0, high=1)
    prompt_suffix: str = arg(PROMPT_SUFFIX, "appended to every prompt")
    chat_template: str = arg("auto", "auto = when the tokenizer has one", ("auto", "always", "never"))
    stop_tokens: str = arg("auto", "comma-separated tokens that end a response; auto = the model's own")
    max_prompt_tokens: int = arg(3200, "longer prompts are dropped; 0 = half the context, up to 1024", low=0)
    max_response_tokens: int = arg(4096, "a response cut here is wrong unless a --reward says else; 0 = what prompts "
                                         "leave, up to 1024", low=0)

    engine: str = arg("auto", "auto = vLLM; torch on a CPU where vLLM does not run", ("auto", "vllm", "torch"),
                      heading="sampling")
    prompts_per_step: int = arg(256, "P, prompts of a batch", low=1)
    rollouts_per_prompt: int = arg(4, "n_bar, the mean number of rollouts of a prompt", low=1)
    temperature: float = arg(1.0, "of training; no top-p, no top-k: they would bias the ratio (4)", above=0)
    max_rollouts: int = arg(256, "rollouts decoded at once (TorchEngine takes fewer where GPU memory is short)", low=1)
    gpu_memory_utilization: float = arg(0.5, "vLLM: share of GPU memory it holds while sampling", low=0.01, high=1)
    max_mismatch: float = arg(0.05, "stop when log-probs of sampler and trainer differ more on average", above=0)

    dtype: str = arg("auto", "of a forward pass; auto = bfloat16 on CUDA, float32 elsewhere; masters are float32",
                     ("auto", "bfloat16", "float32"), heading="optimisation")
    threads: int = arg(0, "of PyTorch on CPU; 0 = as PyTorch chooses, or OMP_NUM_THREADS says", low=0)
    minibatch_prompts: int = arg(128, "prompts of one optimiser step", low=1)
    microbatch_tokens: int = arg(16384, "packed tokens of one forward and backward: memory, not the objective", low=1)
    gradient_checkpointing: float = arg(1.0, "share of layers recomputed in backward instead of kept: less memory, up "
                                             "to a third more work", low=0, high=1)
    learning_rate: float = arg(1e-6, "AdamW, constant", above=0)

    kl_beta: float = arg(0.001, "beta_KL, weight of the k3 KL to the frozen base; 0 saves the reference model", low=0,
                         heading="the loss, (3)-(7)")
    eps_low: float = arg(0.2, "lower clip of the ratio", low=0, high=1)
    eps_high: float = arg(0.28, "upper clip of the ratio", low=0)
    rule: str = arg("grpo", "what multiplies a prompt's advantages for its own successes, beside the adversary's "
                            "weight: grpo = 1; dr_grpo, maxrl, tilt: gdro.py", tuple(RULES))
    averaging: str = arg("prompt", "what weighs 1 in the loss: prompt = (7), its rollouts 1/n; or every rollout",
                         ("prompt", "rollout"))

    bin_edges: str = arg("0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9", "inner edges of the bins",
                         heading="difficulty bins, (10)-(11)")
    bin_history: int = arg(50, "H, visits that count", low=1)
    bin_hysteresis: float = arg(0.03, "delta, margin to pass before a prompt leaves its bin", low=0)
    bin_success: str = arg("any", "a visit records its success rate, or if any rollout was right", ("rate", "any"))
    unseen_rate: float = arg(0.0, "estimate of a prompt before its first visit (official code: 0)", low=0, high=1)

    prompt_signal: str = arg("surrogate", "bin loss: that of (5)-(7); minus the mean reward (appendix B); its variance",
                             tuple(SIGNALS), heading="Prompt-GDRO, (12)-(16)")
    prompt_eta: float = arg(0.65, "eta_q", low=0)
    mean_one: bool = arg(False, "rescale the batch's weights to mean 1, as the official code does")

    n_min: int = arg(2, "fewest rollouts of a prompt", low=1, heading="Rollout-GDRO, (17)-(21)")
    n_max: int = arg(12, "most rollouts of a prompt", low=1)
    rollout_utility: str = arg("surrogate", "worth of an arm: surrogate = the paper; variance = -v_b/n; gain = "
                                            "expected learning; rank = fixed, by the rank of the bin", tuple(UTILITIES))
    rollout_budget: str = arg("exact", "exact = the paper's DP; spread = same total, counts inside a bin may differ "
                                       "by one; dual = only the shadow price holds the mean", BUDGETS)
    rollout_eta: float = arg(0.65, "EXP3P learning rate", low=0)
    allocation: str = arg("rollouts", "what the counts n_P become: rollouts; weights = a control, in which each has "
                                      "n_bar and its advantages count n_P / n_bar", ("rollouts", "weights"))

    eval_every: int = arg(50, "steps between evaluations, first of the base; 0 = only at the end", low=0,
                          heading="evaluation")
    eval_rollouts: int = arg(8, "k, responses per problem for mean@k and pass@k", low=1)
    eval_temperature: float = arg(0.6, "of evaluation; 0 = greedy, for one response a problem", low=0)
    eval_top_p: float = arg(0.8, "of evaluation; 1 = off", above=0, high=1)
    eval_top_k: int = arg(20, "of evaluation; 0 = off", low=0)
    grader_workers: int = arg(2, "processes for answers that need math-verify", low=1)
    grader_timeout: float = arg(5.0, "seconds per answer; past it the response counts as wrong. A --reward in _batch "
                                     "has as many for each of its responses, divided by grader_workers", above=0)

    def due(self, step: int) -> bool:
        """Whether there is an evaluation after so many steps."""
        return step == self.steps or bool(self.eval_every and step % self.eval_every == 0)


# What the adversaries see and may do. "paper": Config's defaults, as the paper's text and scripts have it. "tuned":
# what was best on development problems of the built-in tasks' first form, fixed in the arena; see docs/study.md.
ADVERSARIES = {
    "tuned": dict(
        bin_success="rate", unseen_rate=0.5, bin_hysteresis=0.0, prompt_signal="reward", prompt_eta=2.0,
        mean_one=True, rollout_utility="gain", rollout_budget="spread", averaging="rollout"),
}
ADVERSARIES["paper"] = {name: getattr(Config, name) for name in ADVERSARIES["tuned"]}
ON_A_CPU = dict(  # the built-in tasks
    prompt_suffix="", chat_template="never", threads=1,  # threads that wait spin: see docs/speed.md
    max_prompt_tokens=16, max_response_tokens=32, steps=50, prompts_per_step=64,
    minibatch_prompts=16, kl_beta=0.0, gradient_checkpointing=0.0, save_every=25, eval_every=25,
    eval_rollouts=16, eval_temperature=1.0, eval_top_p=1.0, eval_top_k=0, max_rollouts=512)
# For --model and --train_data of one's own: what one small machine can do, the rest from the model and its tokenizer.
OWN = dict(model="", train_data="", eval_data="", max_prompt_tokens=0, max_response_tokens=0, prompts_per_step=16,
           minibatch_prompts=4, kl_beta=0.0, steps=100, save_every=25, eval_every=25, eval_problems=100,
           microbatch_tokens=8192, max_rollouts=64)
# GSM8K on one GPU of 24 GB, in about two hours by `--plan`, unmeasured.
ONE_GPU = dict(
    model="Qwen/Qwen3-0.6B-Base", train_data="hub:openai/gsm8k:main", eval_data="hub:openai/gsm8k:main:test",
    eval_problems=200, eval_rollouts=4, max_prompt_tokens=512, max_response_tokens=512, prompts_per_step=64,
    minibatch_prompts=16, microbatch_tokens=8192, max_rollouts=128, kl_beta=0.0, steps=200)
RATES = {"arithmetic": 2e-4, "permutations": 4e-4}  # the best of three and four in every row of the study's arena
# name -> (adversary, settings)
PRESETS = {
    "own": ("tuned", OWN),
    **{task: ("tuned", dict(ON_A_CPU, model=task, train_data=task, eval_data=task, learning_rate=rate))
       for task, rate in RATES.items()},
    "qwen3-0.6b": ("tuned", ONE_GPU),
    "qwen3-1.7b": ("paper", dict(model="Qwen/Qwen3-1.7B-Base")),
    "qwen3-4b": ("paper", dict(model="Qwen/Qwen3-4B-Base")),
    "qwen3-8b": ("paper", dict(model="Qwen/Qwen3-8B-Base")),
}
# What a resumed run may change; config.json records when it did. The rest makes it another experiment, so does the
# learning rate, which a run that diverged must yet be able to lower.
MAY_CHANGE = ("steps", "out_dir", "save_every", "eval_every", "grader_workers", "grader_timeout", "threads",
              "microbatch_tokens", "max_rollouts", "gpu_memory_utilization", "gradient_checkpointing",
              "learning_rate", "stall_seconds")
# What others call a setting -> its name.
SHORT = {"lr": "learning_rate", "n_bar": "rollouts_per_prompt", "k": "eval_rollouts", "eval_rollouts": "k"}
# What acts with an adversary alone: mode -> its settings.
OF_ADVERSARY = {
    "prompt": ("prompt_signal", "prompt_eta", "mean_one"),
    "rollout": ("n_min", "n_max", "rollout_utility", "rollout_budget", "rollout_eta", "allocation")}

# ------------------------------------------------------------------------------------------------ the command line


def train_flags() -> argparse.ArgumentParser:
    """The command line of train.py. Of the settings only those that are given are in what it parses."""
    parser = argparse.ArgumentParser(
        description="GRPO, Prompt-GDRO and Rollout-GDRO (arXiv 2601.19280). Several GPUs or processes: torchrun.",
        usage="train.py [--preset PRESET] [--adversary paper|tuned] [--mode MODE] [--FLAG VALUE ...]\n"
              "       train.py --out_dir RUN --resume [--FLAG VALUE ...]\n--help lists all flags",
        formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", default="auto", choices=["auto", *PRESETS],
                        help="values for the flags below; auto = the built-in task that is named, own for others;\n"
                             "without --model and --train_data qwen3-1.7b with CUDA, else arithmetic")
    parser.add_argument("--adversary", default="auto", choices=["auto", *ADVERSARIES],
                        help="bins and adversaries as in the paper (auto: for its models) or as our study has it")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the last checkpoint in out_dir; may change:\n" + ", ".join(MAY_CHANGE))
    parser.add_argument("--plan", nargs="?", const="all", metavar="CARDS",
                        help="only print what the run would need, by our estimate: memory and hours on 1 to 16 GPUs,\n"
                             "or on CARDS, 4xA100-40 or 8x96GiB@500TFLOPS, and what to change where they are too small")
    group = parser
    for f in dataclasses.fields(Config):
        group = parser.add_argument_group(f.metadata["heading"]) if f.metadata["heading"] else group
        add_flag(group, f, default=argparse.SUPPRESS)
    return parser


# Settings of train.py that are flags of eval.py, too, with a run's values where it is one of a run.
ASKED = ("eval_rollouts", "eval_temperature", "eval_top_p", "eval_top_k", "seed", "max_prompt_tokens",
         "max_response_tokens", "chat_template", "answer_style")  # with others it is another evaluation
EVAL_FLAGS = (*ASKED, "eval_problems", "prompt_suffix", "stop_tokens", "reward", "allow_bad_golds", "engine", "dtype",
              "threads", "max_rollouts", "gpu_memory_utilization", "grader_workers", "grader_timeout", "stall_seconds")


def eval_flag(setting: str) -> str:
    """What eval.py calls a setting."""
    return "k" if setting == "eval_rollouts" else setting.removeprefix("eval_")


def eval_flags(description: str = "") -> argparse.ArgumentParser:
    """The command line of eval.py. Of EVAL_FLAGS only those that are given are in what it parses."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s (--model RUN|FOLDER|ID [--benchmarks NAME ...] | --regrade FOLDER|FILE | --compare A B) "
              "[option ...]",
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    built_in = ", ".join(BUILT_IN)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a run of train.py (its last model; RUN/best: its best), evaluated as the run "
                                      "does it, but for the flags given; or a Hugging Face folder or hub "
                                      f"id[@revision]; {built_in} = the base model of a built-in task")
    what.add_argument("--regrade", type=Path, metavar="FOLDER|FILE",
                      help="grade the responses of an evaluation again, without any model; --answer_style and "
                           "--reward may be others")
    what.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"),
                      help="two folders of evaluations of the same problems: the differences B - A, paired by problem, "
                           "with 95%% intervals")
    parser.add_argument("--benchmarks", nargs="+", metavar="NAME|FILE",
                        help=f"any of {', '.join(n for n in HUB_SETS if n != 'dapo')}, {built_in}, "
                             f"hub:owner/name:[config]:split, or {'/'.join(SUFFIXES)} files; paper = the seven of "
                             "the paper [those of the run, else paper]")
    parser.add_argument("--out", type=Path, help="folder for eval.json and eval_samples.jsonl [out/eval-RUN or -MODEL, "
                                                 "and the benchmarks if given]")
    for name in EVAL_FLAGS:
        add_flag(parser, Config.__dataclass_fields__[name], default=argparse.SUPPRESS, flag=eval_flag(name))
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """Command line of train.py -> settings, and what it asks for beside: preset, resume, plan. A preset sets fields;
    flags given override it. With --resume the rest comes from the run's config.json. ValueError for values that cannot
    be."""
    given = given_flags(train_flags(), argv)
    from ranks import say  # which imports torch

    preset, adversary, resume, plan = (given.pop(name) for name in ("preset", "adversary", "resume", "plan"))
    if resume and (Path(given.get("out_dir", "")) / "config.json").exists():
        chosen = {} if adversary == "auto" else ADVERSARIES[adversary]
        cfg, preset = of_run(Path(given["out_dir"]), preset, {**chosen, **given})
    elif resume and preset == "auto" and not {"model", "train_data"} & given.keys():
        raise ValueError(f"--resume: {given.get('out_dir') or 'out_dir, which is not given,'} holds no run to go "
                         "on with; is --out_dir the folder of one?")
    else:
        preset = choose_preset(given) if preset == "auto" else preset
        cfg = from_preset(preset, adversary, given)
    check(cfg, needed=("model", "train_data") if plan is None else ("model",))
    for name, why in idle_settings(cfg).items():
        if name in given:
            say(f"WARNING: --{name} has no effect {why}")
    if cfg.reward and cfg.rule in ("dr_grpo", "maxrl"):
        say(f"WARNING: --rule {cfg.rule} is for rewards of two values: a prompt teaches nothing where all of its "
            "rollouts, or none, are above 0, however --reward grades them")
    if cfg.mode in ("rollout", "both") and cfg.rollouts_per_prompt in (cfg.n_min, cfg.n_max):
        say(f"WARNING: a mean of {cfg.rollouts_per_prompt} rollouts from --n_min {cfg.n_min} to --n_max {cfg.n_max} "
            "leaves Rollout-GDRO no choice: every prompt gets as many")
    return cfg, argparse.Namespace(preset=preset, resume=resume, plan=plan)


def add_flag(parser, setting: dataclasses.Field, *, default, flag: str = "") -> None:
    """One setting as a flag, called `flag` where it has another name than the setting."""
    m, flag = setting.metadata, flag or setting.name
    parse = {bool: _boolean, str: str, int: int, float: float}[type(setting.default)]
    parser.add_argument(f"--{flag}", dest=setting.name, type=parse, choices=m["choices"], default=default,
                        metavar=None if m["choices"] else flag.upper(),
                        help=f"{m['help']} [{setting.default!r}]".replace("%", "%%"))


def given_flags(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> dict:
    """What a command line gives. An unknown flag ends the program, with what it probably meant."""
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        names = {flag.lstrip("-"): flag for flag in parser._option_string_actions}
        names |= {short: names[name] for short, name in SHORT.items() if name in names and short not in names}
        meant = difflib.get_close_matches(unknown[0].lstrip("-").partition("=")[0].replace("-", "_"), names, 1)
        hint = f"did you mean {names[meant[0]]}?" if meant else "--help lists all flags"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; {hint}")
    return vars(given)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in ("true", "1", "yes", "on")


def choose_preset(given: dict) -> str:
    """The preset of a command that names none. Raises RunError for a GPU that torch cannot use."""
    from ranks import cuda_usable, say

    named = [given[k] for k in ("train_data", "model") if k in given]
    if named:
        task = next((t for t in BUILT_IN if t in [name.partition(":")[0] for name in named]), None)
        preset, why = task or "own", "for what --model and --train_data name"
    else:
        preset, why = ("qwen3-1.7b", "CUDA is present") if cuda_usable() else ("arithmetic", "CUDA is not present")
    say(f"preset {preset} (auto: {why})")
    return preset


def from_preset(preset: str, adversary: str, given: dict) -> Config:
    """The settings of a new run."""
    usual, settings = PRESETS[preset]
    cfg = Config(**{**ADVERSARIES[usual if adversary == "auto" else adversary], **settings, **given})
    if "minibatch_prompts" not in given:
        cfg = dataclasses.replace(cfg, minibatch_prompts=min(cfg.minibatch_prompts, cfg.prompts_per_step))
    if cfg.out_dir:
        return cfg
    name = preset
    if preset == "own" or {"model", "train_data"} & given.keys():
        model, data = (Path(x.removesuffix(Path(x).suffix * x.endswith(SUFFIXES))).name.replace(":", "-")
                       for x in (cfg.model, cfg.train_data))
        name = model if model.startswith(data) else f"{model}-{data}"
    return dataclasses.replace(cfg, out_dir=f"out/{name}-{cfg.mode}-{cfg.seed}")


def of_run(folder: Path, preset: str, given: dict) -> tuple[Config, str]:
    """The settings of the run in `folder`, as last resumed, with those given on top, and its preset. What config.json
    keeps by its last name alone stands in paths.json."""
    saved = json.loads((folder / "config.json").read_text())
    if preset not in ("auto", saved["preset"]):
        raise ValueError(f"--resume with another preset: this run has {saved['preset']}; leave --preset out")
    paths = folder / "paths.json"
    for change in saved.get("resumed", []):
        saved |= change["changed"]
    saved |= json.loads(paths.read_text()) if paths.exists() else {}
    known = {f.name for f in dataclasses.fields(Config)}
    return Config(**{**{k: v for k, v in saved.items() if k in known}, **given}), saved["preset"]


# ------------------------------------------------------------------------------------------------ checks


def idle_settings(cfg: Config) -> dict[str, str]:
    """Settings that can change nothing beside the others -> why."""
    idle = {name: f"in mode {cfg.mode}" for mode, names in OF_ADVERSARY.items() for name in names
            if cfg.mode not in (mode, "both")}
    if UTILITIES[cfg.rollout_utility].known_for_every_arm and cfg.rollout_budget != "dual" and cfg.rollout_eta:
        idle.setdefault("rollout_eta", f"with --rollout_utility {cfg.rollout_utility}, whose best choice is the same "
                                       "at any scale")
    if cfg.minibatch_prompts == cfg.prompts_per_step:
        idle |= dict.fromkeys(("eps_low", "eps_high"), "with one mini-batch a step: the ratio is 1")
    return idle


def check_bounds(setting: dataclasses.Field, value, flag: str = "") -> None:
    """Raises ValueError for a value outside a setting's bounds."""
    m = setting.metadata
    for holds, what in ((m["low"] is None or value >= m["low"], f"at least {m['low']}"),
                        (m["above"] is None or value > m["above"], f"above {m['above']}"),
                        (m["high"] is None or value <= m["high"], f"at most {m['high']}")):
        if not holds:  # nor does a comparison with NaN
            raise ValueError(f"--{flag or setting.name} must be {what}, got {value}")


def check(cfg: Config, needed: tuple[str, ...] = ("model", "train_data")) -> None:
    """Raises ValueError, naming the flag, for a value outside its bounds, for values that cannot work together, and
    where one of `needed` is empty."""
    for f in dataclasses.fields(cfg):
        check_bounds(f, getattr(cfg, f.name))
    if cfg.eval_temperature == 0 and cfg.eval_rollouts > 1:
        raise ValueError("--eval_temperature 0 gives the same response every time: use it with --eval_rollouts 1")
    if cfg.rollouts_per_prompt == 1 and cfg.mode in ("grpo", "prompt"):
        raise ValueError("--rollouts_per_prompt 1 teaches nothing: an advantage (3) compares the rollouts of a prompt")
    if cfg.minibatch_prompts > cfg.prompts_per_step:
        raise ValueError(f"--minibatch_prompts {cfg.minibatch_prompts} is more than --prompts_per_step "
                         f"{cfg.prompts_per_step}")
    if cfg.tracker != "none" and importlib.util.find_spec(cfg.tracker) is None:
        raise ValueError(f"--tracker {cfg.tracker}: it is not installed; pip install {cfg.tracker}")
    for name in needed:
        if not getattr(cfg, name):
            raise ValueError(f"--{name} is missing: own models and data (--preset own) need both --model and "
                             "--train_data; with the paper's settings: --preset qwen3-1.7b")
    if cfg.mode not in ("rollout", "both"):
        return
    utility = UTILITIES[cfg.rollout_utility]
    if not cfg.n_min <= cfg.rollouts_per_prompt <= cfg.n_max:
        raise ValueError(f"--rollouts_per_prompt {cfg.rollouts_per_prompt} is the mean, so it must lie between --n_min "
                         f"{cfg.n_min} and --n_max {cfg.n_max}")
    if cfg.allocation == "weights" and (cfg.rollout_budget == "dual" or not utility.known_for_every_arm):
        known = ", ".join(name for name, u in UTILITIES.items() if u.known_for_every_arm)
        raise ValueError(f"--allocation weights draws {cfg.rollouts_per_prompt} rollouts of every prompt, so it shows "
                         "no other arm and moves no price: take a --rollout_utility that is known for every arm "
                         f"({known}) and --rollout_budget exact or spread")
    if cfg.allocation == "weights" and cfg.averaging == "prompt":
        raise ValueError("--allocation weights stands for rollouts that weigh alike, --averaging rollout: with prompt "
                         "a prompt weighs 1 however many rollouts it has")

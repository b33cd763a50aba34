"""Every setting of a run: `Config`, the presets, the command line. The only file that knows flags."""

import argparse
import dataclasses
import difflib
import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tasks
from data import SUFFIXES
from gdro import BUDGETS, SIGNALS, UTILITIES
from ranks import cuda_usable, say
from reward import STYLES
from rules import RULES

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
    out_dir: str = arg("", "run folder: config.json, metrics.jsonl, eval.json, checkpoint/, ...; empty = "
                           "out/PRESET-MODE-SEED, or out/MODEL-DATA-MODE-SEED for own ones")
    save_every: int = arg(50, "steps between checkpoints; 0 = only at the end", low=0)
    keep: int = arg(2, "checkpoints kept, the newest ones; 0 = all", low=0)
    stall_seconds: float = arg(1800.0, "end a run in which no rank moves for so long (docs/log.md); 0 = never", low=0)
    tracker: str = arg("none", "also send each line of metrics.jsonl to this (pip install it)",
                       ("none", "tensorboard", "wandb"))

    model: str = arg("Qwen/Qwen3-1.7B-Base", "Hugging Face folder or hub id; 'arithmetic' and 'permutations' = base "
                                             "model 0 of the built-in task, 'arithmetic:3' = its base model 3",
                     heading="what is trained on what")
    model_revision: str = arg("main", "hub revision of the model; the commit it resolves to is recorded")
    train_data: str = arg("dapo", "'arithmetic', 'permutations', 'dapo', hub:owner/name[:config[:split]], or "
                                   ".jsonl/.json/.parquet")
    train_revision: str = arg("main", "hub revision of the training data; the commit it resolves to is recorded")
    train_problems: int = arg(0, "use the first so many training problems; 0 = all (built-in tasks: 640)", low=0)
    eval_data: str = arg("math500", "problems for evaluation, in the same forms; empty = the last tenth of train_data, "
                                    "at most 200, which is then not trained on")
    eval_revision: str = arg("main", "hub revision of the evaluation data; the commit it resolves to is recorded")
    eval_problems: int = arg(0, "use the first so many; 0 = all (built-in tasks: 600)", low=0)
    answer_style: str = arg("auto", "where a response's answer is: math = \\boxed, 'Answer:', ####, the last number; "
                                    "dapo = 'Answer:' near the end; gsm8k = the number after ####, boxed or last; "
                                    "choice = a letter; auto = as the data set says", ("auto", *STYLES))
    reward: str = arg("", "FILE.py:function, a reward of your own: (response: str, problem: data.Problem) -> float in "
                          "[-1, 1]; what is above 0 counts as right. Empty = +1 for the right answer, else -1")
    allow_bad_golds: float = arg(0.02, "largest share of problems whose gold answer could match no response", low=0,
                                 high=1)
    prompt_suffix: str = arg(PROMPT_SUFFIX, "appended to every prompt")
    chat_template: str = arg("auto", "auto = when the tokenizer has one", ("auto", "always", "never"))
    stop_tokens: str = arg("auto", "comma-separated tokens that end a response; auto = the model's own")
    max_prompt_tokens: int = arg(3200, "longer prompts are dropped and counted; 0 = half of the model's context, at "
                                       "most 1024", low=0)
    max_response_tokens: int = arg(4096, "a response cut here counts as wrong; 0 = what prompts leave of the context, "
                                         "at most 1024", low=0)

    engine: str = arg("auto", "auto = vLLM; torch on a CPU where vLLM does not run", ("auto", "vllm", "torch"),
                      heading="sampling")
    prompts_per_step: int = arg(256, "P, prompts of a batch", low=1)
    rollouts_per_prompt: int = arg(4, "n_bar, the mean number of rollouts of a prompt", low=1)
    temperature: float = arg(1.0, "of training rollouts; no top-p or top-k: truncation would bias the ratio (4)",
                             above=0)
    max_rollouts: int = arg(256, "rollouts decoded at once (TorchEngine takes fewer where GPU memory is short)", low=1)
    gpu_memory_utilization: float = arg(0.5, "vLLM: share of GPU memory it holds while sampling", low=0.01, high=1)
    max_mismatch: float = arg(0.05, "stop when sampler and trainer log-probs differ by more than this on average",
                              above=0)

    dtype: str = arg("auto", "of weights in the forward pass; auto = bfloat16 on CUDA, float32 elsewhere; "
                             "the optimiser keeps float32 masters", ("auto", "bfloat16", "float32"),
                     heading="optimisation")
    threads: int = arg(0, "of PyTorch on CPU; 0 = as PyTorch chooses, one a core unless OMP_NUM_THREADS says otherwise",
                       low=0)
    minibatch_prompts: int = arg(128, "prompts of one optimiser step", low=1)
    microbatch_tokens: int = arg(16384, "packed tokens of one forward and backward; changes memory, not the objective",
                                 low=1)
    gradient_checkpointing: float = arg(1.0, "share of the layers, the first ones, that are recomputed in backward "
                                             "instead of kept: less memory, up to a third more work", low=0, high=1)
    compile: bool = arg(True, "on CUDA: have torch.compile fuse what stands around the attention")
    learning_rate: float = arg(1e-6, "AdamW, constant", above=0)
    weight_decay: float = arg(0.01, "AdamW, decoupled, on all weights", low=0)
    grad_clip: float = arg(1.0, "global gradient norm", above=0)

    kl_beta: float = arg(0.001, "beta_KL, weight of the k3 KL to the frozen base; 0 saves the reference model", low=0,
                         heading="the loss, (3)-(7)")
    eps_low: float = arg(0.2, "lower clip of the ratio", low=0, high=1)
    eps_high: float = arg(0.28, "upper clip of the ratio", low=0)
    advantage_clip: float = arg(5.0, "advantages are clipped to [-c, c] before the adversary's weight", above=0)
    rule: str = arg("grpo", "what multiplies a prompt's advantages for its own successes, beside the adversary's "
                            "weight: grpo = 1; dr_grpo, maxrl, pass_at_k, tilt: rules.py", tuple(RULES))
    averaging: str = arg("prompt", "what weighs 1 in the loss: prompt = (7), its rollouts 1/n; rollout; token = DAPO",
                         ("prompt", "rollout", "token"))

    bin_edges: str = arg("0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9", "inner edges of the bins",
                         heading="difficulty bins, (10)-(11)")
    bin_history: int = arg(50, "H, visits that count", low=1)
    bin_decay: float = arg(1.0, "what a visit counts of what the next one does; 1 = the paper's plain mean", above=0,
                           high=1)
    bin_hysteresis: float = arg(0.03, "delta, margin to pass before a prompt leaves its bin", low=0)
    bin_success: str = arg("any", "a visit records its success rate, or whether any rollout was right (the paper; "
                                   "depends on n)", ("rate", "any"))
    unseen_rate: float = arg(0.0, "estimate of a prompt before its first visit (official code: 0)", low=0, high=1)

    prompt_signal: str = arg("surrogate", "bin loss: surrogate = (5)-(7); reward = minus the mean reward (appendix B); "
                                          "variance = of the reward within a prompt", tuple(SIGNALS),
                             heading="Prompt-GDRO, (12)-(16)")
    prompt_eta: float = arg(0.65, "eta_q", low=0)
    prompt_ema: float = arg(0.12, "beta, EMA rate of the scores", above=0, high=1)
    prompt_gamma: float = arg(0.01, "uniform mixing of q", low=0, high=1)
    score_clip: float = arg(5.0, "C, scores are clipped to [-C, C]; the paper gives no value", above=0)
    weight_cap: float = arg(15.0, "omega_max", above=0)
    share_normalize: str = arg("auto", "divide a bin's loss by its share of the batch; auto = with signal surrogate",
                               ("auto", "on", "off"))
    share_floor: float = arg(0.05, "least share to divide by", above=0)
    mean_one: bool = arg(False, "rescale the batch's weights to mean 1, as the official code does")

    n_min: int = arg(2, "fewest rollouts of a prompt", low=1, heading="Rollout-GDRO, (17)-(21)")
    n_max: int = arg(12, "most rollouts of a prompt", low=1)
    rollout_utility: str = arg("surrogate", "worth of an arm: surrogate = the paper; official = its sign reversed; "
                                            "variance = -v_b/n; gain = expected learning; gain_per_rollout, "
                                            "coverage, likelihood, rank, knapsack: gdro.py",
                               tuple(UTILITIES))
    rollout_budget: str = arg("exact", "exact = the paper's DP; spread = same total, counts inside a bin may differ "
                                       "by one; dual = only the shadow price holds the mean", BUDGETS)
    rollout_eta: float = arg(0.65, "EXP3P learning rate", low=0)
    rollout_ema: float = arg(0.4, "EMA rate of the arm scores", above=0, high=1)
    rollout_gamma: float = arg(0.01, "EXP3P uniform mixing", low=0, high=1)
    alpha_mu: float = arg(0.05, "step size of the shadow price", low=0)
    allocation: str = arg("rollouts", "what the counts n_P become: rollouts; weights = a control, in which each has "
                                      "n_bar and its advantages are multiplied by n_P / n_bar", ("rollouts", "weights"))

    eval_every: int = arg(50, "steps between evaluations; 0 = only after training (and before it)", low=0,
                          heading="evaluation")
    eval_first: bool = arg(True, "also evaluate the base, before the first step")
    eval_rollouts: int = arg(8, "k, responses per problem for mean@k and pass@k", low=1)
    eval_temperature: float = arg(0.6, "of evaluation; 0 = greedy, with --eval_rollouts 1", low=0)
    eval_top_p: float = arg(0.8, "of evaluation; 1 = off", above=0, high=1)
    eval_top_k: int = arg(20, "of evaluation; 0 = off", low=0)
    grader_workers: int = arg(2, "processes for answers that need math-verify", low=1)
    grader_timeout: float = arg(5.0, "seconds per answer; past it the response counts as wrong", above=0)


# What the adversaries see and may do. "paper": Config's defaults, as the paper's text and scripts have it. "tuned":
# what was best on development problems of the built-in tasks' first form, fixed in the arena; see docs/study.md.
ADVERSARIES = {
    "paper": {},
    "tuned": dict(
        bin_success="rate", unseen_rate=0.5, bin_hysteresis=0.0, prompt_signal="reward", prompt_eta=2.0,
        mean_one=True, rollout_utility="gain", rollout_budget="spread", averaging="rollout"),
}
BUILT_IN = dict(
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
    **{task: ("tuned", dict(BUILT_IN, model=task, train_data=task, eval_data=task, learning_rate=rate))
       for task, rate in RATES.items()},
    "qwen3-0.6b": ("tuned", ONE_GPU),
    "qwen3-1.7b": ("paper", dict(model="Qwen/Qwen3-1.7B-Base")),
    "qwen3-4b": ("paper", dict(model="Qwen/Qwen3-4B-Base")),
    "qwen3-8b": ("paper", dict(model="Qwen/Qwen3-8B-Base")),
}
# What a resumed run may change; config.json records when it did. The rest makes it another experiment, so does the
# learning rate, which a run that diverged must yet be able to lower.
MAY_CHANGE = ("steps", "out_dir", "save_every", "keep", "eval_every", "grader_workers", "grader_timeout", "threads",
              "microbatch_tokens", "max_rollouts", "gpu_memory_utilization", "gradient_checkpointing", "compile",
              "learning_rate", "stall_seconds")


class Parser(argparse.ArgumentParser):
    """Names the flag that an unknown one probably meant."""

    def error(self, message: str):
        unknown = [word for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized arguments") and unknown:
            meant = nearest(unknown[0].lstrip("-").partition("=")[0].replace("-", "_"))
            message += f"; did you mean --{meant}?" if meant else "; --help lists all flags"
        super().error(message)


def nearest(flag: str) -> str | None:
    """The setting of this name, symbol (n_bar) or initials (lr), or the one that is spelt most alike."""
    names = [f.name for f in dataclasses.fields(Config)]
    by_symbol = {"n_bar": "rollouts_per_prompt", "P": "prompts_per_step", "k": "eval_rollouts"}
    by_initials = by_symbol | {"".join(word[0] for word in name.split("_")): name for name in names if "_" in name}
    alike = difflib.get_close_matches(flag, names, 1)
    return flag if flag in names else by_initials.get(flag) or (alike[0] if alike else None)


def parse_args(argv: list[str] | None = None) -> tuple[Config, str, bool]:
    """Command line -> (config, preset name, resume). A preset sets fields; flags given override it. With --resume the
    rest comes from the run's own config.json; with --plan, as with --help, the program ends here. Raises ValueError for
    values that cannot be (`check`)."""
    parser = Parser(
        description="GRPO, Prompt-GDRO and Rollout-GDRO (arXiv 2601.19280). Several GPUs or processes: torchrun.",
        usage="train.py [--preset PRESET] [--adversary paper|tuned] [--mode MODE] [--FLAG VALUE ...]\n"
              "       train.py --out_dir RUN --resume [--FLAG VALUE ...]\n--help lists all flags",
        formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", default="auto", choices=["auto", *PRESETS],
                        help="a set of values for the flags below; auto = that of a built-in task that is named, own\n"
                             "for other --model and --train_data; without either qwen3-1.7b with CUDA, else arithmetic")
    parser.add_argument("--adversary", default="auto", choices=["auto", *ADVERSARIES],
                        help="settings of bins and adversaries: the paper's, or what our study found to work;\n"
                             "auto = paper for the paper's models, else tuned")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the last checkpoint in out_dir, with the settings of the run; may change:\n"
                             + ", ".join(MAY_CHANGE))
    parser.add_argument("--plan", action="store_true",
                        help="only print what the run would need, by our estimate: memory on 1 to 16 GPUs, hours")
    group = parser
    for f in dataclasses.fields(Config):
        group = parser.add_argument_group(f.metadata["heading"]) if f.metadata["heading"] else group
        add_flag(group, f, default=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    preset, adversary = given.pop("preset"), given.pop("adversary")
    resume, planned = given.pop("resume"), given.pop("plan")
    if resume and given.get("out_dir") and (Path(given["out_dir"]) / "config.json").exists():
        chosen = {} if adversary == "auto" else ADVERSARIES[adversary]
        cfg, preset = of_run(Path(given["out_dir"]), preset, {**chosen, **given})
    else:
        if resume and preset == "auto" and not {"model", "train_data"} & given.keys():
            raise ValueError(f"--resume: {given.get('out_dir') or 'out_dir, which is not given,'} holds no run to go "
                             "on with; is --out_dir the folder of one?")
        preset = choose_preset(given) if preset == "auto" else preset
        usual, settings = PRESETS[preset]
        cfg = Config(**{**ADVERSARIES[usual if adversary == "auto" else adversary], **settings, **given})
        if "minibatch_prompts" not in given:
            cfg = dataclasses.replace(cfg, minibatch_prompts=min(cfg.minibatch_prompts, cfg.prompts_per_step))
        cfg = dataclasses.replace(cfg, out_dir=cfg.out_dir or f"out/{own_name(cfg, preset)}-{cfg.mode}-{cfg.seed}")
    idle = [f"--{name}" for name in given if not acts(name, cfg.mode)]
    if idle:
        say(f"WARNING: {', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect in mode {cfg.mode}")
    check(cfg, needed=("model",) if planned else ("model", "train_data"))
    if cfg.mode in ("rollout", "both") and cfg.rollouts_per_prompt in (cfg.n_min, cfg.n_max):
        say(f"WARNING: a mean of {cfg.rollouts_per_prompt} rollouts from --n_min {cfg.n_min} to --n_max {cfg.n_max} "
            "leaves Rollout-GDRO no choice: every prompt gets as many")
    if planned:
        from plan import tables  # here, for it needs this file

        print(tables(cfg))
        sys.exit()
    return cfg, preset, resume


def add_flag(parser, setting: dataclasses.Field, *, default, flag: str = "", help: str = "", usual: str = "") -> None:
    """One setting as a flag. `flag`, `help`, `usual` (the default as it is told): where they are not the setting's."""
    m, flag = setting.metadata, flag or setting.name
    parse = {bool: _boolean, str: str, int: int, float: float}[type(setting.default)]
    parser.add_argument(f"--{flag}", type=parse, choices=m["choices"], default=default,
                        metavar=None if m["choices"] else flag.upper(),
                        help=f"{help or m['help']} [{usual or repr(setting.default)}]".replace("%", "%%"))


def check_bounds(setting: dataclasses.Field, value, flag: str = "") -> None:
    """Raises ValueError for a value outside a setting's bounds."""
    m = setting.metadata
    for holds, what in ((m["low"] is None or value >= m["low"], f"at least {m['low']}"),
                        (m["above"] is None or value > m["above"], f"above {m['above']}"),
                        (m["high"] is None or value <= m["high"], f"at most {m['high']}")):
        if not holds:  # nor does a comparison with NaN
            raise ValueError(f"--{flag or setting.name} must be {what}, got {value}")


def choose_preset(given: dict) -> str:
    """The preset of a command that names none. Raises RunError for a GPU that torch cannot use."""
    named = [given[k] for k in ("train_data", "model") if k in given]
    task = next((name.partition(":")[0] for name in named if tasks.is_base(name)), None)
    if task or named:
        preset, why = task or "own", "for what --model and --train_data name"
    else:
        cuda = cuda_usable()
        preset, why = "qwen3-1.7b" if cuda else "arithmetic", f"CUDA is {'' if cuda else 'not '}present"
    say(f"preset {preset} (auto: {why})")
    return preset


def own_name(cfg: Config, preset: str) -> str:
    """What a run is called: its preset, unless model or data are others than the preset's."""
    usual = PRESETS[preset][1]
    if preset != "own" and cfg.model == usual["model"] and cfg.train_data == usual.get("train_data", Config.train_data):
        return preset
    model, data = (Path(x.removesuffix(Path(x).suffix * x.endswith(SUFFIXES))).name.replace(":", "-")
                   for x in (cfg.model, cfg.train_data))
    return model if model.startswith(data) else f"{model}-{data}"


def acts(name: str, mode: str) -> bool:
    """Whether a setting can matter in a mode: those of an adversary only where it acts."""
    heading = ""
    for f in dataclasses.fields(Config):
        heading = f.metadata["heading"] or heading
        if f.name == name:
            adversary = heading.partition("-GDRO")[0].lower()
            return adversary not in ("prompt", "rollout") or mode in (adversary, "both")
    raise KeyError(name)


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


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in ("true", "1", "yes", "on")


def check(cfg: Config, needed: tuple[str, ...] = ("model", "train_data")) -> None:
    """Raises ValueError, naming the flag, for a value outside its bounds, for values that cannot work together, and
    where one of `needed` is empty."""
    for f in dataclasses.fields(cfg):
        check_bounds(f, getattr(cfg, f.name))
    if cfg.eval_temperature == 0 and cfg.eval_rollouts > 1:
        raise ValueError("--eval_temperature 0 gives the same response every time: use it with --eval_rollouts 1")
    if not cfg.steps and not cfg.eval_first:
        raise ValueError("--steps 0 only evaluates the base, which --eval_first false forbids")
    if cfg.minibatch_prompts > cfg.prompts_per_step:
        raise ValueError(f"--minibatch_prompts {cfg.minibatch_prompts} is more than --prompts_per_step "
                         f"{cfg.prompts_per_step}")
    if cfg.tracker != "none" and importlib.util.find_spec(cfg.tracker) is None:
        raise ValueError(f"--tracker {cfg.tracker}: it is not installed; pip install {cfg.tracker}")
    for name in needed:
        if not getattr(cfg, name):
            raise ValueError(f"--{name} is missing: own models and data (--preset own) need both --model and "
                             "--train_data; with the paper's settings: --preset qwen3-1.7b")
    if cfg.mode in ("rollout", "both") and not cfg.n_min <= cfg.rollouts_per_prompt <= cfg.n_max:
        raise ValueError(f"--rollouts_per_prompt {cfg.rollouts_per_prompt} is the mean, so it must lie between --n_min "
                         f"{cfg.n_min} and --n_max {cfg.n_max}")
    if cfg.allocation == "weights" and cfg.mode in ("rollout", "both") and cfg.rollout_budget == "dual":
        raise ValueError("--allocation weights draws as many rollouts of every prompt, so --rollout_budget dual, whose "
                         "price follows the number drawn, would hold nothing; take exact or spread")
    if cfg.allocation == "weights" and cfg.mode in ("rollout", "both") and not UTILITIES[cfg.rollout_utility].by_share:
        raise ValueError(f"--allocation weights draws {cfg.rollouts_per_prompt} rollouts of every prompt, so "
                         f"--rollout_utility {cfg.rollout_utility} would only ever see that arm; take one that is "
                         f"known for every arm: {', '.join(name for name, u in UTILITIES.items() if u.by_share)}")

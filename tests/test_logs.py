"""The numbers behind figures and tables are what the logs say: against loops and enumerations."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from study import __main__ as command
from study import logs
from study.logs import Run
from study.rows import written

NAN = float("nan")


def a_run(mode: str = "prompt", seed: int = 0, steps: int = 12, bins: int = 5, present: float = 0.6,
          preset: str = "made-up", changes: dict | None = None) -> Run:
    """A run whose log is drawn at random, with the fields and nulls that train.py writes."""
    which = list(logs.MODES).index(mode)  # no two modes are alike
    rng, log = np.random.default_rng((which, seed, steps, bins)), []
    for step in range(steps):
        here = rng.random(bins) < present
        here[rng.integers(bins)] = True
        share = np.where(here, rng.random(bins), 0)
        share /= share.sum()

        def by_bin(values, here=here):
            return [float(v) if h else None for v, h in zip(values, here, strict=True)]

        log.append({
            "step": step, "reward_mean": rng.uniform(-1, 1), "shadow_price": 0.0, "shadow_price_dp": None,
            "surrogate_abs": [0.0, 0.1],
            "seconds": {"generate": 1.0, "reward": 0.0, "logprob": 0.5, "update": 1.25, "total": 3.0},
            "zero_std_frac": 0.25, "truncated_frac": 0.0, "response_tokens_mean": 9.0 + step, "entropy": 1.0,
            "grad_norm": 0.5, "mismatch": {"mean": 1e-7, "max": 1e-6},
            "bins": {"share": share.tolist(), "weight": rng.uniform(0.1, 3, bins).tolist(),
                     "reward": by_bin(rng.uniform(-1, 1, bins)), "rollouts": by_bin(rng.integers(2, 9, bins))},
            "signals": {k: {"mean": by_bin(rng.uniform(0.1, 1, bins)), "error": by_bin(rng.uniform(0.1, 1, bins))}
                        for k in ("surrogate", "reward", "variance")}})
    config = {"preset": preset, "model": "made-up", "train_data": "made-up", "mode": mode, "seed": seed,
              "rollouts_per_prompt": 4, "learning_rate": 1e-4, "rule": "grpo",
              "loaded": {"model": {"head": "the one"}}, **(changes or {})}
    evaluations = [{"step": s, "problems": 10, "rollouts": 16, "mean": 0.3, "passes": {"pass@8": p},
                    "by_kind": {"a": [5, 0.1, p], "b": [5, 0.2, p / 2]}}
                   for s, p in ((steps // 2, 0.6 + seed / 100), (steps, 0.5 + seed / 50 + which / 20))]
    return Run(f"{mode}-{seed}", config, log, evaluations)


def from_base(mode: str, base: int, **changes) -> Run:
    """The same as a run of the study."""
    return a_run(mode, base, preset="arithmetic", changes={"model": f"arithmetic:{base}", **changes})


def folder_of(run: Run, path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(run.config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.log))
    (path / "eval.json").write_text(json.dumps(run.evaluations))
    return path


def test_tail_averages_start_at_the_60th_percentile_and_leave_absent_bins_out():
    x_TB = np.full((11, 3), NAN)
    x_TB[:, 0] = np.arange(11)  # steps 6 to 10 are the tail
    x_TB[8, 1] = 5.0
    assert logs.tail(x_TB)[:2].tolist() == [8.0, 5.0] and np.isnan(logs.tail(x_TB)[2])
    assert logs.tail(np.array([[3.0, NAN]]))[0] == 3.0  # one step is its own tail


def test_mean_bin_mass_and_entropy_equal_loops():
    rng = np.random.default_rng(0)
    x_TB = rng.random((20, 10)) * (rng.random((20, 10)) < 0.5)
    x_TB[:, 4] += 0.1
    for t, row in enumerate(x_TB):
        p = [v / sum(row) for v in row]
        assert logs.mean_bin(x_TB)[t] == pytest.approx(sum(b * v for b, v in enumerate(p)))
        assert logs.mass_from(x_TB, 3)[t] == pytest.approx(sum(p[3:]))
        assert logs.entropy(x_TB)[t] == pytest.approx(-sum(v * math.log(v) for v in p if v))
    assert logs.entropy(np.ones((1, 8)))[0] == pytest.approx(math.log(8))
    assert logs.entropy(np.eye(3))[0] == 0  # one bin


def test_lead_lag_is_negative_when_the_weights_lie_on_harder_bins():
    weight_TB, share_TB = np.array([[3.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), np.array([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    assert logs.lead_lag(weight_TB, share_TB) == pytest.approx([0.25 - 1.5, 1.0])  # (32)


def test_wse_equals_a_loop_and_ignores_absent_bins():
    run = a_run("rollout", bins=6)
    share_TB, n_TB = run.series("bins", "share"), run.series("bins", "rollouts")
    sigma_B = np.random.default_rng(1).random(6)
    for t, line in enumerate(run.log):
        terms = [q * s / math.sqrt(n) for q, s, n in
                 zip(line["bins"]["share"], sigma_B, line["bins"]["rollouts"], strict=True) if n is not None]
        assert logs.wse(share_TB, sigma_B, n_TB)[t] == pytest.approx(sum(terms))  # (33)
    even = logs.wse(share_TB, sigma_B, np.full_like(share_TB, 4.0))
    assert even == pytest.approx(share_TB @ sigma_B / 2)


def test_sigma_is_one_number_a_bin_from_all_steps_and_runs():
    runs = [a_run("rollout", seed) for seed in range(3)]
    for b in range(5):
        seen = [(line["bins"]["share"][b], line["signals"]["variance"]["mean"][b]) for r in runs for line in r.log
                if line["signals"]["variance"]["mean"][b] is not None]
        assert logs.bin_sigma(runs)[b] ** 2 == pytest.approx(sum(q * v for q, v in seen) / sum(q for q, _ in seen))


def test_budget_shares_are_the_rollouts_of_a_bin_over_all():
    run = Run("", {}, [{"bins": {"share": [0.75, 0.25, 0.0], "rollouts": [2, 10, None]}}], [])
    assert logs.budget_share(run)[0] == pytest.approx([1.5 / 4, 2.5 / 4, 0])


def test_differences_are_paired_by_base_whatever_the_order_and_a_base_s_seeds_are_averaged():
    ours, base = [from_base("prompt", b) for b in (3, 1, 2)], [from_base("grpo", b) for b in (0, 1, 2)]
    ours[0].evaluations[-1]["passes"]["pass@8"] = 0.9  # base 3: GRPO has none
    ours[1].evaluations[-1]["passes"]["pass@8"] += 0.25
    assert logs.paired(ours, base, logs.headline) == pytest.approx([30, 5])  # points
    again = from_base("grpo", 1, seed=101)
    again.evaluations[-1]["passes"]["pass@8"] += 0.1
    assert logs.paired(ours, [*base, again], logs.headline) == pytest.approx([25, 5])
    ours[1].config["loaded"] = {"model": {"head": "another"}}
    with pytest.raises(ValueError, match="began from different base models"):
        logs.paired(ours, base, logs.headline)


def test_a_run_is_called_by_what_was_trained_on_what_whatever_its_preset():
    def called(model: str, data: str) -> str:
        return a_run(preset="arithmetic", changes={"model": model, "train_data": data}).subject

    assert called("arithmetic:3", "arithmetic") == "arithmetic"
    assert called("Qwen/Qwen3-1.7B-Base", "dapo") == "Qwen3-1.7B-Base on dapo"
    assert called("models/my-model-0.5B", "../data/my.problems.jsonl") == "my-model-0.5B on my.problems"
    assert called("permutations:1", "hub:owner/problems:main") == "permutations on problems:main"


def test_cross_fitting_equals_brute_force_over_the_bases_that_have_every_rate():
    rng = np.random.default_rng(6)
    for _ in range(400):
        rates, bases = rng.integers(1, 5), rng.integers(1, 7)
        found = {10.0**-k: {int(b): rng.random() for b in rng.permutation(bases) if rng.random() < 0.9}
                 for k in range(rates)}
        sweep = {rate: [Run("", {"model": f"arithmetic:{base}", "learning_rate": rate}, [],
                             [{"rollouts": 16, "passes": {"pass@8": x}}])
                        for base, x in by_base.items()] for rate, by_base in found.items()}
        whole, expected = [b for b in range(bases) if all(b in by_base for by_base in found.values())], []
        for b in whole:
            means = {rate: [by_base[o] for o in whole if o != b] for rate, by_base in found.items()}
            rate = max((np.mean(x) if x else 0, rate) for rate, x in means.items())[1]
            expected.append((b, rate, found[rate][b]))
        assert [(r.base, r.config["learning_rate"], logs.headline(r.last()))
                for r in logs.cross_fitted(sweep)] == expected


def test_holm_rejects_what_its_steps_reject():
    assert logs.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert logs.holm([0.9, 0.3, 0.7]) == pytest.approx([1, 0.9, 1])


def test_the_study_is_read_by_row_rate_and_base(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(logs, "sweeps", logs.sweeps.__wrapped__)  # nothing is remembered
    for row, mode, rate, base in (("rollout", "rollout", 2e-4, 0), ("grpo", "grpo", 1e-4, 1), ("grpo", "grpo", 5e-5, 0),
                                  ("grpo", "grpo", 5e-5, 1), ("grpo", "grpo", 1e-4, 0), ("grpo", "grpo", 1e-4, 2)):
        run = from_base(mode, base, learning_rate=rate)
        command.keep(folder_of(run, tmp_path / f"{row}-{written(rate)}-{base}"), 1.0)
    found = logs.sweeps()
    assert list(found) == ["arithmetic"] and list(found["arithmetic"]) == ["grpo", "rollout"]
    assert [(rate, [r.seed for r in runs]) for rate, runs in found["arithmetic"]["grpo"].items()] == [
        (5e-5, [0, 1]), (1e-4, [0, 1, 2])]
    fitted = logs.study.__wrapped__()["arithmetic"]
    assert {row: [r.seed for r in runs] for row, runs in fitted.items()} == {"grpo": [0, 1], "rollout": [0]}

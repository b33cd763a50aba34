"""What the figures show is what the logs say: the numbers behind them against loops, and every figure from odd logs."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import plots
from plots import Missing, Run

ROOT = Path(__file__).parents[1]
NAN = float("nan")


def a_run(mode: str = "prompt", seed: int = 0, steps: int = 12, bins: int = 5, present: float = 0.6,
          preset: str = "made-up", changes: dict | None = None) -> Run:
    """A run whose log is drawn at random, with the fields and nulls that train.py writes."""
    which = list(plots.MODES).index(mode)  # no two modes are alike
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
            "zero_std_frac": 0.5, "zero_std_rollouts_frac": 0.6, "tokens_generated": 100, "surrogate_abs": [0.0, 0.1],
            "seconds": {"generate": 1.0, "update": 2.0, "total": 3.0},
            "bins": {"share": share.tolist(), "weight": rng.uniform(0.1, 3, bins).tolist(),
                     "reward": by_bin(rng.uniform(-1, 1, bins)), "rollouts": by_bin(rng.integers(2, 9, bins))},
            "signals": {k: {"mean": by_bin(rng.uniform(0.1, 1, bins)), "error": by_bin(rng.uniform(0.1, 1, bins))}
                        for k in ("surrogate", "reward", "variance")}})
    config = {"preset": preset, "mode": mode, "seed": seed, "rollouts_per_prompt": 4, "n_min": 2, "n_max": 8,
              "prompts_per_step": 64, **(changes or {})}
    evaluations = [{"step": s, "mean": 0.3, "passes": {"pass@8": p},
                    "by_kind": {"a": [5, 0.1, p], "b": [5, 0.2, p / 2]}}
                   for s, p in ((steps // 2, 0.6 + seed / 100), (steps, 0.5 + seed / 50 + which / 20))]
    return Run(f"{mode}-{seed}", config, log, evaluations)


def models(**kwargs) -> plots.Models:
    return plots.by_model([a_run(mode, seed, **kwargs) for mode in plots.MODES for seed in range(2)])


# ---------------------------------------------------------------------------------------------- numbers


def test_tail_averages_start_at_the_60th_percentile_and_leave_absent_bins_out():
    x_TB = np.full((11, 3), NAN)
    x_TB[:, 0] = np.arange(11)  # steps 6 to 10 are the tail
    x_TB[8, 1] = 5.0
    assert plots.tail(x_TB)[:2].tolist() == [8.0, 5.0] and np.isnan(plots.tail(x_TB)[2])
    assert plots.tail(np.array([[3.0, NAN]]))[0] == 3.0  # one step is its own tail


def test_mean_bin_mass_and_entropy_equal_loops():
    rng = np.random.default_rng(0)
    x_TB = rng.random((20, 10)) * (rng.random((20, 10)) < 0.5)
    x_TB[:, 4] += 0.1
    for t, row in enumerate(x_TB):
        p = [v / sum(row) for v in row]
        assert plots.mean_bin(x_TB)[t] == pytest.approx(sum(b * v for b, v in enumerate(p)))
        assert plots.mass_from(x_TB, 3)[t] == pytest.approx(sum(p[3:]))
        assert plots.entropy(x_TB)[t] == pytest.approx(-sum(v * math.log(v) for v in p if v))
    assert plots.entropy(np.ones((1, 8)))[0] == pytest.approx(math.log(8))
    assert plots.entropy(np.eye(3))[0] == 0  # one bin


def test_lead_lag_is_negative_when_the_weights_lie_on_harder_bins():
    weight_TB, share_TB = np.array([[3.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), np.array([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    assert plots.lead_lag(weight_TB, share_TB) == pytest.approx([0.25 - 1.5, 1.0])  # (32)


def test_wse_equals_a_loop_and_ignores_absent_bins():
    run = a_run("rollout", bins=6)
    share_TB, n_TB = run.series("bins", "share"), run.series("bins", "rollouts")
    sigma_B = np.random.default_rng(1).random(6)
    for t, line in enumerate(run.log):
        terms = [q * s / math.sqrt(n) for q, s, n in
                 zip(line["bins"]["share"], sigma_B, line["bins"]["rollouts"], strict=True) if n is not None]
        assert plots.wse(share_TB, sigma_B, n_TB)[t] == pytest.approx(sum(terms))  # (33)
    even = plots.wse(share_TB, sigma_B, np.full_like(share_TB, 4.0))
    assert even == pytest.approx(share_TB @ sigma_B / 2)


def test_sigma_is_one_number_a_bin_from_all_steps_and_runs():
    runs = [a_run("rollout", seed) for seed in range(3)]
    for b in range(5):
        seen = [(line["bins"]["share"][b], line["signals"]["variance"]["mean"][b]) for r in runs for line in r.log
                if line["signals"]["variance"]["mean"][b] is not None]
        assert plots.bin_sigma(runs)[b] ** 2 == pytest.approx(sum(q * v for q, v in seen) / sum(q for q, _ in seen))


def test_the_square_root_law_meets_the_budget_and_beats_random_counts():
    rng = np.random.default_rng(2)
    share_TB, sigma_B = rng.dirichlet(np.ones(6), 4), rng.random(6)
    n_TB = plots.square_root_law(share_TB, sigma_B, 4.0)
    assert (share_TB * n_TB).sum(axis=1) == pytest.approx(np.full(4, 4.0))
    for _ in range(200):
        other = rng.random((4, 6)) + 0.05
        other *= 4 / (share_TB * other).sum(axis=1, keepdims=True)
        assert np.all((share_TB * sigma_B**2 / n_TB).sum(axis=1) <= (share_TB * sigma_B**2 / other).sum(axis=1) + 1e-12)


def test_budget_shares_are_the_rollouts_of_a_bin_over_all():
    share_TB, n_TB = np.array([[0.75, 0.25, 0.0]]), np.array([[2.0, 10.0, NAN]])
    assert plots.budget_share(share_TB, n_TB)[0] == pytest.approx([1.5 / 4, 2.5 / 4, 0])


def test_configurations_of_an_exact_budget_are_counted_like_an_enumeration():
    rng, arms = np.random.default_rng(3), np.arange(2, 7)
    for _ in range(30):
        count_B = rng.integers(0, 6, 4)
        total = 4 * int(count_B.sum())
        present = count_B[count_B > 0]
        expected = sum(int(present @ np.array(n)) == total for n in itertools.product(arms, repeat=len(present)))
        assert plots.exact_configurations(count_B, arms, total) == expected
    assert plots.exact_configurations(np.array([45, 19]), np.arange(2, 13), 256) == 1  # the example of the README


def test_signal_to_noise_is_spread_over_error_and_about_one_for_noise():
    mean_B, error_B, share_B = np.array([1.0, -1.0, NAN]), np.array([0.5, 0.5, NAN]), np.array([0.5, 0.5, 0.0])
    assert plots.signal_to_noise(mean_B, error_B, share_B) == pytest.approx(2.0 / math.sqrt(0.5))
    assert np.isnan(plots.signal_to_noise(mean_B, np.array([0.5, NAN, NAN]), share_B))
    rng = np.random.default_rng(4)
    ratios = [plots.signal_to_noise(rng.normal(0, 0.3, 8), np.full(8, 0.3), np.full(8, 1 / 8)) for _ in range(500)]
    assert 0.9 < np.mean(ratios) < 1.05
    ratios = [plots.signal_to_noise(rng.normal(0, 0.3, 2), np.full(2, 0.3), np.full(2, 1 / 2)) for _ in range(4000)]
    assert np.mean(np.square(ratios)) == pytest.approx(1, abs=0.1)  # whatever the number of bins


def test_intervals_are_student_s_and_cover():
    assert plots.interval(np.array([0.4]))[0] == 0.4 and np.isnan(plots.interval(np.array([0.4]))[1])
    x = np.random.default_rng(5).normal(size=8)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert plots.interval(x)[1:] == pytest.approx((expected.low, expected.high))


def test_differences_are_paired_by_seed_whatever_the_order():
    ours, base = [a_run("prompt", s) for s in (3, 1, 2)], [a_run("grpo", s) for s in (0, 1, 2)]
    ours[0].evaluations[-1]["passes"]["pass@8"] = 0.9  # seed 3: GRPO has none
    ours[1].evaluations[-1]["passes"]["pass@8"] += 0.25
    assert plots.paired(ours, base, plots.headline) == pytest.approx([0.30, 0.05])


def test_a_line_of_the_table_says_mean_difference_relative_gain_and_peak():
    rows = {"grpo": [a_run("grpo", s) for s in range(3)], "prompt": [a_run("prompt", s) for s in range(3)]}
    for run in rows["prompt"]:
        run.evaluations[-1]["passes"]["pass@8"] += 0.21
    name, seeds, value, difference, relative, peak, *_ = plots.outcome("prompt", rows["prompt"], rows)
    assert (name, seeds, difference, relative) == ("prompt", "3", "+26.0 [+26.0, +26.0]", "+50.0%")
    assert value.startswith("78.0 [") and peak == "78.0"
    assert plots.outcome("grpo", rows["grpo"], rows)[3:6] == ["", "", "61.0"]


# ---------------------------------------------------------------------------------------------- figures


def values_of(ax) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata(), float) for line in ax.get_lines()]


def test_figure_6_draws_lead_lag_and_wse():
    data = models()
    figure = plots.figure_6(data)
    left, right = figure.axes
    runs = data["made-up"]["prompt"]
    gaps = [plots.lead_lag(r.series("bins", "weight"), r.series("bins", "share")) for r in runs]
    even = [2 - plots.mean_bin(r.series("bins", "share")) for r in runs]  # (B - 1) / 2 = 2
    assert values_of(left)[0] == pytest.approx(np.mean(gaps, axis=0))
    assert values_of(left)[1] == pytest.approx(np.mean(even, axis=0))
    runs = data["made-up"]["rollout"]
    sigma = plots.bin_sigma(runs)
    share, rollouts = ([r.series("bins", key) for r in runs] for key in ("share", "rollouts"))
    drawn = values_of(right)
    assert drawn[0] == pytest.approx(np.mean([q @ sigma / 2 for q in share], axis=0))
    assert drawn[1] == pytest.approx(np.mean([plots.wse(q, sigma, n) for q, n in zip(share, rollouts, strict=True)], 0))
    by_law = [np.sqrt(q @ sigma / 4) * (q @ np.sqrt(sigma)) for q in share]  # (33) at n_b = n_bar sigma_b / q sigma
    assert drawn[2] == pytest.approx(np.mean(by_law, axis=0))
    plots.plt.close("all")


def test_figure_1_draws_tail_averages_and_the_budget():
    data = models(steps=20)
    left, centre, right = plots.figure_1(data).axes
    runs = data["made-up"]["rollout"]
    drawn = [bar.get_height() for bar in right.patches]
    expected = np.nanmean([plots.tail(r.series("bins", "rollouts")) for r in runs], axis=0)
    assert drawn == pytest.approx(expected) and values_of(right)[-1].tolist() == [4, 4]
    weights = [plots.tail(plots.present(r, r.series("bins", "weight"))) for r in data["made-up"]["prompt"]]
    assert [bar.get_y() + bar.get_height() for bar in centre.patches] == pytest.approx(np.nanmean(weights, axis=0))
    heights = [bar.get_height() for bar in left.patches]
    assert heights[:3] == pytest.approx([51, 51, 25.5])  # GRPO: all, a, b; last evaluations of two seeds
    assert heights[3:6] == pytest.approx([56, 56, 28])  # Prompt-GDRO
    plots.plt.close("all")


@pytest.mark.parametrize("name", ["3", "7"])
def test_absent_bins_are_masked_in_heatmaps_and_not_zero(name):
    data = models()
    figure = plots.PAPER_FIGURES[name](data)
    run = data["made-up"]["prompt" if name == "3" else "rollout"][0]
    absent_TB = run.series("bins", "share") == 0
    images = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    assert len(images) == (3 if name == "3" else 2) and absent_TB.any()
    for image in images:
        assert np.array_equal(np.ma.getmaskarray(image), absent_TB.T)
    plots.plt.close("all")


def draw_all(data: plots.Models) -> None:
    """Every figure, rendered; a panel may be empty (no signal to noise with one bin), its figure may not."""
    for function in (*plots.PAPER_FIGURES.values(), *plots.STUDY_FIGURES.values(), overview_of_both):
        figure = function(data)
        figure.canvas.draw()
        assert figure.axes[0].has_data(), function.__name__
        plots.plt.close(figure)


def overview_of_both(data: plots.Models):
    return plots.figure_overview(data["made-up"]["both"][0])


@pytest.mark.parametrize("odd", [{"bins": 1}, {"steps": 1}, {"steps": 2, "present": 0.0}, {"bins": 3, "present": 0.2}])
def test_every_figure_draws_from_odd_logs(odd):
    draw_all(models(**odd))


def test_every_figure_draws_from_seeds_that_stopped_early_and_drew_few_responses_of_one_kind():
    runs = [a_run(mode, seed) for mode in plots.MODES for seed in range(2)]
    for run in runs[::2]:
        del run.log[7:]
    for run in runs:
        for e in run.evaluations:
            e["passes"], e["by_kind"] = {"pass@1": 0.1, "pass@4": 0.4, "pass@16": 0.9}, {"all": [10, 0.1, 0.4]}
    draw_all(plots.by_model(runs))
    assert plots.headline(runs[0].evaluations[0]) == 0.4 and plots.headline_k(runs[0].evaluations[0]) == 4


def test_what_a_figure_lacks_is_named_and_the_others_are_drawn(tmp_path, capsys):
    data = models()
    for runs in data["made-up"].values():
        for run in runs:
            for line in run.log:
                del line["signals"]
    assert not plots.draw({"6": plots.figure_6, "9": plots.figure_9}, data, tmp_path)
    error = capsys.readouterr().err
    assert "figure 6 left out: rollout-0: metrics.jsonl has no 'signals.variance.mean'" in error
    assert (tmp_path / "figure_9.png").exists() and not (tmp_path / "figure_6.png").exists()
    only_grpo = plots.by_model([a_run("grpo")])
    with pytest.raises(Missing, match="no runs of mode rollout, nor of both"):
        plots.figure_7(only_grpo)


def test_runs_of_both_adversaries_stand_in_for_one_that_is_missing_and_the_name_says_so():
    data = plots.by_model([a_run("both", seed) for seed in range(2)])
    found = plots.of_mode(data, "prompt", "rollout")
    assert list(found) == ["made-up, both"] and found["made-up, both"]["prompt"] == data["made-up"]["both"]
    assert list(plots.of_mode(models(), "prompt")) == ["made-up"]
    titles = [ax.get_title(loc="left") for ax in plots.figure_6(data).axes]
    assert titles[0] == "made-up, both: lead-lag (32)"
    plots.plt.close("all")


def test_runs_of_other_settings_are_not_averaged():
    runs = [a_run("prompt", 0), a_run("prompt", 1, changes={"prompt_eta": 2.0})]
    with pytest.raises(ValueError, match="prompt-0 and prompt-1 differ in prompt_eta"):
        plots.by_model(runs)
    with pytest.raises(ValueError, match="two runs of mode prompt have seed 1"):
        plots.by_model([a_run("prompt", s) for s in (0, 1, 1)])
    with pytest.raises(ValueError, match="grpo-0 and prompt-0 differ in loaded"):
        plots.by_model([a_run("grpo", changes={"loaded": "a"}), a_run("prompt", changes={"loaded": "b"})])


def test_allocations_in_the_table_equal_a_loop_over_the_log():
    rows = {"grpo": [a_run("grpo")], "rollout": [a_run("rollout")]}
    run = rows["rollout"][0]
    sigma, ours, even, most = plots.bin_sigma([run]), 0.0, 0.0, []
    for line in run.log:
        bins = line["bins"]
        most.append(max(n for n in bins["rollouts"] if n is not None))
        for q, s, n in zip(bins["share"], sigma, bins["rollouts"], strict=True):
            if n is not None:
                ours, even = ours + q * s**2 / n, even + q * s**2 / 4
    cells = plots.allocation_table("x", rows).splitlines()[-1].strip("| ").split(" | ")
    assert cells[:3] == ["rollout", "1", f"{np.mean(most):.1f}"] and cells[6] == f"{100 * (ours / even - 1):+.1f}%"


def test_signals_in_the_table_equal_a_loop_over_the_log():
    run = a_run("grpo")
    sizes = [abs(x) for line in run.log for x in line["signals"]["reward"]["mean"] if x is not None]
    line = next(x for x in plots.signal_table("x", {"grpo": [run]}).splitlines() if "| reward |" in x)
    assert f"| {np.median(sizes):.1e} |" in line


def folder_of(run: Run, path: Path, cut: str = "") -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(run.config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.log) + cut)
    (path / "eval.json").write_text(json.dumps(run.evaluations))
    return path


def test_a_run_that_is_still_writing_is_read_up_to_its_last_whole_line(tmp_path):
    run = a_run()
    read = Run.load(folder_of(run, tmp_path / "run", cut='{"step": 12, "rew'))
    assert read.log == run.log and read.evaluations == run.evaluations


def test_the_command_draws_given_runs_and_names_what_is_no_run(tmp_path, monkeypatch, capsys):
    folders = [folder_of(a_run(mode, seed), tmp_path / f"{mode}-{seed}") for mode in plots.MODES for seed in range(2)]
    monkeypatch.setattr("sys.argv", ["plots.py", *map(str, folders), "--out", str(tmp_path / "figures")])
    with pytest.raises(SystemExit) as ended:
        plots.main()
    assert not ended.value.code and len(list((tmp_path / "figures").iterdir())) == 2 * len(plots.PAPER_FIGURES)
    monkeypatch.setattr("sys.argv", ["plots.py", "--live", str(tmp_path)])
    with pytest.raises(SystemExit, match="is no run folder: it has no config.json"):
        plots.main()
    monkeypatch.setattr("sys.argv", ["plots.py", "--live"])
    with pytest.raises(SystemExit):
        plots.main()
    assert "--live needs RUN_DIR" in capsys.readouterr().err

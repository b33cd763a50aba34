"""Every figure draws from odd logs, and shows what the logs say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_cost import planted
from test_logs import a_run, folder_of, from_base
from test_tables import sample

import plots
from study import figures, logs


def models(**kwargs) -> plots.Models:
    return plots.by_model([a_run(mode, seed, **kwargs) for mode in plots.MODES for seed in range(2)])


def values_of(ax) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata(), float) for line in ax.get_lines()]


def test_figure_6_draws_lead_lag_and_wse():
    data = models()
    figure = plots.PAPER_FIGURES["6"](data)
    left, right = figure.axes
    runs = data["made-up"]["prompt"]
    gaps = [logs.lead_lag(r.series("bins", "weight"), r.share) for r in runs]
    even = [2 - logs.mean_bin(r.share) for r in runs]  # (B - 1) / 2 = 2
    assert values_of(left)[0] == pytest.approx(np.mean(gaps, axis=0))
    assert values_of(left)[1] == pytest.approx(np.mean(even, axis=0))
    runs = data["made-up"]["rollout"]
    sigma = logs.bin_sigma(runs)
    share, rollouts = ([r.series("bins", key) for r in runs] for key in ("share", "rollouts"))
    drawn = values_of(right)
    assert drawn[0] == pytest.approx(np.mean([q @ sigma / 2 for q in share], axis=0))
    assert drawn[1] == pytest.approx(np.mean([logs.wse(q, sigma, n) for q, n in zip(share, rollouts, strict=True)], 0))
    by_law = [np.sqrt(q @ sigma / 4) * (q @ np.sqrt(sigma)) for q in share]  # (33) at n_b = n_bar sigma_b / q sigma
    assert drawn[2] == pytest.approx(np.mean(by_law, axis=0))
    plots.plt.close("all")


def test_figure_1_draws_tail_averages_and_the_budget():
    data = models(steps=20)
    left, centre, right = plots.figure_1(data).axes
    runs = data["made-up"]["rollout"]
    drawn = [bar.get_height() for bar in right.patches]
    expected = np.nanmean([logs.tail(r.series("bins", "rollouts")) for r in runs], axis=0)
    assert drawn == pytest.approx(expected) and values_of(right)[-1].tolist() == [4, 4]
    weights = [logs.tail(r.bins("weight")) for r in data["made-up"]["prompt"]]
    assert [bar.get_y() + bar.get_height() for bar in centre.patches] == pytest.approx(np.nanmean(weights, axis=0))
    heights = [bar.get_height() for bar in left.patches]
    assert heights[:3] == pytest.approx([51, 51, 25.5])  # GRPO: all, a, b; last evaluations of two seeds
    assert heights[3:6] == pytest.approx([56, 56, 28])  # Prompt-GDRO
    plots.plt.close("all")


def test_the_figure_of_outcomes_compares_a_row_with_that_which_it_is_held_against():
    rows = {row: [from_base(mode, s) for s in range(2)] for row, mode in
            (("grpo", "grpo"), ("rollout", "rollout"), ("rollout-maxrl", "both"), ("maxrl", "grpo"))}
    rows["maxrl"][0].evaluations[-1]["passes"]["pass@8"] = 0.58
    (ax,) = figures.figure_outcomes({"made-up": rows}).axes
    ticks = dict(zip((label.get_text() for label in ax.get_yticklabels()), ax.get_yticks(), strict=True))
    bases = {line.get_ydata()[0]: line.get_xdata()[0] for line in ax.get_lines() if line.get_marker() == "|"}
    assert bases[ticks["rollout - grpo"]] == pytest.approx(60 - 50)
    assert bases[ticks["rollout-maxrl - maxrl"]] == pytest.approx(65 - 58)
    plots.plt.close("all")


def test_the_figure_of_rates_draws_the_mean_over_bases_at_every_rate():
    sweep = {rate: [a_run("grpo", s) for s in range(2)] for rate in (1e-4, 4e-4)}
    sweep[4e-4][0].evaluations[-1]["passes"]["pass@8"] = 0.7
    (ax,) = figures.figure_rates({"made-up": {"grpo": sweep, "base": {1e-4: [a_run("grpo")]}}}).axes
    (line,) = ax.get_lines()
    assert line.get_xdata() == pytest.approx([1e-4, 4e-4]) and line.get_ydata() == pytest.approx([51, 61])
    plots.plt.close("all")


def test_the_figure_of_the_way_draws_a_base_s_seeds_in_the_mean_and_where_grpo_ends():
    curves = {"grpo-way": [20, 40, 70], "maxrl-way": [20, 60, 80], "moved-way": [20, 70, 80],
              "weights-way": [20, 65, 80]}
    rows = {row: {1e-4: [planted(curve, base) for base in range(16, 24)]} for row, curve in curves.items()}
    rows["grpo-way"][1e-4] += [planted([20, 50, 74], base, seed=100) for base in range(16, 24)]
    (ax,) = figures.figure_way({"made-up": rows}).axes
    grpo, maxrl, _, _, end = ax.get_lines()
    assert grpo.get_xdata() == pytest.approx([0, 6.4, 12.8]) and grpo.get_ydata() == pytest.approx([20, 45, 72])
    assert maxrl.get_ydata() == pytest.approx([20, 60, 80]) and list(end.get_ydata()) == pytest.approx([72, 72])
    assert ax.get_legend_handles_labels()[1][0] == "GRPO, 16 x 16"
    rows["maxrl-way"][1e-4].pop()
    with pytest.raises(logs.Missing, match="maxrl-way"):
        figures.figure_way({"made-up": rows})
    plots.plt.close("all")


def test_own_data_own_models_and_rules_have_rows_and_titles_of_their_own_whatever_the_preset():
    own = {"model": "some/tiny-0.1B", "train_data": "data/mine.jsonl"}
    data = plots.by_model([a_run(mode, preset="arithmetic", changes={**own, **rule})
                           for mode in ("prompt", "rollout") for rule in ({}, {"rule": "maxrl"})] +
                          [a_run("both", preset="arithmetic", changes={"model": "arithmetic:0",
                                                                       "train_data": "arithmetic"})])
    assert {name: list(modes) for name, modes in data.items()} == {
        "tiny-0.1B on mine": ["prompt", "rollout"], "tiny-0.1B on mine, maxrl": ["prompt", "rollout"],
        "arithmetic": ["both"]}
    titles = [ax.get_title(loc="left") for ax in plots.PAPER_FIGURES["6"](data).axes[::2]]
    assert titles == [f"{name}\nlead-lag (32)" for name in (*list(data)[:2], "arithmetic, both")]
    plots.plt.close("all")


@pytest.mark.parametrize("name", ["3", "7"])
def test_absent_bins_are_masked_in_heatmaps_and_not_zero(name):
    data = models()
    figure = plots.PAPER_FIGURES[name](data)
    run = data["made-up"]["prompt" if name == "3" else "rollout"][0]
    absent_TB = run.share == 0
    images = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    assert len(images) == (3 if name == "3" else 2) and absent_TB.any()
    for image in images:
        assert np.array_equal(np.ma.getmaskarray(image), absent_TB.T)
    plots.plt.close("all")


def panel(figure, title: str):
    return next(ax for ax in figure.axes if ax.get_title(loc="left") == title)


@pytest.mark.parametrize("mode, changes, by_bin", [
    ("grpo", {}, ["share"]), ("prompt", {}, ["share", "reward", "weight", "tokens"]),
    ("rollout", {}, ["share", "reward", "rollouts", "tokens"]), ("both", {}, ["share", "reward", "weight", "rollouts"]),
    ("rollout", {"allocation": "weights"}, ["share", "reward", "weight", "tokens"])])
def test_the_overview_shows_what_one_looks_at_first_and_adversaries_where_they_act(mode, changes, by_bin):
    run = a_run(mode, changes=changes)
    run.evaluations[-1]["intervals"] = {"pass@8": [0.4, 0.7]}
    for line in run.log:
        line["truncated_frac"], line["bins"]["tokens"] = 0.125, line["bins"]["rollouts"]
    figure = plots.figure_overview(run)
    assert not any(ax.texts for ax in figure.axes)  # nothing is missing
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    held_out = "held-out pass@8, % (bars: 95%)"
    assert titles == [title if title != "held-out pass@k" else held_out for title in plots.CURVES] + [
        f"{key} by bin (0 = hardest)" for key in by_bin]
    assert figure.get_suptitle() == f"{run.name}: made-up, mode {mode}, seed 0"
    assert values_of(panel(figure, "mean reward"))[0] == pytest.approx(run.series("reward_mean"))
    assert values_of(panel(figure, "groups without advantage, %"))[0].tolist() == [25] * 12
    assert values_of(panel(figure, "response tokens (dotted: cut, %)"))[0].tolist() == list(range(9, 21))
    assert values_of(next(ax for ax in figure.axes if ax.get_ylim()[1] == 110))[0].tolist() == [12.5] * 12
    assert values_of(panel(figure, held_out))[0] == pytest.approx([100 * logs.headline(e) for e in run.evaluations])
    (bars,) = panel(figure, held_out).collections
    assert bars.get_segments()[-1] == pytest.approx(np.array([[12, 40], [12, 70]]))
    assert [text.get_text() for text in panel(figure, "seconds a step").get_legend().get_texts()] == list(plots.PHASES)
    generate, *_, other = panel(figure, "seconds a step").collections
    assert [x.get_paths()[0].get_extents().y1 for x in (generate, other)] == [1.0, 3.0]
    plots.plt.close("all")


def integer_ticks(ax) -> bool:
    return all(tick == round(tick) for tick in ax.get_xticks())


def test_the_overview_says_what_a_log_lacks_and_draws_the_rest():
    old, begun = a_run("both", steps=3), a_run("grpo", steps=1)
    for line in old.log:
        del line["zero_std_frac"], line["seconds"]["logprob"]
    del begun.log[:], begun.evaluations[1:]
    figure = plots.figure_overview(old)
    said = {title: " ".join(panel(figure, title).texts[0].get_text().split()) for title in
            ("groups without advantage, %", "seconds a step")}
    assert list(said.values()) == [f"both-0: metrics.jsonl has no {key} in some lines" for key in
                                   ("zero_std_frac", "seconds/logprob")]
    assert panel(figure, "entropy, nats").get_lines() and integer_ticks(figure.axes[0])
    figure = plots.figure_overview(begun)
    assert len(panel(figure, "held-out pass@8, %").get_lines()) == 1 and integer_ticks(figure.axes[0])
    assert "has no step yet" in panel(figure, "mean reward").texts[0].get_text()
    begun.evaluations.clear()
    assert panel(plots.figure_overview(begun), "held-out pass@k").texts[0].get_text() == "no evaluation yet"
    plots.plt.close("all")


def test_maps_have_three_ticks_or_more_and_steps_are_integers_however_short_and_even_a_run_is():
    run = a_run("both", steps=3)
    for line in run.log:
        line["bins"]["weight"] = [1.0] * 5
    data = plots.by_model([run])
    figure = plots.PAPER_FIGURES["3"](data)
    weights = next(ax.images[0].colorbar for ax in figure.axes if ax.get_title(loc="left") == "adversary weight")
    assert weights.get_ticks().tolist() == [0.5, 1, 2]
    assert all(integer_ticks(ax) for ax in (*figure.axes[:3], *plots.PAPER_FIGURES["4"](data).axes))
    assert [ax.get_visible() for ax in plots.PAPER_FIGURES["5"](data).axes] == [True] * 3 + [False]
    run.log[0]["bins"]["weight"] = [2.0**-12] * 5
    weights = plots.PAPER_FIGURES["3"](data).axes[1].images[0].colorbar
    assert len(weights.get_ticks()) == 9 and 1 in weights.get_ticks()
    plots.plt.close("all")


def test_the_legend_has_no_entry_for_a_line_without_a_value():
    ax, run = plots.plt.figure().subplots(), a_run("rollout")
    for label, value in (("known", 1.0), ("unknown", np.nan)):
        plots.band(ax, [run], [np.full(12, value)], "black", label)
    assert ax.get_legend_handles_labels()[1] == ["known"]
    plots.plt.close("all")


def test_the_overview_shows_the_mean_reward_of_a_bin_as_logged_whatever_values_rewards_have():
    run = a_run("both")
    by_bin = panel(plots.figure_overview(run), "reward by bin (0 = hardest)")
    expected = np.ma.masked_invalid(run.series("bins", "reward").T)
    assert np.ma.allequal(by_bin.images[0].get_array(), expected) and by_bin.images[0].get_clim() == (-1, 1)
    plots.plt.close("all")


@pytest.mark.parametrize("odd", [{"bins": 1}, {"steps": 1}, {"steps": 2, "present": 0.0}, {"bins": 3, "present": 0.2},
                                 "few"])
def test_every_figure_draws_from_odd_logs_and_from_seeds_that_stopped_early_and_drew_few_responses_of_one_kind(odd):
    runs = [a_run(mode, seed, **(odd if odd != "few" else {})) for mode in plots.MODES for seed in range(2)]
    for i, run in enumerate(runs if odd == "few" else []):
        del run.log[12 - 5 * (i % 2):]
        for e in run.evaluations:
            e["passes"], e["rollouts"], e["by_kind"] = {"pass@1": 0.1, "pass@4": 0.4}, 4, {"all": [10, 0.1, 0.4]}
    for function in (*plots.PAPER_FIGURES.values(), lambda models: plots.figure_overview(models["made-up"]["both"][0])):
        figure = function(plots.by_model(runs))
        figure.set_layout_engine("none" if odd != "few" else "constrained")  # none is twice as fast
        figure.canvas.draw()
        assert figure.axes[0].has_data()
        plots.plt.close(figure)


def test_what_a_figure_lacks_is_named_and_the_others_are_drawn(tmp_path, capsys):
    some = {name: plots.PAPER_FIGURES[name] for name in ("5", "6", "9")}
    plots.draw(some, plots.by_model([a_run("rollout")]), tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        "figure 5 left out: there are no runs of mode prompt, nor of both",
        "figure 6 left out: there are no runs of mode prompt and rollout, nor of both"]
    assert [file.name for file in tmp_path.glob("*.png")] == ["figure_9.png"]


def test_runs_of_other_settings_are_not_averaged():
    runs = [a_run("prompt", 0), a_run("prompt", 1, changes={"prompt_eta": 2.0})]
    with pytest.raises(ValueError, match="prompt-0 and prompt-1 differ in prompt_eta"):
        plots.by_model(runs)
    resumed = {"resumed": [{"step": 3, "changed": {"learning_rate": 1.0}}]}
    with pytest.raises(ValueError, match="prompt-0 and prompt-1 differ in learning_rate"):
        plots.by_model([a_run("prompt", 0, changes=resumed), a_run("prompt", 1)])


def test_figure_1_puts_no_evaluations_of_other_numbers_side_by_side_and_says_after_which_steps_they_are():
    runs = [a_run("grpo"), a_run("both")]
    runs[0].evaluations[-1]["step"] = 3
    last = runs[1].last()["step"]
    assert f", step 3-{last}\n" in plots.figure_1(plots.by_model(runs)).axes[0].get_title(loc="left")
    runs[1].evaluations[-1]["problems"] += 1
    with pytest.raises(plots.Missing, match="were evaluated on other problems"):
        plots.figure_1(plots.by_model(runs))
    plots.plt.close("all")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(arguments) -> the exit code or message of plots.py; FIGURES is a scratch folder."""
    monkeypatch.setattr(plots, "FIGURES", tmp_path / "figures")

    def run(*arguments) -> object:
        monkeypatch.setattr("sys.argv", ["plots.py", *map(str, arguments)])
        try:
            return plots.main()
        except SystemExit as ended:
            return ended.code

    return run


def test_the_command_draws_given_runs_into_a_folder_of_their_own(tmp_path, monkeypatch, command):
    folders = [folder_of(a_run(mode, seed), tmp_path / f"{mode}-{seed}") for mode in plots.MODES for seed in range(2)]
    some = {name: plots.PAPER_FIGURES[name] for name in ("6", "7")}
    monkeypatch.setattr(plots, "PAPER_FIGURES", some)
    files = {f"figure_{name}.{suffix}" for name in some for suffix in ("png", "pdf")}
    assert not command(*folders) and not command(*folders, "--out", tmp_path / "elsewhere")
    assert not command("--live", *folders[:2])
    drawn = {str(file.relative_to(tmp_path)) for name in ("figures", "elsewhere") for file in
             (tmp_path / name).rglob("*.*")}
    all_of_them, two = plots.label(folders), plots.label(folders[:2])
    assert all_of_them.startswith("grpo-0+7-") and two.startswith("grpo-0+1-")
    assert drawn == {f"{folder}/{file}" for folder in (f"figures/{all_of_them}", "elsewhere") for file in files} | {
        f"figures/{two}/overview_{plots.label([run])}.{suffix}" for run in folders[:2] for suffix in ("png", "pdf")}


def test_runs_of_one_name_have_figures_of_their_own():
    runs = [Path(folder) for folder in ("one/run", "two/run", "three/run")]
    of = [runs[:1], runs[1:2], runs[:2], [runs[0], runs[2]], runs]
    assert len(set(map(plots.label, of))) == len(of)
    assert re.fullmatch("run-[0-9a-f]{6}", plots.label(of[0]))
    assert re.fullmatch(r"run\+2-[0-9a-f]{6}", plots.label(runs))


def test_a_figure_that_is_no_longer_drawn_goes_but_none_of_others(tmp_path, capsys):
    def draw(mode: str) -> None:
        plots.draw({"5": plots.PAPER_FIGURES["5"]}, plots.by_model([a_run(mode)]), tmp_path)

    draw("both")
    assert {path.name for path in tmp_path.iterdir()} == {"figure_5.png", "figure_5.pdf"}
    with pytest.raises(ValueError, match="nothing could be drawn of these runs; --live"):
        draw("rollout")
    assert not list(tmp_path.iterdir())
    (tmp_path / "figure_5.png").write_bytes(b"somebody's own")
    with pytest.raises(ValueError, match="nothing could be drawn"):
        draw("rollout")
    assert [path.name for path in tmp_path.iterdir()] == ["figure_5.png"]


def test_the_command_prints_tables_and_samples_of_runs_and_names_what_they_lack(tmp_path, command, capsys):
    folders = [folder_of(a_run(mode), tmp_path / mode) for mode in ("grpo", "rollout")]
    assert not command("--table", *folders)
    printed = capsys.readouterr().out
    assert "| grpo | made-up | grpo |" in printed and "| rollout | made-up | rollout |" in printed
    assert "rollout: samples.jsonl is missing or empty" in command("--samples", folders[1])
    (folders[0] / "samples.jsonl").write_text(json.dumps(sample()) + "\n")
    assert not command("--samples", folders[0]) and "prompt    3+4=" in capsys.readouterr().out
    assert "is no run folder: it has no config.json" in command("--live", tmp_path)
    (folders[1] / "best").mkdir()
    (folders[1] / "best" / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    assert "best is no run folder" in command("--live", folders[1] / "best")
    with open(folders[1] / "metrics.jsonl", "a") as file:
        file.write("\0\0\n")
    assert "metrics.jsonl, line 13 is no JSON object" in command("--live", folders[1])
    for flag in ("live", "samples"):
        assert command(f"--{flag}") == 2 and f"--{flag} needs RUN" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()

"""The paper's analysis checked by numbers: what holds, with its constants, and what does not of the method as run."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar

from gdro import PromptGDRO, RolloutGDRO
from study.logs import square_root_law

B, ETA = 10, 0.65  # bins and eta_q of the paper


def entropic_risk(loss_B: np.ndarray, eta: float) -> float:
    """R_eta of (23)."""
    return math.log(np.exp(eta * loss_B).sum()) / eta


def adversary_of(loss_B, **settings) -> PromptGDRO:
    """The project's own, without mixing and clip, its scores these losses."""
    adversary = PromptGDRO(len(loss_B), **settings)
    adversary.GAMMA, adversary.SCORE_CLIP = 0.0, np.inf
    adversary.load_state_dict({"score": np.asarray(loss_B, float)})
    return adversary


def softmax(loss_B: np.ndarray, eta: float) -> np.ndarray:
    """q of (14)-(15)."""
    return adversary_of(loss_B, eta=eta).q_B


def ema_play():
    """The adversary as the paper runs it, with its EMA and mixing: play(losses so far) -> q."""
    adversary = PromptGDRO(B, share_normalize=False)

    def play(seen: np.ndarray) -> np.ndarray:
        if len(seen):
            adversary.update(np.arange(B), seen[-1])
        return adversary.q_B

    return play


# ---------------------------------------------------------------------------------------------- Lemma 4.1, (22)-(26)


@pytest.mark.parametrize("eta", [0.1, ETA, 2.0, 20.0])
def test_q_maximises_mean_loss_plus_entropy_up_to_a_risk_between_the_worst_bin_and_log_B_over_eta_above_it(eta):
    rng = np.random.default_rng(0)

    def objective(q, loss_B):  # sum q L + H(q) / eta, (22)
        return q @ loss_B - np.sum(q * np.log(np.maximum(q, 1e-300)), axis=-1) / eta

    for _ in range(50):
        loss_B = rng.normal(0, 2, B)
        q_B, risk = softmax(loss_B, eta), entropic_risk(loss_B, eta)
        assert objective(q_B, loss_B) == pytest.approx(risk)
        near = np.abs(q_B * (1 + 1e-3 * rng.normal(size=(100, B))))
        for others in (rng.dirichlet(np.full(B, 0.5), 100), near / near.sum(axis=1, keepdims=True)):
            assert np.all(objective(others, loss_B) <= risk + 1e-12)
        assert -1e-12 <= risk - loss_B.max() <= math.log(B) / eta
    equal, apart = np.ones(B), np.array([1.0] + [-1e3] * (B - 1))
    assert entropic_risk(equal, eta) == pytest.approx(1 + math.log(B) / eta)  # either bound is attained
    assert entropic_risk(apart, eta) == pytest.approx(1)


@pytest.mark.parametrize("eta", [ETA, 2.0])
def test_its_gradient_is_the_softmax_weighted_gradient_of_the_bins(eta):
    """(26), on bin losses that are functions of a parameter vector: central differences against sum_b q_b grad L_b."""
    rng = np.random.default_rng(1)
    centre, scale, theta = rng.normal(size=(B, 3)), rng.uniform(0.2, 2, B), rng.normal(size=3)

    def losses(x):
        return scale * ((x - centre) ** 2).sum(axis=1)

    gradient = softmax(losses(theta), eta) @ (2 * scale[:, None] * (theta - centre))
    for i, step in enumerate(1e-5 * np.eye(3)):
        numeric = (entropic_risk(losses(theta + step), eta) - entropic_risk(losses(theta - step), eta)) / 2e-5
        assert numeric == pytest.approx(gradient[i], rel=1e-6)


# ---------------------------------------------------------------------------------------------- regret


def sequence(kind: str, T: int, play) -> float:
    """Regret against the best fixed bin of an adversary `play(losses so far) -> q` on a loss sequence in [0, 1]."""
    rng, seen, gained = np.random.default_rng(2), np.zeros((0, B)), 0.0
    for t in range(T):
        q_B = play(seen)
        loss_B = {
            "constant": lambda: np.eye(B)[0],
            "random": lambda: (rng.random(B) < 0.5).astype(float),
            "drifting": lambda t=t: np.eye(B)[t * B // T],
            "spiteful": lambda q_B=q_B: np.where(q_B == q_B.min(), 1.0, 0.0),  # pays where the adversary is not
            "alternating": lambda t=t: np.arange(B) % 2 == t % 2,
        }[kind]().astype(float)
        gained += q_B @ loss_B
        seen = np.vstack([seen, loss_B])
    return float(seen.sum(axis=0).max() - gained)


SEQUENCES = ("constant", "random", "drifting", "spiteful", "alternating")


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("T", [50, 400])
def test_exponential_weights_of_summed_losses_have_regret_below_sqrt_T_log_B(kind, T):
    """The analysed algorithm: eta = sqrt(8 log(B) / T) and the sum of all losses give at most sqrt(T log(B) / 2)."""
    eta = math.sqrt(8 * math.log(B) / T)
    assert sequence(kind, T, lambda seen: softmax(seen.sum(axis=0), eta)) <= math.sqrt(T * math.log(B) / 2) + 1e-9


def test_exponential_weights_of_an_ema_as_the_paper_runs_them_have_linear_regret():
    """(12) averages losses instead of summing them: a bin that is worse by 1 for ever gets odds of exp(eta) only."""
    regret = {T: sequence("constant", T, ema_play()) for T in (100, 400)}
    per_step = 1 - 0.99 * math.exp(ETA) / (math.exp(ETA) + B - 1) - 0.01 / B
    assert per_step == pytest.approx(0.825, abs=5e-4)  # the figure in docs/disagreements.md
    assert (regret[400] - regret[100]) / 300 == pytest.approx(per_step, abs=1e-6)
    assert regret[400] > 10 * math.sqrt(400 * math.log(B) / 2)


# ---------------------------------------------------------------------------------------------- (27), a convex game


def game(T: int, adversary) -> tuple[float, float, float]:
    """min over theta in [-1, 1] of max_b (theta - c_b)^2: projected gradient steps against `adversary(losses so far)`.

    Returns the duality gap of the averaged iterates and the regrets of learner and adversary.
    """
    centre = np.linspace(-1, 0.4, B)
    theta, thetas, qs, losses = 1.0, [], [], np.zeros((0, B))
    for t in range(T):
        q_B = adversary(losses)
        thetas.append(theta)
        qs.append(q_B)
        losses = np.vstack([losses, (theta - centre) ** 2])
        theta = float(np.clip(theta - q_B @ (theta - centre) * 2 / (4 * math.sqrt(t + 1)), -1, 1))

    def value(x: float, q_B: np.ndarray) -> float:
        return float(q_B @ (x - centre) ** 2)

    def least(q_B: np.ndarray) -> float:  # min over theta, by numerical optimisation
        return float(minimize_scalar(lambda x: value(x, q_B), bounds=(-1, 1), method="bounded").fun)

    q_bar = np.mean(qs, axis=0)
    played = sum(value(x, q) for x, q in zip(thetas, qs, strict=True))
    gap = ((np.mean(thetas) - centre) ** 2).max() - least(q_bar)
    return gap, played - T * least(q_bar), losses.sum(axis=0).max() - played


@pytest.mark.parametrize("T", [50, 1000])
def test_the_duality_gap_of_averaged_iterates_is_at_most_the_mean_regret_of_both(T):
    eta = math.sqrt(8 * math.log(B) / T) / 4  # losses are in [0, 4]
    gap, learner, adversary = game(T, lambda seen: softmax(seen.sum(axis=0), eta))
    assert -1e-9 <= gap <= (learner + adversary) / T + 1e-6  # (27)
    assert T < 1000 or gap < 0.05  # so both players together come near the saddle point


def test_an_ema_adversary_does_not_reach_the_saddle_point():
    gap, learner, adversary = game(1000, ema_play())
    assert 0.1 < gap <= (learner + adversary) / 1000 + 1e-6  # (27) holds, with a regret that does not vanish


# ---------------------------------------------------------------------------------------------- (28)-(31), rollouts


@pytest.mark.parametrize("seed", range(5))
def test_the_dp_comes_as_near_the_square_root_law_as_its_arms_are_fine_and_so_does_its_price(seed):
    """The law, (30), is the numerical optimum and the best response (31) to its shadow price. Arms of 1/m rollout are
    n_bar 4 m, from 1 to 12 m, with an exact budget, one count a bin."""
    rng = np.random.default_rng(seed)
    v_B, count_B = rng.uniform(0.05, 1, 5), 1 + rng.multinomial(59, np.full(5, 0.2))
    bin_P, share_B, excess = np.repeat(np.arange(5), count_B), count_B / 64, []
    law = square_root_law(share_B[None], np.sqrt(v_B), 4)[0]
    found = minimize(lambda n: share_B @ (v_B / n), np.full(5, 4.0), bounds=[(0.1, 64)] * 5, method="SLSQP",
                     constraints={"type": "eq", "fun": lambda n: share_B @ n - 4}, options={"ftol": 1e-14})
    assert found.success and found.x == pytest.approx(law, rel=1e-3)
    assert share_B @ (v_B / law) <= found.fun + 1e-12
    price = (share_B @ np.sqrt(v_B) / 4) ** 2  # the multiplier of the budget
    assert np.sqrt(v_B / price) == pytest.approx(law)  # (31)
    for m in (1, 2, 4, 16):
        compute = RolloutGDRO(5, n_min=1, n_max=12 * m, n_bar=4 * m, utility="variance")
        compute.load_state_dict({"score": -v_B[:, None] / compute.arms_K, "mu": np.array(0.0), "step": np.array(1)})
        n_P = compute.allocate(bin_P)
        assert n_P.sum() == 64 * 4 * m
        excess.append(np.mean(v_B[bin_P] / n_P) * m / (share_B @ (v_B / law)) - 1)
    assert all(x > -1e-12 for x in excess) and excess[-1] < 2e-3
    assert excess[-1] <= excess[1] <= excess[0] < 0.2
    assert np.sqrt(v_B / (compute.shadow_price_dp / ETA)) == pytest.approx(16 * law, rel=0.05)

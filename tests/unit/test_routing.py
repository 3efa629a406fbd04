"""The choice of a worker: what costs what, the policies, sessions, and draws that can be repeated."""

from collections import Counter

from pipeline.config import RoutingSettings
from pipeline.prefix_index import Overlap, RankId
from pipeline.routing import Candidate, RankLoad, Router

PROMPT_TOKENS = 1000
IDLE = tuple(Candidate(RankId(f"w{number}")) for number in range(4))


def candidate(worker: str, *, load: RankLoad | None = None, **overlap: int) -> Candidate:
    return Candidate(RankId(worker), Overlap(**overlap), load or RankLoad())


def order(candidates: list[Candidate], session: str | None = None, **settings: object) -> list[str]:
    ranking = Router(RoutingSettings(seed=1, **settings)).rank(PROMPT_TOKENS, candidates, session)
    return [score.rank.worker for score in ranking.scores]


def test_the_longest_cached_prefix_wins():
    assert order([candidate("a"), candidate("b", gpu_tokens=200), candidate("c", gpu_tokens=900)]) == ["c", "b", "a"]


def test_lower_tiers_count_less():
    candidates = [
        candidate("computes"),
        candidate("disk", disk_tokens=800),
        candidate("host", host_tokens=800),
        candidate("gpu", gpu_tokens=800),
    ]
    assert order(candidates) == ["gpu", "host", "disk", "computes"]
    assert order(candidates, disk_share=0.1, host_share=0.3) == ["gpu", "disk", "host", "computes"]


def test_load_outweighs_a_cache_at_its_price():
    queued = candidate("queued", load=RankLoad(queued_tokens=600), gpu_tokens=500)
    assert order([queued, candidate("idle")]) == ["idle", "queued"]
    assert order([queued, candidate("idle")], load_weight=0.5) == ["queued", "idle"]
    running = candidate("running", load=RankLoad(running=9), gpu_tokens=500)
    assert order([running, candidate("idle")], running_tokens=50) == ["running", "idle"]
    assert order([running, candidate("idle")], running_tokens=60) == ["idle", "running"]


def test_a_waiting_request_counts_as_long_as_this_one():
    waiting = candidate("waiting", load=RankLoad(waiting=1), gpu_tokens=999)
    assert order([waiting, candidate("idle")]) == ["idle", "waiting"]


def test_a_nearly_full_pool_costs_more():
    full = candidate("full", load=RankLoad(kv_share=0.95), gpu_tokens=500)
    fair = candidate("fair", load=RankLoad(kv_share=0.79))
    assert order([full, fair]) == ["fair", "full"]
    assert order([full, fair], kv_full_from=0.95) == ["full", "fair"]
    assert order([full, fair], kv_full_from=1.0) == ["full", "fair"]


def test_least_loaded_does_not_look_at_caches():
    candidates = [candidate("cached", load=RankLoad(running=1), gpu_tokens=999), candidate("idle")]
    assert order(candidates, policy="least_loaded") == ["idle", "cached"]


def test_round_robin_gives_everyone_a_turn():
    router = Router(RoutingSettings(policy="round_robin"))
    firsts = [router.rank(PROMPT_TOKENS, IDLE).best.rank.worker for _ in range(8)]
    assert sorted(firsts[:4]) == ["w0", "w1", "w2", "w3"]
    assert firsts[:4] == firsts[4:]


def test_random_and_equal_costs_spread():
    for policy in ("random", "kv"):
        router = Router(RoutingSettings(policy=policy, seed=5))
        counts = Counter(router.rank(PROMPT_TOKENS, IDLE).best.rank.worker for _ in range(400))
        assert len(counts) == 4 and min(counts.values()) > 60, policy


def test_a_seed_repeats_the_draws():
    def firsts(seed: int) -> list[str]:
        router = Router(RoutingSettings(policy="random", seed=seed))
        return [router.rank(PROMPT_TOKENS, IDLE).best.rank.worker for _ in range(20)]

    assert firsts(1) == firsts(1) != firsts(2)


def test_temperature_gives_the_second_best_a_chance_by_its_cost():
    candidates = [candidate("cached", gpu_tokens=900), candidate("half", gpu_tokens=800), candidate("cold")]
    router = Router(RoutingSettings(temperature=0.1, seed=1))
    counts = Counter(router.rank(PROMPT_TOKENS, candidates).best.rank.worker for _ in range(1000))
    assert 670 < counts["cached"] < 790  # 1 / (1 + 1/e + 1/e**9) = 0.73
    assert counts["cold"] < 5


def test_a_session_stays_until_its_worker_is_hot():
    sessions = [f"session-{number}" for number in range(60)]
    homes = {session: order(list(IDLE), session)[0] for session in sessions}
    assert len(set(homes.values())) == 4
    assert homes == {session: order(list(reversed(IDLE)), session)[0] for session in sessions}

    fewer = {session: order(list(IDLE[:3]), session)[0] for session in sessions}
    assert all(fewer[session] == home for session, home in homes.items() if home != "w3")

    hot = [*IDLE[:3], candidate("w3", load=RankLoad(queued_tokens=251))]
    assert all(order(hot, session)[0] != "w3" for session in sessions)
    warm = [*IDLE[:3], candidate("w3", load=RankLoad(queued_tokens=250))]
    assert {session: order(warm, session)[0] for session in sessions} == homes


def test_nobody_there():
    ranking = Router(RoutingSettings(temperature=1.0)).rank(PROMPT_TOKENS, [], "session")
    assert ranking.best is None and ranking.scores == ()


def test_a_score_says_why():
    load = RankLoad(running=3, queued_tokens=40, kv_share=0.5)
    ranking = Router(RoutingSettings()).rank(
        PROMPT_TOKENS, [candidate("a", load=load, gpu_tokens=700, host_tokens=100)]
    )
    assert ranking.best.why == (
        "700 cached, 100 in host memory: 220 to compute; 3 running, 40 tokens queued, KV pool 50% in use: load 232"
    )
    assert Router(RoutingSettings()).rank(10, IDLE).best.why == "nothing cached: 10 to compute; idle: load 0"

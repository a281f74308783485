"""What routing promises, whatever the text, the company and the number of threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge import (
    STRATEGIES,
    Agent,
    AgentError,
    BackendError,
    Bundle,
    BundleError,
    Encoder,
    InputError,
    OutputError,
    ProviderUnavailable,
    Router,
)
from edge.bundle import Calibration
from edge.providers import Candidate
from edge.session import OnnxBackend, check_unit_rows

TASKS = st.text(max_size=80) | st.sampled_from(
    [
        "Fix the null pointer in the login handler",
        "write tests",
        "Explain in the README how the parser works, then open a pull request",
        "",
        "\ud800 lone surrogate \udfff",
        "nul \0 byte",
        "مرحبا بالعالم",
        "🔥" * 40,
        "word " * 400,
    ]
)
SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW
@given(tasks=st.lists(TASKS, max_size=6), data=st.data())
def test_route_many_decides_as_route_does(router: Router, tasks: list[str], data: st.DataObject) -> None:
    alone = {task: router.route(task) for task in tasks}
    assert router.route_many(tasks) == [alone[task] for task in tasks]
    shuffled = data.draw(st.permutations(tasks))
    assert router.route_many(shuffled) == [alone[task] for task in shuffled]


@SLOW
@given(texts=st.lists(TASKS, max_size=5))
def test_vectors_are_finite_unit_rows_and_do_not_depend_on_company(router: Router, texts: list[str]) -> None:
    encoder = router.encoder
    assert encoder is not None
    vectors = encoder.encode(texts)
    assert vectors.shape == (len(texts), encoder.dim)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_array_equal(encoder.encode([text])[0], vector)


@SLOW
@given(task=TASKS, strategy=st.sampled_from(STRATEGIES[:4]))
def test_a_decision_is_consistent(router: Router, task: str, strategy: str) -> None:
    decision = router.decide(router.signals(task), strategy)
    names = {agent.name for agent in router.agents}
    assert {ranked.id for ranked in decision.ranking} == names
    assert len(decision.ranking) == len(names)
    scores = [ranked.score for ranked in decision.ranking]
    assert scores == sorted(scores, reverse=True)
    assert 0 <= sum(scores) <= 1 + 1e-9
    assert 0 <= decision.confidence <= 1
    assert 0 <= decision.margin <= 1
    assert decision.agent in {decision.ranking[0].id, None}
    assert (decision.agent is None) == (decision.method == "abstain")
    if strategy == "keyword":
        assert all(ranked.cosine is None for ranked in decision.ranking)
    else:
        assert all(-1.0001 <= (ranked.cosine or 0) <= 1.0001 for ranked in decision.ranking)


@SLOW
@given(task=TASKS)
def test_keyword_needs_no_encoder_and_decides_the_same(router: Router, bundle: Bundle, task: str) -> None:
    light = Router.load(bundle, strategy="keyword")
    assert light.encoder is None
    with_encoder = router.decide(router.signals(task), "keyword")
    alone = light.route(task)
    assert (alone.agent, alone.ranking, alone.matched) == (
        with_encoder.agent,
        with_encoder.ranking,
        with_encoder.matched,
    )


@pytest.mark.parametrize("padding", [0, 1, 7, 40])
def test_padding_changes_nothing_where_the_graph_allows_it(bundle: Bundle, padding: int) -> None:
    """The runtime never pads. A padded run of the int8 graph still stays near, as parity measured."""
    variant = bundle.variant()
    backend = OnnxBackend(bundle, variant, Candidate(variant.id))
    for golden in bundle.goldens()[:8]:
        ids = np.array([[*golden.ids, *[0] * padding]], dtype=np.int64)
        mask = np.array([[1] * len(golden.ids) + [0] * padding], dtype=np.int64)
        vector = backend.run(ids, mask)[0]
        assert float(vector @ golden.vector) >= 0.96


def test_eight_threads_agree_with_one(router: Router) -> None:
    tasks = [
        f"{verb} the {thing}" for verb in ("fix", "test", "document") for thing in ("cache", "login", "parser")
    ] * 4
    expected = router.route_many(tasks)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(router.route, tasks)) == expected


@pytest.mark.parametrize("task", ["", "   ", "\n\t", "\0", "\u200b", "\x1b\x07"])
def test_tasks_without_content_are_abstained_from(router: Router, task: str) -> None:
    for strategy in STRATEGIES[:4]:  # what this bundle can
        decision = router.decide(router.signals(task), strategy)
        assert (decision.agent, decision.confidence, decision.margin) == (None, 0.0, 0.0)
    assert Router.load(strategy="keyword").route(task).agent is None


def test_long_tasks_are_cut_and_say_so(router: Router) -> None:
    start = "Fix the null pointer in the login handler. "
    long = router.route(start + "more words " * 9_000)
    assert long.truncated
    assert not router.route(start).truncated
    assert long == router.route(start + "more words " * 18_000)


def test_encode_of_nothing_and_of_a_single_string(router: Router) -> None:
    assert router.encoder is not None
    assert router.encoder.encode([]).shape == (0, 384)
    assert router.encoder.encode([]).dtype == np.float32
    with pytest.raises(InputError, match="collection of texts"):
        router.encoder.encode("text")
    with pytest.raises(InputError, match="collection of tasks"):
        router.route_many("text")
    with pytest.raises(InputError, match="must be a string"):
        router.route(None)  # type: ignore[arg-type]


def test_custom_agents_need_no_training(tmp_path: Path) -> None:
    path = tmp_path / "agents.toml"
    path.write_text(
        """
        [[agents]]
        name = "dba"
        description = "Postgres schema, indexes, slow queries, vacuum, replication."

        [[agents]]
        name = "mobile"
        description = "iOS and Android apps, Swift, Kotlin, app store releases."
        examples = ["push notifications do not arrive on the phone"]

        [[agents]]
        name = "ml"
        description = "Training and evaluating machine learning models, datasets, GPUs."
        keywords = ["classifier"]
        """
    )
    router = Router.load(agents=path)
    tasks = ["add an index on orders.created_at", "back button on android closes the app", "fine-tune the classifier"]
    answers = router.route_many(tasks)
    assert [decision.ranking[0].id for decision in answers] == ["dba", "mobile", "ml"]
    assert answers[2].matched == ("classifier",)
    one = Router.load(agents=[Agent("only", "Does everything.")]).route("anything at all")
    assert (one.ranking[0].id, one.margin) == ("only", 0.0)


def test_bad_arguments_are_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="unknown strategy"):
        Router.load(bundle, strategy="magic")
    with pytest.raises(InputError, match="at least one agent"):
        Router.load(bundle, agents=[])
    with pytest.raises(ProviderUnavailable, match="not available"):
        Router.load(bundle, device="npu")
    with pytest.raises(BackendError, match="must be 1 to 256"):
        Encoder.load(bundle, threads=0)
    with pytest.raises(BundleError, match="no variant 'int3'"):
        Encoder.load(bundle, variant="int3")
    with pytest.raises(InputError, match="needs an encoder"):
        Router(bundle.agents, {}, strategy="hybrid")


def test_keyword_first_keeps_the_origins_rule(router: Router) -> None:
    def decide(task: str) -> tuple[str | None, str]:
        decision = router.decide(router.signals(task), "keyword-first")
        return decision.agent, decision.method

    assert decide("investigate why the page is slow") == ("researcher", "keyword")
    assert decide("optimize queries of the report") == ("optimizer", "keyword")
    assert decide("the checkout page went blank") == ("debugger", "embedding")


@pytest.mark.parametrize(
    ("agents", "words"),
    [
        ([Agent("a", "x"), Agent("a", "y")], "already defined"),
        ([Agent("", "x")], "no name"),
        ([Agent("dba")], "neither description nor examples"),
        ([Agent("none", "x")], "stands for 'no agent'"),
        ([Agent("a", "x", keywords="fix")], "keywords must be a list"),  # type: ignore[arg-type]
    ],
)
def test_agents_made_in_python_are_held_to_the_same_rules(agents: list[Agent], words: str, bundle: Bundle) -> None:
    with pytest.raises(AgentError, match=words):
        Router.load(bundle, agents=agents)


def test_keyword_rules_decide_whatever_the_weights() -> None:
    """Fitted weights may be zero; they set the confidence, not the winner."""
    agents = [Agent("low", "x", keywords=("low",), priority=1), Agent("high", "x", keywords=("high",), priority=9)]
    zero = Calibration(0.0, 0.0, 0.0, None, 0.0)
    router = Router(agents, dict.fromkeys(("keyword", "embedding", "hybrid"), zero), strategy="keyword")
    assert router.route("low and high").agent == "high"
    assert router.route("only high").agent == "high"
    assert router.route("only low").agent == "low"
    assert router.route("neither").agent is None
    with pytest.raises(InputError, match="needs an encoder"):
        router.decide(router.signals("x"), "hybrid")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 2.0])
def test_wrong_vectors_never_leave_the_back_end(value: float) -> None:
    rows = np.full((2, 4), 0.5, dtype=np.float32)
    check_unit_rows(rows, (2, 4))
    rows[1] *= value
    with pytest.raises(OutputError, match="ruvltra doctor"):
        check_unit_rows(rows, (2, 4))
    with pytest.raises(OutputError, match="expected"):
        check_unit_rows(rows, (2, 5))

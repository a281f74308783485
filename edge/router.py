"""Routing: signals of a task (keywords, similarities) to a decision with calibrated confidence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.agents import Agent, check_agents, load_agents
from edge.bundle import Bundle, Calibration, Head
from edge.encoder import Encoder, clean
from edge.errors import InputError, ManifestError
from edge.keywords import KeywordRules, Matches
from edge.prototypes import prototypes
from edge.providers import Provider

if TYPE_CHECKING:
    from edge.generate import Generator

STRATEGIES = ("keyword", "keyword-first", "embedding", "hybrid", "generate")
_PROMPTED = 256  # tokens of a task that a language model is asked about, as the default encoder reads
MAX_CHARACTERS = 8192  # a task is cut here before anything looks at it; 256 tokens are far fewer


class Ranked(NamedTuple):
    """An agent in a decision's ranking.

    Attributes:
        id: Name of the agent.
        score: Calibrated probability that the strategy gives it; the ranking falls in it.
        cosine: Similarity of task and prototype; None for the strategies ``keyword`` and ``generate``, which use none.
    """

    id: str
    score: float
    cosine: float | None


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a task goes, and why.

    Attributes:
        agent: Name of the agent; None if the router abstains.
        method: What decided: ``keyword``, ``embedding``, ``hybrid``, ``generate`` or ``abstain``.
        confidence: Calibrated probability of the first agent of the ranking, in [0, 1].
        margin: Its lead over the second one.
        matched: Keywords that spoke for the first agent of the ranking.
        ranking: All agents, most probable first.
        truncated: The task was too long and only its beginning was looked at.
    """

    agent: str | None
    method: str
    confidence: float
    margin: float
    matched: tuple[str, ...]
    ranking: tuple[Ranked, ...]
    truncated: bool = False

    def document(self, most: int | None = None) -> dict[str, Any]:
        """For JSON; with the whole ranking, or the first ``most`` of it."""
        return {
            "agent": self.agent,
            "method": self.method,
            "confidence": self.confidence,
            "margin": self.margin,
            "matched": self.matched,
            "ranking": [ranked._asdict() for ranked in self.ranking[:most]],
            "truncated": self.truncated,
        }


class Signals(NamedTuple):
    """What is known of a task before a strategy weighs it.

    Attributes:
        matches: What the keyword rules found.
        cosine: (agents,) float32 similarities to the nearest prototypes; None without an encoder.
        evidence: (agents,) float32, what the head says, on the scale of cosines: the same as
            ``cosine`` unless there is a linear head; what a language model says, if that is asked; else None.
        out_of_scope: What the head says for "nobody"; None if there is no trained head.
        truncated: The task was cut.
        empty: The task has no content.
    """

    matches: Matches
    cosine: NDArray[np.float32] | None
    evidence: NDArray[np.float32] | None
    out_of_scope: float | None
    truncated: bool
    empty: bool


class Likelihoods:
    """How likely a language model finds each agent's name behind a prompt with the task in it.

    Whatever the task says, what comes out are numbers for these names: it can ask for an agent, but not for anything
    else.

    Attributes:
        empty: (agents,) float64, of an empty task.
    """

    def __init__(self, generator: Generator, prompt: str, names: Sequence[str]) -> None:
        """Ask once for no task.

        Args:
            generator: The language model.
            prompt: ``{task}`` stands for the task.
            names: Of the agents.
        """
        self._generator = generator
        self._before, _, self._after = prompt.partition("{task}")
        self._names = [f" {name}" for name in names]
        taken = sum(generator.count(text) for text in (self._before, self._after, *self._names))
        self._most = min(_PROMPTED, generator.longest - taken)
        if self._most < 1:
            raise InputError(f"{len(names)} agents leave no room for a task. Give fewer, or use another strategy.")
        self.empty = self.of("")[0]

    def of(self, task: str) -> tuple[NDArray[np.float64], bool]:
        """(agents,) logarithms of probabilities, and whether the task was cut."""
        text = " ".join(task.split())
        cut = self._generator.cut(text, self._most)
        prompt = f"{self._before}{cut}{self._after}"
        return self._generator.likelihoods(prompt, self._names, self._before.rstrip()), len(cut) < len(text)


class Router:
    """Routes tasks to agents. Thread-safe: ``route`` may run from many threads."""

    def __init__(
        self,
        agents: Sequence[Agent],
        calibration: dict[str, Calibration],
        *,
        strategy: str = "hybrid",
        encoder: Encoder | None = None,
        head: Head | None = None,
        generator: Generator | None = None,
    ) -> None:
        """Assemble a router from its parts; :meth:`load` does so from a bundle.

        Args:
            agents: The agents to choose between.
            calibration: By strategy, for ``keyword``, ``embedding`` and ``hybrid``; for ``generate`` that of the
                generator.
            strategy: One of ``STRATEGIES``.
            encoder: Needed by every strategy but ``keyword`` and ``generate``.
            generator: Needed by the strategy ``generate``.
            head: Trained prototypes in the order of ``agents``; None makes prototypes of the
                agents' descriptions and examples.

        Raises:
            InputError: An unknown strategy, no agents, or a strategy without the encoder it needs.
        """
        check_strategy(strategy)
        if not agents:
            raise InputError("a router needs at least one agent. Give a list of agents.")
        if generator is None and strategy == "generate":
            raise InputError("the strategy 'generate' needs a generator. Give one, or use another strategy.")
        if encoder is None and strategy not in ("keyword", "generate"):
            raise InputError(f"the strategy {strategy!r} needs an encoder. Give one, or use the strategy 'keyword'.")
        self.agents = check_agents(agents)
        self._names = [agent.name for agent in self.agents]
        self.strategy = strategy
        self.calibration = calibration
        self.encoder = encoder
        self._rules = KeywordRules(self.agents)
        self._head = head
        self._likelihoods: Likelihoods | None = None
        self._prior = 0.0
        if generator is not None and strategy == "generate":
            self._likelihoods = Likelihoods(generator, generator.prompt, [agent.name for agent in self.agents])
            self._prior = generator.prior
        self._prototypes: NDArray[np.float32] | None = None  # (agents, prototypes an agent, dim)
        if encoder is not None:
            self._prototypes = prototypes(encoder, self.agents)[:, None] if head is None else head.prototypes
            # As one matrix: numpy takes five times as long over a stack of small ones.
            self._rows = self._prototypes.reshape(-1, self._prototypes.shape[2])

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle | None = None,
        *,
        agents: str | Path | Sequence[Agent] | None = None,
        strategy: str = "hybrid",
        variant: str | None = None,
        device: str | Provider = "auto",
        threads: int | None = None,
        strict: bool = False,
        use: str = "latency",
    ) -> Router:
        """Open a router.

        Args:
            bundle: Folder, zip file or opened bundle; None for the one that comes with the package.
            agents: Agents of your own instead of the bundle's: a TOML or JSON file, a folder of
                Markdown agent files, or a list. No training is needed; their prototypes are kept in the user's cache
                folder (:func:`edge.prototypes.prototypes`).
            strategy: ``hybrid``, ``embedding``, ``keyword`` or ``keyword-first``; or ``generate``, for a bundle of a
                causal language model: by the likelihood of each agent's name behind the task. It runs on the CPU.
            variant: Id of the bundle's variant to run; None for what suits the device.
            device: ``auto``, ``cpu`` or another provider; as for :meth:`edge.Encoder.load`, and so are
            threads: threads for one task,
            strict: refuse unless the whole graph runs on the provider,
            use: and what a measured winner is to be best at.

        Raises:
            BundleError: The bundle cannot be used.
            AgentError: The agents' file is broken; the message names file and line.
            BackendError: The model cannot run here.
            InputError: An unknown strategy.
        """
        check_strategy(strategy)
        custom: Sequence[Agent] | None
        custom = load_agents(agents) if isinstance(agents, (str, Path)) else agents
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if strategy == "generate":
            if device not in ("auto", "cpu"):
                raise InputError(f"the strategy 'generate' runs on the CPU, not on {device}. Leave the device out.")
            from edge.generate import Generator  # which other strategies do without

            generator = Generator.load(opened, generator=variant, threads=threads)
            return cls(
                opened.agents if custom is None else custom,
                {"generate": generator.calibration},
                strategy=strategy,
                generator=generator,
            )
        encoder = None
        if strategy != "keyword":
            encoder = Encoder.load(opened, variant=variant, device=device, threads=threads, strict=strict, use=use)
        placed = None if encoder is None else encoder.placement
        chosen = opened.variant(variant if placed is None else placed.candidate.variant)
        kind = "custom" if custom is not None or opened.head is None else "trained"
        try:
            calibration = dict(chosen.calibration[kind])
            for needed in ("keyword", "embedding", "hybrid"):
                calibration[needed]
        except KeyError as error:
            raise ManifestError(
                f"{opened.path}: variant {chosen.id!r} has no calibration {error}. Export it again."
            ) from None
        return cls(
            opened.agents if custom is None else custom,
            calibration,
            strategy=strategy,
            encoder=encoder,
            head=opened.head if custom is None else None,
        )

    def route(self, task: str) -> Decision:
        """Decide which agent takes a task.

        A task without content (empty, only control characters) is abstained from.
        """
        return self.decide(self.signals(task), self.strategy)

    def route_many(self, tasks: Iterable[str]) -> list[Decision]:
        """Decide for many tasks, in their order; each exactly as :meth:`route` does."""
        if isinstance(tasks, str):
            raise InputError("route_many takes a collection of tasks. Put the string into a list, or call route.")
        if self.encoder is None:
            return [self.route(task) for task in tasks]
        return self.encoder.each(self.route, tasks)

    def signals(self, task: str) -> Signals:
        """Match keywords and measure similarities; the input of :meth:`decide`."""
        if not isinstance(task, str):
            raise InputError(f"a task must be a string, not {type(task).__name__}. Convert it first.")
        task = task.lstrip()
        text = clean(task[:MAX_CHARACTERS])
        truncated = len(task) > MAX_CHARACTERS
        matches = self._rules.match(text)
        if self._likelihoods is not None:
            found, cut = self._likelihoods.of(text)
            said = (found + self._prior * self._likelihoods.empty).astype(np.float32)
            return Signals(matches, None, said, 0.0, truncated or cut, not _has_content(text))
        if self.encoder is None or self._prototypes is None:
            return Signals(matches, None, None, None, truncated, not _has_content(text))
        tokens = self.encoder.tokenize(text)
        vector = self.encoder.encode_tokens(tokens)
        # Row by row: BLAS would call other threads for many agents, and wait for them.
        cosine: NDArray[np.float32] = np.vecdot(self._rows, vector)
        if self._prototypes.shape[1] > 1:
            cosine = cosine.reshape(self._prototypes.shape[:2]).max(axis=1)
        evidence, out_of_scope = cosine, None
        if self._head is not None and self._head.linear is not None:
            said = self._head.linear.weight.dot(vector) + self._head.linear.bias
            evidence, out_of_scope = said[:-1], float(said[-1])
        elif self._head is not None:
            out_of_scope = float(self._head.out_of_scope.dot(vector))
        return Signals(matches, cosine, evidence, out_of_scope, truncated or tokens.truncated, tokens.empty)

    def decide(self, signals: Signals, strategy: str) -> Decision:
        """Weigh signals by a strategy.

        ``keyword-first`` keeps the origin's rule: the matched agent of the highest priority wins,
        embeddings break ties and take the tasks that no keyword matched.
        """
        check_strategy(strategy)
        if strategy == "generate" and self._likelihoods is None:
            raise InputError("the strategy 'generate' needs a generator. Load the router with that strategy.")
        if signals.cosine is None and strategy not in ("keyword", "generate"):
            raise InputError(f"the strategy {strategy!r} needs an encoder. Load the router with another strategy.")
        method = strategy
        if strategy == "keyword-first":
            method = "keyword" if signals.matches.first else "embedding"
        cosine = None if strategy == "keyword" else signals.cosine
        calibration = self.calibration[method]
        probability = probabilities(signals, calibration)
        order = (-probability).argsort(kind="stable")
        if method == "keyword":
            # The rules decide, whatever the fitted weights; among the agents that they cannot tell
            # apart the similarity does.
            found = np.array([-bool(phrases) for phrases in signals.matches.phrases])
            leads = np.zeros(len(found))
            leads[list(signals.matches.first)] = -1
            order = np.lexsort((np.zeros(len(found)) if cosine is None else -cosine, found, leads))
        places: list[int] = order.tolist()
        top = places[0]
        names = [self._names[place] for place in places]
        shares: list[float] = probability[order].tolist()
        cosines: list[float | None] = [None] * len(places) if cosine is None else cosine[order].tolist()
        confidence = shares[0]
        unmatched = method == "keyword" and not signals.matches.first
        abstains = signals.empty or unmatched or confidence < calibration.threshold
        return Decision(
            agent=None if abstains else names[0],
            method="abstain" if abstains else method,
            confidence=0.0 if signals.empty else confidence,
            margin=0.0 if signals.empty or len(places) == 1 else confidence - shares[1],
            matched=() if method in ("embedding", "generate") else signals.matches.phrases[top],
            # As Ranked._make does, without a call of Python for each: there may be thousands of agents.
            ranking=tuple(map(tuple.__new__, itertools.repeat(Ranked), zip(names, shares, cosines, strict=True))),
            truncated=signals.truncated,
        )


def _has_content(text: str) -> bool:
    return any(character.isprintable() and not character.isspace() for character in text)


def probabilities(signals: Signals, calibration: Calibration) -> NDArray[np.float64]:
    """(agents,) probabilities; they add up to one less the probability of "nobody".

    See :class:`edge.bundle.Calibration` for the formula.
    """
    if signals.evidence is None:
        logits = np.zeros(len(signals.matches.phrases))
    else:
        logits = signals.evidence * np.float64(calibration.cosine)
    if calibration.matched or calibration.first:
        for position, phrases in enumerate(signals.matches.phrases):
            if phrases:
                logits[position] += calibration.matched
        for position in signals.matches.first:
            logits[position] += calibration.first
    rest = -math.inf
    if calibration.out_of_scope is not None:
        rest = calibration.out_of_scope + calibration.cosine * (signals.out_of_scope or 0.0)
    highest = max(logits.item(logits.argmax()), rest)
    exponents = np.exp(logits - highest)
    shares: NDArray[np.float64] = exponents / (sum(exponents.tolist()) + math.exp(rest - highest))
    return shares


def check_strategy(strategy: str) -> None:
    """Raise InputError unless ``strategy`` is one of ``STRATEGIES``."""
    if strategy not in STRATEGIES:
        raise InputError(f"unknown strategy {strategy!r}. Use one of: {', '.join(STRATEGIES)}.")

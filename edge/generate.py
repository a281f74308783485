"""Text out of a causal language model, token by token, and how likely it finds given continuations."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream

from edge.bundle import Bundle
from edge.bundle import Generator as Listed
from edge.decoder import STEP, Cache, open_decoder
from edge.encoder import clean, load_tokenizer
from edge.errors import BundleError, InputError

_HIDDEN = -10000.0  # added to the attention's logits
_ROOM = 128  # a cache that is kept for further prompts has room in multiples of so many tokens


class Generator:
    """A bundle's language model. Thread-safe.

    Attributes:
        id: Which of the bundle's generators it is.
        longest: Tokens that prompt and answer may have together.
        prompt: What asks for an agent's name; ``{task}`` stands for the task.
        prior: See :class:`edge.bundle.Generator`, as for
        calibration: how its likelihoods become probabilities.
    """

    def __init__(self, bundle: Bundle, listed: Listed, threads: int | None = None) -> None:
        """Load a generating graph; :meth:`load` chooses one.

        Raises:
            ChecksumError: A file is missing or has changed.
            BackendError: The graph cannot be loaded.
        """
        self.id = listed.id
        self.longest = bundle.encoder.max_length
        self.prompt = listed.prompt
        self.prior = listed.prior
        self.calibration = listed.calibration
        self._listed = listed
        self._lock = threading.Lock()
        self._kept: list[Cache] = []  # that hold what prompts begin with; one for each call at a time
        self._paths: dict[tuple[str, tuple[str, ...]], list[tuple[int, ...]]] = {}
        self._tokenizer = load_tokenizer(bundle)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A text that spells a control token is a text: nothing that is asked can end the prompt.
        self._tokenizer.encode_special_tokens = True
        self._decoder = open_decoder(bundle, listed, threads)

    @classmethod
    def load(
        cls, bundle: str | Path | Bundle | None = None, *, generator: str | None = None, threads: int | None = None
    ) -> Generator:
        """Open a bundle's language model.

        Args:
            bundle: Folder, zip file or opened bundle; None for the one that comes with the package, which has none.
            generator: Which one; None for the last one listed.
            threads: None for one a physical core.

        Raises:
            BundleError: The bundle cannot be used, or has no such generator.
            BackendError: It cannot run here.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if not opened.generators:
            raise BundleError(
                f"{opened.path}: cannot generate. Export a causal language model: ruvltra-export bundle MODEL --task "
                "generate"
            )
        for listed in opened.generators:
            if listed.id == (opened.generators[-1].id if generator is None else generator):
                return cls(opened, listed, threads)
        have = ", ".join(listed.id for listed in opened.generators)
        raise BundleError(f"{opened.path}: no generator {generator!r}. Choose one of: {have}.")

    def generate(self, prompt: str, max_tokens: int = 64) -> str:
        """The most probable continuation, token by token (greedy), up to a token that ends a text.

        Raises:
            InputError: The prompt is empty, or too long for so many tokens.
        """
        return "".join(self.stream(prompt, max_tokens))

    def stream(self, prompt: str, max_tokens: int = 64) -> Iterator[str]:
        """As :meth:`generate`, piece by piece as it comes; half a character at the end is left out."""
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}. Give a whole number from 1.")
        ids = self._ids(prompt, max_tokens)
        return self._stream(ids, max_tokens)

    def _stream(self, ids: list[int], max_tokens: int) -> Iterator[str]:
        decoder = DecodeStream(skip_special_tokens=True)
        cache = Cache(self._decoder.sizes, len(ids) + max_tokens)
        self._decoder.read(cache, ids[:-1])
        token = ids[-1]
        for _ in range(max_tokens):
            token = int(self._decoder.run(cache, [token], [0])[0].argmax())
            if token in self._listed.end_ids:
                return
            piece = decoder.step(self._tokenizer, token)
            if piece:
                yield piece

    def likelihoods(self, prompt: str, continuations: Sequence[str], shared: str = "") -> NDArray[np.float64]:
        """How likely the model finds each of several continuations of a prompt.

        The continuations' tokens form a tree, which is run behind the prompt in one pass, each branch seeing its own
        tokens alone. Where one continuation is the beginning of another, it is counted only as far as none of the
        longer ones goes on from it.

        Args:
            prompt: What comes before.
            continuations: Texts, all different.
            shared: What this and further prompts begin with, which is read once.

        Returns:
            (continuations,) float64: natural logarithms of their probabilities.

        Raises:
            InputError: The prompt is too long, or a continuation has no token of its own.
        """
        paths = self._branches(prompt, tuple(continuations))
        inner = sorted({path[:n] for path in paths for n in range(1, len(path))}, key=lambda path: (len(path), path))
        ids = self._ids(prompt, len(inner))
        cache = self._begin(ids, shared, len(ids) + len(inner))
        beginning = len(cache.ids)
        try:
            logits = self._tree(cache, ids, inner)
        finally:
            cache.cut(beginning)
            with self._lock:
                self._kept.append(cache)
        following = {(): 0} | {path: i for i, path in enumerate(inner, 1)}
        peak = logits.max(axis=1, keepdims=True)
        # In place, since there are a hundred thousand for each row.
        total = np.log(np.exp(logits - peak, out=np.empty_like(logits)).sum(axis=1, dtype=np.float64)) + peak[:, 0]
        result = []
        for path in paths:
            found = sum(
                float(logits[following[path[:n]], path[n]]) - total[following[path[:n]]] for n in range(len(path))
            )
            if path in following:  # a longer one goes on from here
                row = following[path]
                on = {longer[len(path)] for longer in paths if longer[: len(path)] == path and len(longer) > len(path)}
                share = sum(np.exp(float(logits[row, token]) - total[row]) for token in on)
                found += float(np.log(max(1 - share, 1e-12)))
            result.append(found)
        return np.array(result)

    def count(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self._tokenizer.encode(clean(text), add_special_tokens=False).ids)

    def cut(self, text: str, most: int) -> str:
        """A text's beginning of so many tokens."""
        encoding = self._tokenizer.encode(clean(text), add_special_tokens=False)
        return text if len(encoding.ids) <= most else clean(text)[: encoding.offsets[most - 1][1]]

    def _ids(self, prompt: str, more: int) -> list[int]:
        if not isinstance(prompt, str) or not prompt:
            raise InputError("the prompt is no text, or empty. Give a text.")
        ids: list[int] = self._tokenizer.encode(clean(prompt)).ids
        if not ids or len(ids) + more > self.longest:
            raise InputError(
                f"the prompt has {len(ids)} tokens and may get {more} more; together there may be {self.longest}. "
                "Shorten it."
            )
        return ids

    def _branches(self, prompt: str, continuations: tuple[str, ...]) -> list[tuple[int, ...]]:
        """Tokens of each continuation, as they are behind the prompt's end."""
        end = prompt[-16:]
        if (end, continuations) not in self._paths:
            before = self._tokenizer.encode(end).ids
            paths = []
            for text in continuations:
                whole = tuple(self._tokenizer.encode(end + text).ids)
                joined = whole[: len(before)] != tuple(before)
                path = (
                    tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
                    if joined
                    else whole[len(before) :]
                )
                if not path:
                    raise InputError(f"the continuation {text!r} has no token. Give another.")
                paths.append(path)
            if len(set(paths)) < len(paths):
                raise InputError("two continuations are the same for this model. Leave one of them out.")
            self._paths = {(end, continuations): paths}
        return self._paths[end, continuations]

    def _tree(self, cache: Cache, ids: list[int], inner: list[tuple[int, ...]]) -> NDArray[np.float32]:
        """Logits behind the prompt and behind each of the branches, all in one pass."""
        if len(ids) - len(cache.ids) > STEP:
            self._decoder.read(cache, ids[len(cache.ids) : -1])
        start = len(cache.ids)
        own = len(ids) - start  # of the prompt, before the branches
        if not own:  # a prompt of one token, which is in the cache, since branches need one
            first = self._decoder.run(Cache(self._decoder.sizes, 1), ids, [0])
            if not inner:
                return first
        fed = [*ids[start:], *(path[-1] for path in inner)]
        positions = [*range(start, len(ids)), *(len(ids) - 1 + len(path) for path in inner)]
        bias = np.zeros((len(fed), start + len(fed)), dtype=np.float32)
        place = {path: own + i for i, path in enumerate(inner)}
        for path, row in place.items():
            bias[row, start + own :] = _HIDDEN
            bias[row, [start + place[path[:n]] for n in range(1, len(path) + 1)]] = 0
        logits = self._decoder.run(cache, fed, range(max(own - 1, 0), len(fed)), positions, bias)
        return logits if own else np.concatenate((first, logits))

    def _begin(self, ids: list[int], shared: str, most: int) -> Cache:
        """A cache with room for ``most`` tokens that has the prompt's beginning: at least its first token."""
        wanted = self._tokenizer.encode(shared).ids if shared else []
        count = 0
        while count < min(len(wanted), len(ids) - 1) and wanted[count] == ids[count]:
            count += 1
        beginning = ids[: max(count, 1)]
        with self._lock:
            cache = self._kept.pop() if self._kept else None
        if cache is None or cache.ids != beginning or cache.room < most:
            cache = Cache(self._decoder.sizes, -(-most // _ROOM) * _ROOM)
            self._decoder.read(cache, beginning)
        return cache

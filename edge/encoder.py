"""Texts to token ids to unit vectors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge.bundle import Bundle, Generator
from edge.choice import Wish, hash_ahead, open_backend, side_by_side
from edge.decoder import STEP, Decoder, open_decoder
from edge.errors import BackendError, InputError, ManifestError
from edge.providers import Provider
from edge.session import Backend, Placement

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

S = TypeVar("S")
T = TypeVar("T")
_WORTH_SHARING = 4  # texts; fewer are done before a second thread has begun


class Tokens(NamedTuple):
    """Token ids of one text.

    Attributes:
        ids: With the special tokens at either end.
        truncated: The text was longer than the encoder's maximum length.
        empty: Nothing but special tokens: the text has no content.
    """

    ids: tuple[int, ...]
    truncated: bool
    empty: bool


class Encoder:
    """Embeds texts with a bundle's model. Thread-safe: ``encode`` may run from many threads.

    Every text runs by itself and without padding. The shipped int8 graphs scale activations by the
    whole tensor, so that a text's company or padding would change its vector; one text at a time,
    it never does. Several texts run side by side, one a core.

    Attributes:
        id: What it computes (:attr:`Bundle.encoder_id`): an index is bound to it.
        bundle_id: Of the very bundle: another one may compute the same by a graph with other last bits.
        dim: Number of values of a vector.
        max_length: Tokens of the longest text; longer ones are cut.
        placement: What was chosen to run the model, why, and where its operations run; None for an
            encoder that was put together by hand.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        tokenizer: Tokenizer | None = None,
        lengths: tuple[int, ...] = (),
        placement: Placement | None = None,
        side_by_side: int = 1,
        stepwise: Generator | None = None,
    ) -> None:
        """Join a bundle's tokenizer and a back end; :meth:`load` does so with the best one.

        Args:
            bundle: The opened bundle.
            backend: What runs its model.
            tokenizer: The bundle's, where it is loaded already.
            lengths: The numbers of tokens that the back end takes, ascending; empty where it takes any.
            placement: What is known of where the model runs.
            side_by_side: How many texts :meth:`encode` runs at the same time.
            stepwise: The bundle's generating graph of the same weights, which reads long texts in steps.
        """
        self.placement = placement
        self._side_by_side = side_by_side
        self._stepwise = stepwise
        self._decoder: Decoder | None = None  # loaded by the first long text
        self._lock = threading.Lock()
        self._bundle = bundle
        self._pool: ThreadPoolExecutor | None = None
        self._ones = np.ones((1, bundle.encoder.max_length), dtype=np.int64)  # masks: nothing is padded
        self.id = bundle.encoder_id
        self.bundle_id = bundle.id
        self.dim = bundle.encoder.dim
        self.max_length = min(bundle.encoder.max_length, *lengths[-1:]) if lengths else bundle.encoder.max_length
        self._prompt = bundle.encoder.prompt
        self._backend = backend
        self._tokenizer = load_tokenizer(bundle) if tokenizer is None else tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.max_length)
        # What an empty text has: special tokens, and those of the prompt.
        self._empty = tuple(self._tokenizer.encode(self._prompt).ids)

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle | None = None,
        *,
        variant: str | None = None,
        device: str | Provider = "auto",
        threads: int | None = None,
        strict: bool = False,
        use: str = "latency",
    ) -> Encoder:
        """Open a bundle's encoder.

        Args:
            bundle: Folder, zip file or opened bundle; None for the one that comes with the package.
            variant: Id of a variant; None for what suits the device.
            device: ``auto`` takes what `ruvltra tune` measured as best here, else the CPU. Or ``cpu``, ``coreml``,
                ``cuda``, ``openvino`` and so on, ``openvino:GPU``, or a :class:`Provider` with options of its own.
            threads: Threads for one text; None for 1, or what was measured as best. Several texts run side by side.
            strict: Refuse unless the whole graph runs on the provider.
            use: What a measured winner is to be best at: ``latency``, ``throughput`` or ``memory``.

        Raises:
            BundleError: The bundle cannot be used.
            BackendError: Its model cannot run here, or not as asked for.
            InputError: There is no such device or use.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        wish = Wish(variant, device, threads, strict, use)
        hash_ahead(opened, wish)
        tokenizer = load_tokenizer(opened)
        backend, chosen, placement = open_backend(opened, wish)
        stepwise = None
        if placement.candidate.provider == "cpu":
            stepwise = next((listed for listed in opened.generators if listed.id == chosen.id), None)
        return cls(opened, backend, tokenizer, chosen.lengths, placement, side_by_side(placement.candidate), stepwise)

    def tokenize(self, text: str) -> Tokens:
        """Token ids of a text, cut to the maximum length. Lone surrogates count as U+FFFD."""
        try:
            encoding = self._tokenizer.encode(self._prompt + clean(text))
        except Exception as error:  # tokenizers raises bare Exception
            raise BackendError(f"the tokenizer cannot encode a text ({error}). Run: ruvltra doctor") from None
        ids: list[int] = encoding.ids
        # Without special tokens an empty text has no token, and no graph runs on none.
        return Tokens(tuple(ids) or (0,), bool(encoding.overflowing), tuple(ids) == self._empty)

    def encode_tokens(self, tokens: Tokens) -> NDArray[np.float32]:
        """(dim,) float32 unit vector of one tokenised text."""
        if self._stepwise is not None and len(tokens.ids) > STEP:
            return self._in_steps(tokens.ids)
        ids = np.array([tokens.ids], dtype=np.int64)
        vector: NDArray[np.float32] = self._backend.run(ids, self._ones[:, : ids.shape[1]])[0]
        return vector

    def _in_steps(self, ids: tuple[int, ...]) -> NDArray[np.float32]:
        assert self._stepwise is not None
        with self._lock:
            if self._decoder is None:
                self._decoder = open_decoder(self._bundle, self._stepwise, None)
        return self._decoder.embed(ids, self._bundle.encoder.pooling)

    def encode(self, texts: Iterable[str]) -> NDArray[np.float32]:
        """Embed texts.

        Args:
            texts: Any number of strings; longer ones are cut to the maximum length.

        Returns:
            (n, dim) float32, rows of unit length; (0, dim) for no texts.

        Raises:
            InputError: A single string instead of a collection of strings.
            OutputError: The model returned something other than unit vectors.
        """
        if isinstance(texts, str):
            raise InputError("encode takes a collection of texts. Put the string into a list.")
        rows = self.each(lambda text: self.encode_tokens(self.tokenize(text)), texts)
        return np.stack(rows) if rows else np.empty((0, self.dim), dtype=np.float32)

    def each(self, function: Callable[[S], T], these: Iterable[S]) -> list[T]:
        """What a function that encodes one text gives for each, in their order; side by side where that pays."""
        items = list(these)
        if self._side_by_side == 1 or len(items) < _WORTH_SHARING:
            return [function(text) for text in items]
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor  # a single text does not need it

            self._pool = ThreadPoolExecutor(self._side_by_side, thread_name_prefix="ruvltra")
        return list(self._pool.map(function, items))


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """A bundle's tokenizer.

    Raises:
        ManifestError: The installed tokenizers cannot load it.
    """
    try:
        return Tokenizer.from_buffer(bundle.tokenizer)
    except Exception as error:  # tokenizers raises bare Exception
        raise ManifestError(
            f"{bundle.path}: the tokenizer cannot be loaded ({error}). Install a version of tokenizers from this "
            "package's tested range."
        ) from None


def clean(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD; surrogate pairs become their character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

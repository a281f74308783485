"""The generating graphs of a causal language model: made of its embedding graphs, proven, calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from edge.bundle import Bundle, Calibration
from edge.decoder import STEP, Cache, Decoder, Sizes
from edge.evaluate import Labelled
from edge.generate import Generator
from edge.router import Likelihoods
from export.calibrate import calibrate_likelihoods
from export.checkpoint import Checkpoint
from export.decoder import is_decoder, sizes_of, write_generator
from export.errors import CheckpointError, ParityError
from export.onnx import quiet
from export.parity import parity_texts
from export.variants import VARIANTS
from export.wrapper import BUNDLE_POOLING, embed

GENERATING = ("fp32", "int8-weights", "int4-weights")  # variants whose graphs can generate
STEPS = 4  # tokens generated one by one, each from the cache of the ones before
PROMPT = "Route: {task}\nAgent:"  # the origin's
_MOST = 600  # labelled tasks that a generator is calibrated on; each takes as long as an embedding, and more
_LONG_COSINE = 0.9999  # of a text read in steps, in fp32
UNCALIBRATED = Calibration(1.0, 0.0, 0.0, None, 0.0)


def check_generating(checkpoint: Checkpoint, variants: Sequence[str]) -> None:
    """Refuse what cannot generate before anything takes time.

    Raises:
        CheckpointError: It is no causal language model that these variants are made of.
    """
    if checkpoint.language_model is None:
        raise CheckpointError(
            f"{checkpoint.folder}: is no causal language model with its output layer, so it cannot generate. Leave "
            "--task generate out."
        )
    if not is_decoder(checkpoint.encoder()) or not any(variant in GENERATING for variant in variants):
        raise CheckpointError(
            f"{checkpoint.folder}: only Llama- and Qwen2-like models with SiLU that are pooled by the mean or the last "
            f"token generate, as {', '.join(GENERATING)}. Ask for one of these, or leave --task generate out."
        )


def export_generators(checkpoint: Checkpoint, folder: Path, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Make a generating graph of each embedding graph that can, and hold its greedy tokens against the network's.

    The graphs share the weights of ``model.VARIANT.bin``; only an output layer of its own is added to that file.

    Returns:
        The manifest's entries, files by name.

    Raises:
        ParityError: The fp32 graph gives another next token.
    """
    network = checkpoint.language_model
    assert network is not None
    sizes = sizes_of(network)
    answers = ask_network(checkpoint)
    end = network.config.eos_token_id
    entries = []
    for variant in variants:
        if variant not in GENERATING:
            continue
        path = folder / f"generator.{variant}.onnx"
        write_generator(folder / f"model.{variant}.onnx", path, network)
        proof = prove_generator(answers, path, sizes)
        if variant == "fp32" and not proof.exact:
            raise ParityError(
                f"the generator does not do what the network does; other next tokens for {proof.different[:3]}. No "
                "bundle was written. Leave --task generate out.",
                f"generator: {proof}",
            )
        entries.append(
            {
                "id": variant,
                "model": path.name,
                "weights": f"model.{variant}.bin",
                "precision": VARIANTS[variant].precision,
                "layers": sizes.layers,
                "kv_heads": sizes.heads,
                "head_dim": sizes.values,
                "end_ids": [] if end is None else [end] if isinstance(end, int) else list(end),
                "prompt": PROMPT,
                "prior": 0.0,
                "calibration": UNCALIBRATED._asdict(),
                "calibrated_on": None,
                "parity": {
                    "texts": proof.texts,
                    "tokens_a_text": STEPS,
                    "equal": 1 - len(proof.different) / proof.texts,
                    "long_tokens": proof.tokens,
                    "long_cosine": round(proof.cosine, 6),
                },
            }
        )
    return entries


class Proof(NamedTuple):
    """A generating graph held against the network.

    Attributes:
        texts: For how many texts the next tokens were compared.
        different: Those for which they differ.
        tokens: Of a text that was embedded in steps.
        cosine: Of its vector and the network's.
    """

    texts: int
    different: list[str]
    tokens: int
    cosine: float

    @property
    def exact(self) -> bool:
        """Whether it does what the network does, as a graph in fp32 must."""
        return not self.different and self.cosine >= _LONG_COSINE

    def __str__(self) -> str:
        same = f"{self.texts - len(self.different)} of {self.texts} texts give the network's next {STEPS} tokens"
        return f"{same}; a text of {self.tokens} tokens, read in steps, is embedded at cosine {self.cosine:.5f}"


class Answers(NamedTuple):
    """What the network says, for its generating graphs to be held against.

    Attributes:
        texts: The exporter's tasks.
        rows: Their ids, cut to 64.
        tokens: The ``STEPS`` greedy tokens behind each.
        long: Ids of a text that is read in more than one step, if the checkpoint has so many positions.
        vector: Its embedding, (dim,) float32.
        pooling: As the bundle names it.
    """

    texts: list[str]
    rows: list[list[int]]
    tokens: list[list[int]]
    long: list[int]
    vector: NDArray[np.float32]
    pooling: str


def ask_network(checkpoint: Checkpoint) -> Answers:
    """Let the network answer; a 0.5B one takes a minute."""
    texts = parity_texts("tasks")
    rows = checkpoint.tokenize(texts, min(64, checkpoint.max_length - STEPS))
    long = [token for row in rows for token in row][: min(STEP + STEP // 2, checkpoint.max_length)]
    mode = checkpoint.pooling[0]
    return Answers(
        texts,
        rows,
        [_network_tokens(checkpoint.language_model, row) for row in rows],
        long,
        embed(checkpoint.encoder(), [long])[0].numpy(),
        BUNDLE_POOLING.get(mode, mode),
    )


def prove_generator(answers: Answers, path: Path, sizes: Sizes) -> Proof:
    """Hold a generating graph against the network: greedy tokens from the cache, and a text read in steps."""
    with quiet("running the generating graph"):
        decoder = Decoder(ort.InferenceSession(path, providers=["CPUExecutionProvider"]), sizes)
        different = [
            text
            for text, row, tokens in zip(answers.texts, answers.rows, answers.tokens, strict=True)
            if _next_tokens(decoder, row) != tokens
        ]
        vector = decoder.embed(answers.long, answers.pooling)
    return Proof(len(answers.texts), different, len(answers.long), float(answers.vector @ vector))


def calibrate_generator(
    bundle: Bundle, listed: dict[str, Any], labelled: Sequence[Labelled], names: Sequence[str]
) -> None:
    """Fit how likelihoods become probabilities, on labelled tasks spread over the file."""
    rows = [labelled[i] for i in np.unique(np.linspace(0, len(labelled) - 1, min(_MOST, len(labelled))).astype(int))]
    likelihoods = Likelihoods(Generator.load(bundle, generator=listed["id"]), listed["prompt"], names)
    found = np.stack([likelihoods.of(row.task)[0] for row in rows])
    prior, calibration = calibrate_likelihoods(found, likelihoods.empty, rows, names)
    listed["prior"] = round(prior, 5)
    listed["calibration"] = {
        key: None if value is None else round(value, 5) for key, value in calibration._asdict().items()
    }


def _next_tokens(decoder: Decoder, row: list[int]) -> list[int]:
    """The greedy next tokens, each step fed with the last token and the cache."""
    cache = Cache(decoder.sizes, len(row) + STEPS)
    fed, tokens = row, list[int]()
    for _ in range(STEPS):
        tokens.append(int(decoder.run(cache, fed, [len(fed) - 1])[0].argmax()))
        fed = tokens[-1:]
    return tokens


@torch.no_grad()
def _network_tokens(network: Any, row: list[int]) -> list[int]:
    """The same by the network, which reads the whole text anew at each step."""
    ids = torch.tensor([row])
    for _ in range(STEPS):
        following = network(input_ids=ids, logits_to_keep=1).logits[0, -1].argmax()
        ids = torch.cat([ids, following[None, None]], dim=1)
    return [int(token) for token in ids[0, len(row) :]]

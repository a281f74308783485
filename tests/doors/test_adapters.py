"""The adapters in the libraries that they are for."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge import Encoder, InputError
from tests.conftest import MINI, ROOT

# These libraries warn of their own doings when they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TEXTS = [
    "Sessions live in Redis, for 30 minutes",
    "Orders are kept in PostgreSQL",
    "The mascot is a capybara",
    "日本語",
]
QUESTION = "where are user sessions kept?"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load(MINI / "bundle")


def test_sentence_transformers_beside_the_real_one(encoder: Encoder) -> None:
    import sentence_transformers

    from edge.adapters.sentence_transformers import SentenceTransformer

    real = sentence_transformers.SentenceTransformer(str(MINI / "checkpoint"), device="cpu")
    ours = SentenceTransformer(MINI / "bundle")
    for given in (TEXTS, TEXTS[0]):
        expected, made = real.encode(given), ours.encode(given)
        assert (made.dtype, made.shape) == (expected.dtype, expected.shape)
        assert (np.sum(np.atleast_2d(expected * made), axis=1) > 0.985).all()
    assert ours.encode([]).shape == (0, 384)
    assert ours.get_embedding_dimension() == ours.get_sentence_embedding_dimension() == 384
    assert ours.max_seq_length == real.max_seq_length
    vectors = ours.encode(TEXTS, batch_size=2, show_progress_bar=True, normalize_embeddings=True)
    assert (vectors == encoder.encode(TEXTS)).all()
    expected = real.similarity(real.encode(TEXTS), real.encode(QUESTION)).numpy()
    assert ours.similarity(vectors, ours.encode_query(QUESTION)) == pytest.approx(expected, abs=0.05)
    for arguments in (
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"precision": "int8"},
        {"batch_size": 0},
    ):
        with pytest.raises(InputError):
            ours.encode(TEXTS, **arguments)
    with pytest.raises(InputError, match="only texts"):
        ours.encode([1])  # type: ignore[list-item]


def test_langchain(encoder: Encoder) -> None:
    from langchain_core.vectorstores import InMemoryVectorStore

    from edge.adapters.langchain import RuvltraEmbeddings

    made = RuvltraEmbeddings(encoder=encoder)
    store = InMemoryVectorStore.from_texts(TEXTS, made)
    found = store.similarity_search_with_score(QUESTION, k=2)
    assert found[0][0].page_content == TEXTS[0]
    assert found[0][1] == pytest.approx(float(encoder.encode([QUESTION])[0] @ encoder.encode(TEXTS[:1])[0]), abs=1e-5)
    assert asyncio.run(made.aembed_query(QUESTION)) == made.embed_query(QUESTION)
    assert made.embed_documents([]) == []


def test_llama_index(encoder: Encoder) -> None:
    from llama_index.core import Settings, VectorStoreIndex
    from llama_index.core.schema import TextNode

    from edge.adapters.llama_index import RuvltraEmbedding

    made = RuvltraEmbedding(bundle=str(MINI / "bundle"), encoder=encoder)
    assert Settings is not None
    index = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=made)
    (first, *_) = index.as_retriever(similarity_top_k=2).retrieve(QUESTION)
    assert first.node.get_content() == TEXTS[0]
    again = RuvltraEmbedding.from_dict(made.to_dict())
    assert again.get_text_embedding(TEXTS[0]) == made.get_text_embedding(TEXTS[0])
    assert asyncio.run(made.aget_query_embedding(QUESTION)) == made.get_query_embedding(QUESTION)
    other = made.to_dict() | {"bundle": str(MINI.parent / "ruvltra-nano" / "bundle")}
    with pytest.raises(InputError, match="its encoder is not that"):
        RuvltraEmbedding.from_dict(other)


def test_semantic_router(encoder: Encoder) -> None:
    from semantic_router import IndexedRouter, Route

    from edge.adapters.semantic_router import RuvltraEncoder

    made = RuvltraEncoder(encoder=encoder)
    routes = [
        Route(name="billing", utterances=["the customer was charged twice", "refund the last order"]),
        Route(name="database", utterances=["add an index on orders.created_at", "why is this query slow?"]),
    ]
    router = IndexedRouter(encoder=made, routes=routes)
    assert router("they paid twice for one order").name == "billing"
    assert router("the index on the orders table is not used").name == "database"
    assert asyncio.run(made.acall(TEXTS)) == made(TEXTS)


def test_chroma(tmp_path: Path) -> None:
    import chromadb
    from chromadb.config import Settings

    from edge.adapters.chroma import RuvltraEmbeddingFunction

    def client() -> Any:
        return chromadb.PersistentClient(str(tmp_path / "chroma"), Settings(anonymized_telemetry=False))

    made = RuvltraEmbeddingFunction(MINI / "bundle")
    collection = client().create_collection("notes", embedding_function=made)
    collection.add(ids=[str(place) for place in range(len(TEXTS))], documents=TEXTS)
    assert collection.query(query_texts=[QUESTION], n_results=1)["documents"] == [[TEXTS[0]]]
    chromadb.api.shared_system_client.SharedSystemClient.clear_system_cache()
    again = client().get_collection("notes")  # which knows its function by itself
    found = again.query(query_texts=[QUESTION], n_results=1)
    assert found["documents"] == [[TEXTS[0]]]
    encoder = Encoder.load(MINI / "bundle")
    cosine = float(encoder.encode([QUESTION])[0] @ encoder.encode(TEXTS[:1])[0])
    assert found["distances"][0][0] == pytest.approx(1 - cosine, abs=1e-4)
    config = made.get_config() | {"bundle": str(MINI.parent / "ruvltra-nano" / "bundle")}
    with pytest.raises(InputError, match="its encoder is not that"):
        RuvltraEmbeddingFunction.build_from_config(config)


EXAMPLES = re.findall(r"^```(?:py|python)\n(.*?)^```", (ROOT / "docs" / "adapters.md").read_text("utf-8"), re.S | re.M)


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    ("module", "library"),
    [
        ("langchain", "langchain_core"),
        ("llama_index", "llama_index.core"),
        ("semantic_router", "semantic_router"),
        ("chroma", "chromadb"),
    ],
)
def test_without_the_library_it_says_how_to_get_it(module: str, library: str) -> None:
    program = f"import sys; sys.modules[{library!r}] = None; import edge.adapters.{module}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MissingExtra" in done.stderr
    assert "pip install 'ruvltra-edge[adapters]'" in done.stderr

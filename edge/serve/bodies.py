"""What requests hold: one description each, by which they are checked and documented."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edge.memory import NAMESPACE
from edge.router import STRATEGIES

Text = Annotated[str, Field(description="Any text")]
Namespace = Annotated[str, Field(min_length=1, max_length=200, description="Part of the store")]


class Body(BaseModel):
    """Unknown names are errors: a misspelt one would be passed over in silence."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Embeddings(Body):
    """Embed texts, as OpenAI's API does."""

    input: str | list[str] = Field(description="A text, or a list of texts; long ones are cut")
    model: str = Field(description="As GET /v1/models lists it")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: little-endian float32")
    dimensions: int | None = Field(None, description="The model's own number, and no other")
    user: str | None = Field(None, description="Is not looked at")


class Route(Body):
    """Decide which agent takes a task."""

    input: str | list[str] = Field(description="A task, or a list of tasks")
    model: str | None = Field(None, description="As GET /v1/models lists it")
    strategy: Literal[STRATEGIES] | None = Field(None, description="How to decide; the server's, if it is left out")  # type: ignore[valid-type]
    top: int = Field(3, ge=1, le=10_000, description="Agents of each ranking that come back")


class New(Body):
    """A text to remember."""

    text: Text
    id: str | None = Field(None, min_length=1, max_length=200, description="Its name; a hash of the text, if left out")
    metadata: dict[str, Any] | None = Field(None, description="What searches can be limited by")
    namespace: Namespace = NAMESPACE
    ttl: float | None = Field(None, gt=0, description="Seconds after which it is forgotten")


class Add(Body):
    """Remember texts: all of them, or none."""

    records: list[New] = Field(min_length=1)
    replace: bool = Field(False, description="Put them in the place of other texts of their ids")


class Search(Body):
    """Find what was remembered."""

    query: Text
    k: int = Field(10, ge=1, le=1000, description="How many at most")
    mode: Literal["hybrid", "dense", "text"] = Field("hybrid", description="By meaning and words, meaning, or words")
    where: dict[str, Any] | list[dict[str, Any]] | None = Field(None, description="Conditions on metadata")
    namespace: Namespace | None = Field(NAMESPACE, description="Part of the store; null is all of it")
    min_score: float | None = Field(None, description="Leave out what scores less")
    diversity: float = Field(0.0, ge=0, le=1, description="How much a record loses for being like those before it")


class Name(Body):
    """A record, by its name."""

    id: str = Field(min_length=1, max_length=200)
    namespace: Namespace = NAMESPACE

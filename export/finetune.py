"""Contrastive fine-tuning of an encoder and its agents' prototypes.

Every task is pulled to its agent's prototype and pushed from the others by two losses on cosine
similarities:

* InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) over the prototypes, temperature 0.07;
* a triplet margin loss (Schroff et al. 2015, arXiv:1503.03832), margin 0.5, whose negative is the
  agent that the author noted as the tempting wrong one, or else the nearest wrong prototype.

A third term keeps the encoder from collapsing into one point per agent. It pulls the batch's
pairwise similarities to those of a vector that is the base model's beside a one-hot label, in fixed
shares: ``(1 - s) * base + s * [same agent]``. What a text is about stays in its vector, which
retrieval and agents that were never trained live on.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from edge.agents import Agent, load_agents
from edge.errors import MissingExtra
from export.checkpoint import Checkpoint, Head, load_checkpoint, save_checkpoint
from export.dataset import OUT_OF_SCOPE, Example, load_commits, load_dataset
from export.errors import RecipeError
from export.recipe import Recipe, Train
from export.wrapper import SentenceEncoder


@dataclass(frozen=True, slots=True)
class _Rows:
    """Tokenised examples, ready for batching."""

    ids: list[list[int]]
    label: torch.Tensor  # (n,) int64, index of a prototype
    near: torch.Tensor  # (n,) int64, -1 where there is none
    weight: torch.Tensor  # (n,) float32
    base: torch.Tensor  # (n, dim) float32, the base model's vectors


def finetune(recipe: Recipe, out: Path, *, commits: Path | None = None, quiet: bool = False) -> dict[str, Any]:
    """Train the recipe's checkpoint and write it to ``out`` with metrics and plots.

    The epoch with the best dev accuracy (in-scope tasks, nearest prototype) is kept.

    Args:
        recipe: What to train and how.
        out: Folder for the checkpoint, ``metrics.json`` and ``training.png``.
        commits: File of commit subjects; needed if the recipe gives them a weight.
        quiet: No progress bar.

    Returns:
        The content of ``metrics.json``.

    Raises:
        RecipeError: Data or base weights are not what the recipe says.
    """
    if out.exists() and not (out / "metrics.json").exists():
        raise RecipeError(
            f"{out}: exists and is no checkpoint of an earlier training. Choose another folder for --out."
        )
    agents = load_agents(recipe.resolve(recipe.agents))
    names = [agent.name for agent in agents]
    dataset = load_dataset(recipe, names)
    examples = list(dataset.train)
    if recipe.commits.weight > 0:
        if commits is None:
            raise RecipeError(
                f"{recipe.path}: trains on commit subjects, which are not in the repository. Give a file of "
                '{"task", "agent"} lines with --commits, or set weight = 0 under [commits].'
            )
        examples += load_commits(commits, recipe, names, dataset)
    settings = recipe.train
    if importlib.util.find_spec("matplotlib") is None:  # asked now, not after an hour of training
        raise MissingExtra("ruvltra-export finetune", "train")
    if settings.epochs < 1:
        raise RecipeError(f"{recipe.path}: train: epochs must be at least 1. Correct it.")
    torch.manual_seed(settings.seed)
    checkpoint = load_checkpoint(recipe.base_folder())
    model = SentenceEncoder(checkpoint.backbone)

    base = _embed(model, checkpoint.tokenize([e.task for e in examples], settings.max_tokens), quiet, "base vectors")
    rows = _rows(checkpoint, examples, names, settings, base)
    prototypes = nn.Parameter(_initial_prototypes(checkpoint, model, agents, rows, base, settings))
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "lr": settings.learning_rate},
            {
                "params": [p for p in model.parameters() if p.ndim <= 1],
                "lr": settings.learning_rate,
                "weight_decay": 0.0,
            },
            {"params": [prototypes], "lr": settings.head_learning_rate, "weight_decay": 0.0},
        ],
        weight_decay=settings.weight_decay,
    )
    authored = len(dataset.train)
    drawn = authored + int(recipe.commits.share * (len(examples) - authored))
    total = settings.epochs * math.ceil(drawn / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total, settings.warmup))
    epochs: list[dict[str, float]] = []
    best_epoch, best = 0, -1.0
    for epoch in range(settings.epochs):
        started = time.monotonic()
        model.train()
        sums = {"loss": 0.0, "infonce": 0.0, "triplet": 0.0, "retention": 0.0}
        batches = list(_batches(rows, authored, drawn, settings, epoch))
        bar = tqdm(batches, desc=f"epoch {epoch + 1}/{settings.epochs}", disable=quiet, unit="batch")
        for step, index in enumerate(bar, 1):
            terms = _losses(model, prototypes, rows, index, settings)
            loss = terms["infonce"] + settings.triplet_weight * terms["triplet"]
            loss = loss + settings.retention_weight * terms["retention"]
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_([*model.parameters(), prototypes], settings.gradient_clip)
            optimizer.step()
            schedule.step()
            for name, value in {"loss": loss, **terms}.items():
                sums[name] += float(value.detach())
            bar.set_postfix(loss=f"{sums['loss'] / step:.3f}")
        head = _head(names, prototypes)
        measured = {name: value / len(batches) for name, value in sums.items()}
        measured |= _evaluate(checkpoint, model, head, dataset.dev, settings)
        measured["seconds"] = time.monotonic() - started
        epochs.append(measured)
        if not quiet:
            tqdm.write(f"epoch {epoch + 1}: " + "  ".join(f"{k} {v:.4f}" for k, v in measured.items()))
        if measured["dev_accuracy"] > best:
            best_epoch, best = epoch + 1, measured["dev_accuracy"]
            best_weights = {name: value.clone() for name, value in checkpoint.backbone.state_dict().items()}
            best_head = head
    metrics: dict[str, Any] = {
        "recipe": recipe.name,
        "split_sha256": dataset.digest(),
        "examples": {
            "train": len(dataset.train),
            "dev": len(dataset.dev),
            "test": len(dataset.test),
            "commits": len(examples) - len(dataset.train),
        },
        "settings": asdict(settings),
        "versions": {"torch": torch.__version__},
        "best_epoch": best_epoch,
        "epochs": epochs,
    }
    checkpoint.backbone.load_state_dict(best_weights)
    partial = out.with_name(out.name + ".partial")
    try:
        save_checkpoint(partial, checkpoint, best_head)
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        _plot(partial / "training.png", epochs)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return metrics


def _rate(step: int, total: int, warmup: float) -> float:
    """Linear warm-up, then cosine decay to zero."""
    rising = max(1, int(total * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def _rows(
    checkpoint: Checkpoint, examples: list[Example], names: list[str], settings: Train, base: torch.Tensor
) -> _Rows:
    position = {name: i for i, name in enumerate([*names, OUT_OF_SCOPE])}
    return _Rows(
        ids=checkpoint.tokenize([e.task for e in examples], settings.max_tokens),
        label=torch.tensor([position[e.agent] for e in examples]),
        near=torch.tensor([position[e.near] if e.near else -1 for e in examples]),
        weight=torch.tensor([e.weight for e in examples], dtype=torch.float32),
        base=base,
    )


def _initial_prototypes(
    checkpoint: Checkpoint,
    model: SentenceEncoder,
    agents: list[Agent],
    rows: _Rows,
    base: torch.Tensor,
    settings: Train,
) -> torch.Tensor:
    """Mean base vector of each agent's tasks and its description; (agents + 1, dim), the last out of scope."""
    described = _embed(model, checkpoint.tokenize([a.description or a.name for a in agents], settings.max_tokens))
    authored = rows.weight == 1.0
    means = []
    for label in range(len(agents) + 1):
        members = base[(rows.label == label) & authored]
        if label < len(agents):
            members = torch.cat([members, described[label : label + 1]])
        elif len(members) == 0:
            members = -described.mean(0, keepdim=True)
        means.append(members.mean(0))
    return nn.functional.normalize(torch.stack(means), dim=1)


def _batches(rows: _Rows, authored: int, drawn: int, settings: Train, epoch: int) -> Iterator[torch.Tensor]:
    """All authored rows and a sample of the rest, ``drawn`` in all, in batches of similar lengths.

    Rows are shuffled, sorted by length within windows of 32 batches, and the batches shuffled.
    """
    generator = random.Random(settings.seed * 1000 + epoch)  # noqa: S311
    order = [*range(authored), *generator.sample(range(authored, len(rows.ids)), drawn - authored)]
    generator.shuffle(order)
    window = settings.batch_size * 32
    batches = []
    for start in range(0, len(order), window):
        chunk = sorted(order[start : start + window], key=lambda i: len(rows.ids[i]))
        batches += [chunk[i : i + settings.batch_size] for i in range(0, len(chunk), settings.batch_size)]
    generator.shuffle(batches)
    for batch in batches:
        yield torch.tensor(batch)


def _pad(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in ids)
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return padded, mask


def _losses(
    model: SentenceEncoder, prototypes: torch.Tensor, rows: _Rows, index: torch.Tensor, settings: Train
) -> dict[str, torch.Tensor]:
    vectors = model(*_pad([rows.ids[i] for i in index.tolist()]))
    label, near, weight = rows.label[index], rows.near[index], rows.weight[index]
    weight = weight / weight.sum().clamp(min=1e-6)
    cosine = vectors @ nn.functional.normalize(prototypes, dim=1).T
    infonce = (nn.functional.cross_entropy(cosine / settings.temperature, label, reduction="none") * weight).sum()
    own = cosine.gather(1, label[:, None]).squeeze(1)
    others = cosine.scatter(1, label[:, None], -2.0)
    rival = torch.where(near >= 0, cosine.gather(1, near.clamp(min=0)[:, None]).squeeze(1), others.max(1).values)
    triplet = (nn.functional.relu(settings.margin + rival - own) * weight).sum()
    base = rows.base[index]
    share = settings.label_share
    target = (1 - share) * (base @ base.T) + share * (label[:, None] == label[None, :]).float()
    retention = nn.functional.mse_loss(vectors @ vectors.T, target)
    return {"infonce": infonce, "triplet": triplet, "retention": retention}


def _head(names: list[str], prototypes: torch.Tensor) -> Head:
    unit = nn.functional.normalize(prototypes.detach(), dim=1)
    return Head(tuple(names), unit[:-1].clone(), unit[-1].clone())


@torch.no_grad()
def _embed(
    model: SentenceEncoder, ids: list[list[int]], quiet: bool = True, description: str = "embedding"
) -> torch.Tensor:
    model.eval()
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    result = torch.empty(len(ids), model.backbone.config.hidden_size)
    for start in tqdm(range(0, len(order), 128), desc=description, disable=quiet, unit="batch"):
        part = order[start : start + 128]
        result[part] = model(*_pad([ids[i] for i in part]))
    return result


def _evaluate(
    checkpoint: Checkpoint, model: SentenceEncoder, head: Head, dev: list[Example], settings: Train
) -> dict[str, float]:
    """Dev accuracy on in-scope tasks, on those with a tempting wrong agent, and retrieval kept."""
    scope = [e for e in dev if e.agent != OUT_OF_SCOPE]
    vectors = _embed(model, checkpoint.tokenize([e.task for e in scope], settings.max_tokens))
    best = (vectors @ head.prototypes.T).argmax(1).tolist()
    right = [head.agents[b] == e.agent for b, e in zip(best, scope, strict=True)]
    hard = [r for r, e in zip(right, scope, strict=True) if e.near]
    return {
        "dev_accuracy": sum(right) / max(1, len(right)),
        "dev_hard_accuracy": sum(hard) / max(1, len(hard)),
        "retrieval_mrr": _halves_mrr(checkpoint, model, [e.task for e in scope], settings),
    }


def _halves_mrr(checkpoint: Checkpoint, model: SentenceEncoder, tasks: list[str], settings: Train) -> float:
    """Mean reciprocal rank of a task's second half, sought by its first half among all second halves.

    It falls towards zero when the encoder keeps nothing but the agent.
    """
    words = [task.split() for task in tasks]
    words = [w for w in words if len(w) >= 8]
    first = _embed(model, checkpoint.tokenize([" ".join(w[: len(w) // 2]) for w in words], settings.max_tokens))
    second = _embed(model, checkpoint.tokenize([" ".join(w[len(w) // 2 :]) for w in words], settings.max_tokens))
    scores = first @ second.T
    rank = (scores > scores.diagonal()[:, None]).sum(1) + 1
    return float((1.0 / rank).mean())


def _plot(path: Path, epochs: list[dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    numbers = range(1, len(epochs) + 1)
    for name in ("infonce", "triplet", "retention"):
        left.plot(numbers, [e[name] for e in epochs], marker="o", label=name)
    left.set(xlabel="epoch", ylabel="mean loss", title="Training loss")
    left.legend()
    for name in ("dev_accuracy", "dev_hard_accuracy", "retrieval_mrr"):
        right.plot(numbers, [e[name] for e in epochs], marker="o", label=name.replace("_", " "))
    right.set(xlabel="epoch", ylim=(0, 1), title="Dev split")
    right.legend(loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

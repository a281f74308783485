"""Contrastive fine-tuning of an encoder and its agents' prototypes.

Every task is pulled to its agent's prototype and pushed from the others by the terms of
:mod:`export.losses`; the recipe weighs them, and a weight of 0 leaves a term out. Retention keeps
the encoder from collapsing into one point per agent: what a text is about stays in its vector, which
retrieval and agents that were never trained live on.

The state after each epoch is kept beside the output until training is done, so that a run that was
killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import random
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from edge.agents import Agent
from edge.errors import MissingExtra
from export import lora, losses
from export.checkpoint import Checkpoint, Head, save_checkpoint
from export.dataset import OUT_OF_SCOPE, Dataset, Example, Judged
from export.errors import RecipeError
from export.heads import choose_head
from export.nomic import NomicBert
from export.recipe import DEVICES, Lora, Train
from export.wrapper import SentenceEncoder, embed, forward

_PREFERENCES_A_STEP = 16  # judged tasks that join each batch


@dataclass(frozen=True, slots=True)
class Plan:
    """What to train from what on what.

    Attributes:
        name: For ``metrics.json``.
        start: Checkpoint to train; its head, if it is of the same agents, gives the first prototypes.
        reference: Checkpoint whose vectors are retained or imitated. They are computed before training
            begins, so that it may be ``start`` itself.
        agents: The agents of the labels.
        dataset: Tasks to train on and to judge by.
        extra: More tasks to train on, of which each epoch draws a share: commit subjects, whose labels
            are not to be trusted, and variations, whose weight as labelled tasks is 0.
        judged: Preferences, for the reward term.
        soft: A teacher's probabilities (agents, then out of scope) by task.
        settings: How.
        lora: Adapters to train in the weights' stead, if their rank is above 0.
    """

    name: str
    start: Checkpoint
    reference: Checkpoint
    agents: Sequence[Agent]
    dataset: Dataset
    settings: Train
    lora: Lora = field(default_factory=Lora)
    extra: Sequence[Example] = ()
    judged: Sequence[Judged] = ()
    soft: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the agents."""
        return [agent.name for agent in self.agents]

    def fingerprint(self) -> str:
        """Digest of all that decides a run, so that no run is resumed with another's state."""
        digest = hashlib.sha256(self.dataset.digest().encode())
        settings = (asdict(self.settings), asdict(self.lora))
        for part in (*settings, [*map(asdict, self.extra)], [*map(asdict, self.judged)]):
            digest.update(json.dumps(part, sort_keys=True).encode())
        for checkpoint in (self.start, self.reference):
            digest.update(checkpoint.backbone.get_input_embeddings().weight.detach().cpu().numpy().tobytes())
        for task, probabilities in sorted(self.soft.items()):
            digest.update(task.encode() + probabilities.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Rows:
    """Tokenised examples, ready for batching."""

    ids: list[list[int]]
    label: torch.Tensor  # (n,) int64, index of a prototype
    near: torch.Tensor  # (n,) int64, -1 where there is none
    weight: torch.Tensor  # (n,) float32
    reference: torch.Tensor  # (n, dim) float32, the reference's vectors; (n, 0) if not in use
    soft: torch.Tensor  # (n, agents + 1) float32, a teacher's probabilities; (0, agents + 1) if not in use
    authored: int  # the first so many have labels that are trusted


@dataclass(frozen=True, slots=True)
class _Judged:
    ids: list[list[int]]
    advantage: torch.Tensor  # (groups, agents) float32


class _Network(nn.Module):
    """The encoder, and (agents + 1, dim) prototypes."""

    def __init__(self, encoder: SentenceEncoder, prototypes: torch.Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.prototypes = nn.Parameter(prototypes)


def _trained(module: nn.Module) -> dict[str, torch.Tensor]:
    """What of a module's state changes in training: all of it but frozen parameters."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def _restore(module: nn.Module, trained: dict[str, torch.Tensor]) -> None:
    """Put back what ``_trained`` gave, all of it."""
    changing = _trained(module)
    frozen = {name: value for name, value in module.state_dict().items() if name not in changing}
    module.load_state_dict(frozen | trained)


class _Run:
    """What changes while training: weights, optimiser, averages, best epoch; saved and restored."""

    def __init__(self, plan: Plan, network: _Network, steps: int) -> None:
        self.settings = plan.settings
        self.fingerprint = plan.fingerprint()
        self.network = network
        self.steps = steps
        self.step = 0
        self.epochs: list[dict[str, float]] = []
        self.best_epoch = 0
        self.best: dict[str, torch.Tensor] = {}
        self.optimizer = torch.optim.AdamW(_parameter_groups(network, plan.settings), fused=True)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._average: AveragedModel | None = None
        if self.settings.average > 0:
            average = get_ema_multi_avg_fn(self.settings.average)  # type: ignore[no-untyped-call]
            self._average = AveragedModel(network, multi_avg_fn=average)

    def update(self, loss: torch.Tensor) -> None:
        """One step of the optimiser, at the schedule's rate."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * _rate(self.step, self.steps, self.settings.warmup)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.gradient_clip)
        self.optimizer.step()
        self.step += 1
        if self._average is not None:
            self._average.update_parameters(self.network)

    def averaged(self) -> _Network:
        """The network to judge and to keep: the average, where there is one."""
        if self._average is None:
            return self.network
        network = self._average.module
        assert isinstance(network, _Network)
        return network

    def finish_epoch(self, measured: dict[str, float], folder: Path) -> None:
        """Note an epoch's figures, keep its weights if they are the best so far, save the state."""
        self.epochs.append(measured)
        if len(self.epochs) == 1 or measured["dev_accuracy"] > self.epochs[self.best_epoch - 1]["dev_accuracy"]:
            self.best_epoch = len(self.epochs)
            self.best = {name: value.to("cpu", copy=True) for name, value in _trained(self.averaged()).items()}
        tensors = {f"network.{name}": value for name, value in _trained(self.network).items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors["random"] = torch.get_rng_state()
        device = self.network.prototypes.device
        if device.type != "cpu":
            tensors[f"random.{device.type}"] = torch.get_device_module(device).get_rng_state()
        if self._average is not None:
            tensors |= {f"average.{name}": value for name, value in _trained(self._average).items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        partial = folder.with_name(folder.name + ".new")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copies = {name: value.to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        save_file(copies, partial / "state.safetensors")
        note = {
            "fingerprint": self.fingerprint,
            "step": self.step,
            "best_epoch": self.best_epoch,
            "epochs": self.epochs,
        }
        (partial / "state.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    def resume(self, folder: Path) -> None:
        """Take up the state in ``folder``, if there is one.

        Raises:
            RecipeError: It is another run's, or it is broken.
        """
        if not folder.exists():
            return
        remedy = "Train with --restart to begin anew, or choose another --out."
        try:
            note = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "state.safetensors")
        except Exception as error:  # safetensors raises its own
            raise RecipeError(f"{folder}: the state of an earlier run cannot be read ({error}). {remedy}") from None
        if note["fingerprint"] != self.fingerprint:
            raise RecipeError(f"{folder}: holds a run with other settings, data or weights. {remedy}")

        def under(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        _restore(self.network, under("network."))
        self.best = under("best.")
        torch.set_rng_state(tensors["random"])
        device = self.network.prototypes.device
        if f"random.{device.type}" in tensors:
            torch.get_device_module(device).set_rng_state(tensors[f"random.{device.type}"])
        if self._average is not None:
            _restore(self._average, under("average."))
        state = self.optimizer.state_dict()
        for name, value in under("optimizer.").items():
            index, key = name.split(".")
            state["state"].setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(state)
        self.step, self.best_epoch, self.epochs = note["step"], note["best_epoch"], note["epochs"]


def finetune(plan: Plan, out: Path, *, restart: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Carry out a plan and write checkpoint, head, metrics and plots to ``out``.

    The epoch with the best dev accuracy (in-scope tasks, nearest prototype) is kept.

    Args:
        plan: What to train and how.
        out: Folder for the checkpoint, ``metrics.json`` and ``training.png``.
        restart: Do not resume a run that was killed.
        quiet: No progress bar.

    Returns:
        The content of ``metrics.json``.

    Raises:
        RecipeError: The data or ``out`` cannot be used, or ``out`` holds the state of another run.
    """
    settings = plan.settings
    if plan.start.dense or isinstance(plan.start.backbone, NomicBert):
        raise RecipeError(f"{plan.name}: a base with dense layers, or a nomic-bert, is not trained. Use another base.")
    if out.exists() and not (out / "metrics.json").exists():
        raise RecipeError(
            f"{out}: exists and is no checkpoint of an earlier training. Choose another folder for --out."
        )
    needed = ["matplotlib"] + ["peft"] * (plan.lora.rank > 0)
    if any(importlib.util.find_spec(name) is None for name in needed):  # asked now, not after an hour of training
        raise MissingExtra("ruvltra-export finetune", "train")
    if settings.epochs < 1:
        raise RecipeError(f"{plan.name}: epochs must be at least 1. Correct the recipe.")
    resuming = out.with_name(out.name + ".resume")
    if restart:
        shutil.rmtree(resuming, ignore_errors=True)
    torch.manual_seed(settings.seed)
    device = _device(settings.device)
    if plan.lora.rank > 0:
        lora.attach(plan.start.backbone, plan.lora)
    for checkpoint in (plan.start, plan.reference):
        checkpoint.encoder().to(device)  # in place
    examples = [*plan.dataset.train, *plan.extra]
    rows = _rows(plan, examples, quiet)
    judged = _judged(plan)
    network = _Network(plan.start.encoder(), _initial_prototypes(plan, rows)).to(device)
    drawn = rows.authored + int(settings.extra_share * (len(examples) - rows.authored))
    run = _Run(plan, network, settings.epochs * math.ceil(drawn / settings.batch_size))
    run.resume(resuming)
    if run.epochs and not quiet:
        tqdm.write(f"resumed after epoch {len(run.epochs)}")
    for epoch in range(len(run.epochs), settings.epochs):
        started = time.monotonic()
        negatives = _mine(network, rows, settings) if settings.hard_negatives else None
        batches = _batches(rows, drawn, settings, epoch, negatives)
        network.train()
        sums: dict[str, float] = {}
        bar = tqdm(batches, desc=f"epoch {epoch + 1}/{settings.epochs}", disable=quiet, unit="batch")
        for done, index in enumerate(bar, 1):
            terms = _losses(network, rows, index, settings)
            if judged is not None:
                terms["reward"] = _reward(network, judged, run.step, settings)
            weights = _weights(settings)
            loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
            run.update(loss)
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            bar.set_postfix({name: f"{value / done:.3f}" for name, value in sums.items()})
        measured = {name: value / len(batches) for name, value in sums.items()}
        measured |= _evaluate(plan, run.averaged())
        measured["seconds"] = time.monotonic() - started
        if not quiet:
            tqdm.write(f"epoch {epoch + 1}: " + "  ".join(f"{k} {v:.4f}" for k, v in measured.items()))
        run.finish_epoch(measured, resuming)
    _restore(network, run.best)
    if plan.lora.rank > 0:
        lora.merge(plan.start.backbone)
    parts = {
        part: (
            embed(
                network.encoder,
                plan.start.tokenize([e.task for e in members], settings.max_tokens),
                settings.precision,
            ),
            torch.tensor([_position(plan, e.agent) for e in members]),
        )
        # Embedding the train part takes minutes, and only further heads need it.
        for part, members in (("train", plan.dataset.train if settings.heads else []), ("dev", plan.dataset.dev))
    }
    head, compared = choose_head(_head(plan.names, network), parts, settings.heads)
    metrics: dict[str, Any] = {
        "recipe": plan.name,
        "split_sha256": plan.dataset.digest(),
        "examples": {
            "train": len(plan.dataset.train),
            "dev": len(plan.dataset.dev),
            "test": len(plan.dataset.test),
            "extra": len(plan.extra),
            "judged": len(plan.judged),
            "soft": len(plan.soft),
        },
        "settings": asdict(settings),
        "lora": asdict(plan.lora),
        "device": device.type,
        "versions": {"torch": torch.__version__},
        "best_epoch": run.best_epoch,
        "heads": compared,
        "epochs": run.epochs,
    }
    network.cpu()
    _write(out, plan.start, head, metrics)
    shutil.rmtree(resuming, ignore_errors=True)
    return metrics


def _device(name: str) -> torch.device:
    """Where to train: ``cuda``, ``mps`` or ``cpu``, or by ``auto`` the first of these that torch has here.

    Raises:
        RecipeError: It has it not.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in DEVICES if there[kind])
    elif not there[name]:
        raise RecipeError(
            f"train: torch {torch.__version__} finds no device {name!r} here. Install a torch that has it, or set "
            "device = 'auto'."
        )
    return torch.device(name)


def _write(out: Path, checkpoint: Checkpoint, head: Head, metrics: dict[str, Any]) -> None:
    partial = out.with_name(out.name + ".partial")
    try:
        save_checkpoint(partial, checkpoint, head)
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        _plot(partial / "training.png", metrics["epochs"])
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rate(step: int, total: int, warmup: float) -> float:
    """Linear warm-up, then cosine decay to zero."""
    rising = max(1, int(total * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def _parameter_groups(network: _Network, settings: Train) -> list[dict[str, Any]]:
    """What is trained. Rates fall by ``layer_decay`` from layer to layer downwards; biases and norms do not decay."""
    backbone = network.encoder.backbone
    layers = int(backbone.config.num_hidden_layers)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in backbone.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = re.search(r"\blayers?\.(\d+)\.", name)  # an encoder's "layer", a decoder's "layers"
        depth = int(layer[1]) + 1 if layer else 0
        rate = settings.learning_rate * settings.layer_decay ** (layers - depth)
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        *({"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()),
        {"params": [network.prototypes], "lr": settings.head_learning_rate, "weight_decay": 0.0},
    ]


def _position(plan: Plan, agent: str) -> int:
    return len(plan.agents) if agent == OUT_OF_SCOPE else plan.names.index(agent)


def _rows(plan: Plan, examples: list[Example], quiet: bool) -> _Rows:
    settings = plan.settings
    position = {name: i for i, name in enumerate([*plan.names, OUT_OF_SCOPE])}
    texts = [e.task for e in examples]
    reference = torch.empty(len(texts), 0)
    if {"retention", "imitation"} & _weights(settings).keys():
        reference = embed(
            plan.reference.encoder(),
            plan.reference.tokenize(texts, settings.max_tokens),
            settings.precision,
            "" if quiet else "reference vectors",
        )
    label = torch.tensor([position[e.agent] for e in examples])
    soft = torch.empty(0, len(position))
    if settings.soft_weight > 0:
        # Tasks that the teacher did not see keep their label.
        soft = nn.functional.one_hot(label, len(position)).float()
        for row, text in enumerate(texts):
            if text in plan.soft:
                soft[row] = plan.soft[text]
    return _Rows(
        ids=plan.start.tokenize(texts, settings.max_tokens),
        label=label,
        near=torch.tensor([position[e.near] if e.near else -1 for e in examples]),
        weight=torch.tensor([e.weight for e in examples], dtype=torch.float32),
        reference=reference,
        soft=soft,
        authored=len(plan.dataset.train),
    )


def _judged(plan: Plan) -> _Judged | None:
    if plan.settings.reward_weight <= 0 or not plan.judged:
        return None
    position = {name: i for i, name in enumerate(plan.names)}
    scores = torch.full((len(plan.judged), len(position)), torch.nan)
    for row, judged in enumerate(plan.judged):
        for agent, score in judged.scores:
            scores[row, position[agent]] = score
    return _Judged(
        plan.start.tokenize([judged.task for judged in plan.judged], plan.settings.max_tokens),
        losses.advantages(scores, plan.settings.reward_clip),
    )


def _initial_prototypes(plan: Plan, rows: _Rows) -> torch.Tensor:
    """(agents + 1, dim), the last out of scope.

    Those of the starting checkpoint; without them, the mean vector of each agent's authored tasks
    and its description.
    """
    names, head = plan.names, plan.start.head
    if head is not None and list(head.agents) == names:
        return torch.cat([nn.functional.normalize(head.prototypes.mean(1), dim=1), head.out_of_scope[None]])
    settings = plan.settings
    model = plan.start.encoder()
    descriptions = plan.start.tokenize([a.description or a.name for a in plan.agents], settings.max_tokens)
    described = embed(model, descriptions, settings.precision)
    vectors = embed(model, rows.ids[: rows.authored], settings.precision)
    means = []
    for label in range(len(names) + 1):
        members = vectors[rows.label[: rows.authored] == label]
        if label < len(names):
            members = torch.cat([members, described[label : label + 1]])
        elif len(members) == 0:
            members = -described.mean(0, keepdim=True)
        means.append(members.mean(0))
    return nn.functional.normalize(torch.stack(means), dim=1)


@torch.no_grad()
def _mine(network: _Network, rows: _Rows, settings: Train) -> list[int]:
    """For each authored task the nearest one of an agent that the current model confuses with its own.

    Confusable are the three agents whose prototypes come nearest to the agent's tasks.
    """
    vectors = embed(network.encoder, rows.ids[: rows.authored], settings.precision)
    label = rows.label[: rows.authored]
    unit = nn.functional.normalize(network.prototypes, dim=1).cpu()
    count = len(unit)
    similarity = torch.stack([(vectors[label == a] @ unit.T).mean(0) for a in range(count)]).nan_to_num(-1.0)
    similarity.fill_diagonal_(-torch.inf)
    confusable = torch.zeros(count, count, dtype=torch.bool)
    confusable.scatter_(1, similarity.topk(min(3, count - 1), dim=1).indices, True)
    nearest = []
    for start in range(0, len(vectors), 1024):
        scores = vectors[start : start + 1024] @ vectors.T
        allowed = confusable[label[start : start + 1024]][:, label]
        nearest.append(scores.masked_fill(~allowed, -torch.inf).argmax(1))
    result: list[int] = torch.cat(nearest).tolist()
    return result


def _batches(
    rows: _Rows, drawn: int, settings: Train, epoch: int, negatives: list[int] | None = None
) -> list[torch.Tensor]:
    """All authored rows and a sample of the rest, ``drawn`` in all, in batches of similar lengths.

    Rows are shuffled, sorted by length within windows of 32 batches, and the batches shuffled. With
    ``negatives`` a task comes in the same batch as its hard negative, unless another task has it.
    """
    generator = random.Random(settings.seed * 1000 + epoch)  # noqa: S311
    order = [*range(rows.authored), *generator.sample(range(rows.authored, len(rows.ids)), drawn - rows.authored)]
    generator.shuffle(order)
    units, taken = [], set()
    for row in order:
        if row in taken:
            continue
        unit = [row]
        if negatives is not None and row < rows.authored and negatives[row] not in taken and negatives[row] != row:
            unit.append(negatives[row])
        taken.update(unit)
        units.append(unit)
    batches: list[list[int]] = []
    window = settings.batch_size * 32
    position = 0
    while position < len(units):
        chunk: list[list[int]] = []
        size = 0
        while position < len(units) and size < window:
            chunk.append(units[position])
            size += len(units[position])
            position += 1
        chunk.sort(key=lambda unit: max(len(rows.ids[i]) for i in unit))
        flat = [row for unit in chunk for row in unit]
        batches += [flat[i : i + settings.batch_size] for i in range(0, len(flat), settings.batch_size)]
    generator.shuffle(batches)
    return [torch.tensor(batch) for batch in batches]


def _weights(settings: Train) -> dict[str, float]:
    """Weights of the terms that are in use."""
    weights = {
        "infonce": settings.infonce_weight,
        "triplet": settings.triplet_weight,
        "retention": settings.retention_weight,
        "imitation": settings.imitation_weight,
        "soft": settings.soft_weight,
        "reward": settings.reward_weight,
    }
    return {name: weight for name, weight in weights.items() if weight > 0}


def _losses(network: _Network, rows: _Rows, index: torch.Tensor, settings: Train) -> dict[str, torch.Tensor]:
    """The terms in use, each a weighted mean over the batch; the reward's comes from other tasks."""
    vectors = forward(network.encoder, [rows.ids[i] for i in index.tolist()], settings.precision)

    def of_batch(values: torch.Tensor) -> torch.Tensor:
        return values[index].to(vectors.device)

    label, near, weight = of_batch(rows.label), of_batch(rows.near), of_batch(rows.weight)
    weight = weight / weight.sum().clamp(min=1e-6)
    cosine = vectors @ nn.functional.normalize(network.prototypes, dim=1).T
    others = None
    if settings.in_batch_negatives:
        others = losses.in_batch_negatives(vectors, label, (index < rows.authored).to(vectors.device))
    terms = {
        "infonce": lambda: (losses.infonce(cosine, label, settings.temperature, others) * weight).sum(),
        "triplet": lambda: (losses.triplet(cosine, label, near, settings.margin) * weight).sum(),
        "retention": lambda: losses.retention(vectors, of_batch(rows.reference), label, settings.label_share),
        "imitation": lambda: losses.imitation(vectors, of_batch(rows.reference)).mean(),
        "soft": lambda: losses.soft_labels(cosine, of_batch(rows.soft), settings.temperature).mean(),
    }
    return {name: terms[name]() for name in _weights(settings) if name in terms}


def _reward(network: _Network, judged: _Judged, step: int, settings: Train) -> torch.Tensor:
    """The reward term of the step's share of the judged tasks."""
    start = step * _PREFERENCES_A_STEP
    index = [i % len(judged.ids) for i in range(start, start + min(_PREFERENCES_A_STEP, len(judged.ids)))]
    vectors = forward(network.encoder, [judged.ids[i] for i in index], settings.precision)
    cosine = vectors @ nn.functional.normalize(network.prototypes, dim=1).T
    return losses.reward(cosine, judged.advantage[index].to(vectors.device), settings.temperature).mean()


def _head(names: list[str], network: _Network) -> Head:
    unit = nn.functional.normalize(network.prototypes.detach(), dim=1).cpu()
    return Head(tuple(names), unit[:-1, None].clone(), unit[-1].clone())


def _evaluate(plan: Plan, network: _Network) -> dict[str, float]:
    """Dev accuracy on in-scope tasks, on those with a tempting wrong agent, and retrieval kept."""
    settings = plan.settings
    scope = [e for e in plan.dataset.dev if e.agent != OUT_OF_SCOPE]
    if not scope:
        return {"dev_accuracy": 0.0, "dev_hard_accuracy": 0.0, "retrieval_mrr": 0.0}
    head = _head(plan.names, network)
    ids = plan.start.tokenize([e.task for e in scope], settings.max_tokens)
    vectors = embed(network.encoder, ids, settings.precision)
    best = (vectors @ head.prototypes[:, 0].T).argmax(1).tolist()
    right = [head.agents[b] == e.agent for b, e in zip(best, scope, strict=True)]
    hard = [r for r, e in zip(right, scope, strict=True) if e.near]
    return {
        "dev_accuracy": sum(right) / len(right),
        "dev_hard_accuracy": sum(hard) / max(1, len(hard)),
        "retrieval_mrr": _halves_mrr(plan, network.encoder, [e.task for e in scope]),
    }


def _halves_mrr(plan: Plan, model: SentenceEncoder, tasks: list[str]) -> float:
    """Mean reciprocal rank of a task's second half, sought by its first half among all second halves.

    It falls towards zero when the encoder keeps nothing but the agent.
    """
    words = [task.split() for task in tasks]
    words = [w for w in words if len(w) >= 8]
    if not words:
        return 0.0
    halves = ([" ".join(w[: len(w) // 2]) for w in words], [" ".join(w[len(w) // 2 :]) for w in words])
    first, second = (
        embed(model, plan.start.tokenize(texts, plan.settings.max_tokens), plan.settings.precision) for texts in halves
    )
    scores = first @ second.T
    rank = (scores > scores.diagonal()[:, None]).sum(1) + 1
    return float((1.0 / rank).mean())


def _plot(path: Path, epochs: list[dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    numbers = range(1, len(epochs) + 1)
    for name in ("infonce", "triplet", "retention", "imitation", "soft", "reward"):
        if name in epochs[0]:
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

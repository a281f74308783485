"""Made-up variations of tasks, for a student to learn a teacher's answers on.

They need not make sense and have no label of their own: a student that agrees with its teacher on
texts that nobody would write agrees with it on those that somebody will (data augmentation for
distillation as in TinyBERT, Jiao et al. 2020, arXiv:1909.10351; here without a language model).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

_FEWEST_WORDS = 4


def variations(tasks: Sequence[str], copies: int, seed: int) -> list[str]:
    """``copies`` variations of each task of four words or more; the same for the same input.

    One in two takes the beginning of the task and the end of another one, one in four a part of it,
    one in four leaves out every sixth word or so.
    """
    generator = random.Random(seed)  # noqa: S311
    words = [split for task in tasks if len(split := task.split()) >= _FEWEST_WORDS]
    result = []
    for _ in range(copies):
        for own in words:
            kind = generator.random()
            if kind < 0.5:
                other = generator.choice(words)
                changed = own[: _cut(own, generator)] + other[_cut(other, generator) :]
            elif kind < 0.75:
                length = max(3, round(len(own) * generator.uniform(0.5, 0.9)))
                start = generator.randint(0, len(own) - length)
                changed = own[start : start + length]
            else:
                changed = [word for word in own if generator.random() > 1 / 6] or own
            result.append(" ".join(changed))
    return list(dict.fromkeys(result))


def _cut(words: list[str], generator: random.Random) -> int:
    return max(1, round(len(words) * generator.uniform(0.35, 0.65)))

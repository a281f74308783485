"""A GGUF file's vocabulary and merges as one ``tokenizer.json``."""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from export.errors import CheckpointError
from export.gguf import GgufFile

_REMEDY = "Export the model's Hugging Face folder instead."
# Kinds of token, as `tokenizer.ggml.token_type` numbers them.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _pre_gpt2(digits: bool) -> list[pre_tokenizers.PreTokenizer]:
    alone = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    return [*alone, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _pre_words(digits: str) -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(Regex(_WORDS % digits), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# How text is cut before pairs are merged, by the name under `tokenizer.ggml.pre`. A wrong guess gives
# other tokens without a word, so that an unknown name is an error.
_PRE: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "modern-bert", "jina-v2-es", "jina-v2-de", "mpt", "olmo"), ("gpt2", "")),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), ("gpt2", "digits")),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), ("words", "")),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), ("words", "{1,3}")),
}
PRE_TOKENIZERS = tuple(_PRE)
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token is not merged again
_COMPOSED = ("qwen2", "deepseek-r1-qwen")  # the originals compose characters (NFC); llama.cpp does not


def tokenizer_of(file: GgufFile) -> Tokenizer:
    """Build the tokenizer, with what it adds at the ends of a text.

    Byte-level BPE (``gpt2``), SentencePiece BPE with byte fallback (``llama``) and WordPiece (``bert``).

    Raises:
        CheckpointError: The kind is not supported, or the vocabulary contradicts itself.
    """
    vocabulary = _Vocabulary(file)
    build = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _wordpiece}.get(vocabulary.kind)
    if build is None:
        raise CheckpointError(
            f"{file.path}: tokenizer {vocabulary.kind!r} is not supported, only gpt2, llama and bert. {_REMEDY}"
        )
    tokenizer = build(vocabulary)
    vocabulary.add_special(tokenizer)
    first, last = vocabulary.ends()
    if first or last:
        text = vocabulary.tokens
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(text[i] for i in first), "$A", *(text[i] for i in last)],
            special_tokens=[(text[i], i) for i in sorted({*first, *last})],
        )
    return tokenizer


class _Vocabulary:
    """The file's tokens and what it says of them."""

    def __init__(self, file: GgufFile) -> None:
        self.path = file.path
        self._file = file
        self.kind = file.text("tokenizer.ggml.model")
        self.pre = file.text("tokenizer.ggml.pre")
        self.tokens = file.texts("tokenizer.ggml.tokens")
        count = len(self.tokens)
        if not count:
            raise CheckpointError(f"{file.path}: holds no tokenizer. {_REMEDY}")
        if len(set(self.tokens)) < count:
            raise CheckpointError(f"{file.path}: two tokens have the same text. {_REMEDY}")
        types = file.numbers("tokenizer.ggml.token_type")
        if types is not None and len(types) != count:
            raise CheckpointError(f"{file.path}: {count} tokens, but {len(types)} token types. {_REMEDY}")
        self.types: list[int] = [1] * count if types is None else types.astype(int).tolist()
        self.scores = file.numbers("tokenizer.ggml.scores")
        self.merges = file.texts("tokenizer.ggml.merges")

    def flag(self, key: str, default: bool) -> bool:
        """What the file says that the tokenizer does."""
        return self._file.flag(f"tokenizer.ggml.{key}", default)

    def id(self, key: str) -> int | None:
        """Id of a special token, or None."""
        return self._file.token(key, len(self.tokens))

    def ends(self) -> tuple[list[int], list[int]]:
        """Ids put before and after a text."""
        if self.kind == "bert":
            first = self.id("cls") if self.id("cls") is not None else self.id("bos")
            # The key was misspelt for years, and files still carry it.
            last = next((i for key in ("seperator", "sep", "eos") if (i := self.id(key)) is not None), None)
            return self._needed("cls", first), self._needed("sep", last)
        bos = self.flag("add_bos_token", self.kind == "llama" or self.pre in _WHOLE_WORDS_FIRST)
        eos = self.flag("add_eos_token", False)
        return (self._needed("bos", self.id("bos")) if bos else []), (
            self._needed("eos", self.id("eos")) if eos else []
        )

    def _needed(self, key: str, value: int | None) -> list[int]:
        if value is None:
            raise CheckpointError(
                f"{self.path}: its tokenizer adds a {key} token to texts, but the file names none. {_REMEDY}"
            )
        return [value]

    def add_special(self, tokenizer: Tokenizer) -> None:
        """Control tokens, and those that users defined, are found in texts before anything else."""
        added = [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED) or (kind == _UNKNOWN and self.kind == "bert")
        ]
        tokenizer.add_tokens([token for token in added if not token.special])
        tokenizer.add_special_tokens([token for token in added if token.special])


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    if vocabulary.pre not in _PRE:
        raise CheckpointError(
            f"{vocabulary.path}: the pre-tokenizer {vocabulary.pre!r} is not known to this version, only "
            f"{', '.join(PRE_TOKENIZERS)}. {_REMEDY}"
        )
    family, digits = _PRE[vocabulary.pre]
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = []
    for line in vocabulary.merges:
        left, _, right = line.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(f"{vocabulary.path}: the merge {line!r} is of tokens that do not exist. {_REMEDY}")
        merges.append((left, right))
    if not merges:
        raise CheckpointError(f"{vocabulary.path}: has no merges. {_REMEDY}")
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=vocabulary.pre in _WHOLE_WORDS_FIRST))
    if vocabulary.pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    steps = _pre_gpt2(bool(digits)) if family == "gpt2" else _pre_words(digits)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    scores = vocabulary.scores
    if scores is None or len(scores) != len(vocabulary.tokens) or not np.isfinite(scores).all():
        raise CheckpointError(f"{vocabulary.path}: lacks a finite score for each token. {_REMEDY}")
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    # SentencePiece merges whatever neighbours give the token of the highest score, so that every way of
    # cutting a token in two is a merge of that token's rank.
    merges = []
    for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True):
        if kind in (_UNKNOWN, _CONTROL, _BYTE):
            continue
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
        merges += [(-float(score), ids[left], ids[right], left, right) for left, right in cuts]
    merges.sort()
    unknown = vocabulary.id("unknown")
    tokenizer = Tokenizer(
        models.BPE(
            ids,
            [(left, right) for *_, left, right in merges],
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = vocabulary.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    return tokenizer


def _wordpiece(vocabulary: _Vocabulary) -> Tokenizer:
    # llama.cpp marks beginnings of words ("▁fix"), WordPiece the rest ("##ing").
    ids: dict[str, int] = {}
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        special = kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or (token.startswith("[") and token.endswith("]"))
        ids[token if special else token[1:] if token.startswith("▁") else f"##{token}"] = i
    if len(ids) < len(vocabulary.tokens):
        raise CheckpointError(f"{vocabulary.path}: two tokens have the same text. {_REMEDY}")
    vocabulary.tokens = list(ids)
    unknown = vocabulary.id("unknown")
    lower = not any(token != token.lower() for token in ids if not token.startswith("["))
    tokenizer = Tokenizer(
        models.WordPiece(
            ids, unk_token="[UNK]" if unknown is None else vocabulary.tokens[unknown], max_input_chars_per_word=100
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer

"""Prompts of indirect-object identification, and their corrupted twins.

"When Mary and John went to the store, John gave a drink to" goes on with " Mary": the indirect
object (IO), not the subject (S), which stands twice (S1, S2). END is the last token.

Source: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593); templates after theirs.
"""

import logging
import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

logger = logging.getLogger("sae_lens_qk")

Name = Literal["io", "s1", "s2"]
Twin = Literal["third_name", "other_io", "swapped"]
Order = Literal["ABBA", "BABA"]

TEMPLATES = (
    "When {first} and {second} went to the {place}, {subject} gave a {object} to",
    "After {first} and {second} went to the {place}, {subject} gave a {object} to",
    "While {first} and {second} were at the {place}, {subject} handed a {object} to",
    "Then, {first} and {second} went to the {place}. {subject} gave a {object} to",
    "Then, {first} and {second} were working at the {place}. "
    "{subject} decided to give a {object} to",
    "Then, {first} and {second} had a long argument, and afterwards {subject} said to",
    "Afterwards, {first} and {second} went to the {place}. {subject} gave a {object} to",
    "The {place} {first} and {second} went to had a {object}. {subject} gave it to",
)
NAMES = tuple(
    """Mary John Tom James Dan Martin Sarah Michael David Laura Alice Bob Anna Peter Paul Mark
    Emily Kate Jack Henry George Robert Lucy Emma Simon Adam Rachel Amy Lisa Jane Susan Helen Alex
    Steven Kevin Brian Eric Ryan Daniel Thomas William Richard Charles Joseph Edward Frank Jason
    Matthew Andrew Joshua Nicole Jessica Jennifer Elizabeth Linda Karen Nancy Margaret Ruth Sharon
    Michelle Carol Amanda Melissa Stephanie Rebecca Angela Anne Max Sam Ben""".split()
)
PLACES = tuple("store garden restaurant school hospital office house station park market".split())
OBJECTS = tuple("ring bone drink book gift computer snack pen letter ball".split())


class IOIPrompts(NamedTuple):
    """Prompts of one length; the last token is END."""

    tokens: Int[Tensor, "prompt pos"]
    io_pos: Int[Tensor, " prompt"]
    s1_pos: Int[Tensor, " prompt"]
    s2_pos: Int[Tensor, " prompt"]
    io_token: Int[Tensor, " prompt"]
    s_token: Int[Tensor, " prompt"]
    third_token: Int[Tensor, " prompt"]
    """A name that is neither, for the twins."""

    def to(self, device: torch.device | str) -> "IOIPrompts":
        return IOIPrompts(*(tensor.to(device) for tensor in self))

    def twin(self, kind: Twin) -> "IOIPrompts":
        """The prompts with one name replaced, the same length token by token.

        Args:
            kind: third_name: S2 becomes a third name, so that no name stands twice; other_io: IO
                becomes a third name, which is then the indirect object; swapped: S2 becomes IO, so
                that S1 is the indirect object, while the fields go on calling it S1.
        Raises:
            ValueError: unknown kind.
        """
        if kind not in get_args(Twin):
            raise ValueError(f"kind must be one of {get_args(Twin)}, got {kind!r}.")
        position = self.io_pos if kind == "other_io" else self.s2_pos
        name = self.io_token if kind == "swapped" else self.third_token
        tokens = self.tokens.scatter(1, position[:, None], name[:, None])
        if kind == "other_io":
            return self._replace(
                tokens=tokens, io_token=self.third_token, third_token=self.io_token
            )
        return self._replace(tokens=tokens)

    @property
    def positions(self) -> Int[Tensor, "prompt name"]:
        """Where IO, S1 and S2 stand."""
        return torch.stack([self.io_pos, self.s1_pos, self.s2_pos], dim=1)

    @property
    def is_abba(self) -> Bool[Tensor, " prompt"]:
        """Whether IO is named first."""
        return self.io_pos < self.s1_pos

    def logit_difference(self, logits: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, " prompt"]:
        """logit(IO) - logit(S)."""
        io_logits = logits.gather(1, self.io_token[:, None])
        s_logits = logits.gather(1, self.s_token[:, None])
        return (io_logits - s_logits)[:, 0]


class _Row(NamedTuple):
    """One prompt; fields as those of `IOIPrompts`."""

    tokens: list[int]
    io_pos: int
    s1_pos: int
    s2_pos: int
    io_token: int
    s_token: int
    third_token: int


def ioi_prompts(
    tokenizer: Any,
    n_prompts: int,
    seed: int = 0,
    templates: Sequence[str] = TEMPLATES,
    orders: Sequence[Order] = ("ABBA", "BABA"),
    names: Sequence[str] = NAMES,
    places: Sequence[str] = PLACES,
    objects: Sequence[str] = OBJECTS,
) -> list[IOIPrompts]:
    """Prompts in every template and order by turns; full sequences, BOS first.

    Names, places and objects are drawn at random; words that are not one token after a space are
    dropped, so that all prompts of a template have one length.

    Args:
        tokenizer: of the model, in the way of transformers; BOS is put before each prompt.
        templates: with the fields first, second, subject, and place and object where wanted; END is
            the last token.
        orders: ABBA: IO is named first; BABA: S is.
    Returns:
        One batch per length, shortest first.
    Raises:
        ValueError: fewer than three names or no place or object are left, no BOS, or a template in
            which a name does not stand alone as its own token.
    """
    names = _single_tokens(tokenizer, "names", names, least=3)
    places = _single_tokens(tokenizer, "places", places, least=1)
    objects = _single_tokens(tokenizer, "objects", objects, least=1)
    if tokenizer.bos_token_id is None:
        raise ValueError("The tokenizer has no BOS token: set tokenizer.bos_token.")
    rng = random.Random(seed)
    rows: dict[int, list[_Row]] = {}  # by length
    for number in range(n_prompts):
        template = templates[number % len(templates)]
        order = orders[number // len(templates) % len(orders)]
        io, subject, third = rng.sample(names, 3)
        text = template.format(
            first=io if order == "ABBA" else subject,
            second=subject if order == "ABBA" else io,
            subject=subject,
            place=rng.choice(places),
            object=rng.choice(objects),
        )
        row = _row(tokenizer, text, io, subject, third)
        if row is None:
            raise ValueError(
                "Each name must follow a space and stand for itself alone, "
                f"got the template {template!r}."
            )
        rows.setdefault(len(row.tokens), []).append(row)
    batches = []
    for length in sorted(rows):
        columns = zip(*rows[length], strict=True)
        batches.append(IOIPrompts(*(torch.tensor(column) for column in columns)))
    return batches


def _single_tokens(
    tokenizer: Any,
    kind: str,
    words: Sequence[str],
    least: int,
) -> list[str]:
    """The words that are one token after a space."""
    single = [word for word in dict.fromkeys(words) if len(_ids(tokenizer, f" {word}")) == 1]
    if len(single) < len(words):
        n_dropped = len(words) - len(single)
        logger.info("%d of %d %s are not one token each", n_dropped, len(words), kind)
    if len(single) < least:
        raise ValueError(
            f"At least {least} of the {kind} must be one token after a space, got {single}."
        )
    return single


def _row(
    tokenizer: Any,
    text: str,
    io: str,
    subject: str,
    third: str,
) -> _Row | None:
    """A prompt by token; None where IO does not stand once, S twice and the third name nowhere."""
    tokens = [tokenizer.bos_token_id, *_ids(tokenizer, text)]
    io_token, s_token, third_token = (
        _ids(tokenizer, f" {name}")[0] for name in (io, subject, third)
    )
    counts = (tokens.count(io_token), tokens.count(s_token), tokens.count(third_token))
    if counts != (1, 2, 0):
        return None
    s1_pos = tokens.index(s_token)
    return _Row(
        tokens=tokens,
        io_pos=tokens.index(io_token),
        s1_pos=s1_pos,
        s2_pos=tokens.index(s_token, s1_pos + 1),
        io_token=io_token,
        s_token=s_token,
        third_token=third_token,
    )


def _ids(
    tokenizer: Any,
    text: str,
) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])

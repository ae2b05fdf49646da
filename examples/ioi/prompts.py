"""Prompts of indirect-object identification, and their corrupted twins.

"When Mary and John went to the store, John gave a drink to" goes on with " Mary": the indirect object (IO), not the subject
(S), which stands twice (S1, S2). END is the last token.

Source: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593); templates after theirs.
"""

import logging
import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
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
    "Then, {first} and {second} were working at the {place}. {subject} decided to give a {object} to",
    "Then, {first} and {second} had a long argument, and afterwards {subject} said to",
    "Afterwards, {first} and {second} went to the {place}. {subject} gave a {object} to",
    "The {place} {first} and {second} went to had a {object}. {subject} gave it to",
)
NAMES = tuple(
    """Mary John Tom James Dan Martin Sarah Michael David Laura Alice Bob Anna Peter Paul Mark Emily Kate Jack Henry George
    Robert Lucy Emma Simon Adam Rachel Amy Lisa Jane Susan Helen Alex Steven Kevin Brian Eric Ryan Daniel Thomas William
    Richard Charles Joseph Edward Frank Jason Matthew Andrew Joshua Nicole Jessica Jennifer Elizabeth Linda Karen Nancy
    Margaret Ruth Sharon Michelle Carol Amanda Melissa Stephanie Rebecca Angela Anne Max Sam Ben""".split()
)
PLACES = (
    "store",
    "garden",
    "restaurant",
    "school",
    "hospital",
    "office",
    "house",
    "station",
    "park",
    "market",
)
OBJECTS = ("ring", "bone", "drink", "book", "gift", "computer", "snack", "pen", "letter", "ball")


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
            kind: third_name: S2 becomes a third name, so that no name stands twice; other_io: IO becomes a third name,
                which is then the indirect object; swapped: S2 becomes IO, so that S1 is the indirect object, while the
                fields go on calling it S1.
        Raises:
            ValueError: unknown kind.
        """
        if kind not in get_args(Twin):
            raise ValueError(f"kind must be one of {get_args(Twin)}, got {kind!r}.")
        at = self.io_pos if kind == "other_io" else self.s2_pos
        names = self.io_token if kind == "swapped" else self.third_token
        twin = self._replace(tokens=self.tokens.scatter(1, at[:, None], names[:, None]))
        return (
            twin._replace(io_token=self.third_token, third_token=self.io_token)
            if kind == "other_io"
            else twin
        )

    @property
    def positions(self) -> Int[Tensor, "prompt name"]:
        """Where IO, S1 and S2 stand."""
        return torch.stack([self.io_pos, self.s1_pos, self.s2_pos], dim=1)

    def logit_difference(self, logits: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, " prompt"]:
        return (logits.gather(1, self.io_token[:, None]) - logits.gather(1, self.s_token[:, None]))[
            :, 0
        ]


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
    """Prompts in every template and order by turns, names, places and objects drawn at random; full sequences, BOS first.

    Words that are not one token after a space are dropped, so that all prompts of a template have one length.

    Args:
        tokenizer: of the model, in the way of transformers; BOS is put before each prompt.
        templates: with the fields first, second, subject, and place and object where wanted; END is the last token.
        orders: ABBA: IO is named first; BABA: S is.
    Returns:
        One batch a length, shortest first.
    Raises:
        ValueError: fewer than three names or no place or object are left, no BOS, or a template in which a name does not
            stand alone as its own token.
    """
    usable = {}
    for kind, words, least in (("names", names, 3), ("places", places, 1), ("objects", objects, 1)):
        usable[kind] = [
            word for word in dict.fromkeys(words) if len(_ids(tokenizer, f" {word}")) == 1
        ]
        if len(usable[kind]) < len(words):
            logger.info(
                "%d of %d %s are not one token each",
                len(words) - len(usable[kind]),
                len(words),
                kind,
            )
        if len(usable[kind]) < least:
            raise ValueError(
                f"At least {least} of the {kind} must be one token after a space, got {usable[kind]}."
            )
    if tokenizer.bos_token_id is None:
        raise ValueError("The tokenizer has no BOS token: set tokenizer.bos_token.")
    rng, by_length = random.Random(seed), {}
    for number in range(n_prompts):
        template = templates[number % len(templates)]
        order = orders[number // len(templates) % len(orders)]
        io, s, third = rng.sample(usable["names"], 3)
        first, second = (io, s) if order == "ABBA" else (s, io)
        text = template.format(
            first=first,
            second=second,
            subject=s,
            place=rng.choice(usable["places"]),
            object=rng.choice(usable["objects"]),
        )
        ids = [tokenizer.bos_token_id, *_ids(tokenizer, text)]
        io_id, s_id, third_id = (_ids(tokenizer, f" {name}")[0] for name in (io, s, third))
        if (ids.count(io_id), ids.count(s_id), ids.count(third_id)) != (1, 2, 0):
            raise ValueError(
                f"Each name must follow a space and stand for itself alone, got the template {template!r}."
            )
        s1 = ids.index(s_id)
        row = ids, ids.index(io_id), s1, ids.index(s_id, s1 + 1), io_id, s_id, third_id
        by_length.setdefault(len(ids), []).append(row)
    return [
        IOIPrompts(*map(torch.tensor, zip(*by_length[n], strict=True))) for n in sorted(by_length)
    ]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])

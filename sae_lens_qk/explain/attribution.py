"""Why did this head attend there? One score or many, explained from a model and its tokens."""

from collections import UserList
from collections.abc import Sequence
from typing import Any, SupportsIndex, overload

import numpy as np
import pandas as pd
import torch
from rich.console import RenderableType
from torch import Tensor

from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.explain.one_score import Attribution
from sae_lens_qk.explain.prompt import RecordedPrompt, ScorePosition, Tokens, integers
from sae_lens_qk.explain.renamed import form_renamed
from sae_lens_qk.explain.term_frames import tensor_frame
from sae_lens_qk.host.support import Model
from sae_lens_qk.patching import Source
from sae_lens_qk.tables import html_table, rich_table

__all__ = ["Attribution", "Attributions", "attribute", "overview"]


class Attributions(UserList[Attribution]):
    """Several scores of one prompt: a list by head, query and key."""

    @form_renamed
    def to_frame(self, source: Source | None = "transcoders") -> pd.DataFrame:
        """`Attribution.to_frame` of each, after columns head, query_pos, key_pos."""
        frames = [attribution.to_frame(source) for attribution in self]
        positions = [attribution.position for attribution in self]
        names = list(ScorePosition._fields)
        # positions as an index of three levels, then as columns
        frame = pd.concat(frames, keys=positions, names=names)
        return frame.reset_index(names).reset_index(drop=True)

    def to_dict(
        self,
        n: int = 10,
        source: Source | None = None,
    ) -> list[dict[str, Any]]:
        """`Attribution.to_dict` of each."""
        return [attribution.to_dict(n, source) for attribution in self]

    to_json = Attribution.to_json

    def checked(self, **settings: Any) -> "Attributions":
        """`Attribution.checked` of each."""
        return Attributions([attribution.checked(**settings) for attribution in self])

    def summary(self) -> pd.DataFrame:
        """One row per score.

        Returns:
            head, query_pos, key_pos, query and key (words), score, attention, and the pattern
            effect of each kind of term.
        """
        rows = []
        for attribution in self:
            _, query_pos, key_pos = attribution.position
            words = attribution.prompt.words
            # a column per kind; kinds that a score lacks are missing
            parts = attribution.parts().set_index("kind")["pattern_effect"]
            row = {
                **attribution.position._asdict(),
                "query": words[query_pos],
                "key": words[key_pos],
                "score": attribution.score,
                "attention": attribution.attention,
                **parts,
            }
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"Attributions({len(self)} scores)"

    def __rich__(self) -> RenderableType:
        return rich_table(self.summary(), f"{len(self)} scores")

    def _repr_html_(self) -> str:
        return html_table(self.summary(), f"{len(self)} scores")


Number = int | np.integer
Numbers = Number | Sequence[int] | np.ndarray | Tensor | None
"""One number, several, or (None) all."""


@overload
def attribute(
    dictionary: BilinearQKDictionary,
    model: Model,
    tokens: Tokens | RecordedPrompt,
    head: Number,
    query_pos: Number,
    key_pos: Number,
) -> Attribution: ...
@overload
def attribute(
    dictionary: BilinearQKDictionary,
    model: Model,
    tokens: Tokens | RecordedPrompt,
    head: Numbers = None,
    query_pos: Numbers = -1,
    key_pos: Numbers = None,
) -> Attributions: ...
@torch.no_grad()
def attribute(
    dictionary: BilinearQKDictionary,
    model: Model,
    tokens: Tokens | RecordedPrompt,
    head: Any = None,
    query_pos: Any = -1,
    key_pos: Any = None,
) -> Attribution | Attributions:
    """Why did this head attend there? All terms of one attention score, or of many.

    The terms of each score add up to the model's own. What comes back depends on how head,
    query_pos and key_pos are given, and on nothing else:

        all three one number each (int, numpy integer, 0-d array or tensor)   an Attribution
        any of them a sequence, array or tensor [n], even of one, or None     Attributions, a list

    Args:
        tokens: ids [pos] or [1, pos] of a full sequence from position 0, as a list, array or
            tensor; a text, before which the model's BOS is put; or a `RecordedPrompt` of this
            dictionary and model, which are not run again.
        head, query_pos, key_pos: numbers; None: all. Several stand for every combination in which
            the query may attend to the key. Negative positions count from the end.
    Returns:
        An `Attribution`, or `Attributions` by head, query and key.
    Raises:
        ValueError: several sequences; a prompt recorded with another dictionary or model; no such
            head or position; or no key that one of the queries may attend to.
        FingerprintError, UnsupportedModelError: the model is not the dictionary's, or does what is
            not computed here.
    """
    if isinstance(tokens, RecordedPrompt):
        prompt = tokens
        prompt.require(dictionary, model)
    else:
        prompt = RecordedPrompt.record(dictionary, model, tokens)
    n_heads, n_pos = prompt.scores.shape[:2]
    heads = _numbers("head", head, n_heads)
    queries = _numbers("query_pos", query_pos, n_pos)
    keys = _numbers("key_pos", key_pos, n_pos)
    # numbers have no axis, sequences have one even if they hold one number
    if heads.ndim == queries.ndim == keys.ndim == 0:
        return Attribution.of(prompt, heads, queries, keys)
    queries = queries.reshape(-1)
    keys = keys.reshape(-1)
    attributions = Attributions()
    for one_head in heads.reshape(-1).tolist():
        # before what takes long: refuses heads and positions that do not exist
        rows = [prompt.position(one_head, i, i) for i in queries]
        # rotated once for all rows of the head
        head_terms = prompt.head_terms(one_head)
        for _, query, _ in rows:
            terms = head_terms.row(query)
            for one_key in keys:
                if prompt.is_allowed(query, one_key):
                    position = prompt.position(one_head, query, one_key)
                    attributions.append(Attribution(prompt, position, terms))
    if not attributions:
        raise ValueError(
            f"None of the keys {keys[:5].tolist()} may be attended to from the queries "
            f"{queries[:5].tolist()}: a query attends to keys at or before it."
        )
    return attributions


def _numbers(
    name: str,
    values: Any,
    n: int,
) -> Tensor:
    """One number (no axis) or several; None: 0 to n - 1."""
    numbers = integers(name, range(n) if values is None else values)
    if numbers.ndim > 1:
        raise ValueError(f"{name} must be a number or a list, got shape {list(numbers.shape)}.")
    return numbers


@torch.no_grad()
def overview(
    prompt: RecordedPrompt,
    query_pos: SupportsIndex = -1,
) -> pd.DataFrame:
    """Where each head looks from one query.

    The first token is left out: heads rest on it when nothing matches.

    Returns:
        head, to_first (attention to position 0), key_pos and key (the most attended of the
        others), attention and rebuilt (by the feature map where there is one), query_feature,
        key_feature and pattern_effect of the strongest pair.
    """
    i = prompt.find(query_pos)
    rows = prompt.pattern[:, i, : i + 1]  # [head, key]
    # the first token has no key but itself
    first_other = min(i, 1)
    keys = rows[:, first_other:].argmax(dim=1) + first_other  # [head]
    heads = torch.arange(len(rows), device=keys.device)
    looks = tensor_frame(
        {
            "head": heads,
            "to_first": rows[:, 0],
            "key_pos": keys,
            "attention": rows[heads, keys],
            "rebuilt": prompt.rebuilt_pattern()[heads, i, keys],
        }
    )
    words = [prompt.words[key] for key in keys.tolist()]
    looks.insert(3, "key", words)
    pairs = prompt.strongest(1, query_positions=[i])
    supporting = pairs.query("pattern_effect > 0")
    # a head without a supporting pair has none of these
    features = supporting[["query_feature", "key_feature"]].astype("Int64")
    cells = supporting[["head", "key_pos"]]
    effects = supporting["pattern_effect"]
    best = pd.concat([cells, features, effects], axis=1)
    return looks.merge(best, how="left")

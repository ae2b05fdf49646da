"""What is left of a head's attention and of the logit difference after an intervention.

Without the pairs that carry the attention, or with nothing but them; and, without our decoders,
with features removed from the model's own x.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

import sae_lens_qk as qk
from examples.ioi.pairs import NAMES, recorded_prompts, top_pairs
from examples.ioi.prompts import IOIPrompts, Name
from sae_lens_qk.explain.check import named_removals
from sae_lens_qk.explain.removals import Directions, control_removals
from sae_lens_qk.explain.terms import HeadTerms
from sae_lens_qk.host.layer import AttentionLayer, LayerReplay
from sae_lens_qk.host.support import Hooks, Model

MEASURES = ("attention_io", "attention_s1", "attention_s2", "logit_difference")
"""Pattern of a head from END to each name, and logit(IO) - logit(S) after END."""


class Replay:
    """A batch run once, then its upper layers again with another pattern in one layer.

    Attributes:
        x: the layer's input [prompt, pos, d_model].
        scores: the model's own [prompt, head, pos_q, pos_k].
    """

    def __init__(
        self,
        model: Model,
        layer: int,
        batch: IOIPrompts,
    ):
        self.batch = batch
        self.layer = AttentionLayer(model, layer)
        self._replay = LayerReplay(self.layer)
        _, record = self._replay.record(batch.tokens)
        self.x = record.x
        self.scores = record.scores

    def measures(
        self,
        head: int,
        hooks: Hooks,
    ) -> Float[Tensor, "prompt measure"]:
        """`MEASURES` under hooks."""
        rows: list[Tensor] = []  # [prompt, key]

        def keep_row(
            pattern: Tensor,
            hook: Any,
        ) -> None:
            rows.append(pattern[:, head, -1])

        recorder = (self.layer.names.pattern, keep_row)
        logits = self._replay.run([*hooks, recorder], slice(-1, None))[:, 0]
        attention = rows[-1].gather(1, self.batch.positions)
        difference = self.batch.logit_difference(logits)
        return torch.cat([attention, difference[:, None]], dim=1).float().cpu()


class Condition(NamedTuple):
    """One intervention on a head: its name, how many pairs, and what `fwd_hooks` is given."""

    name: str
    k: int
    edits: dict[str, Any]


@torch.no_grad()
def pair_ablations(
    dictionary: qk.BilinearQKDictionary,
    model: Model,
    batches: Sequence[IOIPrompts],
    pairs: pd.DataFrame,
    targets: Mapping[int, Name],
    ks: Sequence[int] = (1, 2, 5, 10, 20, 50),
    n_controls: int = 4,
    seed: int = 0,
) -> pd.DataFrame:
    """From pairs to attention to the logit difference, one head at a time, at all positions.

    Args:
        pairs: `name_pairs` of other prompts, from which the k best are taken.
        targets: heads, and the name attention to which is explained.
        n_controls: draws of k others of the pairs that support the same attention and act in at
            least half of the prompts.
    Returns:
        head, name, condition, k, and means over prompts of `MEASURES`. Conditions: model;
        transcoders, feature_map (rebuilt from all pairs, from all kept ones); removed (the k best
        pairs' terms subtracted from the model's own scores); control (as many others subtracted,
        mean over draws); kept (nothing but the terms of the k best pairs).
    """
    replays = [Replay(model, dictionary.cfg.layer, batch) for batch in batches]
    records = []
    for head, name in targets.items():
        best = top_pairs(pairs, head, name)
        frequent = top_pairs(pairs, head, name, active=0.5)
        for condition in ablations(best, frequent, ks, n_controls, seed):
            hooks: Hooks = []
            if condition.edits:
                hooks = dictionary.fwd_hooks(model, heads=[head], **condition.edits)
            means = torch.cat([replay.measures(head, hooks) for replay in replays]).mean(dim=0)
            record = {"head": head, "name": name, "condition": condition.name, "k": condition.k}
            records.append(record | dict(zip(MEASURES, means.tolist(), strict=True)))
    identity = ["head", "name", "condition", "k"]
    return pd.DataFrame(records).groupby(identity, sort=False).mean().reset_index()


def ablations(
    best: Int[Tensor, "pair 3"],
    frequent: Int[Tensor, "pair 3"],
    ks: Sequence[int],
    n_controls: int,
    seed: int,
) -> Iterator[Condition]:
    """The conditions of `pair_ablations` for one head, controls as often as they are drawn.

    Args:
        best: pairs in the order in which they are removed.
        frequent: pairs from which controls are drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    yield Condition("model", 0, {})
    yield Condition("transcoders", 0, {"source": "transcoders"})
    yield Condition("feature_map", 0, {"source": "feature_map"})
    for k in ks:
        if k > len(best):
            continue
        yield Condition("removed", k, {"source": "model", "ablate_pairs": best[:k]})
        yield Condition("kept", k, {"source": "transcoders", "keep_pairs": best[:k]})
        is_removed = (frequent[:, None] == best[:k]).all(dim=2).any(dim=1)
        others = frequent[~is_removed]
        if len(others) < k:
            continue
        for _ in range(n_controls):
            control = others[torch.randperm(len(others), generator=generator)[:k]]
            yield Condition("control", k, {"source": "model", "ablate_pairs": control})


class RemovalKey(NamedTuple):
    """Which features are removed, and where."""

    side: str
    ranking: str
    k: int
    condition: str


class _Edit(NamedTuple):
    """The pattern row as measured after a removal, and attention to the name as predicted."""

    row: Float[Tensor, " pos"]
    predicted: float


@torch.no_grad()
def feature_removals(
    dictionary: qk.BilinearQKDictionary,
    model: Model,
    batches: Sequence[IOIPrompts],
    targets: Mapping[int, Name],
    directions: Directions,
    ks: Sequence[int] = (1, 2, 5, 10),
    seed: int = 0,
) -> pd.DataFrame:
    """Evidence without our decoders: features are removed from the model's own x.

    At END or at the name; see `sae_lens_qk.explain.removals`. W_Q and W_K give one head's new
    scores, its new pattern row of END replaces the model's, and the upper layers run again.

    Args:
        targets: heads, and the name attention to which is explained.
        directions: fitted on other text.
    Returns:
        prompt (a number), head, name, side, ranking (features: by the effect of all their terms at
        the site; pairs: features of the k pairs with the largest effects), k, condition (top, or
        the name of a control), attention_drop (of P[END, name]), predicted_drop (the same by the
        dictionary), logit_drop (of the logit difference).
    """
    generator = torch.Generator().manual_seed(seed)
    records = []
    n_earlier = 0
    for batch in batches:
        replay = Replay(model, dictionary.cfg.layer, batch)
        prompts = list(recorded_prompts(dictionary, model, [batch]))
        for head, name in targets.items():
            # the same removal in all prompts is one pass
            edits: dict[RemovalKey, dict[int, _Edit]] = {}
            for number, (prompt, positions) in enumerate(prompts):
                prompt_edits = _edits(prompt, head, positions[name], directions, ks, generator)
                for key, edit in prompt_edits:
                    edits.setdefault(key, {})[number] = edit
            for record in _drops(replay, head, name, edits):
                records.append({**record, "prompt": n_earlier + record["prompt"]})
        n_earlier += len(prompts)
    return pd.DataFrame(records)


def _edits(
    prompt: qk.RecordedPrompt,
    head: int,
    key_pos: int,
    directions: Directions,
    ks: Sequence[int],
    generator: torch.Generator,
) -> Iterator[tuple[RemovalKey, _Edit]]:
    """All removals that exist for one prompt, head and key."""
    position = prompt.position(head, -1, key_pos)
    row = prompt.score_row(head, position.query_pos)
    terms = HeadTerms(prompt.dictionary, prompt.features, head).row(position.query_pos)
    for removal in named_removals(prompt, position, terms, ks, directions):
        site = removal.site
        factors = {"top": removal.top.to(site.rows.dtype)}
        factors |= control_removals(site, removal.top, generator)
        stacked_factors = torch.stack(list(factors.values()))
        patterns = row.row_pattern(site.measure(row, stacked_factors))
        predicted_patterns = row.row_pattern(site.predict(row, stacked_factors))
        for n, condition in enumerate(factors):
            key = RemovalKey(site.side, removal.ranking, removal.k, condition)
            yield key, _Edit(patterns[n], float(predicted_patterns[n, key_pos]))


def _drops(
    replay: Replay, head: int, name: Name, edits: dict[RemovalKey, dict[int, _Edit]]
) -> Iterator[dict[str, Any]]:
    """Drops after each removal in each prompt of a batch that has it."""
    column = NAMES.index(name)
    clean = replay.measures(head, [])
    for key, prompt_edits in edits.items():
        rows = {number: edit.row for number, edit in prompt_edits.items()}
        drops = (clean - replay.measures(head, _row_hooks(replay.layer, head, rows))).tolist()
        for number, edit in prompt_edits.items():
            yield {
                "prompt": number,
                "head": head,
                "name": name,
                **key._asdict(),
                "attention_drop": drops[number][column],
                "predicted_drop": float(clean[number, column]) - edit.predicted,
                "logit_drop": drops[number][-1],
            }


def _row_hooks(
    layer: AttentionLayer, head: int, rows: Mapping[int, Float[Tensor, " pos"]]
) -> Hooks:
    """Hooks that replace a head's last pattern row in some prompts of a batch."""
    numbers = list(rows)
    edited_rows = torch.stack(list(rows.values()))

    def pattern_fn(
        x: Tensor,
        scores: Tensor,
    ) -> Tensor:
        pattern = layer.spec.pattern(scores)
        pattern[numbers, head, -1] = edited_rows.to(pattern)
        return pattern

    return layer.pattern_hooks(pattern_fn, heads=[head])


def removal_summary(removals: pd.DataFrame) -> pd.DataFrame:
    """Top features against each control, on the prompts where both exist.

    Returns:
        head, name, side, ranking, k, control, n (prompts), means of the top features'
        attention_drop, predicted_drop and logit_drop and of control_attention_drop and
        control_logit_drop, and wins: the share of prompts in which attention drops by more than
        with the control.
    """
    identity = ["head", "name", "side", "ranking", "k"]
    is_top = removals["condition"] == "top"
    top = removals[is_top].drop(columns="condition")
    controls = removals[~is_top].drop(columns="predicted_drop")
    controls = controls.rename(
        columns={
            "condition": "control",
            "attention_drop": "control_attention_drop",
            "logit_drop": "control_logit_drop",
        }
    )
    both = top.merge(controls, on=["prompt", *identity])
    both["wins"] = both["attention_drop"] > both["control_attention_drop"]
    groups = both.groupby([*identity, "control"], sort=False)
    means = groups.mean().drop(columns="prompt")
    means.insert(0, "n", groups.size())
    return means.reset_index()

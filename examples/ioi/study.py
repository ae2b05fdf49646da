"""Indirect objects, end to end: the feature pairs behind a head's attention to the names, and what follows from them.

Prompts are in `ioi_prompts`, the heads of a whole model in `ioi_scan`. Here, for heads of a dictionary's layer: the pairs
that carry attention from END to a name; what is left of attention and logit difference without them, or with nothing but
them; the same from features that leave the model's own x, free of our decoders; and corrupted twins. With s the scores of
one head and P its pattern, IO is preferred to S1 by P[IO] / P[S1] = exp(preference),

    preference = s[END, IO] - s[END, S1]

to which a pair adds the difference of its two contributions.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk.explain.removals import Directions, control_removals
from sae_lens_qk.explain.terms import ScoreTerms
from sae_lens_qk.explain.check import named_removals
from sae_lens_qk.analysis.ioi_prompts import IOIPrompts, Name, Order, Twin, ioi_prompts
from sae_lens_qk.analysis.ioi_scan import HeadScan, scan_heads
from sae_lens_qk.explain.prompt import Prompt
from sae_lens_qk.attention import attention_scores, pattern_from_scores
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.host.support import Hooks, Model
from sae_lens_qk.host.layer import LayerReplay, hook_names, input_completion, layer_inputs, qk_weights
from sae_lens_qk.patching import PatchSource
from sae_lens_qk.host.proof import check_model
from sae_lens_qk.host.layer import pattern_hooks

MEASURES = ("attention_io", "attention_s1", "attention_s2", "logit_difference")
"""Pattern of a head from END to each name, and logit(IO) - logit(S) after END."""

_PAIR = ["query_feature", "key_feature", "head"]


@torch.no_grad()
def role_features(
    dictionary: BilinearQKDictionary, model: Model, batches: Sequence[IOIPrompts]
) -> pd.DataFrame:
    """How often features fire at END (query) and at the names (key): what prompts, orders and twins tell apart.

    Returns:
        prompts ("clean" or the kind of twin), order (of the names: ABBA or BABA), side, role ("end", "io", "s1", "s2"),
        feature, active (share of prompts), mean (activation, zeros included); features that never fire there are left out.
    """
    acts: dict[tuple[str, str, str], list[Tensor]] = {}
    for clean, kind in product(batches, ("clean", *get_args(Twin))):
        batch = clean if kind == "clean" else clean.twin(kind)
        x = layer_inputs(model, dictionary.cfg.layer, batch.tokens)
        at_names = dictionary.encode_key(x.take_along_dim(batch.positions[..., None], dim=1))
        roles = dict(
            zip(
                ("end", *get_args(Name)),
                (dictionary.encode_query(x[:, -1]), *at_names.unbind(1)),
                strict=True,
            )
        )
        for (role, values), order in product(roles.items(), get_args(Order)):
            of_order = (clean.io_pos < clean.s1_pos) == (order == "ABBA")
            acts.setdefault((kind, order, role), []).append(values[of_order])
    frames = []
    for (kind, order, role), parts in acts.items():
        values = torch.cat(parts).float().cpu()
        features = (values > 0).any(dim=0).nonzero()[:, 0]
        columns = {
            "feature": features,
            "active": (values > 0).float().mean(dim=0)[features],
            "mean": values.mean(dim=0)[features],
        }
        where = {
            "prompts": kind,
            "order": order,
            "side": "query" if role == "end" else "key",
            "role": role,
        }
        frames.append(
            pd.DataFrame({**where, **{name: column.numpy() for name, column in columns.items()}})
        )
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def name_pairs(
    dictionary: BilinearQKDictionary,
    model: Model,
    batches: Sequence[IOIPrompts],
    heads: Sequence[int],
    names: Sequence[Name] = get_args(Name),
) -> pd.DataFrame:
    """The feature pairs that carry attention from END to the names, kept by the map or not.

    Returns:
        head, name, query_feature, key_feature (d_query / d_key: the constant), weight (0: not kept), active (share of
        prompts), contribution and pattern_effect (of the unmasked term; means over all prompts, zero where it is not
        active). By head and name, the largest pattern effect first.
    """
    d, frames, n_prompts = dictionary, [], 0
    for prompt, positions in _prompts(d, model, batches):
        n_prompts += 1
        for head, name in product(heads, names):
            terms = ScoreTerms.of(d, prompt.query_acts[-1], prompt.key_acts, head)
            here = terms.key_positions == positions[name]
            a, b = torch.meshgrid(terms.query_features, terms.key_features[here], indexing="ij")
            values = {
                "query_feature": a,
                "key_feature": b,
                "contribution": terms.terms[:, here],
                "pattern_effect": terms.effects(prompt.pattern[head, -1])[:, here],
            }
            frame = pd.DataFrame(
                {column: value.flatten().cpu().numpy() for column, value in values.items()}
            )
            frames.append(frame.assign(head=head, name=name, active=1.0))
    listed, means = pd.concat(frames), ["active", "contribution", "pattern_effect"]
    made = _grouped(listed, ["head", "name", "query_feature", "key_feature"], means, "sum")
    made[means] /= n_prompts
    found = d.feature_map.find(made[_PAIR].to_numpy()).cpu().numpy()
    weights = np.append(
        d.feature_map.weights.float().cpu().numpy(), 0.0
    )  # found is -1 where a pair is not kept
    made.insert(4, "weight", weights[found])
    return made.sort_values(
        ["head", "name", "pattern_effect"], ascending=[True, True, False], ignore_index=True
    )


def top_pairs(
    pairs: pd.DataFrame, head: int, name: Name, active: float = 0.0
) -> Int[Tensor, "pair 3"]:
    """The kept pairs that support a head's attention to a name on the mean, the largest pattern effect first.

    Args:
        pairs: of `name_pairs`.
        active: on this share of prompts at least.
    """
    listed = pairs.query(
        "head == @head and name == @name and weight > 0 and active >= @active and pattern_effect > 0"
    )
    listed = listed.sort_values("pattern_effect", ascending=False, kind="stable")
    return torch.from_numpy(listed[_PAIR].to_numpy(dtype=np.int64))


def _prompts(
    d: BilinearQKDictionary, model: Model, batches: Sequence[IOIPrompts]
) -> Iterator[tuple[Prompt, dict[Name, int]]]:
    """Each prompt through the model, and where the names stand."""
    for batch in batches:
        for tokens, positions in zip(batch.tokens, batch.positions.tolist(), strict=True):
            yield Prompt.of(d, model, tokens), dict(zip(get_args(Name), positions, strict=True))


def _grouped(
    frame: pd.DataFrame, by: list[str], columns: list[str], what: Literal["mean", "sum"] = "mean"
) -> pd.DataFrame:
    """Columns by group, groups in order of appearance."""
    made: Any = frame.groupby(by, sort=False)[columns].agg(what)
    return made.reset_index()


class _Replay:
    """A batch run once, and its upper layers again and again with another pattern in one layer; x: the layer's input."""

    def __init__(self, model: Model, layer: int, batch: IOIPrompts):
        self.batch, self._names, self._replay = (
            batch,
            hook_names(model, layer),
            LayerReplay(model, layer),
        )
        _, seen = self._replay.record(batch.tokens, [self._names.input])
        self.x: Float[Tensor, "prompt pos d_model"] = input_completion(model, layer)(
            seen[self._names.input]
        )

    def measures(self, head: int, hooks: Hooks) -> Float[Tensor, "prompt measure"]:
        """`MEASURES` under hooks."""
        seen: dict[str, Tensor] = {}
        record = self._names.pattern, lambda pattern, hook: seen.update(row=pattern[:, head, -1])
        logits = self._replay.run([*hooks, record], slice(-1, None))[:, 0]
        attention = seen["row"].gather(1, self.batch.positions)
        return (
            torch.cat([attention, self.batch.logit_difference(logits)[:, None]], dim=1)
            .float()
            .cpu()
        )


@torch.no_grad()
def pair_ablations(
    dictionary: BilinearQKDictionary,
    model: Model,
    batches: Sequence[IOIPrompts],
    pairs: pd.DataFrame,
    targets: Mapping[int, Name],
    ks: Sequence[int] = (1, 2, 5, 10, 20, 50),
    n_controls: int = 4,
    seed: int = 0,
) -> pd.DataFrame:
    """From pairs to attention to the logit difference: heads without their k best pairs, or with nothing but them.

    One head is changed at a time, at all positions.

    Args:
        pairs: `name_pairs` of other prompts, from which the k best are taken.
        targets: heads, and the name attention to which is explained.
        n_controls: draws of k others of the pairs that support the same attention and act in at least half of the prompts.
    Returns:
        head, name, condition, k, and means over prompts of `MEASURES`. Conditions: model; transcoders, feature_map (rebuilt
        from all pairs, from all kept ones); removed (the k best pairs' terms subtracted from the model's own scores);
        control (as many others subtracted, mean over draws); kept (nothing but the terms of the k best pairs).
    """
    replays = [_Replay(model, dictionary.cfg.layer, batch) for batch in batches]
    records = []
    for head, name in targets.items():
        best, frequent = top_pairs(pairs, head, name), top_pairs(pairs, head, name, active=0.5)
        for condition, k, edits in _ablations(best, frequent, ks, n_controls, seed):
            hooks = dictionary.fwd_hooks(model, heads=[head], **edits) if edits else []
            means = torch.cat([replay.measures(head, hooks) for replay in replays]).mean(dim=0)
            record = {"head": head, "name": name, "condition": condition, "k": k}
            records.append(record | dict(zip(MEASURES, means.tolist(), strict=True)))
    return _grouped(pd.DataFrame(records), ["head", "name", "condition", "k"], list(MEASURES))


def _ablations(
    best: Int[Tensor, "pair 3"],
    frequent: Int[Tensor, "some 3"],
    ks: Sequence[int],
    n_controls: int,
    seed: int,
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Condition, k, and what `fwd_hooks` is given."""
    generator = torch.Generator().manual_seed(seed)
    yield "model", 0, {}
    yield "transcoders", 0, {"source": "transcoders"}
    yield "feature_map", 0, {"source": "feature_map"}
    for k in (k for k in ks if k <= len(best)):
        yield "removed", k, {"source": "model", "ablate_pairs": best[:k]}
        yield "kept", k, {"source": "transcoders", "keep_pairs": best[:k]}
        others = frequent[~(frequent[:, None] == best[:k]).all(dim=2).any(dim=1)]
        for _ in range(n_controls if len(others) >= k else 0):
            drawn = others[torch.randperm(len(others), generator=generator)[:k]]
            yield "control", k, {"source": "model", "ablate_pairs": drawn}


@torch.no_grad()
def feature_removals(
    dictionary: BilinearQKDictionary,
    model: Model,
    batches: Sequence[IOIPrompts],
    targets: Mapping[int, Name],
    directions: Directions,
    ks: Sequence[int] = (1, 2, 5, 10),
    seed: int = 0,
) -> pd.DataFrame:
    """Evidence without our decoders: features leave the model's own x at END or at the name; see `causal`.

    W_Q and W_K give one head's new scores, its new pattern row of END replaces the model's, and the upper layers run again.

    Args:
        targets: heads, and the name attention to which is explained.
        directions: fitted on other text.
    Returns:
        prompt (a number), head, name, side, ranking (features: by the effect of all their terms at the place; pairs:
        features of the k pairs with the largest effects), k, condition (top, or the name of a control), attention_drop (of
        P[END, name]), predicted_drop (the same by the dictionary), logit_drop (of the logit difference).
    """
    generator, records, n_before = torch.Generator().manual_seed(seed), [], 0
    for batch in batches:
        replay = _Replay(model, dictionary.cfg.layer, batch)
        prompts = list(_prompts(dictionary, model, [batch]))
        for head, name in targets.items():
            at, clean = get_args(Name).index(name), replay.measures(head, [])
            edits: dict[tuple[str, str, int, str], dict[int, _Edit]] = {}
            for number, (prompt, positions) in enumerate(prompts):
                for what, edit in _edits(prompt, head, positions[name], directions, ks, generator):
                    edits.setdefault(what, {})[number] = edit
            for what, by_prompt in edits.items():
                hooks = _row_hooks(
                    model,
                    dictionary.cfg.layer,
                    head,
                    {n: edit.row for n, edit in by_prompt.items()},
                )
                drops = (clean - replay.measures(head, hooks)).tolist()
                for number, edit in by_prompt.items():
                    drop = {
                        "attention_drop": drops[number][at],
                        "predicted_drop": float(clean[number, at]) - edit.predicted,
                        "logit_drop": drops[number][-1],
                    }
                    place = dict(zip(("side", "ranking", "k", "condition"), what, strict=True))
                    records.append(
                        {"prompt": n_before + number, "head": head, "name": name, **place, **drop}
                    )
        n_before += len(prompts)
    return pd.DataFrame(records)


class _Edit(NamedTuple):
    """The pattern row as measured after a removal, and attention to the name as the dictionary predicts it."""

    row: Float[Tensor, " pos"]
    predicted: float


def _edits(
    prompt: Prompt,
    head: int,
    j: int,
    directions: Directions,
    ks: Sequence[int],
    generator: torch.Generator,
) -> Iterator[tuple[tuple[str, str, int, str], _Edit]]:
    """All removals that exist for one prompt, head and key, by side, ranking, k and condition."""
    place = prompt.place(head, -1, j)
    row = prompt.score_row(head, place.query_pos)
    terms = ScoreTerms.of(prompt.dictionary, prompt.query_acts[-1], prompt.key_acts, head)
    for named in named_removals(prompt, place, terms, ks, directions):
        removals = {"top": named.top.to(named.removable.rows.dtype)}
        removals |= control_removals(named.removable, named.top, generator)
        measured, predicted = named.removable.remove(
            row, named.x, named.side, j, torch.stack(list(removals.values()))
        )
        for condition, scores, expected in zip(removals, measured, predicted, strict=True):
            edit = _Edit(scores.softmax(dim=-1), float(expected.softmax(dim=-1)[j]))
            yield (named.side, named.ranking, named.k, condition), edit


def _row_hooks(
    model: Model, layer: int, head: int, rows: Mapping[int, Float[Tensor, " pos"]]
) -> Hooks:
    """Hooks that replace a head's last pattern row in some prompts of a batch."""
    numbers, replaced = list(rows), torch.stack(list(rows.values()))

    def pattern_fn(x: Tensor, scores: Tensor) -> Tensor:
        pattern = pattern_from_scores(scores)
        pattern[numbers, head, -1] = replaced.to(pattern)
        return pattern

    return pattern_hooks(model, layer, pattern_fn, heads=[head])


def removal_summary(removals: pd.DataFrame) -> pd.DataFrame:
    """Top features against each control, on the prompts where both exist.

    Returns:
        head, name, side, ranking, k, control, n (prompts), means of the top features' attention_drop, predicted_drop and
        logit_drop and of control_attention_drop and control_logit_drop, and wins: the share of prompts in which attention
        drops by more than with the control.
    """
    what = ["head", "name", "side", "ranking", "k"]
    top = removals.query("condition == 'top'").drop(columns="condition")
    controls = removals.query("condition != 'top'").drop(columns="predicted_drop")
    of_control = {name: f"control_{name}" for name in ("attention_drop", "logit_drop")} | {
        "condition": "control"
    }
    both = top.merge(controls.rename(columns=of_control), on=["prompt", *what]).assign(n=1)
    both["wins"] = both["attention_drop"] > both["control_attention_drop"]
    means = [name for name in both.columns if name.endswith("_drop")]
    counts = _grouped(both, [*what, "control"], ["n"], "sum")
    return counts.merge(_grouped(both, [*what, "control"], [*means, "wins"]), on=[*what, "control"])


@torch.no_grad()
def twin_patterns(
    dictionary: BilinearQKDictionary,
    model: Model,
    batches: Sequence[IOIPrompts],
    heads: Sequence[int],
) -> pd.DataFrame:
    """Prompts and their corrupted twins: what heads attend to by themselves and as rebuilt, and what follows.

    Twins need neither decoders nor fitted directions: the model itself computes another x.

    Returns:
        prompt (a number), order (of the names: ABBA or BABA), prompts ("clean" or the kind of twin), head, source (model,
        transcoders, feature_map), `MEASURES` with this one head attending as the source says, and preference:
        s[END, IO] - s[END, S1].
    """
    d, frames, n_before = dictionary, [], 0
    check_model(d, model)
    for clean in batches:
        for kind in ("clean", *get_args(Twin)):
            batch = clean if kind == "clean" else clean.twin(kind)
            replay = _Replay(model, d.cfg.layer, batch)
            preferences = _preferences(d, model, batch, replay.x)
            for (source, preference), head in product(preferences.items(), heads):
                hooks = [] if source == "model" else d.fwd_hooks(model, source=source, heads=[head])
                numbers = n_before + np.arange(len(batch.tokens))
                order = np.where((clean.io_pos < clean.s1_pos).cpu(), *get_args(Order))
                where = {
                    "prompt": numbers,
                    "order": order,
                    "prompts": kind,
                    "head": head,
                    "source": source,
                }
                frame = pd.DataFrame(where)
                frame[list(MEASURES)] = replay.measures(head, hooks).numpy()
                frames.append(frame.assign(preference=preference[:, head].float().cpu().numpy()))
        n_before += len(clean.tokens)
    return pd.concat(frames, ignore_index=True)


def _preferences(
    d: BilinearQKDictionary, model: Model, batch: IOIPrompts, x: Float[Tensor, "prompt pos d_model"]
) -> dict[PatchSource, Float[Tensor, "prompt head"]]:
    """s[END, IO] - s[END, S1] of every head, the model's own and as rebuilt."""
    weights = qk_weights(model, d.cfg.layer)
    scores: dict[PatchSource, Tensor] = {
        "model": attention_scores(weights.queries(x), weights.keys(x), d.spec)
    }
    scores["transcoders"] = d.scores(x)
    if d.has_feature_map:
        scores["feature_map"] = d.scores(x, "feature_map")
    at = torch.stack([batch.s1_pos, batch.io_pos], dim=1)[:, None]
    return {
        name: made[:, :, -1].take_along_dim(at, dim=2).diff(dim=2)[..., 0]
        for name, made in scores.items()
    }


def twin_summary(twins: pd.DataFrame) -> pd.DataFrame:
    """Means of `twin_patterns` by head, prompts and source, and how preference changes.

    Returns:
        head, prompts, source, `MEASURES`, preference, change (clean preference minus this one), and pearson: over prompts,
        of the change as rebuilt with the model's own (missing where it is all zero).
    """
    keys = ["prompt", "head", "source"]
    clean = twins.query("prompts == 'clean'")[[*keys, "preference"]]
    both = twins.merge(clean, on=keys, suffixes=("", "_clean"))
    both["change"] = both["preference_clean"] - both["preference"]
    own = both.query("source == 'model'")[["prompt", "head", "prompts", "change"]]
    both = both.merge(own, on=["prompt", "head", "prompts"], suffixes=("", "_own"))
    group = ["head", "prompts", "source"]
    made, groups = (
        _grouped(both, group, [*MEASURES, "preference", "change"]),
        list(both.groupby(group, sort=False)),
    )
    made["pearson"] = [float(of[["change", "change_own"]].corr().iloc[0, 1]) for _, of in groups]  # type: ignore[arg-type]
    return made


class IOIResult(NamedTuple):
    """What `study_ioi` measures.

    Attributes:
        targets: heads, and the name attention to which is explained.
        scan: of `scan_heads`; features: of `role_features`; ablations: of `pair_ablations`; removals: of
            `feature_removals`; twins: of `twin_patterns`.
        pairs: of `name_pairs`, on other prompts than all the rest.
    """

    n_prompts: int
    targets: dict[int, Name]
    scan: HeadScan
    features: pd.DataFrame
    pairs: pd.DataFrame
    ablations: pd.DataFrame
    removals: pd.DataFrame
    twins: pd.DataFrame

    def to_dict(self, n_pairs: int = 20) -> dict[str, Any]:
        """Plain JSON values: means over prompts; of features those that fire in half of the prompts somewhere; of the pairs
        the n kept ones with the largest effects by head and name."""
        tables = {
            "heads": self.scan.heads,
            "parts": self.scan.parts,
            "features": self.features.query("active >= 0.5"),
            "pairs": self.pairs.query("weight > 0").groupby(["head", "name"]).head(n_pairs),
            "ablations": self.ablations,
            "removals": removal_summary(self.removals),
            "twins": twin_summary(self.twins),
        }
        figures = {
            name: value for name, value in self.scan._asdict().items() if isinstance(value, float)
        }
        records = {
            name: json.loads(str(table.to_json(orient="records"))) for name, table in tables.items()
        }
        return {
            "n_prompts": self.n_prompts,
            "targets": {str(h): name for h, name in self.targets.items()},
            **figures,
            **records,
        }


def study_ioi(
    dictionary: BilinearQKDictionary,
    model: Model,
    targets: Mapping[int, Name],
    n_prompts: int = 48,
    directions: Directions | None = None,
    ks: Sequence[int] = (1, 2, 5, 10, 20, 50),
    seed: int = 0,
    **prompts: Any,
) -> IOIResult:
    """Indirect objects end to end, on heads of a dictionary's layer.

    Args:
        targets: heads, and the name attention to which is explained.
        n_prompts: to measure on; pairs are chosen on as many others.
        directions: default: fitted on the text that comes with the package.
        ks: numbers of pairs and of features; those of which there are fewer are left out.
        **prompts: of `ioi_prompts`, such as templates and names.
    """
    check_model(dictionary, model)
    to_choose, to_measure = (
        [
            batch.to(dictionary.device)
            for batch in ioi_prompts(model.tokenizer, n_prompts, number, **prompts)
        ]
        for number in (seed + 1, seed)
    )
    fitted = Directions.from_own_text(dictionary, model) if directions is None else directions
    chosen = name_pairs(dictionary, model, to_choose, list(targets))
    return IOIResult(
        n_prompts,
        dict(targets),
        scan_heads(model, to_measure),
        role_features(dictionary, model, to_measure),
        chosen,
        pair_ablations(dictionary, model, to_measure, chosen, targets, ks, seed=seed),
        feature_removals(dictionary, model, to_measure, targets, fitted, ks, seed),
        twin_patterns(dictionary, model, to_measure, list(targets)),
    )

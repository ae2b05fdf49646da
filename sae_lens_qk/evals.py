"""Every metric by which a dictionary is judged, with bootstrap intervals over rows.

Definitions. Pattern metrics are means over rows and queries, position 0 left out (its pattern is
trivial):

    pattern_kl   KL(P || P') = sum over allowed keys of P (log P - log P'), nats
    pattern_tv   half the L1 distance over keys
    argmax_agreement   share of queries whose strongest key is the same
    logit_kl     KL(clean || patched) of the next-token distribution, nats, mean over all positions
    ce_recovered = (ce_zero - ce) / (ce_zero - ce_clean)
    logit_kl_recovered = 1 - logit_kl / logit_kl_zero
    score_explained = 1 - sum P (s~ - f~)^2 / sum P s~^2, with s the model's score, f the part of it
        that pairs of features explain, tilde = minus the P-weighted mean over keys;
        score_explained_unweighted the same with equal weights; norm_share = sum f^2 / sum s^2

Baselines replace the pattern by zero (all 0), mean (average true pattern of each head, query and
key), uniform (over the allowed keys and the sink, if any) and shuffled (the true pattern of another
row of the same batch, so its metrics depend on batch_size).
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import Features
from sae_lens_qk.host.layer import AttentionLayer, LayerReplay
from sae_lens_qk.host.proof import proven_layer
from sae_lens_qk.host.support import Model
from sae_lens_qk.metrics import (
    bootstrap_interval,
    explained_shares,
    explained_sums,
    next_token_loss,
    pattern_metrics,
    prediction_metrics,
    uniform_pattern,
)
from sae_lens_qk.patching import Source
from sae_lens_qk.results import (
    Evaluation,
    FeatureResult,
    MapResult,
    PatternResult,
    RowMetrics,
    RowTables,
)

BASELINES = ("zero", "mean", "uniform", "shuffled")


def evaluate(
    dictionary: BilinearQKDictionary,
    model: Model,
    tokens: Int[Tensor, "row pos"],
    *,
    batch_size: int = 8,
    baselines: Sequence[str] = BASELINES,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Patch every source into the model; measure pattern, loss and logits as the module defines.

    Args:
        tokens: whole rows, BOS first; the protocol is 256 tokens per row and the full split.
        batch_size: rows in a forward pass, at least 2.
        baselines: of `BASELINES`; "zero" is always measured, the recovered shares need it.
        seed: of the bootstrap.
    Raises:
        ValueError: fewer than two rows, or an unknown baseline.
        FingerprintError: the model is not the dictionary's.
    """
    results = compare(
        {"": dictionary},
        model,
        tokens,
        batch_size=batch_size,
        baselines=baselines,
        seed=seed,
        progress=progress,
    )
    return results[""]


@torch.no_grad()
def compare(
    dictionaries: Mapping[str, BilinearQKDictionary],
    model: Model,
    tokens: Int[Tensor, "row pos"],
    *,
    batch_size: int = 8,
    baselines: Sequence[str] = BASELINES,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Evaluation]:
    """`evaluate` for several dictionaries of one layer, by name.

    The model and the baselines run once for all of them, on the same rows: `Evaluation.by_row`
    gives paired differences.

    Raises:
        ValueError: as there; or dictionaries of several layers, or none.
        FingerprintError: the model is not that of a dictionary.
    """
    unknown = set(baselines) - set(BASELINES)
    if unknown or tokens.ndim != 2 or len(tokens) < 2 or batch_size < 2:
        raise ValueError(
            f"evaluate needs tokens [row >= 2, pos], batch_size >= 2 and baselines of {BASELINES}, "
            f"got {list(tokens.shape)}, {batch_size} and {baselines}."
        )
    layers = {dictionary.cfg.layer for dictionary in dictionaries.values()}
    if len(layers) != 1:
        raise ValueError(f"compare needs dictionaries of one layer, got those of {sorted(layers)}.")
    for dictionary in dictionaries.values():
        layer = proven_layer(dictionary.cfg, model)
    # in order, each once
    baselines = tuple(dict.fromkeys(("zero", *baselines)))
    # batches of nearly one size: no last one of a single row, which has no other to be shuffled
    # with
    batches = tokens.tensor_split(max(1, len(tokens) // batch_size))
    mean_pattern = _mean_pattern(layer, batches) if "mean" in baselines else None
    replay = LayerReplay(layer)
    sums = {name: _DictionarySums(dictionary) for name, dictionary in dictionaries.items()}
    baseline_rows: _Rows = defaultdict(list)
    clean_ce: list[Tensor] = []
    bar = tqdm(batches, "Evaluating", unit="batch", disable=not progress)
    with _eval_mode(dictionaries.values()):
        for rows in bar:
            batch = _Batch(replay, rows)
            clean_ce.append(batch.ce)
            for dictionary_sums in sums.values():
                dictionary_sums.add(batch)
            for name in baselines:
                pattern = batch.baseline(name, mean_pattern)
                baseline_rows[name].append(batch.metrics(pattern))
    tables = _tables(baseline_rows)
    ce_by_row = torch.cat(clean_ce).double().cpu().numpy()
    results = {}
    for name, dictionary_sums in sums.items():
        results[name] = dictionary_sums.result(tables, ce_by_row, seed)
    return results


@contextmanager
def _eval_mode(dictionaries: Iterable[BilinearQKDictionary]) -> Iterator[None]:
    """Those in training mode go back to it."""
    in_training = [dictionary for dictionary in dictionaries if dictionary.training]
    for dictionary in in_training:
        dictionary.eval()
    try:
        yield
    finally:
        for dictionary in in_training:
            dictionary.train()


def _mean_pattern(
    layer: AttentionLayer, batches: Sequence[Tensor]
) -> Float[Tensor, "head pos_q pos_k"]:
    total = torch.zeros(())
    # a pass of its own: the mean has to be known before anything is patched
    for rows in batches:
        scores = layer.record(rows).scores.float()
        total = total + layer.spec.pattern(scores).sum(dim=0)
    return total / sum(len(rows) for rows in batches)


class _Batch:
    """Some rows as the model sees them, and what another pattern makes of its predictions."""

    def __init__(
        self,
        replay: LayerReplay,
        tokens: Int[Tensor, "row pos"],
    ):
        self.replay = replay
        self.tokens = tokens
        logits, record = replay.record(tokens)
        self.x = record.x
        self.scores = record.scores.float()  # [row, head, pos_q, pos_k]
        self.log_pattern = replay.layer.spec.log_pattern(self.scores)
        self.log_probs = logits.float().log_softmax(dim=-1)  # [row, pos, vocab]
        self.ce = next_token_loss(self.log_probs, tokens)

    def metrics(
        self, log_pattern: Float[Tensor, "row head pos_q pos_k"] | None
    ) -> dict[str, Tensor]:
        """`RowMetrics.sources` of one source; None is the zero pattern."""
        layer = self.replay.layer
        zero = torch.zeros_like(self.log_pattern)
        pattern = zero if log_pattern is None else log_pattern.exp()
        # the layers below are not run again
        logits = self.replay.run(layer.pattern_hooks(lambda x, scores: pattern))
        metrics = pattern_metrics(self.log_pattern, log_pattern, layer.spec)
        metrics |= prediction_metrics(logits, self.log_probs, self.tokens)
        return {name: values.double() for name, values in metrics.items()}

    def baseline(
        self, name: str, mean_pattern: Float[Tensor, "head pos_q pos_k"] | None
    ) -> Float[Tensor, "row head pos_q pos_k"] | None:
        """Log pattern of one of `BASELINES`; None: zero."""
        if name == "zero":
            return None
        if name == "shuffled":
            return self.log_pattern.roll(1, dims=0)
        if name == "mean":
            assert mean_pattern is not None
            pattern = mean_pattern
        else:
            n_pos = self.tokens.shape[1]
            pattern = uniform_pattern(self.replay.layer.spec, n_pos, self.scores.device)
        return pattern.log().expand_as(self.log_pattern)


_Rows = dict[str, list[dict[str, Tensor]]]
"""By source, then batch: metrics by row."""


def _tables(rows: _Rows) -> RowTables:
    tables: RowTables = {}
    for source, batches in rows.items():
        tables[source] = {}
        for name in batches[0]:
            values = torch.cat([batch[name] for batch in batches])
            tables[source][name] = values.cpu().numpy()
    return tables


class _DictionarySums:
    """What is summed over the batches, of one dictionary."""

    def __init__(self, dictionary: BilinearQKDictionary):
        self.d = dictionary
        self.rows: _Rows = defaultdict(list)
        self.explained: dict[str, Tensor] = {}
        d_query, d_key, _ = dictionary.feature_map.sizes
        self.fired = Features(torch.zeros(d_query), torch.zeros(d_key))
        self.n_active_pairs = 0
        self.n_tokens = 0
        self.n_allowed = 0
        query, key, _ = dictionary.feature_map.indices.T
        has_constant = (query == d_query) | (key == d_key)
        self.feature_pairs = dictionary.feature_map.select(~has_constant)

    def add(self, batch: _Batch) -> None:
        d = self.d
        features = d.features(batch.x)
        n_rows, n_pos = batch.tokens.shape
        self.n_tokens += n_rows * n_pos
        self.n_allowed += n_rows * d.spec.n_allowed(n_pos)
        for fired, acts in zip(self.fired, features, strict=True):
            fires = acts > 0  # [batch, pos, d]
            fired += fires.sum(dim=(0, 1)).cpu()
        if d.has_feature_map:
            self.n_active_pairs += d.feature_map.count_active(features, d.spec)
        pattern = batch.log_pattern.exp()  # [row, head, pos_q, pos_k]
        for source in _sources(d):
            log_pattern = d.spec.log_pattern(d.scores(features, source))
            self.rows[source].append(batch.metrics(log_pattern))
            explained = self._feature_scores(features, source)
            sums = explained_sums(batch.scores, explained, pattern, d.spec)
            self.explained[source] = self.explained.get(source, 0.0) + sums

    def _feature_scores(
        self, features: Features, source: Source
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """The part of a source's scores that belongs to pairs of features, without constants."""
        d = self.d
        if source == "feature_map":
            pairs = self.feature_pairs
            return pairs.scores(features, d.decoders, d.spec, include_constant=False)
        # without b_dec, the constants
        queries = d.spec.split_queries(features.query @ d.query.W_dec)
        keys = d.spec.split_keys(features.key @ d.key.W_dec)
        return d.spec.scores(queries, keys)

    def result(
        self,
        baselines: RowTables,
        clean_ce: np.ndarray,
        seed: int,
    ) -> Evaluation:
        tables = _tables(self.rows) | baselines
        zero = tables["zero"]
        sources = {}
        for name, metrics in tables.items():
            explained = self.explained.get(name)
            sources[name] = _pattern_result(metrics, zero, clean_ce, explained, seed)
        fired = [counts.long().numpy() for counts in self.fired]
        return Evaluation(
            n_tokens=self.n_tokens,
            n_rows=len(clean_ce),
            ce_clean=float(clean_ce.mean()),
            sources=sources,
            features=self._feature_result(),
            feature_map=self._map_result() if self.d.has_feature_map else None,
            by_row=RowMetrics(tables, *fired),
        )

    def _feature_result(self) -> FeatureResult:
        query, key = self.fired
        n_tokens = self.n_tokens
        return FeatureResult(
            l0_query=float(query.sum() / n_tokens),
            l0_key=float(key.sum() / n_tokens),
            live_query=int((query > 0).sum()),
            live_key=int((key > 0).sum()),
            max_density_query=float(query.max() / n_tokens),
            max_density_key=float(key.max() / n_tokens),
        )

    def _map_result(self) -> MapResult:
        n_heads = self.d.spec.n_heads
        heads = self.d.feature_map.indices[:, 2]
        pairs_per_head = torch.bincount(heads, minlength=n_heads)
        query, key, _ = self.feature_pairs.indices.T.cpu()
        live_query = self.fired.query > 0
        live_key = self.fired.key > 0
        is_live = live_query[query] & live_key[key]  # [pair]
        n_live_features = int(live_query.sum()) * int(live_key.sum())
        n_live_entries = max(1, n_live_features * n_heads)
        # before dead features were dropped
        n_entries = math.prod(self.d.cfg.original_sizes) * n_heads
        return MapResult(
            n_pairs=len(self.d.feature_map),
            n_pairs_without_constants=len(self.feature_pairs),
            sparsity_of_all=1 - len(self.feature_pairs) / n_entries,
            sparsity_of_live=1 - int(is_live.sum()) / n_live_entries,
            pairs_per_head=pairs_per_head.tolist(),
            active_pairs=self.n_active_pairs / self.n_allowed,
        )


def _sources(dictionary: BilinearQKDictionary) -> list[Source]:
    return ["transcoders", "feature_map"] if dictionary.has_feature_map else ["transcoders"]


def _pattern_result(
    metrics: Mapping[str, np.ndarray],
    zero: Mapping[str, np.ndarray],
    clean_ce: np.ndarray,
    explained: Float[Tensor, "6 head"] | None,
    seed: int,
) -> PatternResult:
    """From the rows of one source, those of the zero pattern, and the model's own losses."""
    pattern_kl = None
    pattern_kl_per_head = None
    argmax_agreement = None
    if "pattern_kl" in metrics:  # not of the zero pattern
        kl = metrics["pattern_kl"]  # [row, head]
        pattern_kl = bootstrap_interval(kl.mean(axis=1), seed=seed)
        pattern_kl_per_head = kl.mean(axis=0).tolist()
        argmax_agreement = float(metrics["argmax_agreement"].mean())
    shares: list[Any] = [None, None, None]
    if explained is not None:
        shares = [share.tolist() for share in explained_shares(explained)]
    ce_gain = zero["ce_loss"] - metrics["ce_loss"]  # [row]
    logit_kl_gain = zero["logit_kl"] - metrics["logit_kl"]
    return PatternResult(
        pattern_kl=pattern_kl,
        pattern_kl_per_head=pattern_kl_per_head,
        pattern_tv=float(metrics["pattern_tv"].mean()),
        argmax_agreement=argmax_agreement,
        ce_loss=float(metrics["ce_loss"].mean()),
        logit_kl=float(metrics["logit_kl"].mean()),
        ce_recovered=bootstrap_interval(ce_gain, zero["ce_loss"] - clean_ce, seed=seed),
        logit_kl_recovered=bootstrap_interval(logit_kl_gain, zero["logit_kl"], seed=seed),
        score_explained=shares[0],
        score_explained_unweighted=shares[1],
        norm_share=shares[2],
    )


@torch.no_grad()
def rounding_loss(
    dictionary: BilinearQKDictionary, x: Float[Tensor, "batch pos d_model"]
) -> pd.DataFrame:
    """What storing in fewer bits costs: saved in each dtype and loaded in float32, against float32.

    Args:
        x: the layer's input for full sequences.
    Returns:
        Index dtype (float32, bfloat16, float16) and source; megabytes of the weights,
        pattern_error, the largest absolute difference of a pattern entry, and pattern_kl =
        KL(pattern || stored pattern) in nats, mean over heads and queries but the first, whose
        pattern is trivial.
    """
    spec = dictionary.spec
    sources = _sources(dictionary)

    def log_patterns(d: BilinearQKDictionary) -> dict[Source, Tensor]:
        features = d.features(x)
        patterns = {}
        for source in sources:
            scores = d.scores(features, source).double()
            patterns[source] = spec.log_pattern(scores)
        return patterns

    references = log_patterns(copy.deepcopy(dictionary).to(torch.float32))
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = copy.deepcopy(dictionary).to(dtype)
        state_dict = rounded.state_dict()
        # as `save_model` does: indices as digits
        rounded.process_state_dict_for_saving(state_dict)
        n_bytes = sum(tensor.nbytes for tensor in state_dict.values())
        rounded_patterns = log_patterns(rounded.to(torch.float32))
        for source, log_pattern in rounded_patterns.items():
            reference = references[source]
            difference = reference.exp() - log_pattern.exp()
            divergence = spec.kl(reference, log_pattern)  # [batch, head, pos_q]
            row = {
                "dtype": str(dtype).removeprefix("torch."),
                "source": source,
                "megabytes": n_bytes / 1e6,
                "pattern_error": float(difference.abs().max()),
                "pattern_kl": float(divergence[:, :, 1:].mean()),
            }
            rows.append(row)
    return pd.DataFrame(rows).set_index(["dtype", "source"])

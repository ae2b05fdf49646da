"""Every figure by which a dictionary is judged, with bootstrap intervals over rows.

Definitions. Pattern figures are means over rows and queries, position 0 left out (its pattern is trivially 1):

    pattern_kl   KL(P || P') = sum over allowed keys of P (log P - log P'), nats      pattern_tv   half the L1 distance
    argmax_agreement   share of queries whose strongest key is the same
    logit_kl     KL(clean || patched) of the next-token distribution, nats, mean over all positions
    ce_recovered = (ce_zero - ce) / (ce_zero - ce_clean)        logit_kl_recovered = 1 - logit_kl / logit_kl_zero
    score_explained = 1 - sum P (s~ - f~)^2 / sum P s~^2, s the model's score, f its feature x feature part,
        tilde = minus the P-weighted mean over keys; score_explained_unweighted the same with equal weights;
        norm_share = sum f^2 / sum s^2

Baselines replace the pattern by zero (all 0), mean (average true pattern of each head, query, key), uniform (over the
allowed keys) and shuffled (the true pattern of another row of the same batch, so its figures depend on batch_size).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Group
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_qk.attention import allowed_keys, attention_scores, log_pattern, pattern_from_scores, pattern_kl
from sae_lens_qk.dictionary import BilinearQKDictionary, Source
from sae_lens_qk.host.layer import LayerReplay, hook_names, input_completion, run_recording
from sae_lens_qk.host.support import Model
from sae_lens_qk.host.proof import check_model
from sae_lens_qk.host.layer import pattern_hooks

BASELINES = ("zero", "mean", "uniform", "shuffled")
_N_BOOTSTRAP = 2000
_POSITIONS = 64  # whose predictions over the vocabulary are compared at a time


class Interval(NamedTuple):
    """A figure with its 95 % bootstrap interval over rows."""

    value: float
    low: float
    high: float


class PatternResult(NamedTuple):
    """What replacing the pattern by one source does; figures that make no sense for it are None."""

    pattern_kl: Interval | None
    pattern_kl_per_head: list[float] | None
    pattern_tv: float
    argmax_agreement: float | None
    ce_loss: float
    logit_kl: float
    ce_recovered: Interval
    logit_kl_recovered: Interval
    score_explained: list[float] | None
    """Per head; dictionary sources only, as the two below."""
    score_explained_unweighted: list[float] | None
    norm_share: list[float] | None


class FeatureResult(NamedTuple):
    """Firing of the features of both sides over all positions."""

    l0_query: float
    l0_key: float
    live_query: int
    live_key: int
    """Features that fired at least once in the evaluated tokens."""
    max_density_query: float
    max_density_key: float
    """Share of tokens on which the most frequent feature fires."""


class MapResult(NamedTuple):
    """Size of the feature map, with both sparsity denominators."""

    n_pairs: int
    n_pairs_without_constants: int
    sparsity_of_all: float
    sparsity_of_live: float
    """Among entries whose two features fired in the evaluated tokens."""
    pairs_per_head: list[int]
    active_pairs: float
    """Mean number of kept pairs active at a (query, key) position, all heads together."""


class RowFigures(NamedTuple):
    """What the means of an evaluation are made of."""

    sources: dict[str, dict[str, np.ndarray]]
    """By source, then figure, with the names of `PatternResult`: pattern_kl [row, head]; pattern_tv, argmax_agreement,
    ce_loss and logit_kl [row]. The zero pattern has neither pattern_kl nor argmax_agreement."""
    fired_query: np.ndarray
    """Tokens on which each feature fires, [d_query]."""
    fired_key: np.ndarray


class Evaluation(NamedTuple):
    """Result of `evaluate`."""

    n_tokens: int
    n_rows: int
    ce_clean: float
    sources: dict[str, PatternResult]
    """By name: the dictionary's sources, then the baselines."""
    features: FeatureResult
    feature_map: MapResult | None
    by_row: RowFigures | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without `by_row`."""
        return {name: _plain(value) for name, value in self._asdict().items() if name != "by_row"}

    def __rich__(self) -> Group:
        """Readable tables, for `rich.print`."""
        table = Table(
            title=f"{self.n_tokens:,} tokens in {self.n_rows} rows, clean loss {self.ce_clean:.4f} nats"
        )
        table.add_column("pattern from", no_wrap=True)
        for column in (
            "pattern KL",
            "TV",
            "argmax",
            "loss",
            "logit KL",
            "loss recovered",
            "logit KL recovered",
        ):
            table.add_column(column, justify="right")
        for name, row in self.sources.items():
            kl = f"{row.pattern_kl.value:.4f}" if row.pattern_kl else "-"
            argmax = f"{row.argmax_agreement:.3f}" if row.argmax_agreement is not None else "-"
            recovered = [
                f"{i.value:.1%} ({i.low:.1%}, {i.high:.1%})"
                for i in (row.ce_recovered, row.logit_kl_recovered)
            ]
            table.add_row(
                name,
                kl,
                f"{row.pattern_tv:.4f}",
                argmax,
                f"{row.ce_loss:.4f}",
                f"{row.logit_kl:.4f}",
                *recovered,
            )
        f, m = self.features, self.feature_map
        features = (
            f"L0 {f.l0_query:.1f} query / {f.l0_key:.1f} key features a token; live {f.live_query} / {f.live_key} "
            f"in {self.n_tokens:,} tokens"
        )
        if m is None:
            return Group(table, features)
        feature_map = (
            f"feature map: {m.n_pairs:,} pairs ({m.n_pairs_without_constants:,} between features), sparsity "
            f"{m.sparsity_of_all:.3%} of all, {m.sparsity_of_live:.3%} of live; {m.active_pairs:.1f} active at a position"
        )
        return Group(table, features, feature_map)


def evaluate(
    dictionary: BilinearQKDictionary,
    model: Model,
    tokens: Int[Tensor, "row pos"],
    *,
    batch_size: int = 8,
    baselines: tuple[str, ...] = BASELINES,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Patch every source into the model and measure pattern, loss and logits; see the module for the definitions.

    Args:
        tokens: whole rows, BOS first; the protocol is 256 tokens a row and the full split.
        batch_size: rows in a forward pass, at least 2.
        baselines: of `BASELINES`; "zero" is always measured, the recovered shares need it.

    Raises:
        ValueError: fewer than two rows, or an unknown baseline.
        FingerprintError: the model is not the dictionary's.
    """
    shared: dict[str, Any] = dict(
        batch_size=batch_size, baselines=baselines, seed=seed, progress=progress
    )
    return compare({"": dictionary}, model, tokens, **shared)[""]


@torch.no_grad()
def compare(
    dictionaries: Mapping[str, BilinearQKDictionary],
    model: Model,
    tokens: Int[Tensor, "row pos"],
    *,
    batch_size: int = 8,
    baselines: tuple[str, ...] = BASELINES,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Evaluation]:
    """`evaluate` for several dictionaries of one layer, by name; the model and the baselines run once for all of them.

    All see the same rows: `Evaluation.by_row` gives paired differences.

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
        check_model(dictionary, model)
    training = [dictionary for dictionary in dictionaries.values() if dictionary.training]
    run = _Run(dictionaries, model, layers.pop(), tuple(dict.fromkeys(("zero", *baselines))))
    batches = tokens.tensor_split(max(1, len(tokens) // batch_size))
    try:
        for dictionary in training:
            dictionary.eval()
        if "mean" in baselines:
            run.average_pattern(batches)
        for batch in tqdm(batches, desc="Evaluating", unit="batch", disable=not progress):
            run.add(batch)
    finally:
        for dictionary in training:
            dictionary.train()
    return run.result(np.random.default_rng(seed))


class _Batch:
    """The layer's inputs and pattern and the model's predictions on some rows, and what another pattern makes of them."""

    def __init__(
        self, model: Model, layer: int, replay: LayerReplay, tokens: Int[Tensor, "row pos"]
    ):
        self.model, self.layer, self.replay, self.tokens = model, layer, replay, tokens
        names = hook_names(model, layer)
        logits, seen = replay.record(tokens, (names.input, names.scores))
        self.x, self.scores = (
            input_completion(model, layer)(seen[names.input]),
            seen[names.scores].float(),
        )
        self.log_pattern = log_pattern(self.scores)
        self.log_probs = logits.float().log_softmax(dim=-1)
        self.ce = _cross_entropy(self.log_probs, tokens)

    def with_pattern(
        self, log_made: Float[Tensor, "row head pos_q pos_k"] | None
    ) -> dict[str, Tensor]:
        """The figures of `RowFigures.sources`, by row; None is the zero pattern."""
        true = self.log_pattern
        made = torch.zeros_like(true) if log_made is None else log_made.exp()
        found = {
            "pattern_tv": 0.5 * (true.exp() - made).abs().sum(dim=-1)[..., 1:].mean(dim=(1, 2))
        }
        if log_made is not None:
            same = true.argmax(dim=-1) == made.argmax(dim=-1)
            found["pattern_kl"] = pattern_kl(true, log_made)[..., 1:].mean(dim=2)
            found["argmax_agreement"] = same[..., 1:].double().mean(dim=(1, 2))
        found |= self._predictions(
            self.replay.run(pattern_hooks(self.model, self.layer, lambda x, scores: made))
        )
        return {name: by_row.double().cpu() for name, by_row in found.items()}

    def _predictions(self, logits: Float[Tensor, "row pos vocab"]) -> dict[str, Tensor]:
        """Loss and divergence from the model's own predictions, by row; a few positions at a time, which a cache holds."""
        of_next, kl = [], []
        by_position = (
            t.flatten(0, 1).split(_POSITIONS)
            for t in (logits, self.log_probs, self.tokens.roll(-1, dims=1))
        )
        for made, clean, following in zip(*by_position, strict=True):
            patched = made.float().log_softmax(dim=-1)
            of_next.append(patched.gather(1, following[:, None])[:, 0])
            kl.append((clean.exp() * (clean - patched)).sum(dim=-1))
        log_prob, divergence = (
            torch.cat(found).unflatten(0, self.tokens.shape) for found in (of_next, kl)
        )
        return {"ce_loss": -log_prob[:, :-1].mean(dim=1), "logit_kl": divergence.mean(dim=1)}


class _Rows:
    """Figures by source and row."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, list[Tensor]]] = {}

    def add(self, source: str, figures: Mapping[str, Tensor]) -> None:
        for name, by_row in figures.items():
            self.found.setdefault(source, {}).setdefault(name, []).append(by_row)

    def tables(self) -> dict[str, dict[str, np.ndarray]]:
        return {
            source: {f: torch.cat(v).numpy() for f, v in rows.items()}
            for source, rows in self.found.items()
        }


class _Run:
    """Sums over batches."""

    def __init__(
        self,
        dictionaries: Mapping[str, BilinearQKDictionary],
        model: Model,
        layer: int,
        baselines: tuple[str, ...],
    ):
        self.model, self.layer, self.baselines = model, layer, baselines
        self.sums = {name: _DictionarySums(dictionary) for name, dictionary in dictionaries.items()}
        self.rows, self.clean_ce = _Rows(), []
        self.mean_pattern: Tensor | None = None
        self.replay = LayerReplay(model, layer)

    def average_pattern(self, batches: tuple[Tensor, ...]) -> None:
        name, stop = hook_names(self.model, self.layer).scores, self.layer + 1
        scores = (
            run_recording(self.model, batch, [name], stop_at_layer=stop)[1][name]
            for batch in batches
        )
        total = sum(pattern_from_scores(batch.float()).sum(dim=0) for batch in scores)
        assert isinstance(total, Tensor)
        self.mean_pattern = total / sum(len(batch) for batch in batches)

    def add(self, tokens: Tensor) -> None:
        batch = _Batch(self.model, self.layer, self.replay, tokens)
        self.clean_ce.append(batch.ce.double().cpu())
        for sums in self.sums.values():
            sums.add(batch)
        for name in self.baselines:
            self.rows.add(name, batch.with_pattern(self._baseline(name, batch.log_pattern)))

    def _baseline(self, name: str, true: Tensor) -> Tensor | None:
        if name == "zero":
            return None
        if name == "uniform":
            return log_pattern(torch.zeros_like(true))
        if name == "shuffled":
            return true.roll(1, dims=0)
        assert self.mean_pattern is not None
        return self.mean_pattern.log().expand_as(true)

    def result(self, generator: np.random.Generator) -> dict[str, Evaluation]:
        clean, baselines = torch.cat(self.clean_ce).numpy(), self.rows.tables()
        picks = generator.integers(0, len(clean), (_N_BOOTSTRAP, len(clean)))
        return {name: sums.result(baselines, clean, picks) for name, sums in self.sums.items()}


class _DictionarySums:
    """What is summed over batches of one dictionary."""

    def __init__(self, dictionary: BilinearQKDictionary):
        self.d, self.rows = dictionary, _Rows()
        self.sources: tuple[Source, ...] = (
            ("transcoders", "feature_map") if dictionary.has_feature_map else ("transcoders",)
        )
        self.explained: dict[str, Tensor] = {}
        self.fired = [torch.zeros(dictionary.cfg.d_query), torch.zeros(dictionary.cfg.d_key)]
        self.active_pairs, self.n_tokens, self.n_allowed = 0.0, 0, 0.0

    def add(self, batch: _Batch) -> None:
        for source in self.sources:
            self.rows.add(source, batch.with_pattern(log_pattern(self.d.scores(batch.x, source))))
        n_rows, n_pos = batch.tokens.shape
        self.n_tokens += n_rows * n_pos
        self.n_allowed += n_rows * n_pos * (n_pos + 1) / 2
        self._add_features(batch.x, batch.scores, batch.log_pattern.exp())

    def _add_features(self, x: Tensor, scores: Tensor, pattern: Tensor) -> None:
        d, spec = self.d, self.d.spec
        query_acts, key_acts = d.encode_query(x), d.encode_key(x)
        for fired, acts in zip(self.fired, (query_acts, key_acts), strict=True):
            fired += (acts > 0).sum(dim=(0, 1)).cpu()
        without_bias = attention_scores(
            spec.split_queries(query_acts @ d.query.W_dec),
            spec.split_keys(key_acts @ d.key.W_dec),
            spec,
        )
        self._add_explained("transcoders", scores, without_bias, pattern)
        if d.has_feature_map:
            listed = d.feature_map
            constant = (listed.indices[:, 0] == d.cfg.d_query) | (
                listed.indices[:, 1] == d.cfg.d_key
            )
            features_only = listed.select(~constant).scores(
                query_acts, key_acts, d.decoders, spec, include_constant=False
            )
            self._add_explained("feature_map", scores, features_only, pattern)
            self.active_pairs += float(listed.count_active(query_acts, key_acts))

    def _add_explained(self, name: str, scores: Tensor, features: Tensor, pattern: Tensor) -> None:
        by_head = explained_sums(scores, features, pattern)
        self.explained[name] = self.explained.get(name, torch.zeros_like(by_head)) + by_head

    def result(
        self, baselines: dict[str, dict[str, np.ndarray]], clean: np.ndarray, picks: np.ndarray
    ) -> Evaluation:
        tables = self.rows.tables() | baselines
        return Evaluation(
            n_tokens=self.n_tokens,
            n_rows=len(clean),
            ce_clean=float(clean.mean()),
            sources={name: self._source_result(name, tables, clean, picks) for name in tables},
            features=self._feature_result(),
            feature_map=self._map_result() if self.d.has_feature_map else None,
            by_row=RowFigures(tables, *(fired.long().cpu().numpy() for fired in self.fired)),
        )

    def _source_result(
        self,
        name: str,
        tables: dict[str, dict[str, np.ndarray]],
        clean: np.ndarray,
        picks: np.ndarray,
    ) -> PatternResult:
        rows, zero = tables[name], tables["zero"]
        kl = rows.get("pattern_kl")
        explained = None
        if name in self.explained:
            explained = [shares.tolist() for shares in explained_shares(self.explained[name])]
        return PatternResult(
            pattern_kl=None
            if kl is None
            else _interval(lambda at: kl[at].mean(axis=(-1, -2)), picks),
            pattern_kl_per_head=None if kl is None else kl.mean(axis=0).tolist(),
            pattern_tv=float(rows["pattern_tv"].mean()),
            argmax_agreement=float(rows["argmax_agreement"].mean())
            if "argmax_agreement" in rows
            else None,
            ce_loss=float(rows["ce_loss"].mean()),
            logit_kl=float(rows["logit_kl"].mean()),
            ce_recovered=_interval(
                lambda at: (
                    (zero["ce_loss"][at] - rows["ce_loss"][at]).mean(-1)
                    / (zero["ce_loss"][at] - clean[at]).mean(-1)
                ),
                picks,
            ),
            logit_kl_recovered=_interval(
                lambda at: 1 - rows["logit_kl"][at].mean(-1) / zero["logit_kl"][at].mean(-1), picks
            ),
            score_explained=explained[0] if explained else None,
            score_explained_unweighted=explained[1] if explained else None,
            norm_share=explained[2] if explained else None,
        )

    def _feature_result(self) -> FeatureResult:
        (query, key), n = self.fired, self.n_tokens
        return FeatureResult(
            l0_query=float(query.sum() / n),
            l0_key=float(key.sum() / n),
            live_query=int((query > 0).sum()),
            live_key=int((key > 0).sum()),
            max_density_query=float(query.max() / n),
            max_density_key=float(key.max() / n),
        )

    def _map_result(self) -> MapResult:
        listed, cfg, n_heads = self.d.feature_map, self.d.cfg, self.d.spec.n_heads
        query, key, head = listed.indices.unbind(dim=1)
        features_only = (query < cfg.d_query) & (key < cfg.d_key)
        between_features = int(features_only.sum())
        live = [fired > 0 for fired in self.fired]
        both_live = live[0][query[features_only].cpu()] & live[1][key[features_only].cpu()]
        n_live_entries = int(live[0].sum()) * int(live[1].sum()) * n_heads
        return MapResult(
            n_pairs=len(listed),
            n_pairs_without_constants=between_features,
            sparsity_of_all=1 - between_features / (math.prod(cfg.original_sizes) * n_heads),
            sparsity_of_live=1 - int(both_live.sum()) / max(1, n_live_entries),
            pairs_per_head=torch.bincount(head, minlength=n_heads).tolist(),
            active_pairs=self.active_pairs / self.n_allowed,
        )


def explained_sums(
    scores: Float[Tensor, "batch head pos_q pos_k"],
    features: Float[Tensor, "batch head pos_q pos_k"],
    pattern: Float[Tensor, "batch head pos_q pos_k"],
) -> Float[Tensor, "6 head"]:
    """Sums that `explained_shares` is made of, to be added over batches.

    s^2, f^2, then weighted by the pattern and by equal weights: (s~ - f~)^2 and s~^2.
    """
    allowed = allowed_keys(scores.shape[-1], scores.device)
    s, f = (t.masked_fill(~allowed, 0.0).double() for t in (scores, features))
    sums = [s.square(), f.square()]
    for P in (pattern.double(), (allowed / allowed.sum(dim=-1, keepdim=True)).double()):
        s_centred, f_centred = (t - (P * t).sum(dim=-1, keepdim=True) for t in (s, f))
        sums += [P * (s_centred - f_centred).square(), P * s_centred.square()]
    return torch.stack([t.sum(dim=(0, 2, 3)) for t in sums])


def explained_shares(sums: Float[Tensor, "6 head"]) -> tuple[Tensor, Tensor, Tensor]:
    """`score_explained`, its unweighted version and `norm_share` of each head; see the module."""
    s2, f2, error, variance, error_equal, variance_equal = sums
    return 1 - error / variance, 1 - error_equal / variance_equal, f2 / s2


def _cross_entropy(
    log_probs: Float[Tensor, "row pos vocab"], tokens: Int[Tensor, "row pos"]
) -> Float[Tensor, " row"]:
    """Mean next-token loss of each row, nats."""
    return -log_probs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0].mean(dim=1)


def _interval(figure: Any, picks: np.ndarray) -> Interval:
    """`figure` of all rows, and its 2.5 and 97.5 percentiles over resampled rows (paired: the same rows everywhere)."""
    drawn = np.concatenate([np.atleast_1d(figure(chunk)) for chunk in np.array_split(picks, 20)])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(figure(np.arange(picks.shape[1]))), float(low), float(high))


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value

"""What the pictures draw: their images, bars, labels and scales, read off the finished figures."""

import io
import sys
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sae_lens_qk.figures import (
    density_histogram,
    escape_dollars,
    pattern_triptych,
    recovery_bars,
)
from sae_lens_qk.metrics import Interval
from sae_lens_qk.results import Evaluation, FeatureResult, PatternResult

WORDS = ["<s>", " When", " $", "$$", "\n", " a very long token", " {x}^2"]
WORD_LABELS = ["<s>", "When", "$", "$$", "↵", "a very long…", "{x}^2"]
N_POS = len(WORDS)


def random_patterns(
    n_heads: int,
    n_pos: int = N_POS,
) -> tuple[Tensor, Tensor]:
    """Two of [head, pos_q, pos_k]."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, n_heads, n_pos, n_pos, generator=generator)
    after_query = torch.ones(n_pos, n_pos).triu(1).bool()
    one, other = scores.masked_fill(after_query, -torch.inf).softmax(dim=-1)
    return one, other


def rendered(figure: Figure) -> Figure:
    """Rendering is where labels are read as mathematics and layouts fail."""
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    return figure


def panels_of(figure: Figure) -> list:
    return [ax for ax in figure.axes if ax.get_images()]


def tick_labels(axis) -> list[str]:
    """Those that are not empty, as readers see them: an escaped dollar is a dollar."""
    labels = [label.get_text().replace(r"\$", "$") for label in axis.get_ticklabels()]
    return [label for label in labels if label]


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def font_sizes(figure: Figure) -> list[float]:
    texts = figure.findobj(lambda artist: hasattr(artist, "get_fontsize"))
    return [text.get_fontsize() for text in texts if text.get_text() and text.get_visible()]


class TestTriptych:
    @pytest.mark.parametrize("n_heads", [1, 3])
    def test_images_are_the_patterns(self, n_heads):
        true, rebuilt = random_patterns(n_heads)
        heads = range(4, 4 + n_heads)
        panels = panels_of(rendered(pattern_triptych(true, rebuilt, WORDS, heads=heads)))
        assert len(panels) == 3 * n_heads
        after_query = np.triu(np.ones((N_POS, N_POS), bool), 1)
        for n, panel in enumerate(panels):
            head, column = divmod(n, 3)
            difference = rebuilt[head] - true[head]
            expected = (true[head], rebuilt[head], difference)[column].numpy()
            image = panel.images[0].get_array()
            assert np.array_equal(image.mask, after_query)  # stays blank
            assert np.array_equal(image.data[~after_query], expected[~after_query])
            alpha = panel.images[0].cmap(image)[0, 1, 3]
            assert alpha == 0

    def test_scales_are_shared(self):
        true, rebuilt = random_patterns(3)
        panels = panels_of(pattern_triptych(true, 0.5 * rebuilt, WORDS))
        limits = [panel.images[0].get_clim() for panel in panels]
        widest = float((0.5 * rebuilt - true).abs().max())
        # up to 1, as the first query attends to itself alone
        assert set(limits[0::3]) == set(limits[1::3]) == {(0.0, 1.0)}
        assert limits[2::3] == [(-widest, widest)] * 3

    def test_a_limit_clips_the_patterns(self):
        true, rebuilt = random_patterns(1)
        panels = panels_of(pattern_triptych(true, rebuilt, WORDS, limit=0.3))
        assert panels[0].images[0].get_clim() == (0, 0.3)
        assert panels[1].images[0].get_clim() == (0, 0.3)

    @pytest.mark.parametrize(("limit", "extend"), [(None, "neither"), (0.3, "max")])
    def test_one_bar_per_scale_says_where_it_is_clipped(self, limit, extend):
        true, rebuilt = random_patterns(3)
        panels = panels_of(pattern_triptych(true, rebuilt, WORDS, limit=limit))
        bars = [panel.images[0].colorbar for panel in panels]
        has_bar = [bar is not None for bar in bars]
        assert has_bar == [True, False, True] + [False] * 6
        assert bars[0].extend == extend
        assert bars[2].extend == "neither"

    def test_labels(self):
        true, rebuilt = random_patterns(2)
        titles = ["true", "from $5", "error"]
        figure = rendered(pattern_triptych(true, rebuilt, WORDS, heads=[7, 2], titles=titles))
        panels = panels_of(figure)
        assert [panel.get_title() for panel in panels] == ["true", r"from \$5", "error", "", "", ""]
        assert [panel.get_ylabel() for panel in panels] == ["head 7", "", "", "head 2", "", ""]
        for n, panel in enumerate(panels):
            is_left = n % 3 == 0
            is_lowest = n >= 3
            assert tick_labels(panel.yaxis) == (WORD_LABELS if is_left else [])
            assert tick_labels(panel.xaxis) == (WORD_LABELS if is_lowest else [])
        assert all(label.get_rotation() == 90 for label in panels[3].get_xticklabels())
        sizes = font_sizes(figure)
        assert min(sizes) >= 4.5
        assert max(sizes) == 8

    @pytest.mark.parametrize("head", [5, np.int64(5), torch.tensor(5), [5]])
    def test_a_single_head(self, head):
        true, rebuilt = random_patterns(1)
        panels = panels_of(pattern_triptych(true[0], rebuilt[0], WORDS, heads=head))
        expected = panels_of(pattern_triptych(true, rebuilt, WORDS))
        for panel, other in zip(panels, expected, strict=True):
            image = panel.images[0].get_array().filled(9)
            assert np.array_equal(image, other.images[0].get_array().filled(9))
        assert panels[0].get_ylabel() == "head 5"

    def test_many_tokens_are_numbered(self):
        true, rebuilt = random_patterns(1, n_pos=83)
        figure = rendered(pattern_triptych(true, rebuilt, ["word"] * 83))
        labels = tick_labels(panels_of(figure)[0].yaxis)
        assert "word" not in labels
        assert {"0", "20", "40"} <= set(labels)

    def test_equal_patterns_differ_nowhere(self):
        true, _ = random_patterns(1)
        panels = panels_of(rendered(pattern_triptych(true, true, WORDS)))
        image = panels[2].images[0]
        assert image.get_clim() == (-1.0, 1.0)
        assert not image.get_array().compressed().any()

    @pytest.mark.parametrize(
        ("words", "heads"), [(WORDS[:-1], None), (WORDS, 3), (WORDS, [1, 2, 3])]
    )
    def test_patterns_that_do_not_fit_are_refused(self, words, heads):
        true, rebuilt = random_patterns(2)
        with pytest.raises(ValueError, match="a word for each position"):
            pattern_triptych(true, rebuilt, words, heads)


class TestDensities:
    def test_bins_hold_the_features_that_fire(self):
        query = [0.0, 0.0, 0.02, 0.5, 1.0]
        key = [0.0, 0.011, 0.012, 0.013]
        figure = rendered(density_histogram(query, pd.Series(key)))
        ax = figure.axes[0]
        assert ax.get_xscale() == "log"
        for outline, densities in zip(ax.patches, (query, key), strict=True):
            corners = outline.get_xy()[:-1]
            counts = dict(zip(corners[::2, 0], corners[1::2, 1], strict=False))
            edges = sorted(counts)
            for left, right in pairwise(edges):
                is_last = right == edges[-1]
                inside = [d for d in densities if left <= d < right or (is_last and d == right)]
                assert counts[left] == len(inside)
        assert legend_labels(figure) == ["query: 3 fire, 2 never", "key: 3 fire, 1 never"]

    def test_features_that_always_fire(self):
        outlines = rendered(density_histogram([1.0, 1.0], [0.0, 1.0])).axes[0].patches
        heights = [outline.get_xy()[:, 1].max() for outline in outlines]
        assert heights == [2, 1]

    @pytest.mark.parametrize("wrong", [[0.0, 1.2], [-0.1, 0.5], [float("nan"), 0.5], [0.0, 0.0]])
    def test_what_is_no_density_is_refused(self, wrong):
        with pytest.raises(ValueError, match="some feature must fire"):
            density_histogram(wrong, [0.0])


@pytest.fixture
def evaluation() -> Evaluation:
    def source(kl, ce_recovered, logit_kl_recovered) -> PatternResult:
        return PatternResult(
            pattern_kl=kl,
            pattern_kl_per_head=None,
            pattern_tv=0.1,
            argmax_agreement=None,
            ce_loss=3.5,
            logit_kl=0.01,
            ce_recovered=Interval(*ce_recovered),
            logit_kl_recovered=Interval(*logit_kl_recovered),
            score_explained=None,
            score_explained_unweighted=None,
            norm_share=None,
        )

    sources = {
        "transcoders": source(Interval(0.06, 0.05, 0.08), (0.95, 0.9, 0.97), (0.91, 0.9, 0.92)),
        "zero": source(None, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
        "uniform": source(Interval(3.1, 3.0, 3.3), (-0.8, -1.0, -0.5), (-0.5, -0.7, -0.4)),
    }
    return Evaluation(512, 2, 3.4, sources, FeatureResult(1.0, 1.0, 3, 3, 0.1, 0.1), None)


class TestRecovery:
    @pytest.mark.parametrize("is_dict", [False, True])
    def test_bars_and_points(self, evaluation, is_dict):
        metrics = evaluation.to_dict() if is_dict else evaluation
        figure = rendered(recovery_bars(metrics))
        loss, logits, kl = figure.axes
        assert [bar.get_width() for bar in loss.patches] == [0.95, 0.0, -0.8]
        assert [bar.get_width() for bar in logits.patches] == [0.91, 0.0, -0.5]
        points = np.ma.filled(kl.collections[-1].get_offsets(), np.nan)[:, 0]
        assert np.array_equal(points, [0.06, np.nan, 3.1], equal_nan=True)
        assert kl.get_xscale() == "log"
        assert tick_labels(loss.yaxis) == ["transcoders", "zero", "uniform"]
        assert loss.yaxis_inverted()  # the first on top
        titles = [ax.get_xlabel() for ax in figure.axes]
        assert titles == ["loss recovered", "logit KL recovered", "pattern KL (nats)"]
        assert "50%" in tick_labels(loss.xaxis)

    @pytest.mark.parametrize(
        ("panel", "expected"),
        [
            (0, [(0.9, 0.97), (-1.0, -0.5)]),
            (1, [(0.9, 0.92), (-0.7, -0.4)]),
            (2, [(0.05, 0.08), (3.0, 3.3)]),
        ],
    )
    def test_intervals(self, evaluation, panel, expected):
        ax = recovery_bars(evaluation).axes[panel]
        segments = [segment[:, 0] for segment in ax.collections[0].get_segments() if len(segment)]
        ends = [segment for segment in segments if np.ptp(segment) > 0]
        assert np.array(ends) == pytest.approx(np.array(expected))

    def test_baselines_are_grey(self, evaluation):
        bars = recovery_bars(evaluation).axes[0].patches
        colours = [tuple(bar.get_facecolor()) for bar in bars]
        assert colours[1] == colours[2] != colours[0]
        red, green, blue, _ = colours[1]
        assert red == green == blue


@pytest.mark.parametrize("word", ["$", "$$", "$x$", " ${a}$ and $", r"\$", "a$b"])
def test_no_text_is_read_as_mathematics(word):
    """Escaped labels draw the characters themselves: as wide as with mathematics switched off."""
    figure = Figure()
    escaped = figure.text(0, 0, escape_dollars(word)).get_window_extent()
    plain = figure.text(0, 0, word, parse_math=False).get_window_extent()
    assert escaped.width == plain.width > 0


def test_pyplot_has_no_part_in_it(monkeypatch, evaluation):
    """It would choose a backend."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    true, rebuilt = random_patterns(1)
    rendered(pattern_triptych(true, rebuilt, WORDS))
    rendered(density_histogram([0.1], [0.2]))
    rendered(recovery_bars(evaluation))


def test_matplotlib_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install sae-lens-qk\[figures\]"):
        density_histogram([0.1], [0.2])

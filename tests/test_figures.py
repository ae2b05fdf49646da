"""Figures by what is drawn in them: images equal to the input, shared scales, blank future keys, labels, bars, curves."""

import io
import sys
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from tiny_dictionaries import D_KEY, D_QUERY, tiny_dictionary

from sae_lens_qk.figures import _escaped, density_histogram, kl_against_pairs, offset_kernel, pattern_triptych, recovery_bars
from sae_lens_qk.evals import Evaluation, FeatureResult, Interval, PatternResult

WORDS = ["<s>", " When", " $", "$$", "\n", " a very long token", " {x}^2"]
SHOWN = ["<s>", "When", "$", "$$", "↵", "a very long…", "{x}^2"]


def random_patterns(n_heads: int, n_pos: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, n_heads, n_pos, n_pos, generator=generator)
    patterns = scores.masked_fill(torch.ones(n_pos, n_pos).triu(1).bool(), -torch.inf).softmax(
        dim=-1
    )
    return patterns[0], patterns[1]


def drawn(figure: Figure) -> Figure:
    """Rendered, which is where labels are read as mathematics and layouts fail."""
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    return figure


def panels_of(figure: Figure) -> list:
    return [ax for ax in figure.axes if ax.get_images()]


def labels(axis) -> list[str]:
    """As drawn: an escaped dollar is a dollar."""
    return [label.get_text().replace(r"\$", "$") for label in axis.get_ticklabels()]


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text().replace(r"\$", "$") for text in figure.legends[0].get_texts()]


def fonts(figure: Figure) -> list[float]:
    texts = figure.findobj(lambda artist: hasattr(artist, "get_fontsize"))
    return [text.get_fontsize() for text in texts if text.get_text() and text.get_visible()]


class TestTriptych:
    @pytest.mark.parametrize("n_heads", [1, 3])
    def test_images_are_the_patterns(self, n_heads):
        true, made = random_patterns(n_heads)
        figure = drawn(pattern_triptych(true, made, WORDS, heads=range(4, 4 + n_heads)))
        panels = panels_of(figure)
        assert len(panels) == 3 * n_heads
        future = np.triu(np.ones((7, 7), bool), 1)
        for n, panel in enumerate(panels):
            head, column = divmod(n, 3)
            expected = (true[head], made[head], made[head] - true[head])[column].numpy()
            image = panel.images[0].get_array()
            assert np.array_equal(image.mask, future)  # future keys stay blank
            assert np.array_equal(image.data[~future], expected[~future])
            assert panel.images[0].cmap(image)[0, 1, 3] == 0  # transparent

    def test_scales_are_shared(self):
        true, made = random_patterns(3)
        panels = panels_of(pattern_triptych(true, 0.5 * made, WORDS))
        limits = [panel.images[0].get_clim() for panel in panels]
        assert (
            set(limits[0::3]) == set(limits[1::3]) == {(0.0, 1.0)}
        )  # the first query attends to itself alone
        widest = float((0.5 * made - true).abs().max())
        assert limits[2::3] == [(-widest, widest)] * 3
        clipped = panels_of(pattern_triptych(true, made, WORDS, limit=0.3))
        assert [panel.images[0].get_clim() for panel in clipped[:2]] == [(0, 0.3), (0, 0.3)]

    def test_one_bar_a_scale_says_where_it_is_clipped(self):
        true, made = random_patterns(3)
        for limit, extend in ((None, "neither"), (0.3, "max")):
            panels = panels_of(pattern_triptych(true, made, WORDS, limit=limit))
            bars = [panel.images[0].colorbar for panel in panels]
            assert [bar is not None for bar in bars] == [True, False, True] + [False] * 6
            assert [bars[0].extend, bars[2].extend] == [extend, "neither"]

    def test_labels(self):
        true, made = random_patterns(2)
        figure = drawn(
            pattern_triptych(true, made, WORDS, heads=[7, 2], titles=["true", "from $5", "error"])
        )
        panels = panels_of(figure)
        assert [panel.get_title() for panel in panels] == ["true", r"from \$5", "error", "", "", ""]
        assert [panel.get_ylabel() for panel in panels] == ["head 7", "", "", "head 2", "", ""]
        for n, panel in enumerate(panels):
            assert [label for label in labels(panel.yaxis) if label] == (
                SHOWN if n % 3 == 0 else []
            )
            assert [label for label in labels(panel.xaxis) if label] == (SHOWN if n >= 3 else [])
        assert all(label.get_rotation() == 90 for label in panels[3].get_xticklabels())
        assert 4.5 <= min(fonts(figure)) <= max(fonts(figure)) == 8

    def test_a_single_head(self):
        true, made = random_patterns(1)
        one, same = (
            pattern_triptych(true[0], made[0], WORDS, heads=5),
            pattern_triptych(true, made, WORDS, heads=[5]),
        )
        for a, b in zip(panels_of(one), panels_of(same), strict=True):
            assert np.array_equal(*(panel.images[0].get_array().filled(9) for panel in (a, b)))
        assert panels_of(one)[0].get_ylabel() == "head 5"

    def test_many_tokens_are_numbered(self):
        true, made = random_patterns(1, n_pos=83)
        panel = panels_of(drawn(pattern_triptych(true, made, ["word"] * 83)))[0]
        assert "word" not in labels(panel.yaxis)
        assert {"0", "20", "40"} <= set(labels(panel.yaxis))

    def test_equal_patterns_differ_nowhere(self):
        true, _ = random_patterns(1)
        image = panels_of(drawn(pattern_triptych(true, true, WORDS)))[2].images[0]
        assert image.get_clim() == (-1.0, 1.0)
        assert not image.get_array().compressed().any()

    def test_patterns_that_do_not_fit_are_refused(self):
        true, made = random_patterns(2)
        for arguments in (
            (true, made, WORDS[:-1]),
            (true, made, WORDS, 3),
            (true, made, WORDS, [1, 2, 3]),
        ):
            with pytest.raises(
                ValueError, match="a word for each position and a number for each head, got"
            ):
                pattern_triptych(*arguments)


class TestDensities:
    def test_bins_hold_the_features_that_fire(self):
        query, key = [0.0, 0.0, 0.02, 0.5, 1.0], [0.0, 0.011, 0.012, 0.013]
        figure = drawn(density_histogram(query, pd.Series(key)))
        ax = figure.axes[0]
        assert ax.get_xscale() == "log"
        for outline, densities in zip(ax.patches, (query, key), strict=True):
            corners = outline.get_xy()
            steps = dict(
                zip(corners[::2, 0], corners[1::2, 1], strict=False)
            )  # left edge of a bin: its count
            edges = sorted(steps)
            for left, right in pairwise(edges):
                inside = [d for d in densities if left <= d < right or right == edges[-1] == d]
                assert steps[left] == len(inside)
        assert legend_labels(figure) == ["query: 3 fire, 2 never", "key: 3 fire, 1 never"]

    def test_features_that_always_fire(self):
        outlines = drawn(density_histogram([1.0, 1.0], [0.0, 1.0])).axes[0].patches
        assert [outline.get_xy()[:, 1].max() for outline in outlines] == [2, 1]

    @pytest.mark.parametrize("wrong", [[0.0, 1.2], [-0.1, 0.5], [float("nan"), 0.5], [0.0, 0.0]])
    def test_what_is_no_density_is_refused(self, wrong):
        with pytest.raises(
            ValueError, match=r"shares of tokens in \[0, 1\], and some feature must fire"
        ):
            density_histogram(wrong, [0.0])


def an_evaluation() -> Evaluation:
    def source(kl, ce, logits):
        return PatternResult(kl, None, 0.1, None, 3.5, 0.01, ce, logits, None, None, None)

    sources = {
        "transcoders": source(
            Interval(0.06, 0.05, 0.08), Interval(0.95, 0.9, 0.97), Interval(0.91, 0.9, 0.92)
        ),
        "zero": source(None, Interval(0.0, 0.0, 0.0), Interval(0.0, 0.0, 0.0)),
        "uniform": source(
            Interval(3.1, 3.0, 3.3), Interval(-0.8, -1.0, -0.5), Interval(-0.5, -0.7, -0.4)
        ),
    }
    return Evaluation(512, 2, 3.4, sources, FeatureResult(1.0, 1.0, 3, 3, 0.1, 0.1), None)


class TestRecovery:
    @pytest.mark.parametrize("as_dict", [False, True])
    def test_bars_points_and_intervals(self, as_dict):
        evaluation = an_evaluation()
        figure = drawn(recovery_bars(evaluation.to_dict() if as_dict else evaluation))
        loss, logits, kl = figure.axes
        assert [bar.get_width() for bar in loss.patches] == [0.95, 0.0, -0.8]
        assert [bar.get_width() for bar in logits.patches] == [0.91, 0.0, -0.5]
        points = np.ma.filled(kl.collections[-1].get_offsets(), np.nan)[:, 0]
        assert points[[0, 2]].tolist() == [0.06, 3.1] and np.isnan(points[1])
        assert kl.get_xscale() == "log"
        ends_of = {
            loss: [(0.9, 0.97), (-1.0, -0.5)],
            logits: [(0.9, 0.92), (-0.7, -0.4)],
            kl: [(0.05, 0.08), (3.0, 3.3)],
        }
        for ax, ends in ends_of.items():
            segments = [
                segment[:, 0] for segment in ax.collections[0].get_segments() if len(segment)
            ]
            found = [segment for segment in segments if np.ptp(segment) > 0]
            assert np.array(found) == pytest.approx(np.array(ends))
        assert labels(loss.yaxis) == ["transcoders", "zero", "uniform"]
        assert loss.yaxis_inverted()  # the first on top
        assert [ax.get_xlabel() for ax in figure.axes] == [
            "loss recovered",
            "logit KL recovered",
            "pattern KL (nats)",
        ]
        assert "50%" in labels(loss.xaxis)

    def test_baselines_are_grey(self):
        bars = recovery_bars(an_evaluation()).axes[0].patches
        colours = [tuple(bar.get_facecolor()) for bar in bars]
        assert colours[1] == colours[2] != colours[0]
        assert len(set(colours[1][:3])) == 1


class TestKlAgainstPairs:
    table = pd.DataFrame(
        {
            "dictionary": ["$a$", "b", "$a$", "b", "b"],
            "n_pairs": [400, 100, 200, 300, 200],
            "pattern_kl": [0.1, 0.5, 0.2, 0.3, 0.4],
        }
    )

    def curves(self, figure) -> dict[str, list]:
        containers = figure.axes[0].containers
        return {
            c.get_label().replace(r"\$", "$"): np.array(c.lines[0].get_xydata()).tolist()
            for c in containers
        }

    def test_one_curve_a_dictionary(self):
        figure = drawn(kl_against_pairs(self.table, {"transcoders": 0.08}))
        curves = self.curves(figure)
        assert curves == {
            "$a$": [[200, 0.2], [400, 0.1]],
            "b": [[100, 0.5], [200, 0.4], [300, 0.3]],
        }
        assert legend_labels(figure) == ["$a$", "b", "transcoders"]
        ax = figure.axes[0]
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
        assert ax.get_ylim()[0] == 0 < 0.5 < ax.get_ylim()[1]
        line = next(line for line in ax.lines if line.get_label() == "transcoders")
        assert line.get_ydata() == [0.08, 0.08]
        styles = [(c.lines[0].get_color(), c.lines[0].get_marker()) for c in ax.containers]
        assert styles[0][0] != styles[1][0] and styles[0][1] != styles[1][1]

    def test_far_lines_need_a_logarithm(self):
        figure = drawn(kl_against_pairs(self.table, {"transcoders": 0.08, "uniform": 3.1}))
        assert figure.axes[0].get_yscale() == "log"
        assert "1" in labels(figure.axes[0].yaxis)

    def test_no_line_is_left_out(self):
        lines = {name: 0.1 * n + 0.05 for n, name in enumerate("pqrst")}
        figure = drawn(kl_against_pairs(self.table, lines))
        assert legend_labels(figure) == ["$a$", "b", *lines]
        found = {
            line.get_label(): line.get_ydata()[0]
            for line in figure.axes[0].lines
            if len(line.get_ydata()) == 2
        }
        assert {name: found.get(name) for name in lines} == lines

    def test_intervals(self):
        table = self.table.assign(
            low=self.table["pattern_kl"] - 0.01, high=self.table["pattern_kl"] + 0.02
        )
        figure = drawn(kl_against_pairs(table))
        segments = figure.axes[0].containers[1].lines[2][0].get_segments()
        ends = [segment[:, 1].tolist() for segment in segments]
        assert np.array(ends) == pytest.approx(np.array([(0.49, 0.52), (0.39, 0.42), (0.29, 0.32)]))

    def test_missing_columns_are_named(self):
        with pytest.raises(ValueError, match="there is no n_pairs"):
            kl_against_pairs(self.table.drop(columns="n_pairs"))


class TestOffsetKernel:
    PAIRS = ((3, 5, 1), (D_QUERY, 2, 0), (4, D_KEY, 2))

    @pytest.mark.parametrize("bridge", ["gpt2_bridge", "llama_bridge"])
    def test_curves_are_the_kernel(self, bridge, request):
        d = tiny_dictionary(request.getfixturevalue(bridge))
        figure = drawn(offset_kernel(d, self.PAIRS, n_offsets=13))
        curves = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == 13]
        assert np.array_equal(np.array(curves), d.pair_kernel(self.PAIRS, range(13)).numpy())
        assert (np.ptp(curves[0]) > 0) == (bridge == "llama_bridge")
        assert legend_labels(figure) == [
            "3 × 5, head 1",
            "constant × 2, head 0",
            "4 × constant, head 2",
        ]

    def test_labels_of_ones_own(self, llama_bridge):
        figure = drawn(
            offset_kernel(
                tiny_dictionary(llama_bridge), self.PAIRS[:2], labels=["prices $x$", "names"]
            )
        )
        assert legend_labels(figure) == ["prices $x$", "names"]
        assert len(figure.axes[0].lines[1].get_ydata()) == 256

    def test_too_many_curves_are_refused(self, llama_bridge):
        d = tiny_dictionary(llama_bridge)
        for pairs, names in (
            ([], None),
            ([(0, n, 0) for n in range(8)], None),
            (self.PAIRS, ["one"]),
        ):
            with pytest.raises(ValueError, match="draws 1 to 7 pairs, with a label each"):
                offset_kernel(d, pairs, labels=names)


def test_no_text_is_read_as_mathematics():
    """Escaped labels draw the characters themselves: as wide as with mathematics switched off."""
    figure = Figure()
    for word in ("$", "$$", "$x$", " ${a}$ and $", r"\$", "a$b"):
        escaped, plain = (
            figure.text(0, 0, _escaped(word)),
            figure.text(0, 0, word, parse_math=False),
        )
        widths = [text.get_window_extent().width for text in (escaped, plain)]
        assert widths[0] == widths[1] > 0, word


def test_pyplot_has_no_part_in_it(monkeypatch):
    """It would choose a backend."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    true, made = random_patterns(1)
    for figure in (
        pattern_triptych(true, made, WORDS),
        density_histogram([0.1], [0.2]),
        recovery_bars(an_evaluation()),
    ):
        assert type(drawn(figure)) is Figure


def test_matplotlib_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"Figures need matplotlib: pip install sae-lens-qk\[figures\]"
    ):
        density_histogram([0.1], [0.2])

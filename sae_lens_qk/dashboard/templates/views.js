// Overview, heads, features and pairs.

const IMPORTANCE_NOTE = "what dropping the pair costs, to leading order, in nats per query";

// Overview

function overviewView() {
  const o = overview;
  const features = `${whole.format(o.d_query)} query and ${whole.format(o.d_key)} key features`;
  return {
    title: "Overview",
    nodes: [
      el("h1", {}, o.title),
      el(
        "p",
        { class: "lede" },
        `Attention of layer ${o.layer} of ${o.model}, rebuilt from ${features} and ${plural(o.n_pairs, "kept pair")} in `,
        `${plural(o.n_heads, "head")}. Contexts come from ${whole.format(o.n_tokens)} tokens of text.`,
      ),
      promptCards(),
      o.metrics?.sources && metricsSection(o.metrics),
      section("Features and heads", el("div", { class: "columns" }, densityChart(), pairsChart())),
      ...o.tables.map((t) =>
        section(
          t.title,
          plainTable(
            hidden(t.title),
            t.columns.map((name) => name.replaceAll("_", " ")),
            t.rows,
            { sorts: true },
          ),
        ),
      ),
      shownSection(),
    ],
  };
}

function promptCards() {
  const card = (prompt, number) =>
    el(
      "li",
      {},
      el(
        "a",
        { href: `#/prompt/${number}` },
        el("span", { class: "eyebrow" }, `Prompt ${number + 1}`),
        prompt.words.map(visible).join(""),
      ),
    );
  const prompts = data("prompts");
  return prompts.length > 0 && section("Prompts", el("ul", { class: "cards" }, prompts.map(card)));
}

const SOURCE_NAMES = {
  transcoders: "transcoders (all pairs)",
  feature_map: "feature map (kept pairs)",
  zero: "baseline: zero",
  mean: "baseline: mean pattern",
  uniform: "baseline: uniform",
  shuffled: "baseline: shuffled",
};

function metricsSection(metrics) {
  const interval = (format, i) => {
    if (!i) return NOT_KNOWN;
    return [format(i.value), i.high > i.low && el("span", { class: "interval" }, ` ${format(i.low)} to ${format(i.high)}`)];
  };
  const column = (name, note, cell) => ({ name, note, numeric: true, cell: ([, values]) => cell(values) });
  const measured = metrics.features && [
    ["Query features at a token", number(metrics.features.l0_query), `${whole.format(metrics.features.live_query)} live`],
    ["Key features at a token", number(metrics.features.l0_key), `${whole.format(metrics.features.live_key)} live`],
  ];
  const map = metrics.feature_map && [
    [
      "Kept pairs",
      whole.format(metrics.feature_map.n_pairs),
      `${whole.format(metrics.feature_map.n_pairs_without_constants)} between features`,
    ],
    ["Active at a (query, key)", number(metrics.feature_map.active_pairs), "pairs, all heads together"],
    ["Sparsity", share(metrics.feature_map.sparsity_of_all), `${share(metrics.feature_map.sparsity_of_live)} among live`],
  ];
  return section(
    "Faithfulness",
    facts([...(measured ?? []), ...(map ?? [])]),
    table({
      caption: `The pattern replaced in the model, ${whole.format(metrics.n_tokens)} tokens; 95 % intervals over rows`,
      rows: Object.entries(metrics.sources),
      columns: [
        { name: "Pattern from", cell: ([name]) => SOURCE_NAMES[name] ?? name },
        column("Pattern KL", "nats; mean over heads and queries", (f) => interval(number, f.pattern_kl)),
        column("Half L1", "half the L1 distance of patterns", (f) => number(f.pattern_tv)),
        column("Same top key", "share of queries whose strongest key is the same", (f) => share(f.argmax_agreement)),
        column("Loss", "next-token loss, nats", (f) => f.ce_loss?.toFixed(4) ?? NOT_KNOWN),
        column("Logit KL", "KL(clean || patched) of the next token, nats", (f) => number(f.logit_kl)),
        column("Loss recovered", "of what zeroing the pattern costs", (f) => interval(share, f.ce_recovered)),
        column("Logit KL recovered", "of what zeroing the pattern costs", (f) => interval(share, f.logit_kl_recovered)),
      ],
    }),
  );
}

function densityChart() {
  const { log10_edges: edges, query, key } = overview.density;
  const live = SIDES.map((side) => ofAll(overview.live[side], sizeOf(side)));
  const labels = edges.slice(0, -1).map((edge, at) => `${share(10 ** edge)} to ${share(10 ** edges[at + 1])}`);
  const series = [
    { name: "query features", values: query, look: () => "series-1" },
    { name: "key features", values: key, look: () => "series-2" },
  ];
  const wholeEdges = edges.map((edge, at) => [at / (edges.length - 1), edge]).filter(([, edge]) => Number.isInteger(edge));
  return chart({
    title: "How often features fire",
    summary: `Share of tokens, logarithmic. ${live[0]} query and ${live[1]} key features fire at all.`,
    labels,
    series,
    kind: "grouped",
    xTicks: wholeEdges.map(([place, edge]) => [place, share(10 ** edge)]),
    xTitle: "share of tokens",
    yTitle: "features",
    columns: ["Share of tokens", "Query features", "Key features"],
    rows: labels.map((text, at) => [text, query[at], key[at]]).filter((row) => row[1] || row[2]),
  });
}

function pairsChart() {
  const { pairs, with_constant: constant } = overview.heads;
  const between = pairs.map((n, head) => n - constant[head]);
  const series = [
    { name: "between features", values: between, look: () => "series-1" },
    { name: "with the constant", values: constant, look: () => "series-2" },
  ].filter(({ values }) => values.some((n) => n > 0));
  return chart({
    title: "Kept pairs by head",
    summary: `${whole.format(Math.min(...pairs))} to ${whole.format(Math.max(...pairs))} per head.`,
    labels: pairs.map((_, head) => String(head)),
    series,
    kind: "stacked",
    xTitle: "head",
    yTitle: "pairs",
    columns: ["Head", ...series.map(({ name }) => name)],
    rows: pairs.map((_, head) => [head, ...series.map(({ values }) => values[head])]),
  });
}

function shownSection() {
  const [q, k] = SIDES.map((side) => ofAll(data("features")[side].feature.length, sizeOf(side)));
  const pairs = ofAll(data("pairs").pair.length, overview.n_pairs);
  const part =
    overview.importance_shown === null ? "" : `, which hold ${share(overview.importance_shown)} of all importance`;
  return section(
    "What this file holds",
    el(
      "p",
      {},
      `Pages of ${q} query features, ${k} key features and ${pairs} pairs${part}. The others appear by number only. `,
      "Those that the prompts name come first, then the most important ones. ",
      overview.importance_measured
        ? `Importance is ${IMPORTANCE_NOTE}.`
        : "This dictionary carries no measured importance: half of co-occurrence times the squared mean term stands for it.",
    ),
  );
}

// Heads

function headsView() {
  const { pairs, with_constant: constant, importance } = overview.heads;
  const map = overview.metrics?.sources?.feature_map;
  const column = (name, note, values) =>
    values && { name, note, numeric: true, value: (h) => values[h], cell: (h) => number(values[h]) };
  return {
    title: "Heads",
    nodes: [
      el("h1", {}, "Heads"),
      table({
        caption: "Each head's share of the feature map",
        rows: pairs.map((_, head) => head),
        pageSize: 64,
        order: { column: 0, descending: false },
        columns: [
          { name: "Head", value: (h) => h, cell: (h) => link(`#/pairs/${h}`, `Head ${h}`) },
          column("Pairs", "", pairs),
          constant.some((n) => n > 0) &&
            column("With the constant", "pairs of which one side is the constant feature", constant),
          column("Importance", `sum over its pairs of ${IMPORTANCE_NOTE}`, importance),
          column("Pattern KL", "of the pattern rebuilt from kept pairs, nats", map?.pattern_kl_per_head),
          column("Score explained", "by pairs of two features, weighted by the pattern", map?.score_explained),
        ].filter(Boolean),
      }),
      el(
        "div",
        { class: "columns" },
        pairsChart(),
        headBars("Importance by head", "Sum over its kept pairs, nats per query.", importance, 220),
      ),
    ],
  };
}

// Features

function featuresView(side) {
  const f = data("features")[side];
  const of = (name) => ({ numeric: true, value: (at) => f[name][at] });
  return {
    title: `${SIDE_NAMES[side]} features`,
    nodes: [
      el("h1", {}, `${SIDE_NAMES[side]} features`),
      el("p", { class: "lede" }, `${ofAll(f.feature.length, sizeOf(side))}, with the tokens on which they fire most.`),
      table({
        caption: `${SIDE_NAMES[side]} features, most important first`,
        rows: f.feature.map((_, at) => at),
        order: { column: 4, descending: true },
        columns: [
          { name: "Feature", value: (at) => f.feature[at], cell: (at) => featureName(side, f.feature[at]) },
          {
            name: "Density",
            note: "share of tokens on which it fires",
            ...of("density"),
            cell: (at) => share(f.density[at]),
          },
          { name: "Mean activation", note: "where it fires", ...of("mean"), cell: (at) => number(f.mean[at]) },
          { name: "Pairs", note: "kept, all heads", ...of("pairs"), cell: (at) => whole.format(f.pairs[at]) },
          {
            name: "Importance",
            note: `sum over its pairs of ${IMPORTANCE_NOTE}`,
            ...of("importance"),
            cell: (at) => number(f.importance[at]),
          },
        ],
      }),
    ],
  };
}

function featureView(side, feature) {
  const at = featurePlaces()[side].get(feature);
  const f = data("features")[side];
  const name = `${SIDE_NAMES[side]} feature ${feature}`;
  const contexts = f.contexts[at];
  return {
    title: name,
    nodes: [
      el("p", { class: "eyebrow" }, link(`#/features/${side}`, `${SIDE_NAMES[side]} features`)),
      el("h1", {}, badge(side), name, " ", label(side, feature)),
      facts([
        ["Density", share(f.density[at]), "of tokens"],
        ["Mean activation", number(f.mean[at]), "where it fires"],
        ["Largest", number(f.max[at])],
        ["Kept pairs", whole.format(f.pairs[at])],
        ["Importance", number(f.importance[at]), "all its pairs, nats per query"],
      ]),
      el(
        "div",
        { class: "main-and-side" },
        section(
          "Strongest contexts",
          contexts.length
            ? featureContexts(contexts, f.max[at])
            : el("p", { class: "empty" }, "It never fires in these texts."),
        ),
        el(
          "div",
          {},
          partnersSection(side, feature, f.partners[at], f.pairs[at]),
          neighboursSection(side, f.neighbours[at]),
        ),
      ),
    ],
  };
}

function partnersSection(side, feature, partners, total) {
  const other = otherSide(side);
  const heads = [...new Set(partners.map((p) => p[1]))].sort((a, b) => a - b);
  const list = el("div");
  const draw = (wanted) =>
    list.replaceChildren(
      table({
        caption: `${SIDE_NAMES[other]} features it is paired with; ${partners.length} of ${plural(total, "pair")}`,
        rows: partners.filter((p) => wanted === "all" || p[1] === Number(wanted)),
        order: { column: 2, descending: true },
        pageSize: 12,
        columns: [
          { name: `${SIDE_NAMES[other]} feature`, value: (p) => p[0], cell: (p) => featureName(other, p[0]) },
          { name: "Head", numeric: true, value: (p) => p[1], cell: (p) => String(p[1]) },
          { name: "Importance", note: IMPORTANCE_NOTE, numeric: true, value: (p) => p[3], cell: (p) => number(p[3]) },
          {
            name: "Mean term",
            note: "in the score, where both fire",
            numeric: true,
            value: (p) => p[4],
            cell: (p) => signed(p[4]),
          },
          { name: "Pair", cell: ([partner, head]) => pairLink(pairOf(side, feature, partner, head)) },
        ],
      }),
    );
  draw("all");
  const options = [["all", "all heads"], ...heads.map((h) => [h, `head ${h}`])];
  return section(`Partners among ${other} features`, heads.length > 1 && select("Show", options, "all", draw), list);
}

function neighboursSection(side, neighbours) {
  return section(
    `${SIDE_NAMES[side]} features that fire along`,
    table({
      caption: "Share of this feature's tokens on which the other fires, too",
      rows: neighbours,
      order: { column: 1, descending: true },
      columns: [
        { name: "Feature", value: (n) => n[0], cell: (n) => featureName(side, n[0]) },
        { name: "Share", numeric: true, value: (n) => n[1], cell: (n) => [share(n[1]), meter(n[1], 1)] },
      ],
    }),
  );
}

// Pairs

const pairColumns = (p) => [
  { name: "Pair", value: (at) => p.pair[at], cell: (at) => link(pairHref(p.pair[at]), String(p.pair[at])) },
  { name: "Query feature", value: (at) => p.query_feature[at], cell: (at) => featureName("query", p.query_feature[at]) },
  { name: "Key feature", value: (at) => p.key_feature[at], cell: (at) => featureName("key", p.key_feature[at]) },
  { name: "Head", numeric: true, value: (at) => p.head[at], cell: (at) => String(p.head[at]) },
  { name: "Weight", note: "m, from 0 to 1", numeric: true, value: (at) => p.weight[at], cell: (at) => number(p.weight[at]) },
  {
    name: "Mean term",
    note: "in the score, where both fire",
    numeric: true,
    value: (at) => p.mean[at],
    cell: (at) => signed(p.mean[at]),
  },
  {
    name: "Importance",
    note: IMPORTANCE_NOTE,
    numeric: true,
    value: (at) => p.importance[at],
    cell: (at) => number(p.importance[at]),
  },
];

function pairsTable(caption, places) {
  return table({ caption, rows: places, columns: pairColumns(data("pairs")), order: { column: 6, descending: true } });
}

function pairsView(head) {
  const p = data("pairs");
  const places = p.pair.map((_, at) => at).filter((at) => head === undefined || p.head[at] === head);
  const heads = overview.heads.pairs.map((_, h) => [h, `head ${h}`]);
  const go = (h) => (location.hash = h === "all" ? "#/pairs" : `#/pairs/${h}`);
  const name = head === undefined ? "Pairs" : `Pairs of head ${head}`;
  return {
    title: name,
    nodes: [
      el("h1", {}, name),
      el("div", { class: "toolbar" }, select("Show", [["all", "all heads"], ...heads], head ?? "all", go)),
      pairsTable(`${name} with a page, most important first`, places),
    ],
  };
}

function pairView(pair) {
  const at = pairPlaces().get(pair);
  const p = data("pairs");
  const [a, b, head] = [p.query_feature[at], p.key_feature[at], p.head[at]];
  const contexts = p.contexts[at];
  return {
    title: `Pair ${pair}`,
    nodes: [
      el("p", { class: "eyebrow" }, link(`#/pairs/${head}`, `Pairs of head ${head}`)),
      el("h1", {}, `Pair ${pair}`),
      el(
        "p",
        { class: "pair-name" },
        featureName("query", a),
        el("span", { class: "arrow" }, ` attends in head ${head} to `),
        featureName("key", b),
      ),
      facts([
        ["Weight", number(p.weight[at]), "m, from 0 to 1"],
        ["Importance", number(p.importance[at]), "nats per query"],
        ["Mean term", signed(p.mean[at]), "in the score, where both fire"],
        ["Range", `${signed(p.min[at])} to ${signed(p.max[at])}`],
        ["Co-occurrence", share(p.co_occurrence[at]), "of (query, key) places"],
      ]),
      el(
        "div",
        { class: "main-and-side" },
        el(
          "div",
          {},
          section(
            "Largest terms",
            contexts.length
              ? pairContexts(contexts)
              : el("p", { class: "empty" }, "Both never fire together in these texts."),
          ),
          inPromptsSection(a, b, head),
        ),
        el("div", {}, offsetSection(p, at), sameFeaturesSection(p.heads[at], a, b)),
      ),
    ],
  };
}

function offsetSection(p, at) {
  if (!overview.rotary)
    return section(
      "By distance",
      el("p", {}, "Without rotary embeddings the score of a pair does not depend on the distance."),
    );
  const values = p.kernel[at];
  const labels = p.stretches.map(([first, last]) => (first === last ? String(first) : `${first}–${last}`));
  if (values.some((value) => value === null))
    return section("By distance", el("p", { class: "empty" }, "One of both never fires in these texts."));
  return section(
    "By distance",
    chart({
      title: "Typical score term",
      summary:
        "Both features at their mean activation, by how many tokens the key lies before the query; far ones as means.",
      labels,
      series: [{ name: "score", values, look: () => "series-1" }],
      kind: "line",
      xTitle: "query position − key position",
      yTitle: "score",
      columns: ["Distance", "Score"],
      rows: values.map((value, n) => [labels[n], value]),
    }),
  );
}

function sameFeaturesSection(listed, a, b) {
  const measures = [
    ["Weight", "m, by head", 1],
    ["Importance", "nats per query", 2],
    ["Effect", "mean score before m", 3],
  ];
  const byHead = (column) => overview.heads.pairs.map((_, head) => listed.find((row) => row[0] === head)?.[column] ?? null);
  const rows = listed.map(([head, ...rest]) => [head, ...rest, pairNumber(a, b, head)]);
  return section(
    "The same features in other heads",
    el(
      "div",
      { class: "small-charts" },
      measures.map(([title, note, column]) => headBars(title, note, byHead(column), 110)),
    ),
    table({
      caption: `Kept in ${plural(rows.length, "head")}`,
      rows,
      pageSize: 64,
      columns: [
        {
          name: "Head",
          cell: (row) => (row[4] === undefined ? `head ${row[0]}` : link(pairHref(row[4]), `head ${row[0]}`)),
        },
        ...measures.map(([name, note, at]) => ({
          name,
          note,
          numeric: true,
          value: (row) => row[at],
          cell: (row) => number(row[at]),
        })),
      ],
    }),
  );
}

function inPromptsSection(a, b, head) {
  const cells = promptCells().get(tripleKey(a, b, head));
  if (!cells) return null;
  const place = ({ number: n, prompt, i, j }) =>
    link(cellHref(n, head, i, j), `Prompt ${n + 1}: `, chip(prompt.words[i]), " to ", chip(prompt.words[j]));
  return section(
    "In the prompts",
    table({
      caption: "Attention weights for which it is among the strongest pairs",
      rows: [...cells].sort((x, y) => Math.abs(y.effect) - Math.abs(x.effect)),
      pageSize: 8,
      columns: [
        { name: "Attention", cell: place },
        { name: "Contribution", numeric: true, value: (c) => c.contribution, cell: (c) => signed(c.contribution) },
        { name: "Pattern effect", numeric: true, value: (c) => c.effect, cell: (c) => signed(c.effect) },
      ],
    }),
  );
}

// What is behind one attention weight: its strongest pairs, or all that `Attribution.to_dict` says of it.

const KIND_NAMES = {
  pair: "feature × feature",
  query_constant: "constant × key feature",
  key_constant: "query feature × constant",
  constant: "constant × constant",
  masked: "left out by the feature map",
  error: "reconstruction errors",
};

const effectColumns = (most) => [
  { name: "Contribution", numeric: true, value: (row) => row.contribution, cell: (row) => signed(row.contribution) },
  {
    name: "Pattern effect",
    numeric: true,
    value: (row) => row.pattern_effect,
    cell: (row) => [signed(row.pattern_effect), meter(row.pattern_effect, most)],
  },
];

/** The pairs behind an attention weight, and its explanation where this file holds one. */
function cellView(prompt, { head, i, j }, { true: real, rebuilt }) {
  const cell = `${head}/${i}/${j}`;
  const explanation = prompt.explanations[cell];
  const place = [chip(prompt.words[i]), ` (${i}) attends to `, chip(prompt.words[j]), ` (${j})`];
  const weights = [["Weight in the model ", real], [", rebuilt ", rebuilt]];
  const values = el(
    "p",
    {},
    weights.map(([name, weight]) => [name, el("strong", {}, weight.toFixed(3))]),
    explanation && [", score ", el("strong", {}, signed(explanation.score))],
    ".",
  );
  return [
    el("h2", {}, `Head ${head}: `, place),
    values,
    explanation ? explained(explanation, head) : listed(prompt, cell, head),
  ];
}

/** The pairs alone, as `RecordedPrompt.strongest` lists them for many attention weights. */
function listed(prompt, cell, head) {
  const pairs = (prompt.cells[cell] ?? []).map(([query_feature, key_feature, contribution, pattern_effect]) => ({
    query_feature,
    key_feature,
    contribution,
    pattern_effect,
  }));
  if (!pairs.length) {
    const partly = Object.keys(prompt.cells).length < prompt.n_cells;
    const why = partly
      ? "Pairs are listed for the largest attention weights of a prompt; this one is not among them."
      : "No kept pair is active here.";
    return el("p", { class: "empty" }, why);
  }
  const supporting = pairs.filter((pair) => pair.pattern_effect > 0);
  const inhibiting = pairs.filter((pair) => pair.pattern_effect < 0).reverse();
  return [pairHalves(supporting, inhibiting, head), effectNote()];
}

function explained(explanation, head) {
  const { supporting, inhibiting, parts, marginals, check } = explanation;
  return [
    pairHalves(supporting, inhibiting, head),
    effectNote(),
    check && checkSection(check),
    el(
      "div",
      { class: "columns" },
      table({
        caption: [el("strong", {}, "The score, by kind of term"), " these add up to it"],
        rows: parts,
        columns: [
          { name: "Kind", cell: (row) => KIND_NAMES[row.kind] },
          { name: "Terms", numeric: true, value: (row) => row.n_terms, cell: (row) => whole.format(row.n_terms) },
          ...effectColumns(largest(parts)),
        ],
      }),
      SIDES.map((side) => marginalTable(side, marginals[side])),
    ),
  ];
}

const largest = (rows) => Math.max(0, ...rows.map((row) => Math.abs(row.pattern_effect)));

function pairHalves(supporting, inhibiting, head) {
  const most = largest([...supporting, ...inhibiting]);
  return el(
    "div",
    { class: "halves" },
    pairList("Supporting pairs", "raise this attention weight", supporting, head, most),
    pairList("Inhibiting pairs", "lower it", inhibiting, head, most),
  );
}

function pairList(title, note, rows, head, most) {
  const drop = {
    name: "Attention lost",
    note: "without the pair",
    numeric: true,
    value: (row) => row.attention_drop,
    cell: (row) => signed(row.attention_drop),
  };
  return table({
    caption: [el("strong", {}, title), ` ${note}`],
    rows,
    empty: `${title}: none.`,
    columns: [
      { name: "Query feature", cell: (row) => featureName("query", row.query_feature) },
      { name: "Key feature", cell: (row) => featureName("key", row.key_feature) },
      ...effectColumns(most),
      rows.some((row) => row.attention_drop !== undefined) && drop,
      { name: "Pair", cell: (row) => pairLink(pairNumber(row.query_feature, row.key_feature, head)) },
    ].filter(Boolean),
  });
}

function effectNote() {
  const text =
    "Contribution: the pair's term in the score. Pattern effect: the same minus its mean over keys under the head's own " +
    "pattern, which is how fast the logarithm of this weight grows along the pair.";
  return el("p", { class: "note" }, text);
}

function marginalTable(side, rows) {
  const name = (feature) => (feature === null ? "errors and what the map leaves out" : featureName(side, feature));
  return table({
    caption: [el("strong", {}, `${SIDE_NAMES[side]} features`), " over all their partners"],
    rows,
    columns: [
      { name: "Feature", cell: (row) => name(row.feature) },
      { name: "Terms", numeric: true, value: (row) => row.n_terms, cell: (row) => whole.format(row.n_terms) },
      ...effectColumns(largest(rows)),
    ],
  });
}

/** Whether the named features carry the attention in the model itself; see the package's explain/check.py. */
function checkSection({ verdict, table: rows }) {
  const column = (name, field, cell, note) => ({
    name,
    note,
    numeric: true,
    value: (row) => row[field],
    cell: (row) => cell(row[field]),
  });
  return el(
    "div",
    { class: "check" },
    el("p", {}, "Removed from the model's own input, the explanation ", el("strong", {}, verdict), "."),
    table({
      caption: "Drop of the score when the k strongest features leave the input at the query or the key, and of controls",
      rows,
      pageSize: 32,
      columns: [
        { name: "Ranking", cell: (row) => row.ranking },
        { name: "Side", value: (row) => row.side, cell: (row) => row.side },
        column("k", "k", String),
        column("Features", "n_features", String),
        column("Predicted", "predicted", signed, "drop of the score, by the dictionary"),
        column("Measured", "score_drop", signed, "drop of the score, in the model"),
        column("Attention lost", "attention_drop", signed, "in the model"),
        column("Random", "other", signed, "drop with as many other features"),
        column("Matched", "matched", signed, "drop with other features of the same size"),
        column("Rescaled", "rescaled", signed, "drop with other features, scaled to the same size"),
        column("Beaten", "beaten", share, "share of random controls with a smaller drop"),
        { name: "Holds", cell: (row) => ({ true: "yes", false: "no" })[row.holds] ?? NOT_KNOWN },
      ],
    }),
  );
}

/** Links to the attention weights that are explained in full. */
function explainedLinks(number, prompt) {
  const cells = Object.keys(prompt.explanations).map((cell) => cell.split("/").map(Number));
  const item = ([head, i, j]) =>
    el("li", {}, link(cellHref(number, head, i, j), `head ${head}: `, chip(prompt.words[i]), " to ", chip(prompt.words[j])));
  return (
    cells.length > 0 &&
    el("div", { class: "explained" }, "Explained in full: ", el("ul", {}, cells.map(item)))
  );
}

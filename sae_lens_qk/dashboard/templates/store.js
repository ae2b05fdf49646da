// The report's data, parsed section by section when first needed, and how it is looked up.

const sections = {};

/** overview, texts, features, pairs or prompts; see the package's dashboard/data.py. */
function data(name) {
  sections[name] ??= JSON.parse(document.getElementById(`data-${name}`).textContent);
  return sections[name];
}

const overview = data("overview");
const SIDES = ["query", "key"];
const SIDE_NAMES = { query: "Query", key: "Key" };
const otherSide = (side) => (side === "query" ? "key" : "query");
const sizeOf = (side) => (side === "query" ? overview.d_query : overview.d_key);
const isConstant = (side, feature) => feature === sizeOf(side);

/** A function of no arguments that is worked out once. */
function once(make) {
  let value;
  let made = false;
  return () => {
    if (!made) [value, made] = [make(), true];
    return value;
  };
}

/** feature number -> place in the columns of its side. */
const featurePlaces = once(() =>
  Object.fromEntries(SIDES.map((side) => [side, new Map(data("features")[side].feature.map((f, at) => [f, at]))])),
);

const hasPage = (side, feature) => featurePlaces()[side].has(feature);

const tripleKey = (a, b, head) => `${a},${b},${head}`;

/** "query feature,key feature,head" -> pair number. */
const pairNumbers = once(() => {
  const p = data("pairs");
  return new Map(p.pair.map((n, at) => [tripleKey(p.query_feature[at], p.key_feature[at], p.head[at]), n]));
});

const pairPlaces = once(() => new Map(data("pairs").pair.map((n, at) => [n, at])));

const pairNumber = (a, b, head) => pairNumbers().get(tripleKey(a, b, head));

const pairOf = (side, feature, partner, head) =>
  side === "query" ? pairNumber(feature, partner, head) : pairNumber(partner, feature, head);

/** The word at a place of the texts; undefined where the report does not hold it. */
function wordAt(row, pos) {
  const { rows, words } = data("texts");
  for (const [first, run] of rows[row] ?? []) {
    if (pos >= first && pos < first + run.length) return words[run[pos - first]];
  }
  return undefined;
}

/** Words on which a feature fires most. */
function labelWords(side, feature) {
  const { labels, words } = data("texts");
  return (labels[side][feature] ?? []).map((word) => words[word]);
}

/** In which attention weights of the prompts a pair is among the strongest. */
const promptCells = once(() => {
  const found = new Map();
  data("prompts").forEach((prompt, number) => {
    for (const [cell, listed] of Object.entries(prompt.cells)) {
      const [head, i, j] = cell.split("/").map(Number);
      for (const [a, b, contribution, effect] of listed) {
        const key = tripleKey(a, b, head);
        if (!found.has(key)) found.set(key, []);
        found.get(key).push({ number, prompt, head, i, j, contribution, effect });
      }
    }
  });
  return found;
});

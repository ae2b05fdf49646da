// Search by number, by head, by the tokens on which features fire.

const NUMBERED = /^(query|q|key|k|pair|p|head|h)?\s*(?:feature)?\s*#?(\d+)$/i;

/** Places of a number: links to the feature of either side, the pair and the head of that number. */
function numbered(kind, n) {
  const found = [];
  const asked = (name) => !kind || name.startsWith(kind[0].toLowerCase());
  for (const side of SIDES) {
    if (asked(side) && hasPage(side, n)) found.push(el("li", {}, featureName(side, n)));
    else if (asked(side) && n < sizeOf(side))
      found.push(el("li", {}, `${SIDE_NAMES[side]} feature ${n}: `, label(side, n), " left out of this file"));
  }
  if (asked("pair") && pairPlaces().has(n)) found.push(el("li", {}, link(pairHref(n), `Pair ${n}`)));
  else if (asked("pair") && n < overview.n_pairs) found.push(el("li", {}, `Pair ${n}: left out of this file`));
  if (asked("head") && n < overview.n_heads) found.push(el("li", {}, link(`#/pairs/${n}`, `Head ${n}`)));
  return found;
}

/** 2: fires on this very token; 1: on one that contains the text; 0: on none. */
function match(side, at, text) {
  const f = data("features")[side];
  const words = [...labelWords(side, f.feature[at]), ...f.contexts[at].map(([row, pos]) => wordAt(row, pos) ?? "")];
  const lower = words.map((word) => word.toLowerCase());
  if (lower.some((word) => word === text || word.trim() === text)) return 2;
  return lower.some((word) => word.includes(text)) ? 1 : 0;
}

function matchingFeatures(text) {
  const found = SIDES.flatMap((side) =>
    data("features")
      [side].feature.map((feature, at) => ({ side, feature, at, rank: match(side, at, text) }))
      .filter((f) => f.rank),
  );
  const importance = ({ side, at }) => data("features")[side].importance[at];
  return found.sort((x, y) => y.rank - x.rank || importance(y) - importance(x));
}

function searchView(text) {
  const asked = text.match(NUMBERED);
  const numbers = asked ? numbered(asked[1], Number(asked[2])) : [];
  const features = text.trim() ? matchingFeatures(text.trim().toLowerCase()) : [];
  const best = { query: new Set(), key: new Set() };
  for (const f of features) best[f.side].add(f.feature);
  const p = data("pairs");
  const pairs = p.pair
    .map((_, at) => at)
    .filter((at) => best.query.has(p.query_feature[at]) || best.key.has(p.key_feature[at]));
  const of = ({ side, at }, name) => data("features")[side][name][at];
  return {
    title: `Search: ${text}`,
    nodes: [
      el("h1", {}, "Search: ", el("q", {}, text)),
      numbers.length > 0 && section("By number", el("ul", {}, numbers)),
      section(
        "Features that fire on it",
        table({
          caption: plural(features.length, "feature"),
          rows: features,
          empty: "No feature of this file fires most on such a token.",
          columns: [
            { name: "Feature", cell: (f) => featureName(f.side, f.feature) },
            { name: "Side", value: (f) => f.side, cell: (f) => f.side },
            { name: "Density", numeric: true, value: (f) => of(f, "density"), cell: (f) => share(of(f, "density")) },
            {
              name: "Importance",
              numeric: true,
              value: (f) => of(f, "importance"),
              cell: (f) => number(of(f, "importance")),
            },
          ],
        }),
      ),
      pairs.length > 0 && section("Their pairs", pairsTable(plural(pairs.length, "pair"), pairs)),
    ],
  };
}

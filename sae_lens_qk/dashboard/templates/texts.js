// Features, pairs and the contexts they fire in.

const featureHref = (side, feature) => `#/feature/${side}/${feature}`;
const pairHref = (number) => `#/pair/${number}`;
const cellHref = (prompt, head, i, j) => `#/prompt/${prompt}/${head}/${i}/${j}`;

/** A link to a pair's page by its number; a dash where it has none. */
function pairLink(number) {
  return number === undefined
    ? NOT_KNOWN
    : el("a", { href: pairHref(number), "aria-label": `pair ${number}` }, String(number));
}

const badge = (side) => el("span", { class: `badge ${side}`, "aria-hidden": "true" }, side[0].toUpperCase());

/** What a feature fires on. */
function label(side, feature) {
  if (overview.always_on[side].includes(feature)) return el("i", { class: "note" }, "always on");
  return labelWords(side, feature).map(chip);
}

/** A feature by number, with the words it fires on; a link where it has a page. */
function featureName(side, feature) {
  if (isConstant(side, feature))
    return el("span", { class: "feature" }, badge(side), hidden(`${side} `), el("i", {}, "constant"));
  const name = hasPage(side, feature) ? link(featureHref(side, feature), String(feature)) : String(feature);
  const first = el("span", { class: "nowrap" }, badge(side), hidden(`${side} feature `), name);
  return el("span", { class: "feature" }, first, " ", label(side, feature));
}

/** How much a number is, as a bar in the colour of its sign. */
function meter(value, most) {
  const width = most ? `${(100 * Math.min(Math.abs(value) / most, 1)).toFixed(1)}%` : "0";
  return el("span", {
    class: `meter ${value < 0 ? "negative" : "positive"}`,
    "aria-hidden": "true",
    style: { "--width": width },
  });
}

/** The positions around one that the report holds. */
function around(pos) {
  const { before, after } = overview.limits;
  return [Math.max(0, pos - before), pos + after];
}

/** Both stretches of a text, as one where they meet; in order. */
function joined(one, other) {
  const [first, second] = [one, other].sort((a, b) => a[0] - b[0]);
  return second[0] <= first[1] + 1 ? [[first[0], Math.max(first[1], second[1])]] : [first, second];
}

/**
 * Running text of some stretches of a row.
 *
 * mark: position => {class, name, level in [0, 1], title} of a token, or undefined.
 */
function passage(row, stretches, mark) {
  const parts = [];
  stretches.forEach(([from, to], at) => {
    if (at || from > 0) parts.push(el("span", { class: "gap" }, at ? " … " : "… "));
    for (let pos = from; pos <= to; pos++) {
      const word = wordAt(row, pos);
      if (word !== undefined) parts.push(token(word, mark(pos)));
    }
  });
  return el("p", { class: "passage" }, parts);
}

function token(word, mark) {
  if (!mark) return el("span", { class: "token" }, visible(word));
  const style = mark.level === undefined ? {} : { "--level": mark.level.toFixed(3) };
  const tag = mark.name ? "mark" : "span";
  return el(
    tag,
    { class: `token ${mark.class}`, style, title: mark.title },
    mark.name && hidden(`${mark.name}: `),
    visible(word),
  );
}

/** Where a feature is strongest; every token shaded by its activation where the report knows it. */
function featureContexts(contexts, most) {
  const item = ([row, pos, value, acts]) => {
    const stretch = around(pos);
    const mark = (at) => {
      const act = acts ? acts[at - stretch[0]] : at === pos ? value : 0;
      if (!act) return undefined;
      const fires = at === pos ? { class: "firing strongest", name: "fires on" } : { class: "firing" };
      return { ...fires, level: act / most, title: `activation ${number(act)}` };
    };
    return el("li", {}, passage(row, [stretch], mark), contextFoot(`activation ${number(value)}`, row, `token ${pos}`));
  };
  return el("ol", { class: "contexts" }, contexts.map(item));
}

/** Where a pair's term is largest, with its query and its key marked. */
function pairContexts(contexts) {
  const item = ([row, i, j, value]) => {
    const mark = (at) => {
      if (at === i && at === j) return { class: "at-query at-key", name: "query and key token" };
      if (at === i) return { class: "at-query", name: "query token" };
      if (at === j) return { class: "at-key", name: "key token" };
      return undefined;
    };
    const places = i === j ? `token ${i} attends to itself` : `query at ${i}, key at ${j}, ${i - j} back`;
    return el(
      "li",
      {},
      passage(row, joined(around(j), around(i)), mark),
      contextFoot(`score term ${signed(value)}`, row, places),
    );
  };
  return el("ol", { class: "contexts" }, contexts.map(item));
}

function contextFoot(value, row, places) {
  return el("p", { class: "foot-note" }, el("strong", {}, value), ` · text ${row}, ${places}`);
}

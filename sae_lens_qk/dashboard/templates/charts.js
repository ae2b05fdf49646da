// Charts as inline SVG in the colours of the style sheet, each with its numbers as a table beneath.
// Across they measure in percent of their width, down in pixels.

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.flat(Infinity));
  return node;
}

const percent = (share) => `${(100 * share).toFixed(3)}%`;

/** Round numbers that reach from low to high in about four steps. */
function roundSteps(low, high) {
  const rough = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.floor(low / step);
  const last = Math.ceil(high / step);
  return Array.from({ length: last - first + 1 }, (_, n) => (first + n) * step);
}

/**
 * A chart with a caption, a summary for screen readers and a table of its numbers.
 *
 * labels: of the places along the x axis; series: [{name, values, look: value => CSS class}], null: nothing there
 * kind: "grouped" bars, "stacked" bars or "line"; xTicks: [[share of the width, text], ...]
 * columns, rows: the table
 */
function chart({ title, summary, labels, series, kind, xTicks, xTitle, yTitle, columns, rows, height = 220 }) {
  const counts = labels.map((_, at) => series.map(({ values }) => values[at] ?? 0));
  const ends = counts.map((c) => (kind === "stacked" ? c.reduce((sum, value) => sum + value, 0) : c)).flat();
  const steps = roundSteps(Math.min(0, ...ends), Math.max(0, ...ends));
  const [low, high] = [steps[0], steps.at(-1)];
  const [top, bottom] = [yTitle ? 22 : 6, height - 40];
  const y = (value) => top + ((high - value) / (high - low || 1)) * (bottom - top);
  const rules = steps.map((value) => [
    svg("line", { class: value ? "rule" : "rule zero", x1: 0, x2: "100%", y1: y(value), y2: y(value) }),
    svg("text", { x: -8, y: y(value) + 4, "text-anchor": "end" }, number(value)),
  ]);
  const ticks = (xTicks ?? labelTicks(labels)).map(([share, text]) =>
    svg("text", { x: percent(share), y: bottom + 16, "text-anchor": "middle" }, text),
  );
  const draw = kind === "line" ? lineParts : barParts;
  const picture = svg(
    "svg",
    { role: "img", "aria-label": `${title}. ${summary}`, height },
    rules,
    draw(labels, series, kind === "stacked", y, [top, bottom]),
    ticks,
    svg("text", { x: "50%", y: bottom + 34, "text-anchor": "middle" }, xTitle),
    yTitle ? svg("text", { x: -8, y: 10, "text-anchor": "end" }, yTitle) : [],
  );
  const key = ({ name, look }) => el("span", { class: "chart-key" }, el("span", { class: look(1) }), name);
  return el(
    "figure",
    { class: "chart" },
    el("figcaption", {}, el("strong", {}, title), " ", summary),
    series.length > 1 && el("p", { class: "keys" }, series.map(key)),
    picture,
    columns && el("details", {}, el("summary", {}, "Numbers"), plainTable(title, columns, rows)),
  );
}

/** At most 14 of the labels, each under the middle of its place. */
function labelTicks(labels) {
  const every = Math.ceil(labels.length / 14);
  return labels.map((text, at) => [(at + 0.5) / labels.length, text]).filter((_, at) => at % every === 0);
}

function barParts(labels, series, stacked, y) {
  const slots = stacked ? 1 : series.length;
  return labels.map((label, at) => {
    let base = 0;
    return series.map(({ name, values, look }, n) => {
      const value = values[at] ?? 0;
      const from = stacked ? base : 0;
      base += value;
      const [upper, lower] = [y(Math.max(from, from + value)), y(Math.min(from, from + value))];
      const left = (at + 0.08 + (0.84 * (stacked ? 0 : n)) / slots) / labels.length;
      const shape = { x: percent(left), y: upper, width: percent(0.84 / slots / labels.length), height: lower - upper };
      return svg("rect", { class: look(value), ...shape }, svg("title", {}, `${label}, ${name}: ${number(value)}`));
    });
  });
}

function lineParts(labels, [{ values, look }], stacked, y, [top, bottom]) {
  const x = (at) => percent((at + 0.5) / labels.length);
  const lines = values
    .slice(1)
    .map((value, at) =>
      svg("line", { class: look(value), x1: x(at), x2: x(at + 1), y1: y(values[at]), y2: y(value) }),
    );
  const targets = values.map((value, at) => {
    const place = { x: percent(at / labels.length), width: percent(1 / labels.length), y: top, height: bottom - top };
    return svg("rect", { class: "target", ...place }, svg("title", {}, `${labels[at]}: ${signed(value)}`));
  });
  return [lines, targets];
}

/** Bars of one measure, one per head; negative ones have the colour of inhibition. */
function headBars(title, summary, values, height = 150) {
  const look = (value) => (value < 0 ? "negative" : "positive");
  const labels = values.map((_, head) => String(head));
  return chart({ title, summary, height, labels, series: [{ name: title, values, look }], kind: "grouped", xTitle: "head" });
}

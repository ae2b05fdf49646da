// What is painted on a canvas: charts, each with its numbers as a table beneath, and small patterns.

const paintings = new Map(); // canvas -> function that paints it and returns one that clears it, or nothing
const cleared = new Map();

/** Register a canvas: it is painted once it is in the page, and again in the colours of another theme. */
function painted(canvas, paint) {
  paintings.set(canvas, paint);
  return canvas;
}

/** Paint every registered canvas that is in the page; forget those that no longer are. */
function paintAll() {
  for (const [canvas, paint] of paintings) {
    cleared.get(canvas)?.();
    cleared.delete(canvas);
    if (canvas.isConnected) cleared.set(canvas, paint());
    else paintings.delete(canvas);
  }
}

Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;

let colors = {}; // looked up once a theme: every look-up makes the browser restyle the page

/** The value of a colour of the style sheet in the theme of the moment. */
function color(name) {
  if (!colors[name]) {
    const probe = el("span", { style: { color: `var(--${name})` } });
    document.body.append(probe);
    colors[name] = getComputedStyle(probe).color;
    probe.remove();
  }
  return colors[name];
}

/** Paint everything again, in the colours of another theme. */
function repaint() {
  colors = {};
  paintAll();
}

/**
 * A chart with a caption, a summary for screen readers and a table of its numbers.
 *
 * configure: () => a Chart.js configuration in the colours of the moment.
 */
function chart({ title, summary, configure, columns, rows, height = 220 }) {
  const canvas = el("canvas", { role: "img", "aria-label": `${title}. ${summary}` });
  painted(canvas, () => {
    const drawn = new Chart(canvas, withDefaults(configure()));
    return () => drawn.destroy();
  });
  return el(
    "figure",
    { class: "chart" },
    el("figcaption", {}, el("strong", {}, title), " ", summary),
    el("div", { class: "canvas", style: { height: `${height}px` } }, canvas),
    columns && el("details", {}, el("summary", {}, "Numbers"), plainTable(title, columns, rows)),
  );
}

function withDefaults({ type, data: drawn, x = {}, y = {}, legend = false, tooltip = {} }) {
  const [ink, line] = [color("muted"), color("line")];
  const axis = ({ title, ...more }) => ({
    ticks: { color: ink, maxRotation: 0, ...more.ticks },
    title: { display: Boolean(title), text: title, color: ink },
    border: { color: line },
    ...more.scale,
  });
  return {
    type,
    data: drawn,
    options: {
      animation: false,
      maintainAspectRatio: false,
      scales: {
        x: { ...axis(x), grid: { display: false } },
        y: { ...axis(y), grid: { color: line } },
      },
      plugins: { legend: { display: legend, align: "end", labels: { color: ink, boxWidth: 12 } }, tooltip },
    },
  };
}

/** Bars of one measure, one a head; null: nothing there. Negative bars have the colour of inhibition. */
function headBars(title, summary, values, height = 150) {
  return chart({
    title,
    summary,
    height,
    configure: () => ({
      type: "bar",
      data: {
        labels: values.map((_, head) => head),
        datasets: [
          { label: title, data: values, backgroundColor: values.map((v) => color(v < 0 ? "negative" : "positive")) },
        ],
      },
      x: { title: "head" },
    }),
  });
}
